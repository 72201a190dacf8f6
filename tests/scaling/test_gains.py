"""tools/scaling_gains.py: gains of pairs of equal seeds by hand, and the table in the docs is what the results give."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import polars as pl
import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        yield importlib.import_module("scaling_gains")


def test_both_ends_are_paired_by_seed_whatever_their_order(script: ModuleType):
    (axis,) = (axis for axis in script.AXES if axis.name == "history")
    runs = pl.DataFrame({
        "model.short_length": [512, 20, 128, 20, 512, 20],
        "seed": [1, 0, 0, 1, 0, 2],
        "valid_loss": [7.0, 8.0, 7.9, 8.5, 7.5, 8.1],
    })  # fmt: skip
    found = script.pairs(axis, runs, "valid_loss")
    np.testing.assert_array_equal(found, [[8.0, 7.5], [8.5, 7.0]])
    line = script.row(axis, found, "valid_loss")
    assert "8.25 -> 7.25" in line and "-6.2 %, -17.6 %" in line and "-11.9 %" in line and "every seed" in line


def test_an_axis_without_a_seed_at_both_ends_is_an_error(script: ModuleType):
    (axis,) = (axis for axis in script.AXES if axis.name == "experts")
    runs = pl.DataFrame({"model.moe.experts": [0, 32], "seed": [0, 1], "valid_loss": [8.0, 7.0]})
    with pytest.raises(ValueError, match="experts: no seed has both 0 and 32"):
        script.pairs(axis, runs, "valid_loss")


def test_beams_are_two_columns_of_one_run(script: ModuleType):
    (axis,) = (axis for axis in script.AXES if axis.name == "beams")
    found = script.pairs(axis, pl.DataFrame({"R@8": [0.1, 0.2], "R@512": [0.4, 0.5]}), axis.metrics[0])
    np.testing.assert_array_equal(found, [[0.1, 0.4], [0.2, 0.5]])
    line = script.row(axis, found, axis.metrics[0])
    assert "| 3.2 x | 4.0 x, 2.5 x | every seed |" in line


def test_the_table_in_the_docs_is_what_the_committed_results_give(script: ModuleType):
    assert script.table() in (ROOT / "docs" / "scaling.md").read_text()
