"""K-means in JAX: k-means++ start, batched Lloyd iterations, re-seeding of dead codes; all in float32.

Rows pass in batches of one static shape. For a seed the result is a function of the vectors alone; `batch_size` changes
only the order in which float32 sums are taken.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_CPU_TILE = 256  # rows scored at once on a CPU: their scores against a few thousand codes stay in the core's cache
_DEVICE_TILE = 8192
_GROUP = 32  # XLA's argmin is scalar on CPU: minima of groups of codes, then argmin inside one group, is 1.5x faster
_BLOCK = 128  # rows per block of the two-step draw of k-means++


def _tile() -> int:
    return _CPU_TILE if jax.default_backend() == "cpu" else _DEVICE_TILE


class _Batch(NamedTuple):
    rows: jax.Array  # float32 [B,D], zero-padded
    count: int  # real rows


def _batches(vectors: np.ndarray, batch_size: int) -> list[_Batch]:
    size = min(batch_size, len(vectors))
    if size > _tile():
        size += -size % _tile()
    batches = []
    for start in range(0, len(vectors), size):
        rows = vectors[start : start + size]
        batches.append(_Batch(jnp.asarray(np.pad(rows, ((0, size - len(rows)), (0, 0)))), len(rows)))
    return batches


def _assign(rows: jax.Array, centroids: jax.Array) -> jax.Array:
    """The nearest centroid of each row [B,D] by ||c||^2 - 2 x.c, ties to the lowest code."""
    size = len(centroids)
    origin = centroids.mean(0)  # distances do not depend on it, and near it the expansion loses no digits
    padding = -size % _GROUP
    centred = jnp.pad(centroids - origin, ((0, padding), (0, 0)))
    half_norm = jnp.pad(0.5 * jnp.sum((centroids - origin) ** 2, 1), (0, padding), constant_values=jnp.inf)

    def nearest_code(row: jax.Array) -> jax.Array:
        score = half_norm - jnp.dot(centred, row - origin, precision=jax.lax.Precision.HIGHEST)
        grouped = score.reshape(-1, _GROUP)
        group = jnp.argmin(grouped.min(1))
        return (group * _GROUP + jnp.argmin(grouped[group])).astype(jnp.int32)

    return jax.lax.map(nearest_code, rows, batch_size=min(_tile(), len(rows)))


@jax.jit
def _assign_batch(rows: jax.Array, centroids: jax.Array) -> tuple[jax.Array, jax.Array]:
    codes = _assign(rows, centroids)
    return codes, jnp.sum((rows - centroids[codes]) ** 2, 1)


@jax.jit
def _sum_batch(rows: jax.Array, count: int, codes: jax.Array, centroids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Per code the sum of (row - centroid) [K,D] and the number of rows int32 [K], over the first `count` rows."""
    size = len(centroids)
    segment = jnp.where(jnp.arange(len(rows)) < count, codes, size)  # segment_sum drops what lies outside
    moved = jax.ops.segment_sum(rows - centroids[codes], segment, size)
    return moved, jax.ops.segment_sum(jnp.ones(len(rows), jnp.int32), segment, size)


