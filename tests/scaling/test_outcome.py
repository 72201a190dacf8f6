"""What a point leaves behind: by hand from its log, and what its row in the table of runs is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from stand_ins import instant_training

from onerec_jax.config import Recipe
from onerec_jax.errors import InputError, PreemptedError, StoppedError
from onerec_jax.model.onerec import build, count_parameters
from onerec_jax.scaling import outcome
from onerec_jax.scaling.outcome import run_point, spending, write_table
from onerec_jax.scaling.points import PointRun, SweepFolder, plan
from onerec_jax.scaling.runs import read_runs
from onerec_jax.scaling.sweep import Sweep
from onerec_jax.train.flops import request_flops
from onerec_jax.train.loop import load_inputs
from onerec_jax.train.metrics import read_metrics


@dataclasses.dataclass
class Loaded:
    """Stands for a recommender."""

    recipe: Recipe | None
    run: Path


def silent(line: str) -> None:
    pass


@pytest.fixture
def sweep(recipe_file: str) -> SweepFolder:
    changes = [
        "train.steps=20",
        "train.log_every=3",
        "train.eval_every=20",
        "train.eval_batches=1",
        "train.checkpoint_every=7",
    ]
    found = plan("s", Sweep(recipe_file, [{"seed": 0}, {"seed": 1, "tokenizer.content": ["embedding"]}]), changes)
    found.write()
    return found


@pytest.fixture
def run(sweep: SweepFolder, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> PointRun:
    """The first point, trained in no time; its model is the real one where it is counted."""
    loaded = load_inputs(tiny_recipe)
    instant_training(monkeypatch)
    run = sweep.points[0]
    dataset, ids, _ = loaded
    model = build(run.recipe.model, dataset.vocabulary(ids.codebook_sizes))
    monkeypatch.setattr(outcome, "load_inputs", lambda recipe: (dataset, ids, model))
    return run


def test_a_finished_point_says_its_sizes_losses_and_cost(run: PointRun, tiny_recipe: Recipe):
    run_point(str(run.file), [], False, silent)
    found = run.result()
    assert found is not None and found["status"] == "done" and found["metrics"] is None and found["starts"] == 1
    numbers, lines = found["numbers"], read_metrics(run.folder)
    trained = {int(line["step"]): line for line in lines if "loss" in line}

    dataset, _, model = outcome.load_inputs(run.recipe)
    counts = count_parameters(model)
    assert (numbers["params"], numbers["params_total"]) == (counts["active"], counts["model"])
    assert numbers["params_tables"] == counts["codes"] + counts["features"] + counts["tables"]

    # Lines end at steps 3, 6, 7 (saved), 9, 12, 14, 15, 18, 20: the last tenth, steps 19 and 20, is one line.
    assert sorted(trained) == [3, 6, 7, 9, 12, 14, 15, 18, 20] and found["window"] == [19, 20]
    assert numbers["loss"] == trained[20]["loss"] and numbers["loss_level1"] == trained[20]["loss/level1"]
    (valid,) = [line for line in lines if "valid/loss" in line]
    assert numbers["valid_loss"] == valid["valid/loss"]
    assert numbers["epochs"] == pytest.approx(20 * 16 / len(dataset.examples("train")))

    widths = np.diff([0, *sorted(trained)])
    per_context = [trained[step]["targets_per_context"] for step in sorted(trained)]
    assert numbers["targets"] == pytest.approx(16 * np.dot(widths, per_context))


def test_targets_tokens_and_flops_are_those_of_all_steps_at_the_rates_of_the_log():
    lines = [
        {"step": 10, "loss": 1.0, "examples_per_s": 50.0, "targets_per_context": 3.0, "target_tokens_per_s": 450.0, "gflops": 5.0},
        {"step": 10, "valid/loss": 1.0},
        {"step": 30, "loss": 1.0, "examples_per_s": 25.0, "targets_per_context": 2.0, "target_tokens_per_s": 150.0, "gflops": 1.0},
    ]  # fmt: skip
    first, last = spending(lines, batch_size=4)
    assert first == {"step": 10, "targets": 120, "tokens": 360, "flops": pytest.approx(4e9)}
    assert last == {"step": 30, "targets": 120 + 160, "tokens": 360 + 480, "flops": pytest.approx(4e9 + 3.2e9)}


def test_the_flops_of_a_point_are_those_of_its_model_for_so_many_events(run: PointRun):
    """By the log's rate, against the count of a request between none and all events that it may have."""
    run_point(str(run.file), [], False, silent)
    config, requests = run.recipe.model, 20 * 16
    _, _, model = outcome.load_inputs(run.recipe)
    bounds = [
        request_flops(config, model.vocabulary, short=n, positive=0, lifelong=0, targets=t).training * requests
        for n, t in ((0, 1), (config.short_length, 3))
    ]
    assert bounds[0] < run.result()["numbers"]["flops"] < bounds[1]  # type: ignore[index]


def test_recall_is_kept_where_it_is_asked_for(run: PointRun, monkeypatch: pytest.MonkeyPatch):
    def evaluate(recommender, report):
        assert recommender.recipe == run.recipe
        return SimpleNamespace(rows={"model": {"R@10": 0.25}})

    monkeypatch.setattr("onerec_jax.evaluate.evaluation.evaluate", evaluate)
    monkeypatch.setattr("onerec_jax.generate.load.load_recommender", lambda folder: Loaded(None, Path(folder)))
    run_point(str(run.file), [], True, silent)
    assert run.result()["metrics"] == {"R@10": 0.25} and run.finished(evaluate=True)  # type: ignore[index]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StoppedError("it diverged"), 3),
        (InputError("no such thing"), 2),
        (KeyError("lost"), 1),
        (PreemptedError("leave"), None),
    ],
)
def test_a_point_that_fails_says_why_and_one_that_has_to_leave_does_not(
    sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int | None
):
    def pretrain(recipe, report):
        raise error

    monkeypatch.setattr(outcome, "pretrain", pretrain)
    run = sweep.points[0]
    run.folder.mkdir(exist_ok=True)
    run.failed.write_text("{}")
    with pytest.raises(type(error)):
        run_point(str(run.file), [], False, silent)
    assert run.failure() == (None if code is None else {"code": code, "error": str(error)})


def test_the_table_has_settings_numbers_and_metrics_and_is_one_that_fits_read(sweep: SweepFolder):
    numbers = {"params": 1e6, "params_total": 2e6, "tokens": 5e6, "flops": 4e13, "loss": 2.5}
    for run, more in zip(sweep.points, ({"valid_loss": 2.75}, {}), strict=True):
        done = {
            "numbers": numbers | more,
            "metrics": {"R@10": 0.5} if more else None,
            "seconds": 3.5,
            "device": "1 x cpu",
        }
        run.done.write_text(json.dumps(done))
    path = write_table(sweep)
    table = pl.read_csv(path).to_dicts()
    assert [row["name"] for row in table] == [run.name for run in sweep.points]
    assert [row["seed"] for row in table] == [0, 1] and table[1]["tokenizer.content"] == '["embedding"]'
    assert (table[0]["valid_loss"], table[1]["valid_loss"], table[0]["R@10"]) == (2.75, None, 0.5)
    runs = read_runs(path)
    assert list(runs.metric) == [2.5, 2.5] and runs.factor == pytest.approx(4e13 / 5e12)
