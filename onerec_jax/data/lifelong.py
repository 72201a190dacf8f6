"""Lifelong compression: hierarchical k-means over the content vectors of one user's events.

Source: OneRec technical report, section 2.2.1 (lifelong pathway). A set of n events is split into floor(n^(1/3))
clusters, each of which is split again until none holds more than M events. A cluster stands in the sequence with the
categorical features of its event closest to the centre and with the means of the continuous ones.

Axis letters: n events of one user, S clusters, D content dimensions; G sets split together, of P padded events, into K.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np
import pyarrow as pa

ITERATIONS = 10
HASH_ROWS = 1 << 16
HASHED_DIMENSIONS = 64
_PADDED_FLOATS = 1 << 24  # bound on the padded vectors of one call, 64 MiB


class Clusters(NamedTuple):
    """Clusters of one user's events, ordered by mean time."""

    representative: np.ndarray  # int32 [S], the event closest to the centre
    count: np.ndarray  # int32 [S], events in the cluster
    timestamp_ms: np.ndarray  # int64 [S], mean
    playtime_s: np.ndarray  # float32 [S], mean over the events where it is known, -1 = nowhere
    duration_s: np.ndarray  # float32 [S], the same


def compress(
    vectors_nxD: np.ndarray, timestamp_ms: np.ndarray, playtime_s: np.ndarray, duration_s: np.ndarray, max_size: int
) -> Clusters:
    """Compresses n events, oldest first, to clusters of at most `max_size`; deterministic.

    Args:
        vectors_nxD: float32, content of each event's item.
        timestamp_ms: int64 [n].
        playtime_s: float32 [n], negative = unknown.
        duration_s: float32 [n], negative = unknown.
        max_size: M, at least 1.
    """
    cluster = cluster_events(vectors_nxD, max_size)
    order = np.argsort(cluster, kind="stable")
    count = np.bincount(cluster)
    starts = np.cumsum(count) - count
    centres = np.add.reduceat(vectors_nxD[order], starts, axis=0) / count[:, None]
    distance = np.square(vectors_nxD - centres[cluster]).sum(axis=1)
    representative = np.lexsort((distance, cluster))[starts]
    # Means from the first timestamp on: sums of milliseconds since 1970 would lose the last bits of a float64.
    mean_ms = timestamp_ms[0] + np.bincount(cluster, timestamp_ms - timestamp_ms[0]) / count
    by_time = np.lexsort((representative, mean_ms))
    return Clusters(
        representative[by_time].astype(np.int32),
        count[by_time].astype(np.int32),
        mean_ms[by_time].astype(np.int64),
        _known_mean(playtime_s, cluster)[by_time],
        _known_mean(duration_s, cluster)[by_time],
    )


def _known_mean(values: np.ndarray, cluster: np.ndarray) -> np.ndarray:
    known = values >= 0
    total = np.bincount(cluster, np.where(known, values, 0))
    count = np.bincount(cluster, known)
    return np.where(count > 0, total / np.maximum(count, 1), -1).astype(np.float32)


def cluster_events(vectors_nxD: np.ndarray, max_size: int) -> np.ndarray:
    """The cluster of each event, int64 [n], numbered from 0; no cluster holds more than `max_size` events.

    A set that k-means cannot divide (identical vectors) is divided by order, so that it always ends.
    """
    cluster = np.zeros(len(vectors_nxD), np.int64)
    while True:
        size = np.bincount(cluster)
        parts = np.where(size > max_size, np.maximum(2, np.cbrt(size + 0.5).astype(np.int64)), 1)
        if (parts == 1).all():
            return cluster
        part = np.zeros(len(cluster), np.int64)
        order = np.argsort(cluster, kind="stable")
        starts = np.cumsum(size) - size
        for k in np.unique(parts[parts > 1]):
            for sets in _chunks(np.flatnonzero(parts == k), size, vectors_nxD.shape[1]):
                column = np.arange(size[sets].max())
                valid_GxP = column < size[sets][:, None]
                events_GxP = order[np.where(valid_GxP, starts[sets][:, None] + column, 0)]
                part[events_GxP[valid_GxP]] = _split(vectors_nxD[events_GxP], valid_GxP, int(k))[valid_GxP]
        cluster = np.unique(cluster * parts.max() + part, return_inverse=True)[1].reshape(-1)


