"""The duration-aware reward against its definition in float64, and its distribution where play times are exchangeable."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import poison, random_batch, tiny_model

from onerec_jax.reward.candidates import Candidates, Catalogue
from onerec_jax.reward.duration import duration_advantage, duration_quantiles, watched_quantile

ITEMS = 100  # of the vocabulary of random batches
DURATIONS = np.array([-1.0, 0.0, 0.5, 1.0, 3.9, 4.0, 7.9, 8.0, 15.9, 32.0, 64.0, 512.0, 8192.0], np.float32)


def _looped(playtime, duration, valid, own_playtime, own_duration, base) -> float:
    """One impression against one user's history, by the definition."""
    past = [(float(p), float(d)) for p, d, v in zip(playtime, duration, valid, strict=True) if v and p >= 0 and d >= 0]
    if own_playtime < 0 or own_duration < 0 or not past:
        return 0.5

    def bucket(d: float) -> float:
        return np.floor(np.log(d + 1e-6) / np.log(base) + 1e-12)

    alike = [p for p, d in past if bucket(d) == bucket(float(own_duration))]
    if alike:
        return float(np.mean([p <= own_playtime for p in alike]))
    return float(np.mean([p / (d + 1e-6) <= own_playtime / (own_duration + 1e-6) for p, d in past]))


@pytest.mark.parametrize("base", [2.0, 4.0, 10.0])
def test_quantiles_equal_their_definition(base: float):
    rng = np.random.default_rng(0)
    batch, length, size = 30, 12, 8
    playtime = rng.integers(-1, 10, (batch, length)).astype(np.float32)
    duration = rng.choice(DURATIONS, (batch, length))
    valid = rng.random((batch, length)) < np.linspace(0, 1, batch)[:, None]  # of some users nothing is known
    own_playtime = rng.integers(-1, 10, (batch, size)).astype(np.float32)
    own_duration = rng.choice(DURATIONS, (batch, size))
    found = jax.jit(duration_quantiles, static_argnums=5)(playtime, duration, valid, own_playtime, own_duration, base)
    expected = [
        [_looped(playtime[b], duration[b], valid[b], own_playtime[b, n], own_duration[b, n], base) for n in range(size)]
        for b in range(batch)
    ]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("base", [2, 3, 5, 10])
def test_a_bucket_begins_at_a_power_of_the_base(base: int):
    """There a logarithm in float32 falls on either side of the whole number, and the event into either bucket.

    Two events, at the power and just below it, and an impression above, then below, that is watched longer than the second.
    """
    power = np.array([base**k for k in range(3, 20) if 100 < base**k < 1e6], np.float32)[:, None]
    history = np.tile(np.array([5, 1], np.float32), (len(power), 1)), np.hstack([power, np.nextafter(power, 0)])
    own = np.full((len(power), 2), 3, np.float32), np.hstack([1.5 * power, 0.9 * power])
    found = duration_quantiles(*history, np.ones((len(power), 2), bool), *own, base)
    np.testing.assert_array_equal(found, np.tile([0, 1], (len(power), 1)))


def test_a_user_without_events_of_like_duration_is_compared_by_the_share_watched():
    """Shares 0.2, 0.5, 0.8 of the past; 60 s of 100 s is above two of them, 60 s of 1000 s above none."""
    playtime, duration = np.array([[2.0, 5.0, 8.0]], np.float32), np.full((1, 3), 10, np.float32)
    own = np.array([[60.0, 60.0]], np.float32), np.array([[100.0, 1000.0]], np.float32)
    found = duration_quantiles(playtime, duration, np.ones((1, 3), bool), *own)
    np.testing.assert_allclose(found, [[2 / 3, 0]], rtol=1e-6)


def test_a_base_of_one_or_less_is_refused():
    one = np.ones((1, 1), np.float32)
    with pytest.raises(ValueError, match="base of duration buckets is 1"):
        duration_quantiles(one, one, one > 0, one, one, base=1)


def test_quantiles_of_exchangeable_play_times_are_uniform_and_a_quarter_is_positive():
    """Play time grows with duration and differs between users by orders of magnitude; the quantile tells neither.

    In a bucket with n past events q is uniform on 0, 1/n, ... 1, whatever the play times are distributed like.
    """
    rng = np.random.default_rng(0)
    users, per_bucket = 4000, 31
    lengths = np.array([10.0, 100.0], np.float32)  # two buckets
    duration = np.tile(np.repeat(lengths, per_bucket), (users, 1))
    own_duration = rng.choice(lengths, (users, 1))
    taste = np.exp(rng.normal(0, 3, (users, 1)))
    playtime = (taste * duration * rng.exponential(size=duration.shape)).astype(np.float32)
    own_playtime = (taste * own_duration * rng.exponential(size=own_duration.shape)).astype(np.float32)
    valid = np.ones(duration.shape, bool)
    q = np.asarray(duration_quantiles(playtime, duration, valid, own_playtime, own_duration))
    for length in lengths:
        counts = np.bincount(np.rint(q[own_duration == length] * per_bucket).astype(int), minlength=per_bucket + 1)
        expected = counts.sum() / (per_bucket + 1)
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert chi_square < per_bucket + 4 * np.sqrt(2 * per_bucket)
    advantage = np.asarray(duration_advantage(q, np.zeros(q.shape, bool), np.ones(q.shape, bool)))
    assert 0.25 - 1.5 / (per_bucket + 1) < (advantage == 1).mean() <= 0.25  # q comes in steps, and ties are not split
    assert (advantage >= 0).all()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 7, 8, 16, 18])
