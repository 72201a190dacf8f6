"""Pairs of items that behaviour says belong together, for collaborative alignment (REFERENCE 1.1, TR 2.1.1).

Two sources, both of the positive events of train alone: item to item by Swing, and user to item, where a positive target
is paired with the closest of the user's latest positives before it.

Axis letters: I items, U users, N events, P pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import sparse

from onerec_jax.config import AlignmentConfig
from onerec_jax.errors import InputError
from onerec_jax.tokenizer.content import co_occurrence
from onerec_jax.tokenizer.runs import place_in_run

if TYPE_CHECKING:
    from onerec_jax.data.store import Dataset

USERS_PER_ITEM = 100  # the latest users of an item that Swing counts; bounds its pairs of users by I * 100^2 / 2
LATEST = 10  # positives before a target among which its partner is looked for
_KEPT = 200  # most similarities kept per item, so that partners are compared by Swing in bounded memory
_USERS_AT_ONCE = 512
_ITEMS_AT_ONCE = 512


class PositiveLog(NamedTuple):
    """Positive train events by user and time, each int64 [N]."""

    item: np.ndarray
    user: np.ndarray
    timestamp_ms: np.ndarray


class Pairs(NamedTuple):
    """Unordered pairs of item rows int32 [P,2] with left < right, none twice, and their shares of the draws float32 [P].

    Shares sum to 1. Every source has the same part; in it Swing gives every item the same part, split among its
    neighbours by similarity, and users give every event the same part.
    """

    items: np.ndarray
    weight: np.ndarray


def positive_log(dataset: Dataset) -> PositiveLog:
    """The positive events of every user before the user's train stop."""
    stops = np.asarray(dataset.train_stops, np.int64)
    parts = [(np.zeros(0, np.int64),) * 3]
    for first in range(0, len(stops), _USERS_AT_ONCE):
        users = np.arange(first, min(first + _USERS_AT_ONCE, len(stops)))
        for user, history in zip(users, dataset.histories(users), strict=True):
            kept = np.flatnonzero(history.positive[: stops[user]])
            parts.append((history.item[kept], np.full(len(kept), user), history.timestamp_ms[kept]))
    return PositiveLog(*(np.concatenate(column).astype(np.int64) for column in zip(*parts, strict=True)))


def _incidence(log: PositiveLog, num_items: int, num_users: int, users_per_item: int) -> sparse.csr_matrix:
    """0/1 matrix [U,I] of who has what, of each item its latest `users_per_item` users alone (ties: the higher row)."""
    order = np.lexsort((-log.timestamp_ms, -log.user, log.item))
    item, user, time = (column[order] for column in log)
    first = np.diff(item * num_users + user, prepend=-1) != 0  # an item met again counts once, at its latest time
    item, user, time = item[first], user[first], time[first]
    order = np.lexsort((-user, -time, item))
    item, user = item[order], user[order]
    kept = place_in_run(item) < users_per_item
    ones = np.ones(int(kept.sum()), np.float32)
    return sparse.csr_matrix((ones, (user[kept], item[kept])), shape=(num_users, num_items))


