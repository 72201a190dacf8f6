"""The prefix tree of the semantic IDs that exist, as flat arrays: what beams walk, and the way to items."""

from __future__ import annotations

import dataclasses

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
        count, levels = codes.shape
        order = np.lexsort((-priority, *codes.T[::-1]))
        ordered = codes[order]
        opens = np.zeros(count, bool)  # the row is the first of its prefix
        opens[:1] = True
        firsts = [np.zeros(1, np.int64)]
        child_start, token = [], []
        for level in range(levels):
            opens[1:] |= ordered[1:, level] != ordered[:-1, level]
            first = np.flatnonzero(opens)
            child_start.append(np.append(np.searchsorted(first, firsts[-1]), len(first)).astype(np.int32))
            token.append(ordered[first, level].astype(np.int32))
            firsts.append(first)
        item_start = np.append(firsts[-1], count).astype(np.int32)
        return cls(tuple(child_start), tuple(token), item_start, order.astype(np.int32))

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

    def leaf_items(self, leaf: int) -> np.ndarray:
        """Item rows int32 of one leaf, in the order in which they are served."""
        return self.items[self.item_start[leaf] : self.item_start[leaf + 1]]
