"""`tools/bench/serve.py` in small: right answers under load, and nothing compiled meanwhile."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tiny import COMPILED

from onerec_jax.serve.engine import Answer
from onerec_jax.serve.released import Released

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module; `serve` is no name to leave behind."""
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "bench"))
    yield importlib.import_module("serve")
    del sys.modules["serve"]


def test_two_hundred_requests_sixteen_at_a_time_are_all_answered_right_without_compiling(
    bench, export: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    found = bench.measure(export, 200, 16, ["--max-batch", "4"])
    assert (found.statuses, found.errors, found.wrong, found.compiles) == ({200: 200}, [], [], 0)
    assert found.batch > 1.5 and len(found.latencies) == 200


def test_the_comparison_finds_what_is_wrong_with_a_list_and_lets_ties_change_places(bench, released: Released):
    expected = Answer(np.array([5, 9, 2]), np.array([-1.0, -2.0, -2.00001]))

    def told(rows, scores):
        return [{"item": released.item_ids[r], "score": s} for r, s in zip(rows, scores, strict=True)]

    right = told([5, 9, 2], [-1.0, -2.0, -2.00001])
    assert bench.difference(right, expected, released) is None
    assert bench.difference(told([5, 2, 9], [-1.0, -2.0, -2.0]), expected, released) is None
    assert (
        bench.difference(told([9, 5, 2], [-1.0, -2.0, -2.0]), expected, released) == "item row 5 stands at 1, not at 0"
    )
    assert bench.difference(told([7, 9, 2], [-1.0, -2.0, -2.0]), expected, released) == "item row 5 is missing"
    assert bench.difference(right[:2], expected, released) == "2 items instead of 3"
    assert "scores off by" in bench.difference(told([5, 9, 2], [-1.0, -2.0, -2.1]), expected, released)


def test_bodies_of_the_load_are_of_every_way_to_ask(bench, released: Released):
    bodies = [bench.parse(body) for body in bench.made_up_requests(released, 40, 1)]
    assert {body.user is None for body in bodies} == {True, False} == {bool(body.exclude) for body in bodies}
