"""Floors against loops over tiny random logs, EASE against its optimality conditions."""

import itertools
import math

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_jax.config import EvaluateConfig
from onerec_jax.data.schema import DAY_MS
from onerec_jax.data.train_log import TrainLog
from onerec_jax.evaluate import floors
from onerec_jax.generate.ranking import rank

ITEMS = 8
USERS = 6
DECAY = 0.7
CONFIG = EvaluateConfig(history_decay=DECAY, recent_days=2.0, ease_lambda=3.0)


def ragged(lists):
    return np.array([x for row in lists for x in row], dtype=np.int32), np.cumsum([0, *map(len, lists)])


def random_log(seed):
    """A log with repeats, an item nobody met and a user without events; also the events as Python lists."""
    rng = np.random.default_rng(seed)
    sequences = [list(rng.integers(0, ITEMS - 1, rng.integers(1, 15))) for _ in range(USERS - 1)] + [[]]
    user = np.repeat(np.arange(USERS), [len(s) for s in sequences])
    timestamp_ms = np.concatenate([np.sort(rng.integers(0, 5 * DAY_MS, len(s))) for s in sequences])
    log = TrainLog(
        user=user.astype(np.int32),
        item=ragged(sequences)[0],
        timestamp_ms=timestamp_ms.astype(np.int64),
        positive=rng.random(len(user)) < 0.5,
        num_users=USERS,
        num_items=ITEMS,
    )
    return log, sequences


def random_contexts(seed):
    rng = np.random.default_rng(seed + 100)
    return [list(rng.integers(0, ITEMS, n)) for n in (0, 1, 4, 13)]


def scores_of(name, log, contexts, config=CONFIG):
    scores = floors.fit_floor(name, log, config)(ragged(contexts))
    assert scores.shape == (len(contexts), log.num_items)
    assert scores.dtype == np.float32
    return scores


def latest_steps(context):
    """Item -> steps back of its most recent event."""
    return {item: len(context) - 1 - place for place, item in enumerate(context)}


@pytest.mark.parametrize("seed", range(3))
def test_popularity_counts_positive_events(seed):
    log, _ = random_log(seed)
    expected = [sum(p and i == item for i, p in zip(log.item, log.positive, strict=True)) for item in range(ITEMS)]
    assert (scores_of("popularity", log, [[], [1, 2]]) == expected).all()


@pytest.mark.parametrize("seed", range(3))
def test_recent_popularity_counts_positive_events_of_the_last_days_of_train(seed):
    log, _ = random_log(seed)
    start = log.timestamp_ms.max() - 2 * DAY_MS
    expected = [0] * ITEMS
    for item, positive, time in zip(log.item, log.positive, log.timestamp_ms, strict=True):
        expected[item] += bool(positive and time > start)
    assert (scores_of("recent_popularity", log, [[3]])[0] == expected).all()
    assert sum(expected) < log.positive.sum()


