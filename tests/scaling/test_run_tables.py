"""Tables of runs: what is derived, and what is refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onerec_jax.errors import InputError
from onerec_jax.scaling.runs import make_runs, read_runs

PARAMS, TOKENS = np.array([1e6, 2e6, 4e6]), np.array([1e8, 3e8, 2e8])
LOSS = [3.0, 2.5, 2.4]


@pytest.mark.parametrize("missing", ["params", "tokens", "flops"])
@pytest.mark.parametrize("factor", [None, 7.5])
def test_the_third_of_params_tokens_and_flops_follows_from_the_other_two(missing: str, factor: float | None):
    sizes = {"params": PARAMS, "tokens": TOKENS, "flops": (factor or 6) * PARAMS * TOKENS}
    wanted = sizes.pop(missing)
    runs = make_runs({**sizes, "loss": LOSS}, factor=factor)
    np.testing.assert_allclose(runs.size(missing), wanted, rtol=1e-14)
    assert runs.factor == (factor or 6)


def test_flops_that_are_counted_otherwise_are_kept_and_give_the_factor():
    counted = np.array([8.0, 9.0, 7.0]) * PARAMS * TOKENS
    columns = {"params": PARAMS, "tokens": TOKENS, "flops": counted, "loss": LOSS}
    runs = make_runs(columns)
    assert np.array_equal(runs.size("flops"), counted) and runs.factor == pytest.approx(8.0)
    assert make_runs(columns, factor=7.0).factor == 7.0


def test_one_size_is_enough_for_a_law_of_it_and_others_are_missed_only_when_asked_for():
    runs = make_runs({"params": PARAMS, "loss": LOSS})
    assert list(runs.sizes) == ["params"]
    with pytest.raises(InputError, match=r"runs: no column 'tokens', and without both of params and flops"):
        runs.size("tokens")


def test_a_csv_of_any_metric_loads_whatever_else_it_holds(tmp_path: Path):
    path = tmp_path / "runs.csv"
    path.write_text("name, params ,flops,recall@10,loss\na,1000000,6e14,0.031,2.5\nb,2e6,1.2e15,0.035,\n")
    runs = read_runs(path, "recall@10")
    assert (runs.metric_name, runs.metric.tolist()) == ("recall@10", [0.031, 0.035])
    np.testing.assert_allclose(runs.size("tokens"), [1e8, 1e8])
    with pytest.raises(InputError, match="row 2: 'loss' is nan, and must be a positive number"):
        read_runs(path)


REFUSED = {
    "no metric": ("params,tokens\n1e6,1e8\n", "no column 'loss' to fit; there: params, tokens"),
    "no size": ("loss\n3.0\n", "no column of params, tokens, flops; there: loss"),
    "words": ("params,tokens,loss\n1e6,many,3.0\n", "column 'tokens' must hold numbers alone"),
    "NaN": ("params,tokens,loss\n1e6,1e8,3.0\n1e6,2e8,nan\n", "row 2: 'loss' is nan, and must be a positive number"),
    "infinite": ("params,tokens,loss\n1e6,inf,3.0\n", "row 1: 'tokens' is inf"),
    "loss of zero": ("params,tokens,loss\n1e6,1e8,0\n", "row 1: 'loss' is 0, and must be a positive number"),
    "negative size": ("params,tokens,loss\n-1e6,1e8,3\n", "row 1: 'params' is -1e+06"),
    "empty file": ("", "not a CSV table"),
    "no CSV": ("params,loss\n1,2,3,4\n", "not a CSV table"),
}


@pytest.mark.parametrize(("text", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_bad_table_is_refused_in_one_sentence_that_names_it(tmp_path: Path, text: str, sentence: str):
    path = tmp_path / "runs.csv"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_runs(path)
    assert str(path) in str(caught.value) and sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there_and_a_factor_that_is_none_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"no\.csv: cannot be read: No such file"):
        read_runs(tmp_path / "no.csv")
    with pytest.raises(InputError, match="FLOPs per parameter and token must be a positive number, not -6"):
        make_runs({"params": PARAMS, "loss": LOSS}, factor=-6)


def test_columns_of_unequal_length_are_refused():
    with pytest.raises(InputError, match="columns of unequal length: params 3, loss 2"):
        make_runs({"params": PARAMS, "loss": LOSS[:2]})


def test_a_header_without_rows_is_refused_by_whatever_is_fitted(tmp_path: Path):
    path = tmp_path / "runs.csv"
    path.write_text("params,tokens,loss\n")
    with pytest.raises(InputError, match="no rows"):
        read_runs(path)
