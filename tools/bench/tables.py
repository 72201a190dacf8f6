"""Time of a train step with an id table of few rows and of many, at equal distinct ids per step, and of the update alone.

    python tools/bench/tables.py                 10,000,000 rows against 100,000

The step is that of `beauty_small` without its item head (which has vectors of all items): 128 requests of 20 events of 12,101
items, spread over all rows of the item table, 64 wide as the model. The update alone is of 20,000 distinct rows: gather, gradient,
row-wise Adagrad, scatter into the donated table. Contestants take turns; ids are drawn before the clock starts.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tiger import CODES, ITEMS, LEVELS, USERS, made_up_batch

from onerec_jax.data.schema import Vocabulary
from onerec_jax.model.onerec import build
from onerec_jax.model.tables import gather, init_tables, update_tables
from onerec_jax.recipe import load_recipe
from onerec_jax.train.optimizer import make_optimizer
from onerec_jax.train.state import init_state
from onerec_jax.train.step import make_train_step

WIDTH = 64


def update_alone(rows: int, ids: int) -> tuple[Callable[[int], None], float]:
    """An update of distinct rows, and the bytes of the table beyond its numbers, a row."""
    state = [jax.jit(lambda: init_tables({"item": (rows, WIDTH)}, jax.random.key(0)))()]
    rng = np.random.default_rng(0)
    drawn = [jnp.asarray(np.unique(rng.integers(0, rows, 2 * ids))[:ids], jnp.int32) for _ in range(4)]

    def step(tables, touched):
        found = {"item": touched}
        gradients = jax.grad(lambda rows: jnp.sum(jnp.square(rows["item"])))(gather(tables, found))
        return update_tables(tables, found, gradients, 0.1)[0]

    compiled = jax.jit(step, donate_argnums=0)

    def run(i: int) -> None:
        state[0] = jax.block_until_ready(compiled(state[0], drawn[i % len(drawn)]))

    return run, sum(leaf.nbytes for leaf in jax.tree.leaves(state[0])) / rows - 4 * WIDTH


def train_step(rows: int) -> tuple[Callable[[int], None], float]:
    """A whole train step whose ids are spread over the table, and the table's bytes beyond its numbers, a row."""
    recipe = load_recipe("beauty_small", ["model.head=codes", "model.softmax=all", f"model.d_model={WIDTH}"])
    model = build(recipe.model, Vocabulary(USERS, rows, 1, 221, (), (), (CODES,) * LEVELS))
    optimizer = make_optimizer(recipe.train)
    state = [jax.jit(lambda: init_state(model, optimizer, 0))()]
    spread = np.linspace(0, rows - 1, ITEMS).astype(np.int32)
    batches = []
    for seed in range(4):
        batch = made_up_batch(128, 6, recipe.model.causal, seed)
        item = spread[batch.short.item]
        batches.append(jax.device_put(dataclasses.replace(batch, short=dataclasses.replace(batch.short, item=item))))
    compiled = jax.jit(make_train_step(model, recipe, optimizer), donate_argnums=0)

    def run(i: int) -> None:
        state[0] = jax.block_until_ready(compiled(state[0], batches[i % len(batches)])[0])

    return run, sum(leaf.nbytes for leaf in jax.tree.leaves(state[0].tables)) / rows - 4 * WIDTH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("few", 100_000), ("many", 10_000_000), ("ids", 20_000), ("repeats", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    table = Table("", "rows", "ms: median", "least", "most", "x few", "bytes a row beyond its numbers")
    for what, make in (("train step", train_step), ("update alone", lambda rows: update_alone(rows, given.ids))):
        measure(what, make, (given.few, given.many), given.repeats, table)
    Console(width=100).print(table)


def measure(what: str, make: Callable, sizes: tuple[int, int], repeats: int, table: Table) -> None:
    """Adds a line for each number of rows; what was made is gone when this returns."""
    runs = {rows: make(rows) for rows in sizes}
    for run, _ in runs.values():
        run(0)
    seconds: dict[int, list[float]] = {rows: [] for rows in sizes}
    for i in track(range(repeats), what):
        for rows, (run, _) in runs.items():
            started = time.perf_counter()
            run(i)
            seconds[rows].append(time.perf_counter() - started)
    for rows, found in seconds.items():
        ms = [1000 * s for s in found]
        ratio = statistics.median(found) / statistics.median(seconds[sizes[0]])
        table.add_row(
            what, f"{rows:,}", f"{statistics.median(ms):.1f}", f"{min(ms):.1f}", f"{max(ms):.1f}", f"{ratio:.2f}",
            f"{runs[rows][1]:.1f}",
        )  # fmt: skip


if __name__ == "__main__":
    main()
