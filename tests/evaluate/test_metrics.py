"""Ranking metrics against hand-computed examples and a loop over Python sets."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_jax.evaluate import metrics

CATALOGUE = 9


def ragged(lists):
    return np.array([x for row in lists for x in row], dtype=np.int32), np.cumsum([0, *map(len, lists)])


def looped(ranked, relevant, k):
    """The four metrics as (sum, weight) by their definitions, one example at a time."""
    totals = {name: [0.0, 0.0] for name in ("recall", "pair_recall", "hit_rate", "ndcg")}
    for row, wanted in zip(ranked, map(set, relevant), strict=True):
        if not wanted:
            continue
        found = set(int(x) for x in row[:k] if x >= 0) & wanted
        gain, met = 0.0, set()
        for place, item in enumerate(row[:k]):
            if item in wanted and item not in met:
                gain += 1 / math.log2(place + 2)
                met.add(item)
        ideal = sum(1 / math.log2(place + 2) for place in range(min(k, len(wanted))))
        for name, part in {
            "recall": (len(found) / len(wanted), 1),
            "pair_recall": (len(found), len(wanted)),
            "hit_rate": (bool(found), 1),
            "ndcg": (gain / ideal, 1),
        }.items():
            totals[name][0] += part[0]
            totals[name][1] += part[1]
    return totals


examples = st.lists(
    st.tuples(
        st.lists(st.integers(-1, CATALOGUE - 1), min_size=5, max_size=5),
        st.lists(st.integers(0, CATALOGUE - 1), max_size=6),
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None)
@given(examples, st.integers(1, 7))
def test_metrics_equal_their_definitions_even_with_repeats_gaps_and_short_lists(rows, k):
    ranked = np.array([row for row, _ in rows], dtype=np.int32)
    relevant = [wanted for _, wanted in rows]
    measured = metrics.ranking_metrics(ranked, ragged(relevant), (k,))
    for name, expected in looped(ranked, relevant, k).items():
        assert measured[f"{name}@{k}"] == pytest.approx(tuple(expected))


@settings(deadline=None)
@given(examples, st.data())
def test_metrics_of_parts_add_up_to_those_of_the_whole(rows, data):
    ranked = np.array([row for row, _ in rows], dtype=np.int32)
    relevant = [wanted for _, wanted in rows]
    cut = data.draw(st.integers(0, len(rows)))
    parts = [
        metrics.ranking_metrics(ranked[part], ragged(relevant[part]), (2, 5))
        for part in (slice(None, cut), slice(cut, None))
    ]
    whole = metrics.ranking_metrics(ranked, ragged(relevant), (2, 5))
    together = metrics.add(*parts)
    assert whole.keys() == together.keys()
    for name in whole:
        assert together[name] == pytest.approx(whole[name])


def test_user_recall_weighs_examples_and_pair_recall_weighs_pairs():
    ranked = np.array([[3, 1], [0, 2]], dtype=np.int32)
    relevant = ragged([[1], [2, 4, 5, 6]])
    measured = metrics.ranking_metrics(ranked, relevant, (2,))
    assert metrics.value(measured["recall@2"]) == pytest.approx((1 + 1 / 4) / 2)
    assert metrics.value(measured["pair_recall@2"]) == pytest.approx(2 / 5)
    assert metrics.value(measured["hit_rate@2"]) == 1.0


def test_ndcg_of_one_relevant_item_is_the_discount_of_its_place():
    ranked = np.array([[7, 8, 3, 1]], dtype=np.int32)
    measured = metrics.ranking_metrics(ranked, ragged([[3]]), (2, 4))
    assert metrics.value(measured["ndcg@2"]) == 0.0
    assert metrics.value(measured["ndcg@4"]) == pytest.approx(0.5)


def test_ideal_gain_counts_no_more_relevant_items_than_fit_in_the_list():
    ranked = np.array([[0, 1]], dtype=np.int32)
    measured = metrics.ranking_metrics(ranked, ragged([[0, 1, 2, 3]]), (2,))
    assert metrics.value(measured["ndcg@2"]) == pytest.approx(1.0)
    assert metrics.value(measured["recall@2"]) == pytest.approx(0.5)


def test_coverage_counts_each_listed_item_once_and_no_empty_place():
    ranked = np.array([[0, 1, 5], [1, -1, -1]], dtype=np.int32)
    assert metrics.coverage(ranked, 2, 8) == (2.0, 8.0)
    assert metrics.coverage(ranked, 3, 8) == (3.0, 8.0)


def test_nothing_measured_is_not_a_number():
    measured = metrics.ranking_metrics(np.array([[1, 2]], dtype=np.int32), ragged([[]]), (2,))
    assert all(weight == 0 for _, weight in measured.values())
    assert math.isnan(metrics.value(measured["recall@2"]))


def test_lists_and_relevant_items_of_different_examples_are_refused():
    with pytest.raises(ValueError, match="2 ranked lists need 3 offsets"):
        metrics.hits(np.zeros((2, 3), dtype=np.int32), ragged([[1]]))
