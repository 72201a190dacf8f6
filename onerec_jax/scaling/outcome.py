"""One point of a sweep, from its recipe to `done.json`, and the table of all that are finished.

The columns are those that `onerec fit` takes: `params` are the active ones (beside them `params_total`, all experts, and
`params_tables`, everything whose rows are a vocabulary), `tokens` target tokens (beside them `targets`, items), `flops` those of
`train.flops`. `loss` is the mean training loss of the last tenth of the steps, `valid_loss` that of the last validation.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import polars as pl

from onerec_jax.config import Recipe
from onerec_jax.errors import ExitCode, PreemptedError
from onerec_jax.recipe import load_recipe
from onerec_jax.scaling.points import SweepFolder, write
from onerec_jax.scaling.recipe import size_of
from onerec_jax.train.goodput import LOST, goodput
from onerec_jax.train.loop import code_revision, load_inputs, pretrain
from onerec_jax.train.metrics import read_metrics

WINDOW = 0.1  # share of the steps, the last ones, whose mean loss is a run's
Lines = list[dict[str, float]]


def run_point(file: str, overrides: list[str], evaluate: bool, report: Callable[[str], None]) -> None:
    """Trains the recipe of a point, or goes on with it; keeps what came out, or why it failed.

    Args:
        file: `recipe.yaml` of the point.
        overrides: what the launcher tells each process of the others.
        evaluate: measure Recall and NDCG too.
        report: takes the lines of progress.
    """
    recipe = load_recipe(file, overrides)
    run = recipe.run_directory
    failed = run / "failed.json"
    failed.unlink(missing_ok=True)
    try:
        pretrain(recipe, report)
        if jax.process_index():
            return
        metrics = _evaluated(recipe, report) if evaluate else None
        write(run / "done.json", json.dumps(outcome(recipe) | {"metrics": metrics}, indent=1) + "\n")
    except PreemptedError:
        raise
    except Exception as error:
        write_failure(run, int(getattr(error, "code", ExitCode.BUG)), str(error) or type(error).__name__)
        raise


def write_failure(run: Path, code: int, sentence: str) -> None:
    """`failed.json`."""
    last = (sentence.strip().splitlines() or [""])[-1]
    write(run / "failed.json", json.dumps({"code": code, "error": last}, indent=1) + "\n")


def _evaluated(recipe: Recipe, report: Callable[[str], None]) -> dict[str, float]:
    from onerec_jax.evaluate.evaluation import evaluate
    from onerec_jax.generate.load import load_recommender

    recommender = load_recommender(str(recipe.run_directory))
    return evaluate(dataclasses.replace(recommender, recipe=recipe), report).rows["model"]


def outcome(recipe: Recipe) -> dict[str, Any]:
    """What a finished run gave: the numbers of its row, and what they were measured on."""
    dataset, _, model = load_inputs(recipe)
    train, lines = recipe.train, read_metrics(recipe.run_directory)
    active, total, tables = size_of(model)
    *_, spent = spending(lines, train.batch_size)
    requests = train.steps * train.batch_size
    first = train.steps - max(1, round(WINDOW * train.steps))
    last = [(line, steps) for line, steps in stretches(lines) if line["step"] > first]
    numbers = {
        "params": active,
        "params_total": total,
        "params_tables": tables,
        "tokens": spent["tokens"],
        "targets": spent["targets"],
        "flops": spent["flops"],
        **{_column(name): _mean(last, name) for name in last[-1][0] if name.split("/")[0] == "loss"},
        **{_column(name): value for name, value in _validation(lines, train.steps).items()},
        "epochs": requests / max(1, len(dataset.examples("train"))),
    }
    seconds, starts = goodput(recipe.run_directory)
    return {
        "status": "done",
        "numbers": numbers,
        "window": [last[0][0]["step"] - last[0][1] + 1, last[-1][0]["step"]],  # steps that `loss` is the mean of
        "seconds": round(sum(value for kind, value in seconds.items() if kind != LOST), 1),
        "lost_seconds": round(seconds[LOST], 1),
        "starts": starts,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "revision": code_revision(),
    }


def stretches(lines: Lines) -> Iterator[tuple[dict[str, float], int]]:
    """Each line of training and how many steps it is the mean of."""
    before = 0
    for line in lines:
        if "loss" in line:
            yield line, int(line["step"]) - before
            before = int(line["step"])


def spending(lines: Lines, batch_size: int) -> Iterator[dict[str, float]]:
    """Targets, target tokens and FLOPs from the first step to each line of training, padding not counted."""
    total = {"step": 0.0, "targets": 0.0, "tokens": 0.0, "flops": 0.0}
    for line, steps in stretches(lines):
        requests, rate = steps * batch_size, line["examples_per_s"]
        total = {
            "step": line["step"],
            "targets": total["targets"] + requests * line["targets_per_context"],
            "tokens": total["tokens"] + requests * line["target_tokens_per_s"] / rate,
            "flops": total["flops"] + requests * 1e9 * line["gflops"] / rate,
        }
        yield total


def _mean(lines: list[tuple[dict[str, float], int]], name: str) -> float:
    return sum(line[name] * steps for line, steps in lines) / sum(steps for _, steps in lines)


def _validation(lines: Lines, step: int) -> dict[str, float]:
    """Losses of the validation after this step, where there was one."""
    for line in lines:
        if line["step"] == step and "valid/loss" in line:
            return {name: value for name, value in line.items() if name.startswith("valid/loss")}
    return {}


def _column(name: str) -> str:
    """`valid/loss/level1` -> `valid_loss_level1`."""
    return name.replace("/", "_")


def rows_of(sweep: SweepFolder) -> list[dict[str, Any]]:
    """A row per finished run: its name, settings, numbers and metrics."""
    found = []
    for run in sweep.points:
        if (result := run.result()) is not None:
            settings = {
                key: value if isinstance(value, int | float | str) else json.dumps(value)
                for key, value in run.point.items()
            }
            others = {name: result[name] for name in ("seconds", "device")}
            found.append({"name": run.name, **settings, **result["numbers"], **(result["metrics"] or {}), **others})
    return found


def write_table(sweep: SweepFolder) -> Path:
    """`runs.csv`: what `onerec fit` reads."""
    path, rows = sweep.folder / "runs.csv", rows_of(sweep)
    columns = list(dict.fromkeys(name for row in rows for name in row)) or ["name"]
    table = pl.DataFrame({name: [row.get(name) for row in rows] for name in columns}, strict=False)
    write(path, table.write_csv())
    return path