def _chunks(sets: np.ndarray, size: np.ndarray, dimensions: int) -> list[np.ndarray]:
    per_chunk = max(1, _PADDED_FLOATS // max(1, int(size[sets].max()) * dimensions))
    return [sets[i : i + per_chunk] for i in range(0, len(sets), per_chunk)]


def _split(vectors_GxPxD: np.ndarray, valid_GxP: np.ndarray, parts: int) -> np.ndarray:
    """Lloyd's iterations on G sets at once, from spread-out starts; the part of each event, int64 [G,P]."""
    vectors_GxPxD = np.where(valid_GxP[..., None], vectors_GxPxD, 0)
    centres_GxKxD = _spread_starts(vectors_GxPxD, valid_GxP, parts)
    part_GxP = np.full(valid_GxP.shape, -1)
    for _ in range(ITERATIONS):
        previous, part_GxP = part_GxP, np.where(valid_GxP, _nearest(vectors_GxPxD, centres_GxKxD), -1)
        if np.array_equal(previous, part_GxP):
            break
        member_GxKxP = (part_GxP[:, None, :] == np.arange(parts)[:, None]).astype(np.float32)
        count_GxKx1 = member_GxKxP.sum(axis=2, keepdims=True)
        means_GxKxD = (member_GxKxP @ vectors_GxPxD) / np.maximum(count_GxKx1, 1)
        centres_GxKxD = np.where(count_GxKx1 > 0, means_GxKxD, centres_GxKxD)
    undivided_G = ((part_GxP == part_GxP[:, :1]) | ~valid_GxP).all(axis=1)
    by_order_GxP = np.arange(valid_GxP.shape[1]) * parts // valid_GxP.sum(axis=1)[:, None]
    return np.where(undivided_G[:, None], by_order_GxP, part_GxP)


def _nearest(vectors_GxPxD: np.ndarray, centres_GxKxD: np.ndarray) -> np.ndarray:
    half_norms_Gx1xK = 0.5 * np.square(centres_GxKxD).sum(axis=-1)[:, None, :]
    # A transposed operand sends OpenBLAS to its threads even for small products: 8 ms, not 50 us, for 2000 x 32 x 12.
    centres_GxDxK = np.ascontiguousarray(centres_GxKxD.transpose(0, 2, 1))
    return np.argmin(half_norms_Gx1xK - vectors_GxPxD @ centres_GxDxK, axis=-1)


def _spread_starts(vectors_GxPxD: np.ndarray, valid_GxP: np.ndarray, parts: int) -> np.ndarray:
    """K starts per set: the event farthest from the mean, then each time the one farthest from all chosen."""
    sets = np.arange(len(vectors_GxPxD))
    norms_GxP = np.einsum("gpd,gpd->gp", vectors_GxPxD, vectors_GxPxD)

    def distance_to(centre_GxD: np.ndarray) -> np.ndarray:
        distance_GxP = norms_GxP - 2 * (vectors_GxPxD @ centre_GxD[..., None])[..., 0]
        return np.where(valid_GxP, distance_GxP + np.square(centre_GxD).sum(axis=-1)[:, None], -np.inf)

    distance_GxP = distance_to((vectors_GxPxD.sum(axis=1) / valid_GxP.sum(axis=1)[:, None]).astype(np.float32))
    starts = [vectors_GxPxD[sets, distance_GxP.argmax(axis=1)]]
    distance_GxP = distance_to(starts[0])
    while len(starts) < parts:
        starts.append(vectors_GxPxD[sets, distance_GxP.argmax(axis=1)])
        distance_GxP = np.minimum(distance_GxP, distance_to(starts[-1]))
    return np.stack(starts, axis=1)


def hashed_content(items: pa.Table, seed: int) -> np.ndarray:
    """Content vectors float32 [I,64] for items without embeddings: the normalised sum of one random vector per feature.

    Features are the author, each tag and each lower-case word of the text; CRC-32 of "field=value" picks a row of a
    seeded Gaussian table of 65,536 rows, so that items sharing features are close (a random projection of the bag of
    features).
    """
    table = np.random.default_rng(seed).standard_normal((HASH_ROWS, HASHED_DIMENSIONS), np.float32)
    vectors = np.zeros((items.num_rows, HASHED_DIMENSIONS), np.float32)
    columns = {name: items[name].to_pylist() for name in ("author_id", "tags", "text") if name in items.column_names}
    for name, values in columns.items():
        for row, value in enumerate(values):
            if value is None:
                continue
            words = value.lower().split() if name == "text" else value if name == "tags" else [value]
            features = [zlib.crc32(f"{name}={word}".encode()) % HASH_ROWS for word in words]
            vectors[row] += table[np.asarray(features, np.int64)].sum(axis=0)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(norms, 1e-12)
