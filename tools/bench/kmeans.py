"""Time and inertia of one k-means against scikit-learn's: same vectors, one k-means++ start, same Lloyd iterations.

    python tools/bench/kmeans.py --rows 20000 --width 64 --codes 256

Ours is timed after one warm-up call, which compiles; the compile time is printed apart.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from onerec_jax.tokenizer.kmeans import k_means, nearest

BATCH = 65_536


def overlapping_clusters(rows: int, width: int, codes: int) -> np.ndarray:
    """Gaussian clusters float32 [rows,width], half as many as codes and wide enough to overlap."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(max(1, codes // 2), width))
    return (centres[rng.integers(0, len(centres), rows)] + 0.7 * rng.normal(size=(rows, width))).astype(np.float32)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 20_000), ("width", 64), ("codes", 256), ("iterations", 25), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    vectors = overlapping_clusters(given.rows, given.width, given.codes)

    def ours(seed: int) -> np.ndarray:
        return k_means(vectors, given.codes, given.iterations, seed, BATCH)

    def theirs(seed: int) -> np.ndarray:
        model = KMeans(
            given.codes, n_init="auto", max_iter=given.iterations, tol=0, algorithm="lloyd", random_state=seed
        )
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
            return model.fit(vectors).cluster_centers_

    first_call = seconds(lambda: ours(0))
    table = Table(
        "k-means",
        "seconds, median",
        "least",
        "most",
        "inertia, mean",
        title=f"{given.rows} x {given.width}, K = {given.codes}",
    )
    for name, run in (("onerec_jax", ours), ("scikit-learn", theirs)):
        found: list[np.ndarray] = []
        times = [
            seconds(lambda seed=seed, run=run, found=found: found.append(run(seed))) for seed in range(given.repeats)
        ]
        inertia = statistics.mean(float(nearest(vectors, centroids, BATCH)[1].sum()) for centroids in found)
        row = (statistics.median(times), min(times), max(times))
        table.add_row(name, *(f"{value:.2f}" for value in row), f"{inertia:.1f}")
    Console().print(table)
    print(f"first call of onerec_jax, with compilation: {first_call:.2f} s; {given.iterations} iterations")


if __name__ == "__main__":
    main()
