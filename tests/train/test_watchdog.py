"""A step that does not end is found by its time, and ends the process with the stacks of its threads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from onerec_jax.config import FaultsConfig
from onerec_jax.errors import ExitCode
from onerec_jax.train.watchdog import Watchdog


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ended() -> list[int]:
    return []


@pytest.fixture
def watchdog(clock: Clock, ended: list[int], tmp_path: Path):
    made = Watchdog(FaultsConfig(hang_factor=5.0, hang_least_s=1000.0), tmp_path / "stacks.txt", ended.append, clock)
    made._settings = FaultsConfig(hang_factor=5.0, hang_least_s=10.0)  # the thread of its own looks at long intervals
    yield made
    made.close()


def _steps(watchdog: Watchdog, clock: Clock, seconds: list[float]) -> None:
    watchdog.beat()
    for took in seconds:
        clock.now += took
        watchdog.beat()


def test_a_hang_is_a_step_of_so_many_medians(watchdog: Watchdog, clock: Clock, ended: list[int], tmp_path: Path):
    _steps(watchdog, clock, [4.0, 3.0, 5.0, 100.0, 4.0])
    assert watchdog.limit() == 20.0
    clock.now += 20.0
    watchdog.look()
    assert not ended
    clock.now += 0.1
    watchdog.look()
    assert ended == [ExitCode.HANG]
    assert "test_watchdog.py" in (tmp_path / "stacks.txt").read_text()


def test_no_step_is_a_hang_before_the_least_time_or_before_there_is_a_median(watchdog, clock, ended):
    _steps(watchdog, clock, [0.1, 0.1])
    clock.now += 1e6
    watchdog.look()
    assert not ended and watchdog.limit() is None
    watchdog.rest()
    _steps(watchdog, clock, [0.1, 0.1, 0.1])
    assert watchdog.limit() == 10.0


def test_what_is_no_step_may_take_any_time_and_does_not_move_the_median(watchdog, clock, ended):
    _steps(watchdog, clock, [2.5] * 5)
    watchdog.rest()
    clock.now += 1e6
    watchdog.look()
    watchdog.beat()
    assert not ended and watchdog.limit() == 12.5
    clock.now += 13
    watchdog.look()
    assert ended


def test_a_process_whose_main_thread_waits_for_ever_exits_with_the_code_of_a_hang(tmp_path: Path):
    script = """
import sys, threading, time
from pathlib import Path
from onerec_jax.config import FaultsConfig
from onerec_jax.train.watchdog import Watchdog
watchdog = Watchdog(FaultsConfig(hang_factor=2.0, hang_least_s=0.5), Path(sys.argv[1]))
for _ in range(5):
    watchdog.beat()
def waits_for_ever():
    threading.Event().wait()
waits_for_ever()
"""
    stacks = tmp_path / "stacks.txt"
    done = subprocess.run([sys.executable, "-c", script, str(stacks)], capture_output=True, text=True, timeout=100)
    assert done.returncode == ExitCode.HANG, done.stderr
    assert "waits_for_ever" in stacks.read_text() and "faults.hang_factor" in done.stderr


def test_a_factor_of_zero_watches_nothing(tmp_path: Path, clock: Clock, ended: list[int]):
    import threading

    before = threading.active_count()
    Watchdog(FaultsConfig(hang_factor=0.0), tmp_path / "stacks.txt", ended.append, clock)
    assert threading.active_count() == before
