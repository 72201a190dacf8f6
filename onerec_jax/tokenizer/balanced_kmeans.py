"""Balanced k-means: every cluster gets the same number of vectors (OneRec v1, 2502.18965, Algorithm 1).

    w = N / K;  repeat:  U <- V;  for k = 1..K:  the w vectors of U nearest to c_k leave U,  c_k <- their mean

The greedy pass depends on the order of the centres: the last ones take what is left. Where K does not divide N the first
N mod K centres take one vector more.
"""

from __future__ import annotations

import numpy as np

from onerec_jax.tokenizer.kmeans import plus_plus

_BLOCK_SCORES = 64  # scores held at once, per row of `batch_size`


def _take_nearest(scores: np.ndarray, quota: int) -> np.ndarray:
    """Indices of the `quota` lowest of scores [R], ties to the lowest index."""
    limit = np.partition(scores, quota - 1)[quota - 1]
    below = np.flatnonzero(scores < limit)
    return np.concatenate([below, np.flatnonzero(scores == limit)[: quota - len(below)]])


def balanced_assignment(vectors: np.ndarray, centroids: np.ndarray, batch_size: int = 65_536) -> np.ndarray:
    """One greedy pass: each centroid [K,D] in turn takes its share of the remaining vectors [N,D], nearest first.

    Returns:
        codes int32 [N]; cluster sizes differ by at most one, ties go to the lowest row.
    """
    count, size = len(vectors), len(centroids)
    quotas = count // size + (np.arange(size) < count % size)
    origin = vectors.mean(0)  # distances do not depend on it, and near it the expansion loses fewer digits
    pool, rows = vectors - origin, np.arange(count)
    half_norm = 0.5 * np.einsum("nd,nd->n", pool, pool)
    codes = np.empty(count, np.int32)
    first = 0
    while len(rows):
        block = max(1, batch_size * _BLOCK_SCORES // len(rows))
        # ||x - c||^2 / 2 without the part that is the same for all x.
        scores = half_norm - (centroids[first : first + block] - origin) @ pool.T
        left = np.ones(len(rows), bool)
        for code, quota in enumerate(quotas[first : first + block], first):
            if quota:
                taken = _take_nearest(scores[code - first], quota)
                codes[rows[taken]] = code
                left[taken] = False
                scores[code - first + 1 :, taken] = np.inf
        pool, rows, half_norm, first = pool[left], rows[left], half_norm[left], first + block
    return codes


def balanced_k_means(
    vectors: np.ndarray, size: int, iterations: int, seed: int | tuple[int, ...], batch_size: int
) -> np.ndarray:
    """Centroids float32 [K,D] of vectors float32 [N,D]: `plus_plus`, then Algorithm 1 until no vector changes cluster.

    Args:
        vectors: float32 [N,D]; with N < K the last K - N centroids stay where they started.
        size: K.
        iterations: most passes.
        seed: of the start.
        batch_size: bounds memory, to N D values and 64 scores per row of it.
    """
    centroids = plus_plus(vectors, size, seed)
    codes = None
    for _ in range(iterations):
        before, codes = codes, balanced_assignment(vectors, centroids, batch_size)
        if before is not None and np.array_equal(before, codes):
            break
        order = np.argsort(codes, kind="stable")
        used, starts = np.unique(codes[order], return_index=True)
        sums = np.add.reduceat(vectors[order], starts, axis=0, dtype=np.float64)
        centroids[used] = sums / np.diff(starts, append=len(codes))[:, None]
    return centroids
