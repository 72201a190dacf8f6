"""Metrics of what an arm served, with intervals by leaving out one user at a time.

Every metric is kept as its value over all users and its values without each of them, so that whatever is made of several
metrics, such as the relative change from one arm to another, has its standard error by one formula (the jackknife, Efron
and Stein 1981), the arms' users paired:

    s.e.(f)^2 = (N - 1) / N  sum_n (f_(n) - mean_m f_(m))^2,    f_(n) without user n

For a mean over users that is the usual standard error; for a ratio it is the delta method's to first order.

Axis letters: N users, A authors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from onerec_jax.evaluate.ab_sessions import Served

Z = 1.96  # standard errors to either side of a 95 % interval


class Estimate(NamedTuple):
    """A metric of one arm."""

    value: float
    without: np.ndarray  # float64 [N], its value without each user


class Interval(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def interval(function: Callable[..., float | np.ndarray], *estimates: Estimate) -> Interval:
    """The interval of a smooth function, elementwise, of one or more metrics of the same users."""
    value = float(function(*(estimate.value for estimate in estimates)))
    without = np.asarray(function(*(estimate.without for estimate in estimates)))
    # From the first on: the mean of equal values need not be that value to the last bit, and no spread is to be none.
    half = Z * float(np.sqrt((len(without) - 1) * np.var(without - without[0])))
    return Interval(value, value - half, value + half)


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
    found = {name: _mean(values.mean(axis=(0, 2))) for name, values in means.items()}
    user, item = np.nonzero(served.item >= 0)[1], served.item[served.item >= 0]
    users = served.item.shape[1]
    found["coverage"] = _coverage(user, item, users, len(author_I))
    found["top 1% authors"] = _concentration(user, np.unique(author_I, return_inverse=True)[1][item], users, author_I)
    return found


def _mean(per_user_N: np.ndarray) -> Estimate:
    total = per_user_N.sum()
    return Estimate(float(per_user_N.mean()), (total - per_user_N) / (len(per_user_N) - 1))


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
