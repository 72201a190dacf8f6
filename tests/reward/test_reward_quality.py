"""AUC, GAUC and calibration against pairs, loops and bins counted one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_jax.reward.quality import auc, calibration, grouped_auc, quality


def _pairs(score: list[float], label: list[float]) -> float:
    """Every positive against every negative."""
    wins = [
        1.0 if score[i] > score[j] else 0.5 if score[i] == score[j] else 0.0
        for i in range(len(score))
        for j in range(len(score))
        if label[i] == 1 and label[j] == 0
    ]
    return sum(wins) / len(wins) if wins else math.nan


def _same(a: float, b: float) -> bool:
    return a == pytest.approx(b, rel=1e-12, nan_ok=True)


rows = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1), st.integers(0, 4)), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(rows=rows)
def test_auc_is_the_share_of_pairs_in_order_with_ties_half_and_gauc_that_of_each_user_weighted(rows):
    score, label, user = (np.array(column, float) for column in zip(*rows, strict=True))
    assert _same(auc(score, label), _pairs(score.tolist(), label.tolist()))
    total = weight = 0.0
    for one in set(user.tolist()):
        own = [row for row in rows if row[2] == one]
        value = _pairs([row[0] for row in own], [row[1] for row in own])
        if not math.isnan(value):
            total, weight = total + value * len(own), weight + len(own)
    expected = total / weight if weight else math.nan
    assert _same(grouped_auc(score, label, user.astype(int)), expected)


def test_users_of_one_class_alone_change_no_gauc():
    score, label, user = np.array([0.2, 0.4, 0.9]), np.array([1.0, 0.0, 1.0]), np.array([3, 3, 3])
    expected = grouped_auc(score, label, user)
    assert expected == 0.5
    more = np.concatenate([score, [0.1, 0.8, 0.5, 0.5]]), np.concatenate([label, [1, 1, 0, 0]])
    assert grouped_auc(*more, np.concatenate([user, [0, 0, 9, 9]])) == expected


@settings(max_examples=80, deadline=None)
@given(count=st.integers(1, 60), bins=st.integers(1, 25), seed=st.integers(0, 99), shares=st.booleans())
def test_calibration_is_of_bins_of_equal_counts_in_order_of_the_prediction(count, bins, seed, shares):
    rng = np.random.default_rng(seed)
    p, y = rng.random(count), rng.random(count)
    y = y if shares else np.round(y)
    ratio, error = calibration(p, y, bins)
    ranked = sorted(zip(p.tolist(), y.tolist(), strict=True))
    expected, first = 0.0, 0
    for i in range(bins):
        size = count // bins + (i < count % bins)
        part, first = ranked[first : first + size], first + size
        expected += abs(sum(a for a, _ in part) - sum(b for _, b in part))
    assert first == count and error == pytest.approx(expected / count, rel=1e-9)
    assert _same(ratio, sum(p) / sum(y) if sum(y) else math.nan)


def test_predictions_that_are_the_rate_of_their_bin_are_calibrated_and_doubled_ones_are_not():
    p = np.repeat([0.25, 0.5], 8)
    y = np.tile([1.0, 0.0, 0.0, 0.0], 2).tolist() + np.tile([1.0, 0.0], 4).tolist()
    assert calibration(p, np.array(y), 2) == (1.0, 0.0)
    assert calibration(2 * p, np.array(y), 2) == pytest.approx((2.0, 0.375))


def test_what_is_undefined_is_nan_and_never_an_error():
    none, user = np.zeros(0), np.zeros(0, int)
    assert all(math.isnan(value) for name, value in quality(none, none, user).items() if name != "impressions")
    assert quality(none, none, user)["impressions"] == 0
    p, user = np.array([0.25, 0.5]), np.array([0, 1])
    never = quality(p, np.zeros(2), user)
    assert {name for name, value in never.items() if math.isnan(value)} == {"AUC", "GAUC", "predicted/observed"}
    assert never["rate"] == 0.0 and never["ECE"] == 0.375
    both = quality(p, np.array([0.0, 1.0]), user)
    assert both["AUC"] == 1.0 and math.isnan(both["GAUC"]), "no user has both classes"


def test_a_share_is_ranked_by_whether_it_is_above_its_mean_and_calibrated_as_it_is():
    y = np.array([0.0, 0.1, 0.2, 0.3, 1.0, 0.9])  # mean 0.417 and median 0.25 part them differently
    p, user = np.array([0.1, 0.2, 0.3, 0.8, 0.7, 0.9]), np.array([0, 0, 1, 1, 1, 0])
    found = quality(p, y, user)
    above = (y > y.mean()).astype(float)
    assert above.sum() == 2
    assert found["AUC"] == _pairs(p.tolist(), above.tolist()) == 7 / 8
    assert found["GAUC"] == grouped_auc(p, above, user) == 0.75
    assert found["rate"] == pytest.approx(y.mean()) and found["impressions"] == 6
    assert found["predicted/observed"] == pytest.approx(p.mean() / y.mean())


def test_a_binary_label_is_taken_as_it_is():
    p, user = np.array([0.1, 0.4, 0.3]), np.zeros(3, int)
    assert quality(p, np.array([0.0, 1.0, 1.0]), user)["AUC"] == 1.0
    assert quality(p, np.array([1.0, 0.0, 1.0]), user)["AUC"] == 0.0
