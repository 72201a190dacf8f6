"""K-means in JAX: batched Lloyd iterations over rows in memory or in a store, on every device of this process.

Rows come from an array, or from anything that is sliced and indexed like one (a TensorStore, `Residuals`), a batch at a
time, so memory does not grow with their number. Batches have one static shape and are split over the devices. For a seed
the result is a function of the vectors alone; `batch_size` and the number of devices change only the order in which
float32 sums are taken.

Axis letters: N rows, D width, K codes, B rows of a batch, T rows of a tile.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from onerec_jax.tokenizer.assignment import Precision, assign
from onerec_jax.tokenizer.kmeans_start import plus_plus
from onerec_jax.tokenizer.relocation import relocate, reseed

__all__ = ["Precision", "Residuals", "Rows", "k_means", "lloyd", "nearest", "plus_plus"]

_CPU_TILE = 256  # rows scored at once on a CPU: their scores against a few thousand codes stay in the core's cache
_DEVICE_TILE = 8192
_CPU_BATCH = (
    8192  # a matrix product inside a loop has one thread on a CPU: batches are the unit that is run in parallel
)
_AHEAD = 2  # batches read before they are needed, so that reading overlaps with computing and memory stays bounded


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


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _cores() -> int:
    """CPU cores that this process may use; where the system does not tell, all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tile() -> int:
    return _CPU_TILE if _on_cpu() else _DEVICE_TILE


@functools.cache
def _mesh() -> Mesh:
    return Mesh(np.array(jax.local_devices()), ("rows",))


def _batches(vectors: Rows, batch_size: int) -> Iterator[_Batch]:
    total, devices = int(vectors.shape[0]), _mesh().devices.size
    size = min(batch_size, total, *([_CPU_BATCH * devices] if _on_cpu() else []))
    unit = devices * (_tile() if size > _tile() * devices else 1)
    size += -size % unit
    sharding = NamedSharding(_mesh(), PartitionSpec("rows"))
    for start in range(0, total, size):
        rows = np.asarray(vectors[start : min(start + size, total)], np.float32)
        padded = np.pad(rows, ((0, size - len(rows)), (0, 0))) if len(rows) < size else rows
        yield _Batch(jax.device_put(padded, sharding), len(rows))


def _on_all_devices(function: Callable, inputs: tuple, outputs: tuple) -> Callable:
    options = {"xla_cpu_multi_thread_eigen": False} if _on_cpu() else None  # batches are what runs in parallel there
    return jax.jit(jax.shard_map(function, mesh=_mesh(), in_specs=inputs, out_specs=outputs), compiler_options=options)


@functools.cache
def _assign_batch(precision: Precision) -> Callable:
    """(rows [B,D], centroids [K,D]) -> codes int32 [B], squared distances float32 [B]."""

    def nearest_of(rows: jax.Array, centroids: jax.Array) -> tuple[jax.Array, jax.Array]:
        codes = assign(rows, centroids, precision, _tile())
        return codes, jnp.sum((rows - centroids[codes]) ** 2, 1)

    split, whole = PartitionSpec("rows"), PartitionSpec()
    return _on_all_devices(nearest_of, (split, whole), (split, split))


@functools.cache
def _lloyd_batch(precision: Precision) -> Callable:
    """(rows, row numbers [B], count, centroids) -> moved [K,D], codes int32 [B], squared distances [B].

    `moved` is the sum of (row - centroid) over the first `count` rows: small numbers, whose sums lose no digits.
    """

    def step(rows: jax.Array, number: jax.Array, count: jax.Array, centroids: jax.Array):
        codes = assign(rows, centroids, precision, _tile())
        away = rows - centroids[codes]
        segment = jnp.where(number < count, codes, len(centroids))  # segment_sum drops what lies outside
        moved = jax.ops.segment_sum(away, segment, len(centroids))
        return jax.lax.psum(moved, "rows"), codes, jnp.sum(away**2, 1)

    split, whole = PartitionSpec("rows"), PartitionSpec()
    return _on_all_devices(step, (split, split, whole, whole), (whole, split, split))


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
    """function(batch) of every batch, in order; the next batches are read while some are computed."""
    workers = _cores() if _on_cpu() else 1

    def ready(batch: _Batch) -> tuple[_Batch, Any]:
        return batch, jax.block_until_ready(function(batch))

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        pending: collections.deque[concurrent.futures.Future] = collections.deque()
        for batch in _batches(vectors, batch_size):
            pending.append(pool.submit(ready, batch))
            if len(pending) >= workers + _AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def lloyd(
    vectors: Rows,
    centroids: np.ndarray,
    iterations: int,
    batch_size: int,
    precision: Precision = "float32",
    relocating: float = 0.8,
) -> np.ndarray:
    """Lloyd's iterations from given centroids float32 [K,D].

    After each of the first `relocating` of the iterations codes that hardly serve move to where they serve better
    (`relocate`); the others let them settle. Where none moved, codes without members are re-seeded; one that no distinct
    vector is left for stays where it was.
    """
    centroids, step, total = centroids.copy(), _lloyd_batch(precision), int(vectors.shape[0])
    codes, distances = np.empty(total, np.int32), np.empty(total, np.float32)
    for iteration in range(iterations):
        book = jnp.asarray(centroids)
        moved, at = np.zeros(centroids.shape), 0

        def one(batch: _Batch, book: jax.Array = book) -> Any:
            return step(batch.rows, np.arange(len(batch.rows), dtype=np.int32), np.int32(batch.count), book)

        for batch, (batch_moved, *of_rows) in _in_flight(vectors, batch_size, one):
            part = slice(at, at + batch.count)
            moved += np.asarray(batch_moved)
            codes[part], distances[part] = (np.asarray(array)[: batch.count] for array in of_rows)
            at = part.stop
        members = np.bincount(codes, minlength=len(centroids))
        centroids += (moved / np.maximum(members, 1)[:, None]).astype(np.float32)
        early = iteration < relocating * (iterations - 1)
        if not early or not relocate(centroids, vectors, codes, distances):
            reseed(centroids, vectors, codes, distances)
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