def _user_pairs(incidence: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """All u < v with two or more items in common, each int64 [Q]."""
    transposed, left, right = sparse.csr_matrix(incidence.T), [], []
    for first in range(0, len(incidence.indptr) - 1, _USERS_AT_ONCE):
        shared = sparse.coo_matrix(incidence[first : first + _USERS_AT_ONCE] @ transposed)
        kept = (shared.data >= 2) & (shared.row + first < shared.col)
        left.append(shared.row[kept].astype(np.int64) + first)
        right.append(shared.col[kept].astype(np.int64))
    return np.concatenate(left), np.concatenate(right)


def strongest(matrix: sparse.csr_matrix, most: int) -> sparse.csr_matrix:
    """The `most` largest entries of every row; of equal ones those of the lower columns."""
    cells = sparse.coo_matrix(matrix)
    order = np.lexsort((cells.col, -np.asarray(cells.data, np.float64), cells.row))
    kept = order[place_in_run(cells.row[order]) < most]
    return sparse.csr_matrix((cells.data[kept], (cells.row[kept], cells.col[kept])), shape=matrix.shape)


def swing(
    log: PositiveLog, num_items: int, alpha: float, most: int, users_per_item: int = USERS_PER_ITEM
) -> sparse.csr_matrix:
    """Swing similarities float64 [I,I], the `most` largest per row (Yang et al. 2020, arXiv 2010.05525).

        s(i, j) = sum over u < v, both with i and j, of  w_u w_v / (alpha + |I_u & I_v|),   w_u = 1 / sqrt(|I_u|)

    I_u are the distinct items of user u. In bounded memory: of every item its latest `users_per_item` users make
    pairs, and count in |I_u & I_v|; |I_u| in w_u counts all.
    """
    num_users = int(log.user.max(initial=-1)) + 1
    if not num_users:
        return sparse.csr_matrix((num_items, num_items))
    everything = np.unique(log.user * num_items + log.item) // num_items
    weight = 1 / np.sqrt(np.maximum(np.bincount(everything, minlength=num_users), 1))
    incidence = _incidence(log, num_items, num_users, users_per_item)
    left, right = _user_pairs(incidence)
    shared = sparse.csr_matrix(incidence[left].multiply(incidence[right]))  # [Q,I], the items of both
    pair_weight = weight[left] * weight[right] / (alpha + np.asarray(shared.sum(1)).ravel())
    by_item, weighted = sparse.csr_matrix(shared.T), sparse.diags(pair_weight) @ shared
    rows = [sparse.csr_matrix((0, num_items))]
    for first in range(0, num_items, _ITEMS_AT_ONCE):
        block = sparse.coo_matrix(by_item[first : first + _ITEMS_AT_ONCE] @ weighted)
        other = block.row + first != block.col
        block = sparse.csr_matrix((block.data[other], (block.row[other], block.col[other])), shape=block.shape)
        rows.append(strongest(block, most))
    return sparse.csr_matrix(sparse.vstack(rows))


def closest_before(log: PositiveLog, similarity: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Of every positive event that has one the partner and the target, each int64 [n].

    The partner is the most similar of the user's `LATEST` positives before it, by `similarity` [I,I] first, then by
    co-occurrence, then the later one. The same item again is no partner.
    """
    both = sparse.csr_matrix(similarity.maximum(similarity.T))
    met = co_occurrence(log.item, log.user, len(similarity.indptr) - 1, LATEST)
    partner = np.full(len(log.item), -1)
    best = np.full((2, len(log.item)), -1.0)
    for gap in range(1, LATEST + 1):
        at = gap + np.flatnonzero((log.user[gap:] == log.user[:-gap]) & (log.item[gap:] != log.item[:-gap]))
        if not at.size:
            continue
        cells = log.item[at], log.item[at - gap]
        near, count = (np.asarray(matrix[cells]).ravel() for matrix in (both, met))
        better = (near > best[0, at]) | ((near == best[0, at]) & (count > best[1, at]))
        at = at[better]
        partner[at], best[0, at], best[1, at] = log.item[at - gap], near[better], count[better]
    found = partner >= 0
    return partner[found], log.item[found]


def mine_pairs(dataset: Dataset, settings: AlignmentConfig) -> Pairs:
    """Item pairs from the positive train events of a dataset, of the sources that `settings.pairs` names.

    Raises:
        InputError: no source is named, or none gives a pair.
    """
    if not settings.pairs:
        raise InputError("tokenizer.alignment.pairs is empty; name 'swing', 'user' or both")
    log, num_items = positive_log(dataset), dataset.num_items
    similarity = swing(log, num_items, settings.swing_alpha, max(settings.neighbours, _KEPT))
    sources = []
    if "swing" in settings.pairs:
        cells = sparse.coo_matrix(strongest(similarity, settings.neighbours))
        total = np.bincount(cells.row, cells.data, num_items)
        sources.append((cells.row, cells.col, cells.data / total[cells.row]))
    if "user" in settings.pairs:
        partner, target = closest_before(log, similarity)
        sources.append((partner, target, np.ones(len(target))))
    sources = [source for source in sources if len(source[0])]
    if not sources:
        raise InputError(
            f"tokenizer.alignment.pairs {list(settings.pairs)} gives no pair of items: no two users share two positive "
            "items in train, or no user has two; set tokenizer.alignment.steps=0"
        )
    return _merged(sources, num_items)


def _merged(sources: list[tuple[np.ndarray, np.ndarray, np.ndarray]], num_items: int) -> Pairs:
    keys = [
        np.minimum(left, right).astype(np.int64) * num_items + np.maximum(left, right) for left, right, _ in sources
    ]
    share = [weight / weight.sum() / len(sources) for _, _, weight in sources]
    unique, position = np.unique(np.concatenate(keys), return_inverse=True)
    items = np.column_stack([unique // num_items, unique % num_items]).astype(np.int32)
    return Pairs(items, np.bincount(position, np.concatenate(share)).astype(np.float32))
