"""Metrics of what an arm served, as estimates over its users (`jackknife`).

Axis letters: N users, A authors.
"""

from __future__ import annotations

import numpy as np

from onerec_jax.evaluate.ab_sessions import Served
from onerec_jax.evaluate.jackknife import Estimate, mean_over_users


def measure(served: Served, author_I: np.ndarray) -> dict[str, Estimate]:
    """Metrics of one arm by name, in the order in which they are printed.

    A place that the arm left empty counts 0 in every mean.

        watch s         true expected seconds of watching, mean over places
        (label)         true probability of each feedback label, mean over places
        filled          share of places that hold an item
        coverage        share of the catalogue that is shown to anyone
        top 1% authors  share of the impressions that the most shown 1 % of the authors have, at least one author

    Args:
        served: what it showed.
        author_I: author rows of all items.
    """
    means = {"watch s": served.watch_s, **served.chance, "filled": served.item >= 0}
    each = np.arange(served.item.shape[1])
    found = {name: mean_over_users(values.mean(axis=(0, 2)), each) for name, values in means.items()}
    user, item = np.nonzero(served.item >= 0)[1], served.item[served.item >= 0]
    users = served.item.shape[1]
    found["coverage"] = _coverage(user, item, users, len(author_I))
    found["top 1% authors"] = _concentration(user, np.unique(author_I, return_inverse=True)[1][item], users, author_I)
    return found


def _coverage(user: np.ndarray, item: np.ndarray, users: int, items: int) -> Estimate:
    """Leaving out a user takes away the items that nobody else was shown."""
    pairs = np.unique(user * items + item)
    viewers = np.bincount(pairs % items, minlength=items)
    alone = np.bincount(pairs // items, viewers[pairs % items] == 1, minlength=users)
    shown = np.count_nonzero(viewers)
    return Estimate(shown / items, (shown - alone) / items)


def _concentration(user: np.ndarray, author: np.ndarray, users: int, author_I: np.ndarray) -> Estimate:
    authors = len(np.unique(author_I))
    most = -(-authors // 100)

    def share(counts_A: np.ndarray) -> float:
        return float(np.partition(counts_A, authors - most)[authors - most :].sum() / max(1, counts_A.sum()))

    counts = np.bincount(author, minlength=authors)
    of_user = np.split(author[np.argsort(user, kind="stable")], np.cumsum(np.bincount(user, minlength=users))[:-1])
    return Estimate(share(counts), np.array([share(counts - np.bincount(own, minlength=authors)) for own in of_user]))