def nearest(vectors: np.ndarray, centroids: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centroid of every vector.

    Args:
        vectors: float32 [N,D].
        centroids: float32 [K,D].
        batch_size: rows assigned at once.

    Returns:
        codes int32 [N] (ties to the lowest code) and squared Euclidean distances float32 [N].
    """
    book = jnp.asarray(centroids)
    parts = [(*_assign_batch(batch.rows, book), batch.count) for batch in _batches(vectors, batch_size)]
    codes = np.concatenate([np.asarray(codes)[:count] for codes, _, count in parts])
    distances = np.concatenate([np.asarray(distances)[:count] for _, distances, count in parts])
    return codes, distances


@jax.jit
def _draw_start(rows: jax.Array, count: int, draws: jax.Array) -> jax.Array:
    """Indices [K] drawn by squared distance from the first `count` of rows [S,D]; `draws` [K,2] in [0, 1)."""
    norm = jnp.sum(rows**2, 1)

    def first_above(weights: jax.Array, draw: jax.Array) -> jax.Array:
        cumulative = jnp.cumsum(weights)
        # Past the end, when rounding or weights that are all 0 leave none above, comes the first.
        return jnp.sum(cumulative <= draw * cumulative[-1]) % len(weights)

    def pick(code: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        weights, picked = state
        blocks = weights.reshape(-1, _BLOCK)
        block = first_above(blocks.sum(1), draws[code, 0])
        row = block * _BLOCK + first_above(blocks[block], draws[code, 1])
        # By the expansion, a matrix-vector product, 3x faster on CPU than the difference; its rounding is cut off, so
        # that a row equal to a centre is never drawn.
        scale = norm + norm[row]
        distances = scale - 2 * jnp.dot(rows, rows[row], precision=jax.lax.Precision.HIGHEST)
        distances = jnp.where(distances > 1e-6 * scale, distances, 0)
        # The first pick is uniform over the rows; from then on the weights are squared distances.
        weights = jnp.where(code == 0, weights * distances, jnp.minimum(weights, distances))
        return weights, picked.at[code].set(row.astype(jnp.int32))

    uniform = (jnp.arange(len(rows)) < count).astype(jnp.float32)
    return jax.lax.fori_loop(0, len(draws), pick, (uniform, jnp.zeros(len(draws), jnp.int32)))[1]


def plus_plus(vectors: np.ndarray, size: int, seed: int | tuple[int, ...]) -> np.ndarray:
    """The k-means++ start (Arthur & Vassilvitskii 2007): rows [K,D] drawn by squared distance to those drawn before.

    Draws from a seeded sample of max(16384, 4 K) rows where there are more. With fewer distinct vectors than codes some
    centroids coincide.
    """
    rng = np.random.default_rng(seed)
    most = max(16_384, 4 * size)
    if len(vectors) > most:
        vectors = vectors[np.sort(rng.choice(len(vectors), most, replace=False))]
    padded = np.pad(vectors - vectors.mean(0), ((0, -len(vectors) % _BLOCK), (0, 0)))
    draws = rng.random((size, 2), np.float32)
    return vectors[np.asarray(_draw_start(jnp.asarray(padded), len(vectors), jnp.asarray(draws)))]


def _reseed(centroids: np.ndarray, members: np.ndarray, vectors: np.ndarray, distances: np.ndarray) -> None:
    """Moves each empty code to one of the vectors farthest from their centroids, no two to the same vector."""
    empty = np.flatnonzero(members == 0)
    if not empty.size:
        return
    farthest = np.argsort(-distances, kind="stable")[: 4 * empty.size]
    farthest = farthest[distances[farthest] > 0]
    _, first = np.unique(vectors[farthest], axis=0, return_index=True)
    rows = farthest[np.sort(first)][: empty.size]
    centroids[empty[: rows.size]] = vectors[rows]


def lloyd(vectors: np.ndarray, centroids: np.ndarray, iterations: int, batch_size: int) -> np.ndarray:
    """Lloyd's iterations from given centroids float32 [K,D]; codes without members are re-seeded after each.

    A code that no distinct vector is left for stays where it was, without members.
    """
    batches = _batches(vectors, batch_size)
    centroids = centroids.copy()
    for _ in range(iterations):
        book = jnp.asarray(centroids)
        moved, members, distances = np.zeros(centroids.shape), np.zeros(len(centroids), np.int64), []
        for batch in batches:
            codes, distance = _assign_batch(batch.rows, book)
            batch_moved, batch_members = _sum_batch(batch.rows, batch.count, codes, book)
            moved += np.asarray(batch_moved)
            members += np.asarray(batch_members)
            distances.append(distance)
        centroids += (moved / np.maximum(members, 1)[:, None]).astype(np.float32)
        if not members.all():
            _reseed(centroids, members, vectors, np.concatenate(distances)[: len(vectors)])
    return centroids


def k_means(
    vectors: np.ndarray, size: int, iterations: int, seed: int | tuple[int, ...], batch_size: int
) -> np.ndarray:
    """Centroids float32 [K,D] of vectors float32 [N,D]: `plus_plus`, then `lloyd`."""
    return lloyd(vectors, plus_plus(vectors, size, seed), iterations, batch_size)
