"""Which requests reject-sampling fine-tuning keeps: those that were watched longest (REFERENCE 1.8).

N examples, U users.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from onerec_jax.data.store import Dataset

Per = Literal["user", "all"]


def longest_watched(dataset: Dataset, examples: np.ndarray, share: float, per: Per) -> np.ndarray:
    """Examples int64 [M,4] whose targets were played longest in sum, about `share` of them; unknown play times add nothing.

    Ties at the threshold are kept, so that a user, or a log, of which nothing is known loses nothing.
    """
    if share == 1.0 or not len(examples):
        return examples
    played = np.empty(len(examples))
    for first in range(0, len(examples), 4096):
        part = np.asarray(examples[first : first + 4096])
        for i, history in enumerate(dataset.histories(part[:, 0])):
            _, _, start, stop = part[i].tolist()
            played[first + i] = np.maximum(history.playtime_s[start:stop], 0.0).sum()
    return examples[played >= _thresholds(played, np.asarray(examples[:, 0]), share, per)]


def least_playtime(dataset: Dataset, share: float, per: Per) -> np.ndarray | None:
    """Play time, seconds, float64 [U], that about `share` of each user's train events, or of all, reach; None keeps all.

    Events of unknown play time are of neither side, and are kept.
    """
    if share == 1.0:
        return None
    users, times = [], []
    for first in range(0, dataset.num_users, 4096):
        rows = np.arange(first, min(first + 4096, dataset.num_users))
        for user, history in zip(rows.tolist(), dataset.histories(rows), strict=True):
            known = history.playtime_s[: dataset.train_stop(user)]
            known = known[known >= 0]
            users.append(np.full(len(known), user))
            times.append(known)
    user, played = np.concatenate(users), np.concatenate(times).astype(float)
    least = np.zeros(dataset.num_users)
    if len(played):
        least[user] = _thresholds(played, user, share, per)
        if per == "all":
            least[:] = least[user[0]]
    return least


def _thresholds(played_N: np.ndarray, user_N: np.ndarray, share: float, per: Per) -> np.ndarray:
    """The play time that each entry must reach, [N]: the (1 - share) quantile of its user's, or of all."""
    if per == "all":
        return np.full(len(played_N), np.quantile(played_N, 1 - share, method="lower"))
    order = np.argsort(user_N, kind="stable")
    starts = np.flatnonzero(np.diff(user_N[order], prepend=-1))
    least = np.empty(len(played_N))
    for rows in np.split(order, starts[1:]):
        least[rows] = np.quantile(played_N[rows], 1 - share, method="lower")
    return least
