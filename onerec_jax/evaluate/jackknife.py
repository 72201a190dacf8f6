"""Intervals by leaving out one user at a time.

Every metric is kept as its value over all users and its values without each of them, so that whatever is made of several
metrics, such as the relative change from one arm of a test to another, has its standard error by one formula (the jackknife,
Efron and Stein 1981), the users paired:

    s.e.(f)^2 = (N - 1) / N  sum_n (f_(n) - mean_m f_(m))^2,    f_(n) without user n

For a mean over users that is the usual standard error; for a ratio it is the delta method's to first order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Z = 1.96  # standard errors to either side of a 95 % interval


class Estimate(NamedTuple):
    """A metric of some users."""

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


def mean_over_users(values_M: np.ndarray, user_M: np.ndarray) -> Estimate:
    """The mean of values of which a user (any int) has one or more; of one user alone there is no interval: it is NaN."""
    user_M = np.unique(user_M, return_inverse=True)[1]
    total_N, count_N = np.bincount(user_M, weights=values_M), np.bincount(user_M)
    with np.errstate(invalid="ignore"):
        without_N = (total_N.sum() - total_N) / (count_N.sum() - count_N)
    return Estimate(float(np.mean(values_M)), without_N)
