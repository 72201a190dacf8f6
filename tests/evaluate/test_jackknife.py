"""Intervals over users against resampled users and the usual formula."""

import numpy as np
import pytest

from onerec_jax.evaluate.jackknife import interval, mean_over_users


def half_width(values: np.ndarray, user: np.ndarray) -> float:
    found = interval(lambda mean: mean, mean_over_users(values, user))
    assert found.value == pytest.approx(values.mean())
    assert found.value - found.low == pytest.approx(found.high - found.value, nan_ok=True)
    return found.high - found.value


def test_the_interval_of_a_mean_over_users_is_that_of_resampled_users():
    rng = np.random.default_rng(0)
    user = np.repeat(rng.permutation(1000)[:400], rng.integers(1, 9, 400))
    values = rng.normal(size=1000)[user] * 2 + rng.normal(size=len(user)) + 5
    own = np.unique(user, return_inverse=True)[1]
    sums, counts = np.bincount(own, weights=values), np.bincount(own)
    drawn = rng.integers(0, 400, (4000, 400))
    resampled = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    assert half_width(values, user) == pytest.approx(1.96 * resampled.std(), rel=0.05)


def test_the_interval_of_one_value_a_user_is_the_usual_one_and_of_one_user_none():
    values = np.array([1.0, 2.0, 4.0, 8.0])
    assert half_width(values, np.arange(4)) == pytest.approx(1.96 * values.std(ddof=1) / 2)
    assert np.isnan(half_width(values, np.zeros(4, int)))
