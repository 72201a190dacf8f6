"""Compile time of the train step by depth: blocks are scanned, so that more of them are not more to compile.

    python tools/bench/compile_depth.py

`beauty_small`, predicting codes, with 2 + 2, 4 + 4, 12 + 12 and 24 + 24 blocks, dense and with experts in every block.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from tiger import CODES, LEVELS, USERS, made_up_batch

from onerec_jax.data.schema import Vocabulary
from onerec_jax.model.onerec import build
from onerec_jax.recipe import load_recipe
from onerec_jax.train.optimizer import make_optimizer
from onerec_jax.train.state import init_state
from onerec_jax.train.step import make_train_step


def seconds(layers: int, experts: int, overrides: list[str]) -> float:
    """To compile the train step with so many blocks in both stacks."""
    recipe = load_recipe(
        "beauty_small",
        [
            "model.head=codes", "model.softmax=all", f"model.encoder_layers={layers}", f"model.decoder_layers={layers}",
            f"model.moe.experts={experts}", "model.moe.hidden=64", "model.moe.location=both", "model.remat=dots", *overrides,
        ],
    )  # fmt: skip
    model = build(recipe.model, Vocabulary(USERS, 12_101, 1, 221, (), (), (CODES,) * LEVELS))
    optimizer = make_optimizer(recipe.train)
    state = jax.eval_shape(lambda: init_state(model, optimizer, 0))
    batch = jax.tree.map(np.asarray, made_up_batch(8, 6, recipe.model.causal))
    lowered = jax.jit(make_train_step(model, recipe, optimizer), donate_argnums=0).lower(state, batch)
    started = time.perf_counter()
    lowered.compile()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 12, 24])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="settings of the recipe, as key.path=value")
    given = parser.parse_args()
    table = Table("", *(f"{depth} + {depth}" for depth in given.depths), title="seconds to compile, median")
    for name, experts in (("dense", 0), ("8 experts in every block", 8)):
        found = [
            statistics.median(seconds(depth, experts, given.overrides) for _ in range(given.repeats))
            for depth in given.depths
        ]
        table.add_row(name, *(f"{s:.1f}" for s in found))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