def test_a_quarter_of_distinct_quantiles_is_above_the_cut(count: int):
    """Of n distinct quantiles the floor(n/4) largest; whatever is not valid is neither counted nor judged."""
    rng = np.random.default_rng(count)
    q = rng.choice(np.array([np.nan, np.inf, -1, 0.3, 2], np.float32), 20)
    place = rng.permutation(20)[:count]
    q[place] = rng.permutation(count) / 20
    valid = np.isin(np.arange(20), place)
    found = np.asarray(duration_advantage(*(x.reshape(4, 5) for x in (q, ~valid, valid))))
    expected = np.zeros(20)
    expected[place[np.argsort(-q[place])[: count // 4]]] = 1
    assert found.shape == (4, 5) and found.dtype == np.float32
    assert found.ravel().tolist() == expected.tolist()


def test_dislike_is_minus_one_however_long_it_was_watched_and_stays_in_the_cut():
    q = np.array([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 0.9]], np.float32)
    disliked = np.zeros((1, 8), bool)
    disliked[0, [0, 7]] = True
    found = duration_advantage(q, disliked, np.ones((1, 8), bool))
    assert np.asarray(found).tolist() == [[-1, 0, 0, 0, 0, 0, 1, -1]]


def _logged(seed: int):
    """Requests with causal targets, each with its own number of events before it, and candidates around them."""
    rng = np.random.default_rng(seed)
    batch = random_batch(tiny_model(causal=True, positive_length=0, lifelong_length=0), batch=8, targets=5, seed=seed)
    shape = batch.short.item.shape
    batch = dataclasses.replace(
        batch,
        short=dataclasses.replace(
            batch.short,
            playtime_s=rng.integers(-1, 12, shape).astype(np.float32),
            duration_s=rng.choice(DURATIONS[4:8], shape),
        ),
        playtime_s=rng.integers(-1, 12, (8, 5)).astype(np.float32),
        target_item=np.where(rng.random((8, 5)) < 0.1, -1, rng.integers(0, 10, (8, 5))).astype(np.int32),
        target_weight=rng.choice([0.0, 0.5, 1.0], (8, 5)).astype(np.float32),
    )
    item = rng.integers(-1, 10, (8, 7)).astype(np.int32)
    nothing = jnp.zeros(ITEMS, jnp.int32)
    catalogue = Catalogue(
        codes=jnp.zeros((ITEMS, 3), jnp.int32),
        author=nothing,
        tag=nothing,
        duration_s=jnp.array(rng.choice(DURATIONS[4:8], ITEMS)),
        exposures=jnp.zeros(ITEMS),
    )
    return batch, Candidates(np.zeros((8, 7, 3), np.int32), item, np.zeros((8, 7), np.float32)), catalogue


@pytest.mark.parametrize("seed", range(4))
def test_a_logged_item_earns_its_quantile_among_the_events_before_it(seed: int):
    batch, candidates, catalogue = _logged(seed)
    events, expected = batch.short, np.zeros(candidates.item.shape)
    durations = np.asarray(catalogue.duration_s)
    for b, row in enumerate(candidates.item):
        for t in range(5):
            if batch.target_weight[b, t] > 0 and batch.target_item[b, t] >= 0:
                before = (events.item[b] >= 0) & (np.arange(len(events.item[b])) < batch.visible[b, t])
                own = batch.playtime_s[b, t], durations[batch.target_item[b, t]]
                q = _looped(events.playtime_s[b], events.duration_s[b], before, *own, 2.0)
                expected[b] = np.maximum(expected[b], np.where(row == batch.target_item[b, t], q, 0))
    assert (expected > 0).any()
    found = jax.jit(watched_quantile(catalogue))(batch, candidates)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_padding_and_missing_targets_change_no_quantile():
    batch, candidates, catalogue = _logged(0)
    reward = jax.jit(watched_quantile(catalogue))
    expected = np.asarray(reward(batch, candidates))
    assert (expected > 0).any()
    for value in (np.nan, np.inf):
        np.testing.assert_array_equal(reward(poison(batch, value), candidates), expected)
