"""Time and inertia of residual k-means against faiss.Kmeans run level by level: same vectors, equal Lloyd iterations.

    python tools/bench/residual_kmeans.py                      200k x 128, 3 x 4096, float32 and bfloat16 assignment
    python tools/bench/residual_kmeans.py --rows 50000 --codes 1024 --levels 1

Contestants take turns; ratios are of medians. Ours is timed after a warm-up on the same shapes with one iteration, which
compiles; the compile time is printed apart. faiss may use all rows (`max_points_per_centroid` is lifted), as ours does.
"""

from __future__ import annotations

import argparse
import statistics
import time

import faiss
import numpy as np
from kmeans import BATCH, overlapping_clusters
from rich.console import Console
from rich.progress import track
from rich.table import Table

from onerec_jax.tokenizer.kmeans import Precision, k_means, nearest


def with_faiss(vectors: np.ndarray, codes: int, iterations: int, seed: int) -> np.ndarray:
    model = faiss.Kmeans(
        vectors.shape[1], codes, niter=iterations, seed=seed, max_points_per_centroid=len(vectors), verbose=False
    )
    model.train(vectors)
    return np.asarray(model.centroids)


def residuals(vectors: np.ndarray, levels: int, one_level) -> tuple[float, list[float]]:
    """Seconds of clustering all levels (assignment between them apart, the same for all), and inertia per level."""
    seconds, inertia, left = 0.0, [], vectors
    for level in range(levels):
        started = time.perf_counter()
        book = one_level(left, level)
        seconds += time.perf_counter() - started
        codes, distances = nearest(left, book, BATCH)
        inertia.append(float(distances.sum(dtype=np.float64)))
        left = left - book[codes]
    return seconds, inertia


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"rows": 200_000, "width": 128, "codes": 4096, "levels": 3, "iterations": 10, "repeats": 3}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    vectors = overlapping_clusters(given.rows, given.width, given.codes)

    def ours(precision: Precision):
        return lambda left, level: k_means(left, given.codes, given.iterations, (0, level), BATCH, precision=precision)

    contestants = {
        "faiss": lambda left, level: with_faiss(left, given.codes, given.iterations, level),
        "onerec_jax float32": ours("float32"),
        "onerec_jax bfloat16": ours("bfloat16"),
    }
    started = time.perf_counter()
    for one_level in (ours("float32"), ours("bfloat16")):
        one_level(vectors[: 2 * BATCH], 0)
    warm_up = time.perf_counter() - started
    times: dict[str, list[float]] = {name: [] for name in contestants}
    inertias: dict[str, list[float]] = {}
    for _ in track(range(given.repeats), "rounds"):
        for name, one_level in contestants.items():
            seconds, inertias[name] = residuals(vectors, given.levels, one_level)
            times[name].append(seconds)
    title = f"{given.rows} x {given.width}, {given.levels} x {given.codes}, {given.iterations} iterations"
    table = Table("", "seconds, median", "least", "most", "time ratio", "inertia ratio per level", title=title)
    base = statistics.median(times["faiss"])
    for name, found in times.items():
        ratio = [own / other for own, other in zip(inertias[name], inertias["faiss"], strict=True)]
        cells = (statistics.median(found), min(found), max(found), statistics.median(found) / base)
        table.add_row(name, *(f"{value:.2f}" for value in cells), " ".join(f"{value:.4f}" for value in ratio))
    Console().print(table)
    print(f"warm-up of onerec_jax, with compilation: {warm_up:.1f} s")


if __name__ == "__main__":
    main()
