"""The page of a sweep: findings against the law that its runs are made of, and a page that someone else can read."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from made_sweep import BUDGETS, FACTOR, best_params, loss_of, made_sweep

from onerec_jax.errors import InputError
from onerec_jax.scaling.findings import agreement, exponents, find, seed_spread, sentences
from onerec_jax.scaling.outcome import rows_of
from onerec_jax.scaling.page import curve_of, write_report
from onerec_jax.scaling.plots import Curve, envelope
from onerec_jax.scaling.points import SweepFolder, load_folder

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def made(recipe_file: str) -> SweepFolder:
    return made_sweep(recipe_file, noise=1e-4)


def test_the_findings_are_the_law_that_the_runs_are_made_of(made: SweepFolder):
    found = find(rows_of(made), resamples=100)
    assert found.metric == "valid_loss" and found.parametric and found.refused == {}
    for way, (a, b) in exponents(found).items():
        assert a.value == pytest.approx(0.36 / 0.70, abs=0.02) and b.value == pytest.approx(0.34 / 0.70, abs=0.02), way
    assert sorted(exponents(found)) == ["IsoFLOP", "parametric"] and "agree within" in agreement(found)
    assert found.largest_R.sum() == 5, "those of the largest budget"
    for row in np.flatnonzero(found.largest_R):
        assert found.predicted()[row].value == pytest.approx(found.runs.metric[row], rel=2e-3)
    assert found.isoflop is not None
    for curve, budget in zip(found.isoflop.curves, BUDGETS, strict=True):
        assert curve.params.value == pytest.approx(best_params(budget), rel=0.05)


def test_the_next_size_up_is_what_the_law_has_for_it(made: SweepFolder):
    points = {run.name: run.point for run in made.points}
    (said,) = [s for s in sentences(find(rows_of(made), resamples=100), 20, points) if s.startswith("The next size up")]
    budget = 4 * BUDGETS[-1]
    params = best_params(budget)
    numbers = [float(word.replace(",", "")) for word in re.findall(r"\d[\d.,e]*\d", said.split("reach ")[1])]
    assert numbers[0] == pytest.approx(loss_of(params, budget / (FACTOR * params)), rel=2e-3)
    assert numbers[1] <= numbers[0] <= numbers[2]
    assert numbers[3] == pytest.approx(params, rel=0.1) and numbers[6] == pytest.approx(
        budget / (FACTOR * params), rel=0.1
    )


def test_the_page_has_every_point_and_plot_and_loads_nothing(made: SweepFolder):
    waiting, failed = made.points[0], made.points[4]  # the smallest and the largest model of one budget
    for run in (waiting, failed):
        run.done.unlink()
    failed.failed.write_text(json.dumps({"code": 3, "error": "it <diverged>"}))
    page = write_report(load_folder("made"), resamples=100).read_text()
    folder = made.folder
    for run in [run for run in made.points if run not in (waiting, failed)]:
        assert f'href="#{run.name}"' in page and f'id="{run.name}"' in page
    assert f"<td>{waiting.name}</td>" in page and "waiting" in page
    assert "failed with exit code 3: it &lt;diverged&gt;" in page and "13 of 15 points are done" in page
    for name in ("compute", "isoflop", "predicted", "exponents"):
        assert (folder / "plots" / f"{name}.png").read_bytes().startswith(PNG)
    assert page.count('src="data:image/png;base64,') == 4
    assert not re.search(r"(src|href)=\"(?!data:|#)|https?://|url\(|<script|@import", page)
    assert "default-src 'none'" in page and "{" not in re.sub(r"<style>.*?</style>", "", page, flags=re.S)
    assert (folder / "runs.csv").read_text().count("\n") == 14


def test_what_the_runs_do_not_determine_is_not_drawn_and_the_page_says_why(made: SweepFolder):
    for run in made.points:
        if run.point["train.steps"] != 100:
            run.done.unlink()
    (made.folder / "plots").mkdir()
    (made.folder / "plots" / "isoflop.png").write_text("of an earlier report")
    page = html.unescape(write_report(made, resamples=100).read_text())
    assert [path.name for path in (made.folder / "plots").iterdir()] == ["compute.png"]
    assert page.count('src="data:image/png;base64,') == 1, "loss against compute alone"
    assert "Not drawn: the sweep: all runs are of one budget" in page
    assert "No law is fitted: the sweep: 5 runs are too few" in page or "distinct 'tokens'" in page


def test_another_metric_can_be_looked_at(made: SweepFolder):
    found = find(rows_of(made), "loss", 100)
    assert found.runs.metric == pytest.approx(np.array([row["valid_loss"] + 0.05 for row in found.rows]))
    with pytest.raises(InputError, match="'recall'"):
        find(rows_of(made), "recall")
    with pytest.raises(InputError, match="no point of the sweep is done yet"):
        find([])


def test_a_curve_is_a_runs_metric_at_the_compute_it_had_spent(made: SweepFolder):
    run, row = made.points[0], rows_of(made)[0]
    curve = curve_of(run, "valid_loss")
    assert curve is not None and curve.metric[-1] == row["valid_loss"] and curve.step[-1] == 100
    assert curve.flops == pytest.approx(row["flops"] * curve.step / 100, rel=1e-6)
    assert curve_of(run, "valid_loss_level1") is None


def test_the_envelope_is_the_lowest_that_any_run_has_reached_by_each_compute():
    rng = np.random.default_rng(0)
    curves = []
    for i in range(4):
        flops = np.sort(rng.uniform(1, 100, 20))
        curves.append(Curve(str(i), flops, flops, rng.uniform(1, 5, 20)))
    flops, metric = envelope(curves)
    every = [(f, m) for curve in curves for f, m in zip(curve.flops, curve.metric, strict=True)]
    expected = sorted((f, m) for f, m in every if m < min([n for g, n in every if g < f], default=np.inf))
    assert [*zip(flops, metric, strict=True)] == expected


def test_the_spread_over_seeds_is_that_of_points_that_differ_in_nothing_else(made: SweepFolder):
    found = find(rows_of(made), resamples=100)
    values = found.runs.metric
    points = {row["name"]: {"a": i // 2, "seed": i % 2} for i, row in enumerate(found.rows)}
    pairs = [values[2 * i : 2 * i + 2] for i in range(7)]
    assert seed_spread(found, points) == pytest.approx(np.sqrt(np.mean([np.var(pair, ddof=1) for pair in pairs])))
    assert seed_spread(found, {name: {"a": i} for i, name in enumerate(points)}) is None


def test_exponents_that_two_ways_give_apart_are_not_to_be_believed(made: SweepFolder, monkeypatch: pytest.MonkeyPatch):
    found = find(rows_of(made), resamples=100)
    far = found._replace(isoflop=None)
    assert "not known by two ways" in agreement(far)
    one, two = exponents(found).values()
    moved = tuple(interval._replace(low=interval.high + 1, high=interval.high + 2) for interval in one)
    monkeypatch.setattr("onerec_jax.scaling.findings.exponents", lambda findings: {"parametric": moved, "IsoFLOP": two})
    assert "disagree, and neither should be believed" in agreement(found)


def test_status_and_report_are_verbs(onerec, made: SweepFolder, tmp_path: Path):
    answer = onerec("sweep", "status", str(made.folder))
    assert answer.code == 0 and "15 done" in answer.out and answer.out.count("100/100") == 5
    assert onerec("sweep", "report", "made", "--resamples", "100").code == 0 and (made.folder / "report.html").exists()
    refused = onerec("sweep", "status", "nothing")
    assert refused.code == 2 and "no sweep 'nothing'" in refused.err


def test_one_large_run_above_the_curves_is_held_out_and_bends_none_of_them(made: SweepFolder):
    rows = rows_of(made)
    before = find(rows, resamples=100)
    params = best_params(10 * BUDGETS[-1])
    tokens = 10 * BUDGETS[-1] / (FACTOR * params)
    lone = {"params": params, "tokens": tokens, "flops": 10 * BUDGETS[-1], "valid_loss": loss_of(params, tokens)}
    after = find([*rows, {**rows[-1], **lone, "name": "lone"}], resamples=100)
    assert after.isoflop is not None and before.isoflop is not None
    assert after.isoflop.exponents() == before.isoflop.exponents() and after.curves_R.sum() == len(rows)
    assert after.largest_R.tolist() == [False] * len(rows) + [True]
    assert after.predicted()[-1].value == pytest.approx(lone["valid_loss"], rel=2e-3)
    said = sentences(after, len(rows) + 1, {run.name: run.point for run in made.points} | {"lone": {}})
    assert any(f"go through {len(rows)} of the runs" in sentence for sentence in said)
