"""Where the best learning rate of each width lies, with muP-style transfer and without.

    python tools/bench/width_transfer.py [RECIPE] [--widths 64 128 256 512] [--steps 150] [--csv FILE] [--plot FILE]

Every model of a family along width is trained for a few steps on the same batches with every rate of a grid of factors of two,
with `model.base_width` at the first of the widths, and at 0. The loss is the mean of the last tenth of the steps. With muP the
minimum stays where it is at the first width; without, it moves towards smaller rates as the model grows.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

from onerec_jax.config import Recipe
from onerec_jax.data.pipeline import Pipeline
from onerec_jax.model.prefixes import training_trie
from onerec_jax.recipe import load_recipe
from onerec_jax.scaling.recipe import family, with_settings
from onerec_jax.train.loop import load_inputs
from onerec_jax.train.metrics import ratios
from onerec_jax.train.optimizer import make_optimizer
from onerec_jax.train.state import init_state
from onerec_jax.train.step import make_train_step

LAST = 0.1  # share of the steps whose mean loss counts


def adjustable(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Its updates times a number of its state, so that one compiled step serves all rates."""

    def update(updates: Any, state: Any, params: Any = None):
        rate, inner = state
        updates, inner = optimizer.update(updates, inner, params)
        return jax.tree.map(lambda u: u * rate, updates), (rate, inner)

    return optax.GradientTransformation(lambda params: (np.float32(1.0), optimizer.init(params)), update)


def losses(recipe: Recipe, batches: Sequence[Any], rates: Sequence[float]) -> list[float]:
    """The loss at the end of a short training with each rate; NaN where it diverged."""
    recipe = with_settings(recipe, {"train.learning_rate": 1.0, "train.steps": len(batches)})
    _, ids, model = load_inputs(recipe)
    optimizer = adjustable(make_optimizer(recipe.train, recipe.model.width_share))
    step = jax.jit(make_train_step(model, recipe, optimizer), donate_argnums=0)
    trie, found = training_trie(recipe.model, ids.trie), []
    for rate in rates:
        state = init_state(model, optimizer, recipe.seed)
        state = dataclasses.replace(state, optimizer=(np.float32(rate), state.optimizer[1]))
        last = []
        for at, batch in enumerate(batches):
            state, metrics = step(state, batch, trie)
            if at >= (1 - LAST) * len(batches):
                last.append(ratios(metrics)["loss"])
        found.append(float(np.mean(last)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("overrides", nargs="*", help="settings of the recipe, as key.path=value")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rates", type=float, nargs="+", default=[2.0**power for power in range(-12, -4)])
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    base = load_recipe(given.recipe, [*given.overrides, f"train.warmup_steps={given.steps // 10}"])
    members = family(base, "width", [width / base.model.d_model for width in given.widths])
    dataset, ids, _ = load_inputs(base)
    with contextlib.closing(Pipeline(dataset, ids.codes, base)) as pipeline:
        batches = [jax.device_put(next(pipeline)) for _ in range(given.steps)]
    rows = []
    for carried, member in track(list(itertools.product((True, False), members)), "training"):
        recipe = with_settings(member.recipe, {"model.base_width": given.widths[0] if carried else 0})
        for rate, loss in zip(given.rates, losses(recipe, batches, given.rates), strict=True):
            rows.append({"muP": carried, "width": recipe.model.d_model, "rate": rate, "loss": loss})
    show(rows)
    if given.csv:
        with given.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    if given.plot:
        plot(rows, given.plot)


def curves(rows: list[dict[str, Any]], carried: bool) -> dict[int, dict[float, float]]:
    """Loss by rate of each width."""
    found: dict[int, dict[float, float]] = {}
    for row in rows:
        if row["muP"] == carried:
            found.setdefault(row["width"], {})[row["rate"]] = row["loss"]
    return found


def show(rows: list[dict[str, Any]]) -> None:
    for carried in (True, False):
        by_width = curves(rows, carried)
        rates = sorted(next(iter(by_width.values())))
        table = Table("width", *(f"{rate:.2g}" for rate in rates), "best rate", title="muP" if carried else "as it is")
        for width, by_rate in by_width.items():
            best = min(by_rate, key=lambda rate: by_rate[rate])
            table.add_row(str(width), *(f"{by_rate[rate]:.3f}" for rate in rates), f"{best:.2g}")
        Console(width=120).print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss against rate, a line a width, muP beside what there is without."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, carried, title in ((left, True, "muP"), (right, False, "as it is")):
        for width, by_rate in curves(rows, carried).items():
            (line,) = axes.plot(list(by_rate), list(by_rate.values()), marker=".", label=f"width {width}")
            best = min(by_rate, key=lambda rate: by_rate[rate])
            axes.plot([best], [by_rate[best]], "o", color=line.get_color(), markersize=8)
        axes.set(xscale="log", xlabel="learning rate", title=title)
    lowest = min(row["loss"] for row in rows)
    left.set(ylabel="loss", ylim=(lowest - 0.05, lowest + 1.5))
    right.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
