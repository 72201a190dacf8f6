"""K-means in JAX: batched Lloyd iterations over rows in memory or in a store, on every device of this process.

Rows come from an array, or from anything that is sliced and indexed like one (a TensorStore, `Residuals`), a batch at a
time, so memory does not grow with their number. Batches have one static shape and are split over the devices. For a seed
the result is a function of the vectors alone; `batch_size` and the number of devices change only the order in which
float32 sums are taken.

Axis letters: N rows, D width, K codes, B rows of a batch, T rows of a tile.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from onerec_jax.tokenizer.kmeans_start import plus_plus

__all__ = ["Residuals", "Rows", "k_means", "lloyd", "nearest", "plus_plus"]

Precision = Literal["float32", "bfloat16"]

_CPU_TILE = 256  # rows scored at once on a CPU: their scores against a few thousand codes stay in the core's cache
_DEVICE_TILE = 8192
_GROUP = 32  # XLA's argmin is scalar on CPU: minima over groups of codes first, then argmin inside one group
_CANDIDATES = 3  # codes of the best bfloat16 scores whose distances are taken again in float32
_AHEAD = 2  # batches in flight, so that reading overlaps with computing and memory stays bounded


class Rows(Protocol):
    """Rows float32 [N,D] that are read in slices or by index."""

    @property
    def shape(self) -> Any: ...

    def __getitem__(self, index: Any, /) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Residuals:
    """What codes int32 [N,l] of the levels so far leave of rows; computed as it is read, so that nothing is stored."""

    rows: Rows
    codebooks: tuple[np.ndarray, ...]
    codes: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.rows.shape[0]), int(self.rows.shape[1])

    def __getitem__(self, index: Any) -> np.ndarray:
        left = np.array(self.rows[index], np.float32)
        for column, book in zip(self.codes[index].T, self.codebooks, strict=True):
            left -= book[column]
        return left


class _Batch(NamedTuple):
    rows: jax.Array  # float32 [B,D], zero-padded, split over the devices
    count: int  # real rows


def _tile() -> int:
    return _CPU_TILE if jax.default_backend() == "cpu" else _DEVICE_TILE


@functools.cache
def _mesh() -> Mesh:
    return Mesh(np.array(jax.local_devices()), ("rows",))


def _batches(vectors: Rows, batch_size: int) -> Iterator[_Batch]:
    total, devices = int(vectors.shape[0]), _mesh().devices.size
    size = min(batch_size, total)
    unit = devices * (_tile() if size > _tile() * devices else 1)
    size += -size % unit
    sharding = NamedSharding(_mesh(), PartitionSpec("rows"))
    for start in range(0, total, size):
        rows = np.asarray(vectors[start : min(start + size, total)], np.float32)
        padded = np.pad(rows, ((0, size - len(rows)), (0, 0))) if len(rows) < size else rows
        yield _Batch(jax.device_put(padded, sharding), len(rows))


def _score(rows_TxD: jax.Array, codes_KxD: jax.Array, half_norm_K: jax.Array, precision: Precision) -> jax.Array:
    """||c||^2 / 2 - x.c [T,K], which orders codes as the distance does."""
    if precision == "bfloat16":
        low = (rows_TxD.astype(jnp.bfloat16), codes_KxD.astype(jnp.bfloat16))
        return half_norm_K - jnp.einsum("td,kd->tk", *low, preferred_element_type=jnp.float32)
    return half_norm_K - jnp.einsum("td,kd->tk", rows_TxD, codes_KxD, precision=jax.lax.Precision.HIGHEST)


def _best(score_TxGxC: jax.Array) -> jax.Array:
    """The code int32 [T] of the least score of group member g, column c: code c G + g, ties to the lowest."""
    column = jnp.argmin(score_TxGxC.min(1), axis=1)
    inside = jnp.take_along_axis(score_TxGxC, column[:, None, None], axis=2)[..., 0]
    return (column * _GROUP + jnp.argmin(inside, axis=1)).astype(jnp.int32)


def _best_few(score_TxGxC: jax.Array, count: int) -> jax.Array:
    """The best codes of the best `count` columns, int32 [T,count], up to 2^-18 of the scores.

    The five lowest bits of a score give way to the number of the group's member, so that one minimum finds both.
    """
    bits = jax.lax.bitcast_convert_type(score_TxGxC, jnp.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    least = ((ordered & -_GROUP) | jnp.arange(_GROUP, dtype=jnp.int32)[:, None]).min(1)
    columns, found = jnp.arange(least.shape[1]), []
    for _ in range(count):
        column = jnp.argmin(least, axis=1)
        member = jnp.take_along_axis(least, column[:, None], axis=1)[:, 0] & (_GROUP - 1)
        found.append((column * _GROUP + member).astype(jnp.int32))
        least = jnp.where(columns == column[:, None], jnp.iinfo(jnp.int32).max, least)
    return jnp.stack(found, axis=1)


def _assign(rows_BxD: jax.Array, centroids_KxD: jax.Array, precision: Precision) -> jax.Array:
    """The nearest centroid int32 [B] of each row, ties to the lowest code.

    Codes are laid out in columns of `_GROUP` consecutive ones, so that the minima of all columns are elementwise minima
    of vectors; only one column is searched. In bfloat16 the best codes of the best columns are compared in float32.
    """
    size, width = centroids_KxD.shape
    origin = centroids_KxD.mean(0)  # distances do not depend on it, and near it the expansion loses no digits
    book = jnp.pad(centroids_KxD - origin, ((0, -size % _GROUP), (0, 0)))
    half_norm = jnp.where(jnp.arange(len(book)) < size, 0.5 * jnp.sum(book**2, 1), jnp.inf)
    columns = len(book) // _GROUP
    by_column = book.reshape(columns, _GROUP, width).transpose(1, 0, 2).reshape(-1, width)
    norm_by_column = half_norm.reshape(columns, _GROUP).T.reshape(-1)

    def tile(rows_TxD: jax.Array) -> jax.Array:
        centred = rows_TxD - origin
        score = _score(centred, by_column, norm_by_column, precision).reshape(-1, _GROUP, columns)
        if precision == "float32":
            return _best(score)
        codes = jnp.sort(_best_few(score, min(_CANDIDATES, columns)), axis=1)
        dots = jnp.einsum("td,tjd->tj", centred, book[codes], precision=jax.lax.Precision.HIGHEST)
        least = jnp.argmin(half_norm[codes] - dots, axis=1)
        return jnp.take_along_axis(codes, least[:, None], axis=1)[:, 0]

    size = min(_tile(), len(rows_BxD))
    if len(rows_BxD) % size:
        return tile(rows_BxD)
    return jax.lax.map(tile, rows_BxD.reshape(-1, size, width)).reshape(-1)


def _on_all_devices(function: Callable, inputs: tuple, outputs: tuple) -> Callable:
    return jax.jit(jax.shard_map(function, mesh=_mesh(), in_specs=inputs, out_specs=outputs))


@functools.cache
def _assign_batch(precision: Precision) -> Callable:
    """(rows [B,D], centroids [K,D]) -> codes int32 [B], squared distances float32 [B]."""

    def assign(rows: jax.Array, centroids: jax.Array) -> tuple[jax.Array, jax.Array]:
        codes = _assign(rows, centroids, precision)
        return codes, jnp.sum((rows - centroids[codes]) ** 2, 1)

    split, whole = PartitionSpec("rows"), PartitionSpec()
    return _on_all_devices(assign, (split, whole), (split, split))


@functools.cache
def _lloyd_batch(precision: Precision) -> Callable:
    """(rows, row numbers [B], count, centroids) -> moved [K,D], members int32 [K], squared distances [B].

    `moved` is the sum of (row - centroid) over the first `count` rows: small numbers, whose sums lose no digits.
    """

    def step(rows: jax.Array, number: jax.Array, count: jax.Array, centroids: jax.Array):
        size = len(centroids)
        codes = _assign(rows, centroids, precision)
        away = rows - centroids[codes]
        segment = jnp.where(number < count, codes, size)  # segment_sum drops what lies outside
        moved = jax.ops.segment_sum(away, segment, size)
        members = jax.ops.segment_sum(jnp.ones(len(rows), jnp.int32), segment, size)
        return *jax.lax.psum((moved, members), "rows"), jnp.sum(away**2, 1)

    split, whole = PartitionSpec("rows"), PartitionSpec()
    return _on_all_devices(step, (split, split, whole, whole), (whole, whole, split))


def nearest(
    vectors: Rows, centroids: np.ndarray, batch_size: int, precision: Precision = "float32"
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centroid of every vector.

    Args:
        vectors: float32 [N,D].
        centroids: float32 [K,D].
        batch_size: rows assigned at once.
        precision: of the scores; with bfloat16 the best few codes are compared again in float32.

    Returns:
        codes int32 [N] (ties to the lowest code) and squared Euclidean distances float32 [N].
    """
    book = jnp.asarray(centroids)
    codes, distances = np.empty(int(vectors.shape[0]), np.int32), np.empty(int(vectors.shape[0]), np.float32)
    at = 0
    for batch, found in _in_flight(vectors, batch_size, lambda batch: _assign_batch(precision)(batch.rows, book)):
        part = slice(at, at + batch.count)
        codes[part], distances[part] = (np.asarray(array)[: batch.count] for array in found)
        at = part.stop
    return codes, distances