@pytest.mark.parametrize("seed", range(3))
def test_markov_adds_normalised_gap_weights_of_the_last_ten_events(seed):
    log, sequences = random_log(seed)
    chain = np.zeros((ITEMS, ITEMS))
    for sequence in sequences:
        for here, there in itertools.combinations(range(len(sequence)), 2):
            if there - here <= 5:
                chain[sequence[here], sequence[there]] += 1 / (there - here)
    chain /= np.maximum(chain.sum(axis=1, keepdims=True), 1e-30)
    contexts = random_contexts(seed)
    expected = np.zeros((len(contexts), ITEMS))
    for row, context in enumerate(contexts):
        for back, item in enumerate(reversed(context[-10:])):
            expected[row] += DECAY**back * chain[item]
    np.testing.assert_allclose(scores_of("markov", log, contexts), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_item_knn_adds_cosines_between_the_sets_of_users(seed):
    log, sequences = random_log(seed)
    users = [{u for u, sequence in enumerate(sequences) if item in sequence} for item in range(ITEMS)]
    contexts = random_contexts(seed)
    expected = np.zeros((len(contexts), ITEMS))
    for row, context in enumerate(contexts):
        for item, back in latest_steps(context).items():
            for other in range(ITEMS):
                if other != item and users[item] and users[other]:
                    cosine = len(users[item] & users[other]) / math.sqrt(len(users[item]) * len(users[other]))
                    expected[row, other] += DECAY**back * cosine
    np.testing.assert_allclose(scores_of("item_knn", log, contexts), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_ease_weights_have_zero_diagonal_and_stationary_loss_everywhere_else(seed):
    rng = np.random.default_rng(seed)
    interactions = (rng.random((12, ITEMS)) < 0.4).astype(float)
    ridge = 2.5
    weights = floors.ease_weights(scipy.sparse.csr_array(interactions), ridge).astype(float)
    assert (np.diag(weights) == 0).all()
    gradient = interactions.T @ (interactions @ weights - interactions) + ridge * weights
    np.fill_diagonal(gradient, 0.0)  # the constraint's multiplier takes up the diagonal
    np.testing.assert_allclose(gradient, 0.0, atol=1e-5)


def test_ease_scores_the_decayed_context_and_counts_repeats_once():
    log, sequences = random_log(0)
    interactions = np.zeros((USERS, ITEMS))
    for user, sequence in enumerate(sequences):
        interactions[user, sequence] = 1.0
    weights = floors.ease_weights(scipy.sparse.csr_array(interactions), CONFIG.ease_lambda)
    contexts = random_contexts(0)
    expected = np.zeros((len(contexts), ITEMS))
    for row, context in enumerate(contexts):
        for item, back in latest_steps(context).items():
            expected[row] += DECAY**back * weights[item]
    np.testing.assert_allclose(scores_of("ease", log, contexts), expected, rtol=1e-5, atol=1e-6)


def test_ease_with_no_decay_reads_a_binary_context():
    log, _ = random_log(1)
    flat = CONFIG.model_copy(update={"history_decay": 1.0})
    repeated, once = scores_of("ease", log, [[4, 2, 4, 4], [2, 4]], flat)
    np.testing.assert_allclose(repeated, once, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(floors.FLOORS))
def test_floors_survive_a_train_part_of_one_event(name):
    log = TrainLog(np.array([0], np.int32), np.array([1], np.int32), np.array([5], np.int64), np.array([True]), 1, 3)
    assert np.isfinite(scores_of(name, log, [[], [0, 1]])).all()


def test_hand_computed_chain():
    log = TrainLog(np.zeros(3, np.int32), np.array([0, 1, 2], np.int32), np.arange(3), np.ones(3, bool), 1, 3)
    np.testing.assert_allclose(scores_of("markov", log, [[0]])[0], [0, 2 / 3, 1 / 3], rtol=1e-6)


@settings(deadline=None)
@given(st.data())
def test_rank_equals_a_full_sort_by_score_then_item_row(data):
    examples = data.draw(st.integers(1, 4))
    values = st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 2.0])
    row = st.lists(values, min_size=ITEMS, max_size=ITEMS)
    scores = np.array(data.draw(st.lists(row, min_size=examples, max_size=examples)), dtype=np.float32)
    items = st.lists(st.integers(0, ITEMS - 1), max_size=ITEMS)
    exclude = data.draw(st.none() | st.lists(items, min_size=examples, max_size=examples))
    k = data.draw(st.integers(1, ITEMS + 2))
    before = scores.copy()
    listed = rank(scores, None if exclude is None else ragged(exclude), k)
    assert (scores == before).all()
    assert listed.dtype == np.int32
    for n in range(examples):
        allowed = [i for i in range(ITEMS) if scores[n, i] > -math.inf and not (exclude and i in exclude[n])]
        expected = sorted(allowed, key=lambda i: (-scores[n, i], i))[:k]
        assert listed[n].tolist() == expected + [-1] * (k - len(expected))
