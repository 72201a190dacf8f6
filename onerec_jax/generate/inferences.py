"""Several inferences per request: contexts with events left out, and the mean of the lists that come of them."""

from __future__ import annotations

import dataclasses

import numpy as np

from onerec_jax.data.schema import Batch, ItemFeatures


def leave_out(batch: Batch, share: float, rng: np.random.Generator) -> Batch:
    """The batch without a random `share` of the events of `short`, of which the most recent always stays.

    A pathway's features are as they were: the age of an event still counts from the event before it in the log.
    """
    item = batch.short.item
    valid = item >= 0
    last = np.arange(item.shape[1]) == valid.sum(axis=1, keepdims=True) - 1
    keep = valid & ((rng.random(item.shape) >= share) | last)
    order = np.argsort(~keep, axis=1, kind="stable")
    kept = keep.sum(axis=1, keepdims=True)
    room = np.arange(item.shape[1]) < kept

    def shorter(values: np.ndarray) -> np.ndarray:
        shape = values.shape[:2] + (1,) * (values.ndim - 2)
        moved = np.take_along_axis(values, order.reshape(shape), axis=1)
        return np.where(room.reshape(shape), moved, -1 if values is item else 0).astype(values.dtype)

    short = {field.name: shorter(getattr(batch.short, field.name)) for field in dataclasses.fields(batch.short)}
    return dataclasses.replace(
        batch, short=ItemFeatures(**short), visible=np.minimum(batch.visible, kept).astype(batch.visible.dtype)
    )


def average_lists(items_ExNxK: np.ndarray, scores_ExNxK: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k items of the highest mean probability over E lists per request; one that a list lacks has 0 there."""
    lists, n, _ = items_ExNxK.shape
    items = items_ExNxK.transpose(1, 0, 2).reshape(n, -1)
    scores = scores_ExNxK.transpose(1, 0, 2).reshape(n, -1).astype(np.float64)
    top = np.max(scores, axis=1, keepdims=True, initial=-np.inf)
    share = np.where(items < 0, 0.0, np.exp(scores - np.where(np.isfinite(top), top, 0.0)))
    order = np.argsort(items, axis=1, kind="stable")
    items, share = np.take_along_axis(items, order, 1), np.take_along_axis(share, order, 1)
    opens = np.ones(items.shape, bool)
    opens[:, 1:] = items[:, 1:] != items[:, :-1]
    start = np.flatnonzero(opens)
    total = np.zeros(items.shape)
    total.reshape(-1)[start] = np.add.reduceat(share.reshape(-1), start)
    total = np.where(opens & (items >= 0), total, -1.0)
    best = np.argsort(-total, axis=1, kind="stable")[:, :k]
    total, found = np.take_along_axis(total, best, 1), np.take_along_axis(items, best, 1)
    with np.errstate(divide="ignore"):
        mean = np.log(np.maximum(total, 0.0) / lists) + np.where(np.isfinite(top), top, 0.0)
    missing = total < 0
    return np.where(missing, -1, found).astype(np.int32), np.where(missing, -np.inf, mean).astype(np.float32)
