"""K-means inside every group of vectors at once: how one level of a tree splits all nodes of the level before.

Axis letters: P vectors, D their width, G groups, K most codes of a group, H children (codes in use, over all groups).
The children of group g are child_start[g] to child_start[g+1]-1; the code of a child is its number within the group.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import sparse

from onerec_jax.tokenizer.runs import place_in_run

_TILE = 32  # vectors of one group scored in one matrix product


class Children(NamedTuple):
    """A split of G groups."""

    codes: np.ndarray  # int32 [P], below K; every child has a vector
    centroids: np.ndarray  # float32 [H,D]
    child_start: np.ndarray  # int64 [G+1]


def _tiles(rows: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows [P] of groups [P] in tiles of one group each: rows int [T,_TILE], the last of a tile repeated; groups [T]."""
    order = np.argsort(group, kind="stable")
    rows, group = rows[order], group[order]
    start = np.flatnonzero(place_in_run(group) % _TILE == 0)
    length = np.diff(start, append=len(group))
    return rows[start[:, None] + np.minimum(np.arange(_TILE), length[:, None] - 1)], group[start]


def nearest_child(
    vectors: np.ndarray, group: np.ndarray, centroids: np.ndarray, child_start: np.ndarray, batch_size: int
) -> np.ndarray:
    """The code int32 [N] of the child of its own group [N] that each vector [N,D] is nearest to.

    Ties go to the lowest code; a group without children gives -1.
    """
    children = np.diff(child_start)
    count = children[group]
    codes = np.where(count > 0, 0, -1).astype(np.int32)
    width = 1
    while width < children.max(initial=0):
        # Groups with about as many children together, so that padding at most doubles the work.
        rows = np.flatnonzero((count > width) & (count <= 2 * width))
        width *= 2
        if not rows.size:
            continue
        tile_rows, tile_group = _tiles(rows, group[rows])
        step = max(1, batch_size // max(width, _TILE))
        for first in range(0, len(tile_rows), step):
            part, node = tile_rows[first : first + step], tile_group[first : first + step]
            child = child_start[node, None] + np.minimum(np.arange(width), children[node, None] - 1)
            books = centroids[child]
            origin = books.mean(1, keepdims=True)  # near it the expansion of the distance loses fewer digits
            books -= origin
            half_norm = 0.5 * np.einsum("tkd,tkd->tk", books, books)
            score = half_norm[:, None] - (vectors[part] - origin) @ books.transpose(0, 2, 1)
            codes[part] = score.argmin(2)
    return codes


def _draw_start(points: np.ndarray, weights: np.ndarray, counts: np.ndarray, size: int, rng: np.random.Generator):
    """K-means++ in every group: rows [G,K] drawn by weight and squared distance to those drawn before.

    `points` [P,D] are sorted by group, `counts` [G] of each, every one at least 1.
    """
    last = np.cumsum(counts) - 1
    first = last + 1 - counts
    points = points - np.repeat(np.add.reduceat(points, first) / counts[:, None].astype(np.float32), counts, axis=0)
    norm = np.einsum("pd,pd->p", points, points)
    distance, picks = np.ones(len(points)), np.empty((len(counts), size), np.int64)
    for code in range(size):
        total = np.cumsum(weights * distance)
        before = np.where(first > 0, total[first - 1], 0)
        draw = before + rng.random(len(counts)) * (total[last] - before)
        row = np.clip(np.searchsorted(total, draw, side="right"), first, last)
        picks[:, code] = row
        scale = norm + np.repeat(norm[row], counts)
        new = scale - 2 * np.einsum("pd,pd->p", points, np.repeat(points[row], counts, axis=0))
        new = np.where(new > 1e-6 * scale, new, 0)  # below is rounding: such a row equals the centre
        distance = np.minimum(distance, new) if code else new
    return picks


def _reseed(centroids: np.ndarray, members: np.ndarray, points: np.ndarray, group: np.ndarray, distance: np.ndarray):
    """Moves the empty codes of each group, centroids [G,K,D], to the farthest of its points from their centroids."""
    empty_group, empty_code = np.nonzero(members == 0)
    rows = np.flatnonzero((members == 0).any(1)[group] & (distance > 0))
    rows = rows[np.lexsort((-distance[rows], group[rows]))]
    begin = np.searchsorted(group[rows], empty_group)
    place = place_in_run(empty_group)
    found = begin + place < np.searchsorted(group[rows], empty_group, side="right")
    source = rows[(begin + place)[found]]
    centroids[empty_group[found], empty_code[found]] = points[source]


def _lloyd(
    points: np.ndarray, weights: np.ndarray, group: np.ndarray, size: int, iterations: int, rng, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Codes int32 [P] and centroids float32 [G,K,D] of points sorted by group."""
    counts = np.bincount(group)
    centroids = points[_draw_start(points, weights, counts, size, rng)]
    child_start = np.arange(len(counts) + 1) * size

    def assigned() -> np.ndarray:
        return nearest_child(points, group, centroids.reshape(-1, points.shape[1]), child_start, batch_size)

    for _ in range(iterations):
        codes = assigned()
        child = group * size + codes
        sums = sparse.csr_array((weights, (child, np.arange(len(points)))), shape=(child_start[-1], len(points)))
        members = sums.sum(1)
        means = (sums @ points)[members > 0] / members[members > 0, None]
        centroids.reshape(-1, points.shape[1])[members > 0] = means
        if not members.all():
            distance = np.sum((points - centroids[group, codes]) ** 2, axis=1)
            _reseed(centroids, members.reshape(-1, size), points, group, distance)
    return assigned(), centroids


def grouped_k_means(
    points: np.ndarray,
    weights: np.ndarray,
    group: np.ndarray,
    size: int,
    iterations: int,
    seed: int | tuple[int, ...],
    batch_size: int,
) -> Children:
    """Splits every group into at most `size` clusters: weighted k-means++ and Lloyd iterations.

    In a group of at most `size` points each is its own child, in row order, so points that should stay together must be
    given as one of larger weight. A code of a larger group that ends up empty is left out.

    Args:
        points: float32 [P,D].
        weights: float64 [P], above 0.
        group: int [P], 0 to G-1, none of them empty.
        size: K.
        iterations: Lloyd iterations.
        seed: the result is a function of it and the points.
        batch_size: vectors scored at once; bounds memory.
    """
    counts = np.bincount(group)
    order = np.argsort(group, kind="stable")
    start = np.cumsum(counts) - counts
    codes = np.empty(len(points), np.int64)
    codes[order] = np.arange(len(points)) - np.repeat(start, counts)
    found = points
    large = order[(counts > size)[group[order]]]
    if large.size:
        number = np.cumsum(counts > size) - 1
        rng = np.random.default_rng(seed)
        local = number[group[large]]
        codes[large], books = _lloyd(points[large], weights[large], local, size, iterations, rng, batch_size)
        found = points.copy()
        found[large] = books[local, codes[large]]
    key = group.astype(np.int64) * size + codes
    used, member, child = np.unique(key, return_index=True, return_inverse=True)
    child_start = np.searchsorted(used, np.arange(len(counts) + 1) * size)
    return Children((child.ravel() - child_start[group]).astype(np.int32), found[member], child_start)
