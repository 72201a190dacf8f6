"""Examples per second of the training input on one core, with contexts of 20 + 256 + 2000 events.

    python tools/bench/pipeline.py [--users 2000] [--batches 20] [--runs 5]

A log of uniform noise (8 labels, 20,000 items, about 2,500 events per user) is prepared in a temporary folder, then
batches of 256 requests with 4 targets are made by `Pipeline.batch_at` (shuffle, reads from disk and packing) with the
process pinned to one core. Prints the median and the spread over runs. The preparation takes about a minute.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from onerec_jax.config import Recipe
from onerec_jax.data.pipeline import Pipeline
from onerec_jax.data.prepare import write_dataset
from onerec_jax.data.schema import LABELS, Tables
from onerec_jax.data.store import Dataset
from onerec_jax.recipe import make_recipe

ITEMS = 20_000
EVENTS_PER_USER = 2_500
CODEBOOK = 256


def noise_tables(users: int, seed: int) -> Tables:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(EVENTS_PER_USER - 1500, EVENTS_PER_USER + 1500, users)
    total = int(lengths.sum())
    events: dict[str, np.ndarray] = {
        "user_id": np.repeat(np.arange(users), lengths),
        "item_id": rng.integers(0, ITEMS, total),
        "timestamp_ms": rng.integers(1_650_000_000_000, 1_652_000_000_000, total),
        "playtime_ms": rng.integers(0, 60_000, total),
    }
    events |= {label: rng.random(total) < 0.2 for label in LABELS}
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(rng.standard_normal(ITEMS * 32, np.float32)), 32)
    items = pa.table(
        {
            "item_id": np.arange(ITEMS),
            "author_id": rng.integers(0, 2_000, ITEMS),
            "tags": pa.array(rng.integers(0, 50, (ITEMS, 1)).tolist()),
            "duration_ms": rng.integers(5_000, 60_000, ITEMS),
            "embedding": embedding,
        }
    )
    return Tables(pa.table(events), items, pa.table({"user_id": np.arange(users), "age": rng.integers(0, 7, users)}))


def bench_recipe() -> Recipe:
    return make_recipe(
        {
            "name": "bench",
            "data": {"source": {"kind": "simulator"}},
            "model": {"short_length": 20, "positive_length": 256, "lifelong_length": 2000},
            "train": {"batch_size": 256},
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=2_000)
    parser.add_argument("--batches", type=int, default=20, help="batches per run")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    recipe = bench_recipe()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        directory = write_dataset(noise_tables(arguments.users, 0), recipe.data, Path(folder) / "noise", 0, {})
        print(f"prepared {arguments.users} users in {time.perf_counter() - started:.0f} s")
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        codes = np.random.default_rng(0).integers(0, CODEBOOK, (ITEMS, 3), np.int32)
        pipeline = Pipeline(Dataset(directory), codes, recipe)
        rates = [measure(pipeline, run, arguments.batches, recipe.train.batch_size) for run in range(arguments.runs)]
    for clock, values in zip(("wall", "CPU"), zip(*rates, strict=True), strict=True):
        median = statistics.median(values)
        print(
            f"{median:,.0f} examples/s of {clock} time on one core "
            f"(median of {len(values)} runs, {min(values):,.0f} to {max(values):,.0f})"
        )


def measure(pipeline: Pipeline, run: int, batches: int, batch_size: int) -> tuple[float, float]:
    """Examples per second of wall and of CPU time; the second leaves out waiting for a core that others use."""
    wall, cpu = time.perf_counter(), time.process_time()
    for step in range(run * batches, (run + 1) * batches):
        pipeline.batch_at(step)
    examples = batches * batch_size
    return examples / (time.perf_counter() - wall), examples / (time.process_time() - cpu)


if __name__ == "__main__":
    main()
