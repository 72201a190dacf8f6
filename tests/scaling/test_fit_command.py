"""`onerec fit`: what it prints is what the fits give, and options that a kind has no use for are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from known_law import V2_RUNS, grid_runs
from typer.testing import CliRunner

from onerec_jax import cli
from onerec_jax.scaling.fit import fit_law, parametric, power
from onerec_jax.scaling.report import to_json
from onerec_jax.scaling.runs import Runs

V2 = str(Path(__file__).parents[2] / "docs" / "results" / "scaling" / "onerec_v2.csv")


def run(*words: str) -> str:
    result = CliRunner().invoke(cli.app, ["fit", *words], catch_exceptions=False, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def grid_csv(tmp_path: Path) -> tuple[str, Runs]:
    runs = grid_runs(5, 4, noise=0.01)
    path = tmp_path / "grid.csv"
    columns = [runs.size("params"), runs.size("tokens"), runs.metric]
    np.savetxt(path, np.stack(columns, axis=1), delimiter=",", header="params,tokens,loss", comments="", fmt="%.17g")
    return str(path), runs


def test_the_published_table_of_onerec_v2_is_the_one_kept():
    found = json.loads(run(V2, "--kind", "power", "--by", "params", "--objective", "squares", "--json"))
    fit = fit_law(V2_RUNS, power("params", "squares", None))
    for name, interval in fit.constants().items():
        kept = found["constants"][name]
        assert (kept["value"], kept["low"], kept["high"]) == tuple(interval), "nothing is rounded"
        assert tuple(kept["leave_one_out"]) == fit.leave_one_out()[name]
    assert found["held_out"]["error"] == fit.held_out().error  # type: ignore[union-attr]


def test_the_table_shows_constants_intervals_spreads_and_the_best_sizes(grid_csv: tuple[str, Runs]):
    path, runs = grid_csv
    text, fit = (
        run(path, "--budget", "1e21", "--budget", "1e23", "--resamples", "100"),
        fit_law(runs, parametric(), 100),
    )
    for name, (value, low, high) in fit.constants().items():
        least, most = fit.leave_one_out()[name]
        (line,) = [line for line in text.splitlines() if line.startswith(f"│ {name} ")]
        assert f"{value:.10g}" in line and f"{low:.4g} to {high:.4g}" in line and f"{least:.4g} to {most:.4g}" in line
    assert "1e21" in text and "1e23" in text and "objective huber_log, C = 6 x params x tokens" in text
    assert f"error {fit.held_out().error:+.2%}" in text  # type: ignore[union-attr]
    least, most = fit.leave_one_out()["a"]
    assert f"{fit.exponents()[0].value:.10g}" in text and f"{least:.4g} to {most:.4g}" in text


def test_a_given_asymptote_is_shown_as_given():
    words = (V2, "--kind", "power", "--by", "params", "--objective", "squares", "--asymptote", "3.1")
    assert "given, not fitted" in run(*words)
    assert json.loads(run(*words, "--json"))["constants"]["E"] == {"value": 3.1, "given": True}


def test_curves_are_shown_by_budget(tmp_path: Path):
    path, offsets = tmp_path / "curves.csv", np.linspace(-2, 2, 5)
    rows = ["params,flops,recall@10"]
    rows += [
        f"{2e8 * (c / 1e18) ** 0.5 * np.exp(o)},{c},{0.1 - 0.01 * o**2}" for c in (1e18, 1e19, 1e20) for o in offsets
    ]
    path.write_text("\n".join(rows) + "\n")
    words = (str(path), "--kind", "isoflop", "--metric", "recall@10", "--rising", "--budget", "1e22")
    found = json.loads(run(*words, "--json"))
    assert [curve["params"]["value"] for curve in found["curves"]] == pytest.approx([2e8, 2e8 * 10**0.5, 2e9])
    assert found["exponents"]["a"]["value"] == pytest.approx(0.5) and found["optima"][0]["params"][
        "value"
    ] == pytest.approx(2e10)
    assert "largest budget left out" in run(*words)
    path.write_text("\n".join([*rows, "3e9,1e21,0.2"]) + "\n")
    with_a_lone_run = json.loads(run(*words, "--json"))
    assert with_a_lone_run["left_out"] == 1 and with_a_lone_run["curves"] == found["curves"]
    assert "left out: 1 at budgets of fewer than three sizes" in run(*words)


def test_what_is_not_finite_is_null_in_json():
    assert json.loads(to_json({"a": (1.5, float("inf")), "b": [float("nan"), 2]})) == {"a": [1.5, None], "b": [None, 2]}


REFUSED = {
    "kind": (["--kind", "cubic"], "kind must be one of parametric, power, isoflop, not 'cubic'"),
    "power of nothing": (["--kind", "power"], "kind power needs --by params, tokens or flops"),
    "parametric by one": (["--by", "params"], "kind power needs --by"),
    "parabolas with an asymptote": (["--kind", "isoflop", "--asymptote", "1"], "neither --objective nor --asymptote"),
    "unknown size": (
        ["--kind", "power", "--by", "layers"],
        "a law is of one or two of params, tokens, flops, not of 'layers'",
    ),
    "one variable and a budget": (["--kind", "power", "--by", "params", "--budget", "1e20"], "has no optimum"),
    "tokens unknown": ([], "no column 'tokens'"),
    "metric": (["--metric", "ndcg"], "no column 'ndcg' to fit; there: params, loss"),
}


@pytest.mark.parametrize(("words", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_bad_command_is_one_sentence_and_exit_code_2(words, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["onerec", "fit", V2, *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == ""
    assert said.err.startswith("onerec: ") and sentence in said.err and said.err.count("\n") == 1