def _in_flight(vectors: Rows, batch_size: int, function: Callable[[_Batch], Any]) -> Iterator[tuple[_Batch, Any]]:
    """function(batch) of every batch, in order; the next batches are read while one is computed."""
    pending: collections.deque[tuple[_Batch, Any]] = collections.deque()
    for batch in _batches(vectors, batch_size):
        pending.append((batch, function(batch)))
        if len(pending) > _AHEAD:
            yield pending.popleft()
    yield from pending


def _reseed(centroids: np.ndarray, members: np.ndarray, vectors: Rows, distances: np.ndarray) -> None:
    """Moves each empty code to one of the vectors farthest from their centroids, no two to the same vector."""
    empty = np.flatnonzero(members == 0)
    if not empty.size:
        return
    farthest = np.argsort(-distances, kind="stable")[: 4 * empty.size]
    farthest = farthest[distances[farthest] > 0]
    ordered = np.sort(farthest)
    rows = np.asarray(vectors[ordered], np.float32)[np.searchsorted(ordered, farthest)]
    _, first = np.unique(rows, axis=0, return_index=True)
    chosen = np.sort(first)[: empty.size]
    centroids[empty[: chosen.size]] = rows[chosen]


def lloyd(
    vectors: Rows, centroids: np.ndarray, iterations: int, batch_size: int, precision: Precision = "float32"
) -> np.ndarray:
    """Lloyd's iterations from given centroids float32 [K,D]; codes without members are re-seeded after each.

    A code that no distinct vector is left for stays where it was, without members.
    """
    centroids, step = centroids.copy(), _lloyd_batch(precision)
    distances = np.empty(int(vectors.shape[0]), np.float32)
    for _ in range(iterations):
        book = jnp.asarray(centroids)
        moved, members, at = np.zeros(centroids.shape), np.zeros(len(centroids), np.int64), 0

        def one(batch: _Batch, book: jax.Array = book) -> Any:
            return step(batch.rows, np.arange(len(batch.rows), dtype=np.int32), np.int32(batch.count), book)

        for batch, (batch_moved, batch_members, batch_distances) in _in_flight(vectors, batch_size, one):
            moved += np.asarray(batch_moved)
            members += np.asarray(batch_members)
            distances[at : at + batch.count] = np.asarray(batch_distances)[: batch.count]
            at += batch.count
        centroids += (moved / np.maximum(members, 1)[:, None]).astype(np.float32)
        _reseed(centroids, members, vectors, distances)
    return centroids


def k_means(
    vectors: Rows,
    size: int,
    iterations: int,
    seed: int | tuple[int, ...],
    batch_size: int,
    precision: Precision = "float32",
) -> np.ndarray:
    """Centroids float32 [K,D] of vectors float32 [N,D]: `plus_plus`, then `lloyd`."""
    return lloyd(vectors, plus_plus(vectors, size, seed), iterations, batch_size, precision)
