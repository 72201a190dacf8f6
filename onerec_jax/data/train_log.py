"""The train part of a log, flat: what baselines are fitted on. Axis letters: E train events, I items."""

from __future__ import annotations

import dataclasses

import numpy as np

from onerec_jax.data.schema import DAY_MS
from onerec_jax.data.store import Dataset


@dataclasses.dataclass(frozen=True)
class TrainLog:
    """The train part of a log, sorted by user, then time."""

    user: np.ndarray  # int32 [E]
    item: np.ndarray  # int32 [E]
    timestamp_ms: np.ndarray  # int64 [E]
    positive: np.ndarray  # bool [E]
    num_users: int
    num_items: int

    def recent_positives(self, days: float) -> np.ndarray:
        """Positive events of every item int64 [I] in the last `days` before the latest event."""
        start_ms = self.timestamp_ms.max(initial=0) - days * DAY_MS
        recent = self.positive & (self.timestamp_ms > start_ms)
        return np.bincount(self.item[recent], minlength=self.num_items)


def train_log(dataset: Dataset) -> TrainLog:
    """The train part of every user's history, flat."""
    users, items, times, positives = [], [], [], []
    for first in range(0, dataset.num_users, 4096):
        rows = np.arange(first, min(first + 4096, dataset.num_users))
        for row, history in zip(rows.tolist(), dataset.histories(rows), strict=True):
            stop = dataset.train_stop(row)
            users.append(np.full(stop, row, np.int32))
            items.append(history.item[:stop])
            times.append(history.timestamp_ms[:stop])
            positives.append(history.positive[:stop])
    return TrainLog(
        user=np.concatenate(users),
        item=np.concatenate(items).astype(np.int32),
        timestamp_ms=np.concatenate(times),
        positive=np.concatenate(positives),
        num_users=dataset.num_users,
        num_items=dataset.num_items,
    )
