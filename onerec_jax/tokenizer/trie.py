"""The prefix tree of the semantic IDs that exist, as flat arrays: what beams walk, and the way to items."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np


@dataclasses.dataclass(frozen=True)
class Trie:
    """Nodes of one depth are numbered in lexicographic order of their prefixes; depth 0 is the root, depth C the IDs.

    The children of node n at depth l are the nodes child_start[l][n] to child_start[l][n+1]-1 of depth l+1, in the
    order of their codes. The items of leaf n are items[item_start[n]:item_start[n+1]], the first to be served first.
    """

    child_start: tuple[np.ndarray, ...]  # C arrays, int32 [nodes of depth l + 1]
    token: tuple[np.ndarray, ...]  # C arrays, int32 [nodes of depth l+1]: the code that leads to the node
    item_start: np.ndarray  # int32 [leaves + 1]
    items: np.ndarray  # int32 [I], item rows

    @classmethod
    def build(cls, codes: np.ndarray, priority: np.ndarray) -> Trie:
        """The trie of codes int [I,C]; items of one ID by descending priority float [I], then by row."""
        order, columns = _in_order(codes, priority)
        count = len(order)
        opens = np.zeros(count, bool)  # the row is the first of its prefix
        opens[:1] = True
        firsts = [np.zeros(1, np.int32)]
        child_start, token = [], []
        for column in columns:
            opens[1:] |= column[1:] != column[:-1]
            first = np.flatnonzero(opens).astype(np.int32)
            child_start.append(np.append(np.searchsorted(first, firsts[-1]), len(first)).astype(np.int32))
            token.append(column[first])
            firsts.append(first)
        return cls(tuple(child_start), tuple(token), np.append(firsts[-1], count).astype(np.int32), order)

    @property
    def codes(self) -> np.ndarray:
        """The semantic ID of every item, int32 [I,C]."""
        found = np.zeros((1, 0), np.int32)
        for start, token in zip(self.child_start, self.token, strict=True):
            found = np.concatenate([np.repeat(found, np.diff(start), axis=0), token[:, None]], axis=1)
        codes = np.empty((len(self.items), self.levels), np.int32)
        codes[self.items] = np.repeat(found, np.diff(self.item_start), axis=0)
        return codes

    @property
    def levels(self) -> int:
        return len(self.token)

    @property
    def leaves(self) -> int:
        """Distinct semantic IDs."""
        return len(self.item_start) - 1

    @property
    def branching(self) -> tuple[int, ...]:
        """Most children of a node, for each depth 0 to C-1."""
        return tuple(int(np.diff(start).max(initial=0)) for start in self.child_start)

    def find(self, codes: np.ndarray) -> np.ndarray:
        """The node int [N] at depth l that each prefix int [N,l] leads to; -1 where no item has the prefix."""
        node = np.zeros(len(codes), np.int64)
        for column, start, token in zip(codes.T, self.child_start, self.token, strict=False):
            if not len(token):
                return np.full(len(codes), -1)
            low, end = start[np.maximum(node, 0)], start[np.maximum(node, 0) + 1]
            high = end
            while (low < high).any():
                middle = (low + high) // 2
                right = (low < high) & (token[np.minimum(middle, len(token) - 1)] < column)
                low, high = np.where(right, middle + 1, low), np.where(right, high, middle)
            known = (node >= 0) & (low < end) & (token[np.minimum(low, len(token) - 1)] == column)
            node = np.where(known, low, -1)
        return node

    def leaf_starts(self, depth: int) -> np.ndarray:
        """The first leaf under each node of a depth, 0 to C, and at last the number of leaves; int [nodes + 1]."""
        first = np.arange(2 if depth == 0 else len(self.token[depth - 1]) + 1)
        for start in self.child_start[depth:]:
            first = start[first]
        return first

    def leaf_items(self, leaf: int) -> np.ndarray:
        """Item rows int32 of one leaf, in the order in which they are served."""
        return self.items[self.item_start[leaf] : self.item_start[leaf + 1]]

    def children(self, depth: int, node: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and one past the last child, int32 [N] each, of nodes int [N] at a depth: one gather of `child_start`."""
        bounds = self.child_start[depth][np.asarray(node)[:, None] + np.arange(2)]
        return bounds[:, 0], bounds[:, 1]


def _in_order(codes: np.ndarray, priority: np.ndarray) -> tuple[np.ndarray, Iterator[np.ndarray]]:
    """Item rows int32 [I] in the order of the leaves, and the columns of codes int32 [I] in that order, one at a time.

    Where an ID and an item's place in priority order fit into 63 bits together, which holds for 10^7 items of 3 x 8192,
    numbers that hold both are sorted in place; that takes a third of the time and memory of sorting by columns.
    """
    count, levels = codes.shape
    served = np.argsort(-np.asarray(priority), kind="stable").astype(np.int32)
    bits = [int(column.max(initial=0)).bit_length() for column in codes.T]
    place = max(1, count - 1).bit_length()
    if sum(bits) + place > 63:
        order = served[np.lexsort(codes[served].T[::-1])]
        return order, (codes[order, level].astype(np.int32) for level in range(levels))
    rank = np.empty(count, np.int32)
    rank[served] = np.arange(count, dtype=np.int32)
    key = np.zeros(count, np.int64)
    for column, width in zip((*codes.T, rank), (*bits, place), strict=True):
        key <<= width
        key |= column
    del rank
    key.sort()
    order = served[key & ((1 << place) - 1)]
    shifts = place + np.cumsum(bits[::-1])[::-1] - bits
    return order, (
        ((key >> shift) & ((1 << width) - 1)).astype(np.int32) for shift, width in zip(shifts, bits, strict=True)
    )
