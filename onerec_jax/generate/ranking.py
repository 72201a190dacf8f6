"""The best items of a matrix of scores."""

from __future__ import annotations

import numpy as np

Ragged = tuple[np.ndarray, np.ndarray]


def rank(scores: np.ndarray, exclude: Ragged | None, k: int) -> np.ndarray:
    """The k best items of each row of `scores` [N,I], best first, equal scores by item row.

    `exclude` names items, per example, that may not be listed. Items scored -inf are not listed either.

    Returns:
        int32 [N,k], -1 in the last places where fewer than k items are left.
    """
    examples, items = scores.shape
    if exclude is not None:
        flat, offsets = exclude
        scores = scores.copy()
        scores[np.repeat(np.arange(examples), np.diff(offsets)), flat] = -np.inf
    listed = np.full((examples, k), -1, dtype=np.int32)
    count = min(k, items)
    threshold = np.partition(scores, items - count, axis=1)[:, items - count, None]
    above = scores > threshold
    tied = scores == threshold
    tied &= np.cumsum(tied, axis=1, dtype=np.int32) <= count - above.sum(axis=1, keepdims=True)
    best = np.nonzero(above | tied)[1].reshape(examples, count)
    best_scores = np.take_along_axis(scores, best, axis=1)
    order = np.argsort(-best_scores, axis=1, kind="stable")
    best = np.where(np.isneginf(best_scores), -1, best)
    listed[:, :count] = np.take_along_axis(best, order, axis=1)
    return listed
