"""What batches of like length save: the mean train step over one pool of batches, with and without `train.length_buckets`.

    onerec data beauty_small data.source.path=FOLDER && onerec tokenize beauty_small
    python tools/bench/length_buckets.py beauty_small

The rounds of both take turns; a round is 32 steps, over which the grouped order has seen the same examples as the plain one.
"""

from __future__ import annotations

import argparse
import time

import jax
import numpy as np
from rich.progress import track

from onerec_jax.data.pipeline import Pipeline
from onerec_jax.model.prefixes import training_trie
from onerec_jax.recipe import load_recipe
from onerec_jax.train.loop import load_inputs
from onerec_jax.train.optimizer import make_optimizer
from onerec_jax.train.state import init_state
from onerec_jax.train.step import make_train_step

STEPS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_intermixed_args()
    runs = {}
    for name, change in (("grouped", []), ("plain", ["train.length_buckets=[]"])):
        recipe = load_recipe(given.recipe, [*given.overrides, *change])
        dataset, ids, model = load_inputs(recipe)
        pipeline = Pipeline(dataset, ids.codes, recipe)
        batches = [pipeline.batch_at(step) for step in range(STEPS)]
        trie = training_trie(recipe.model, ids.trie)
        optimizer = make_optimizer(recipe.train)
        step = jax.jit(make_train_step(model, recipe, optimizer), donate_argnums=0)
        runs[name] = step, batches, trie, init_state(model, optimizer, recipe.seed)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in track(range(given.rounds + 1), "rounds"):
        for name, (step, batches, trie, state) in runs.items():
            started = time.perf_counter()
            for batch in batches:
                state, _ = step(state, batch, trie)
            jax.block_until_ready(state)
            runs[name] = step, batches, trie, state
            if round_:  # the first compiles
                seconds[name].append((time.perf_counter() - started) / STEPS)
    for name, (_, batches, _, _) in runs.items():
        lengths = [batch.short.item.shape[1] for batch in batches]
        print(
            f"{name}: {np.median(seconds[name]):.3f} s a step ({min(seconds[name]):.3f} - {max(seconds[name]):.3f}), "
            f"windows of {np.mean(lengths):.1f} events on average, {len(set(lengths))} shapes"
        )
    print(f"ratio {np.median(seconds['plain']) / np.median(seconds['grouped']):.2f}")


if __name__ == "__main__":
    main()
