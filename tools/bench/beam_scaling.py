"""What a recommend step costs by the number of beams and by the size of the catalogue.

    python tools/bench/beam_scaling.py                              onerec_0.015b, beams 32 to 512, 10^4 to 10^7 items
    python tools/bench/beam_scaling.py onerec_0.121b model.dtype=float32 --items 10000 1000000

Parameters, requests with full contexts and catalogues are random; codes of a level are as unequal as those of k-means. The step is
that of `generate/step.py`: encoder once a request, beams along the trie, lists of ten, fifty items left out. Programs take turns.
The encoder is timed by itself, and `search` is what the step takes beyond it. A cost that grows no faster than linearly in beams
has a `beams x` of 16 at most between 32 and 512; one that does not depend on the catalogue has an `items x` of 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rollout import made_up_codes  # puts the repository on the path
from train_step import made_up_batch

from onerec_jax.generate.step import Catalogue, ListOptions, make_catalogue, make_recommend_step
from onerec_jax.model.onerec import build, planned_vocabulary
from onerec_jax.recipe import load_recipe
from onerec_jax.tokenizer.trie import Trie


def catalogue_of(recipe: Any, items: int) -> Catalogue:
    codes = made_up_codes(recipe.tokenizer.codebook_sizes, items)
    trie = Trie.build(codes, np.zeros(items))
    zeros = np.zeros(items, np.int32)
    return make_catalogue(trie, recipe.model, zeros, zeros)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="onerec_0.015b")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--beams", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 10_000_000])
    parser.add_argument("--requests", type=int, default=1, help="of a batch")
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    recipe = load_recipe(given.recipe, [*given.overrides, f"train.batch_size={given.requests}"])
    model = build(recipe.model, dataclasses.replace(planned_vocabulary(recipe), items=min(given.items)))
    weights = *model.init(0), model.init_bias()
    codes = made_up_codes(recipe.tokenizer.codebook_sizes, min(given.items))
    batch = jax.device_put(made_up_batch(recipe, model.vocabulary, codes, 0))
    exclude = np.random.default_rng(1).integers(0, min(given.items), (given.requests, 50)).astype(np.int32)
    catalogues = {items: catalogue_of(recipe, items) for items in track(given.items, "catalogues", transient=True)}
    encode = jax.jit(lambda *given: model.encode(*given).tokens)
    programs: dict[tuple[int, int], Any] = {(0, 0): lambda: encode(*weights, batch)}
    steps = {beams: make_recommend_step(model, ListOptions(k=10, width=beams)) for beams in given.beams}
    for beams, step in steps.items():
        for items, catalogue in catalogues.items():
            programs[beams, items] = lambda s=step, c=catalogue: s(*weights, c, batch, exclude, None)
    seconds: dict[tuple[int, int], list[float]] = {key: [] for key in programs}
    for key in track(programs, "compiling", transient=True):
        jax.block_until_ready(programs[key]())
    for _ in track(range(given.repeats), "measuring", transient=True):
        for key, run in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run())
            seconds[key].append(time.perf_counter() - begin)
    report(given, {key: statistics.median(values) for key, values in seconds.items()})


def report(given: argparse.Namespace, median: dict[tuple[int, int], float]) -> None:
    encoder = median.pop((0, 0))
    table = Table(
        "items", "beams", "step, ms", "search, ms", "beams x, search", "items x, step", "items x, search",
        title=f"{given.recipe}, {given.requests} request(s), {jax.devices()[0].device_kind}; encoder {1e3 * encoder:.1f} ms",
    )  # fmt: skip
    for (beams, items), value in sorted(median.items(), key=lambda entry: entry[0][::-1]):
        search, fewest = value - encoder, median[beams, min(given.items)]
        table.add_row(
            f"{items:,}",
            str(beams),
            f"{1e3 * value:.1f}",
            f"{1e3 * search:.1f}",
            f"{search / (median[min(given.beams), items] - encoder):.2f}",
            f"{value / fewest:.2f}",
            f"{search / (fewest - encoder):.2f}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
