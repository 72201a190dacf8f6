"""Codes that hardly serve move to where many vectors share one: what keeps k-means out of its worst local minima.

In many dimensions a code near the mean of noise, such as the residuals of the second level, is nearer to most vectors than
any other vector is; it keeps them, while codes that start on outliers keep only these. As in the enhanced LBG algorithm
(Patane & Russo 2001) codes with few members that are not far from others are given to clusters with much distortion. On
residuals this takes several per cent off the inertia and brings the entropy of the codes near its most
(docs/experiments.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onerec_jax.tokenizer.kmeans import Rows

_FEW_MEMBERS = 0.7  # of the mean number
_MUCH_DISTORTION = 2.0  # of the mean over codes
_AT_ONCE = 1024  # centroids compared with all others at once
_NEAR = 0.05  # of the way from the centroid to a member: near enough for a share of the members, not for one only


def relocate(centroids: np.ndarray, vectors: Rows, codes: np.ndarray, distances: np.ndarray) -> int:
    """Moves codes with few members into the clusters with most distortion, in place.

    A cluster with r times the mean distortion gets r - 1 codes, each part of the way to another of its members. A code goes
    only if that costs less than the mean distortion: its members times the squared distance to the nearest other code, so
    that a small cluster far from all others keeps its code.

    Args:
        centroids: float32 [K,D].
        vectors: float32 [N,D].
        codes: int32 [N], the nearest centroid of each vector.
        distances: float32 [N], squared, to it.

    Returns:
        how many codes moved.
    """
    size, count = len(centroids), len(codes)
    members = np.bincount(codes, minlength=size)
    distortion = np.bincount(codes, distances, size)
    mean = distortion.mean()
    large = np.flatnonzero(distortion > _MUCH_DISTORTION * mean)
    few = np.flatnonzero((members <= max(1, _FEW_MEMBERS * count / size)) & (distortion <= _MUCH_DISTORTION * mean))
    if not large.size or not few.size:
        return 0
    cost = members[few] * _nearest_other(centroids, few)
    few = few[np.argsort(cost, kind="stable")][: np.count_nonzero(cost < mean)]
    wanted = np.minimum((distortion[large] / mean).astype(np.int64) - 1, members[large] - 1)
    if wanted.sum() > few.size:
        wanted = wanted * few.size // wanted.sum()
    by_code = np.argsort(codes, kind="stable")
    first = np.cumsum(members) - members
    chosen = [
        by_code[first[code] + np.arange(number) * members[code] // number]
        for code, number in zip(large[wanted > 0], wanted[wanted > 0], strict=True)
    ]
    if not chosen:
        return 0
    rows = np.concatenate(chosen)
    centres = centroids[codes[rows]]
    centroids[few[: rows.size]] = centres + _NEAR * (_read(vectors, rows) - centres)
    return int(rows.size)


def _nearest_other(centroids: np.ndarray, some: np.ndarray) -> np.ndarray:
    """Squared distance float32 [M] of some centroids [M] to the nearest of the others."""
    near = centroids - centroids.mean(0)
    norm = np.einsum("kd,kd->k", near, near)
    least = np.empty(len(some), np.float32)
    for first in range(0, len(some), _AT_ONCE):
        rows = some[first : first + _AT_ONCE]
        apart = norm[rows][:, None] + norm - 2 * near[rows] @ near.T
        apart[np.arange(len(rows)), rows] = np.inf
        least[first : first + len(rows)] = np.maximum(apart.min(1), 0)
    return least


def reseed(centroids: np.ndarray, vectors: Rows, codes: np.ndarray, distances: np.ndarray) -> None:
    """Moves each code without members to one of the vectors farthest from their centroids, no two to the same vector."""
    empty = np.flatnonzero(np.bincount(codes, minlength=len(centroids)) == 0)
    if not empty.size:
        return
    farthest = np.argsort(-distances, kind="stable")[: 4 * empty.size]
    rows = _read(vectors, farthest[distances[farthest] > 0])
    _, first = np.unique(rows, axis=0, return_index=True)
    chosen = np.sort(first)[: empty.size]
    centroids[empty[: chosen.size]] = rows[chosen]


def _read(vectors: Rows, rows: np.ndarray) -> np.ndarray:
    """Vectors float32 [M,D] of distinct rows [M]; a store is read in its own order."""
    ordered = np.sort(rows)
    return np.asarray(vectors[ordered], np.float32)[np.searchsorted(ordered, rows)]
