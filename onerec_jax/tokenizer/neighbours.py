"""Neighbours kept: how often items that belong together start with the same codes, beside what chance gives."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse

from onerec_jax.tokenizer.kmeans import Rows
from onerec_jax.tokenizer.runs import place_in_run

_SCORES_AT_ONCE = 1 << 24  # similarities held in memory; bounds memory, not the result


def prefix_groups(codes: np.ndarray) -> np.ndarray:
    """A number int64 [I,L] for the prefix of every length 1 to L of codes int [I,L]: equal numbers, equal prefixes."""
    groups = np.empty(codes.shape, np.int64)
    above = np.zeros(len(codes), np.int64)
    for level, column in enumerate(codes.T):
        width = int(column.max(initial=0)) + 1
        above = np.unique(above * width + column, return_inverse=True)[1].ravel()
        groups[:, level] = above
    return groups


def chance(groups: np.ndarray) -> list[float]:
    """The probability that two different items, drawn at random, share a prefix, for each column of groups [I,L]."""
    pairs = max(1, len(groups) * (len(groups) - 1))
    sizes = [np.bincount(column).astype(np.float64) for column in groups.T]
    return [float((size * (size - 1)).sum() / pairs) for size in sizes]


def _unit(content: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows [N,D] at length 1, float32, and which of them are zero, bool [N]."""
    norm = np.linalg.norm(content, axis=1)
    return (content / np.where(norm > 0, norm, 1)[:, None]).astype(np.float32), norm == 0


def content_neighbours(content: Rows, queries: np.ndarray, n: int, batch_size: int = 65_536) -> np.ndarray:
    """Item rows int64 [Q,n] of highest cosine with each query item, itself left out; -1 where there are fewer.

    An item without content (a zero vector) has no neighbours and is nobody's. Of content float32 [I,D] the rows of the
    queries are held, and `batch_size` others at a time.
    """
    asking, nothing = _unit(np.asarray(content[queries]))
    found = np.full((len(queries), n), -1, np.int64)
    score = np.full(found.shape, -np.inf, np.float32)
    items = int(content.shape[0])
    for first in range(0, items, batch_size):
        size = min(batch_size, items - first)
        unit, empty = _unit(np.asarray(content[first : first + size]))
        rows_at_once = max(1, _SCORES_AT_ONCE // size)
        for start in range(0, len(queries), rows_at_once):
            part = slice(start, start + rows_at_once)
            scores = asking[part] @ unit.T
            scores[:, empty] = -np.inf
            own = queries[part] - first
            here = (own >= 0) & (own < size)
            scores[here, own[here]] = -np.inf
            best = np.argpartition(scores, -min(n, size), axis=1)[:, -min(n, size) :]
            both = np.hstack([score[part], np.take_along_axis(scores, best, axis=1)])
            top = np.argpartition(both, -n, axis=1)[:, -n:]
            score[part] = np.take_along_axis(both, top, axis=1)
            found[part] = np.take_along_axis(np.hstack([found[part], best + first]), top, axis=1)
    found[~np.isfinite(score)] = -1
    found[nothing] = -1
    return found


def co_clicked_neighbours(co_occurrence: sparse.csr_matrix, queries: np.ndarray, n: int) -> np.ndarray:
    """Item rows int64 [Q,n] most often met together with each query item, ties by row; -1 where there are fewer.

    `co_occurrence` holds counts [I,I].
    """
    cells = sparse.coo_matrix(sparse.csr_matrix(co_occurrence)[queries])
    query, item = cells.row.astype(np.int64), cells.col.astype(np.int64)
    counted = (cells.data > 0) & (item != queries[query])
    query, item, count = query[counted], item[counted], np.asarray(cells.data[counted], np.float64)
    order = np.lexsort((item, -count, query))
    query, item = query[order], item[order]
    rank = place_in_run(query)
    found = np.full((len(queries), n), -1, np.int64)
    found[query[rank < n], rank[rank < n]] = item[rank < n]
    return found


def recall(groups: np.ndarray, queries: np.ndarray, neighbours: np.ndarray) -> tuple[list[float] | None, int]:
    """The share of neighbours in a query item's own group, for each column of groups [I,L], and how many items count.

    A mean over those of the items `queries` [Q] that have a neighbour (`neighbours` [Q,n], -1 for none); None without
    such an item.
    """
    known = neighbours >= 0
    asked = known.any(1)
    if not asked.any():
        return None, 0
    number = known[asked].sum(1)
    shares = []
    for group in groups.T:
        same = (group[neighbours[asked]] == group[queries[asked], None]) & known[asked]
        shares.append(float((same.sum(1) / number).mean()))
    return shares, int(asked.sum())


def neighbour_recall(
    codes: np.ndarray,
    content: Rows,
    co_occurrence: sparse.csr_matrix | None,
    n: int = 10,
    seed: int = 0,
    sample: int = 20_000,
    batch_size: int = 65_536,
) -> dict[str, Any]:
    """How many of an item's neighbours share its prefix of length 1 to L, as plain values.

    Recall divided by chance is the lift: 1 where the codes know nothing of the neighbourhood.

    Args:
        codes: int [I,L].
        content: vectors float32 [I,D]; the n neighbours are those of highest cosine.
        co_occurrence: counts of train co-occurrence [I,I], of which the n largest of a row are neighbours; None without.
        n: neighbours per item, or all there are.
        seed: of the sample.
        sample: query items at most; all items if there are no more. Neighbours are searched among all items.
        batch_size: rows of content searched at once; bounds memory, not the result.

    Returns:
        `chance`, `content` and `co_clicked`: L shares each (None where no item has such a neighbour);
        `content_queries` and `co_clicked_queries`: items they are the mean of; `neighbours`: n.
    """
    groups = prefix_groups(codes)
    queries = np.arange(len(codes))
    if len(codes) > sample:
        queries = np.sort(np.random.default_rng(seed).choice(len(codes), sample, replace=False))
    result: dict[str, Any] = {"neighbours": n, "chance": chance(groups)}
    found = {"content": content_neighbours(content, queries, n, batch_size), "co_clicked": None}
    if co_occurrence is not None:
        found["co_clicked"] = co_clicked_neighbours(co_occurrence, queries, n)
    for name, neighbours in found.items():
        none = (None, 0)
        shares, asked = none if neighbours is None else recall(groups, queries, neighbours)
        result |= {name: shares, f"{name}_queries": asked}
    return result
