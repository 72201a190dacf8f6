"""Every second of a run is booked once, over all of its starts."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onerec_jax.errors import InputError
from onerec_jax.train.goodput import FILE, KINDS, LOST, Books, goodput, goodput_table


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_seconds_are_booked_by_kind_and_what_is_compiled_within_a_kind_is_not_of_it(tmp_path: Path):
    clock = Clock()
    books = Books(tmp_path, clock)
    clock.now += 3
    books.begin(0)
    clock.now += 2
    with books("data"):
        clock.now += 0.5
    with books("evaluation"):
        clock.now += 4
        jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 1.5)
    books.flush(10)
    with books("checkpoint"):
        clock.now += 1
    books.flush(10)
    books.close()
    jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 100.0)
    expected = {"init": 3, "step": 2, "data": 0.5, "evaluation": 2.5, "compile": 1.5, "checkpoint": 1, LOST: 0}
    assert goodput(tmp_path) == (pytest.approx(expected), 1)
    assert books.total == pytest.approx({kind: expected[kind] for kind in KINDS})


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6), st.booleans(), st.booleans()), min_size=1, max_size=6))
def test_the_seconds_of_any_sequence_of_starts_kills_and_ways_back_add_up_to_the_wall_time(tmp_path_factory, starts):
    run, clock, step = tmp_path_factory.mktemp("goodput"), Clock(), 0
    useful: dict[int, float] = {}  # of every step, its seconds when it was last taken
    for down, stretches, killed, goes_back in starts:
        clock.now += down
        books = Books(run, clock)
        step = (step // 4) * 4  # checkpoints are of every fourth step
        clock.now += 1
        books.begin(step)
        for _ in range(stretches):
            for _ in range(2):
                step += 1
                useful[step] = 2.0
                clock.now += 2
            books.flush(step)
        if goes_back:
            step = (step // 4) * 4
            books.back(step)
        if killed:
            clock.now += 0.5  # seconds that no line tells of
        else:
            books.flush(step)
        books.close()
    useful = {at: seconds for at, seconds in useful.items() if at <= step}
    spent, count = goodput(run)
    assert count == len(starts)
    last = json.loads((run / FILE).read_text().splitlines()[-1])["time"]
    first = next(json.loads(line)["time"] for line in (run / FILE).read_text().splitlines())
    assert sum(spent.values()) == pytest.approx(last - first)
    assert spent["init"] == pytest.approx(len(starts))
    assert spent["step"] == pytest.approx(sum(useful.values()))


def test_the_time_after_the_end_of_a_run_is_not_lost_and_that_after_a_preemption_is(tmp_path: Path):
    clock = Clock()
    for ended in (True, False, True):
        clock.now += 1000
        books = Books(tmp_path, clock)
        books.begin(0 if clock.now == 2000 else 10)
        clock.now += 5
        books.flush(10)
        if ended:
            books.end()
        books.close()
    assert goodput(tmp_path) == (pytest.approx(dict.fromkeys(KINDS, 0.0) | {"step": 15, LOST: 1000}), 3)


def test_nothing_is_written_before_training_begins(tmp_path: Path):
    books = Books(tmp_path / "run")
    books.flush(0)
    books.close()
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"goodput\.jsonl"):
        goodput(tmp_path)


def test_a_process_that_is_not_the_first_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    books = Books(None)
    books.begin(0)
    books.flush(1)
    books.close()
    assert not list(tmp_path.iterdir())


def test_the_table_names_the_share_of_useful_steps():
    table = goodput_table({"step": 90.0, "data": 5.0, LOST: 5.0}, 2)
    assert table.title == "100 s over 2 starts; goodput 90.0%"
    assert list(table.columns[2].cells) == ["90.0%", "5.0%", "5.0%"]
