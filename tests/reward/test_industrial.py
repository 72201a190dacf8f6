"""Rewards of whole pages against loops over pairs of candidates."""

from __future__ import annotations

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_batch, tiny_model

from onerec_jax.config import ShareCap
from onerec_jax.reward.candidates import Candidates, Catalogue
from onerec_jax.reward.industrial import author_spread, diversity, share_cap

ITEMS, B, G = 40, 5, 12
REQUEST = random_batch(tiny_model(), batch=B)


def _catalogue(seed: int) -> Catalogue:
    """Few codes and authors, so that many are shared; a fifth of the authors is unknown; the first row is most exposed."""
    rng = np.random.default_rng(seed)
    return Catalogue(
        codes=jnp.array(rng.integers(0, 3, (ITEMS, 3)), jnp.int32),
        author=jnp.array(rng.integers(0, 5, ITEMS), jnp.int32),
        tag=jnp.zeros(ITEMS, jnp.int32),
        duration_s=jnp.ones(ITEMS),
        exposures=jnp.array([99, *rng.integers(0, 30, ITEMS - 1)], jnp.float32),
    )


def _codes(catalogue: Catalogue) -> np.ndarray:
    return np.asarray(catalogue.codes)


def _candidates(seed: int, catalogue: Catalogue) -> Candidates:
    """Some candidates belong to no item; one request has one candidate that does, another has none."""
    rng = np.random.default_rng(seed)
    item = rng.integers(-4, ITEMS, (B, G)).clip(-1).astype(np.int32)
    item[0], item[1] = -1, -1
    item[0, 3] = 7
    return Candidates(_codes(catalogue)[item], item, rng.normal(size=(B, G)).astype(np.float32))


def _common(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.argmin([*(a == b), False]))


@pytest.mark.parametrize("seed", range(5))
def test_diversity_is_the_mean_distance_to_the_other_candidates(seed: int):
    catalogue = _catalogue(seed)
    candidates = _candidates(seed, catalogue)
    codes, expected = _codes(catalogue), np.zeros((B, G))
    for b, row in enumerate(candidates.item):
        there = np.flatnonzero(row >= 0)
        for g in there:
            distances = [1 - _common(codes[row[g]], codes[row[h]]) / 3 for h in there if h != g]
            expected[b, g] = np.mean(distances) if distances else 1
    found = jax.jit(diversity(catalogue))(REQUEST, candidates)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_one_item_repeated_has_no_diversity_and_first_codes_apart_have_all_of_it():
    catalogue = _catalogue(0)._replace(codes=jnp.array([[0, 5, 5], [1, 5, 5], [2, 5, 5]]))
    item = np.array([[2, 2, 2], [0, 1, 2]], np.int32)
    candidates = Candidates(_codes(catalogue)[item], item, np.zeros((2, 3), np.float32))
    assert np.asarray(diversity(catalogue)(REQUEST, candidates)).tolist() == [[0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("seed", range(5))
def test_candidates_of_one_author_share_one_reward_and_unknown_authors_share_nothing(seed: int):
    catalogue = _catalogue(seed)
    candidates = _candidates(seed, catalogue)
    author_of, expected = np.asarray(catalogue.author), np.zeros((B, G))
    for b, row in enumerate(candidates.item):
        authors = [int(author_of[i]) for i in row if i >= 0]
        for g, item in enumerate(row):
            if item >= 0:
                author = int(author_of[item])
                expected[b, g] = 1 / Counter(authors)[author] if author else 1
    found = jax.jit(author_spread(catalogue))(REQUEST, candidates)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (expected[candidates.item >= 0] == 1).any() and (expected[candidates.item >= 0] < 1).any()


def _of_popular(catalogue: Catalogue, popular: int, others: int) -> Candidates:
    """Candidates of which so many are of the four most exposed items, and two that belong to no item."""
    exposures = np.asarray(catalogue.exposures)
    best = sorted(range(ITEMS), key=lambda i: (-exposures[i], i))
    item = np.array([*best[:popular], *best[4 : 4 + others], -1, -1], np.int32)[None]
    return Candidates(_codes(catalogue)[item], item, np.zeros(item.shape, np.float32))


@pytest.mark.parametrize("popular, held", [(2, False), (3, False), (4, True)])
def test_popular_items_are_held_back_only_above_their_share(popular: int, held: bool):
    """Four of 40 items are popular; 3 of 10 that are generated is the share itself, not above it."""
    catalogue = _catalogue(3)
    candidates = _of_popular(catalogue, popular, 10 - popular)
    factor = jax.jit(share_cap(catalogue, ShareCap(share=0.3, factor=0.25, popular=0.1)))(REQUEST, candidates)
    assert factor.dtype == np.float32
    assert np.asarray(factor)[0].tolist() == [0.25 if held else 1.0] * popular + [1.0] * (12 - popular)


def test_the_popular_share_is_counted_over_the_whole_batch():
    catalogue = _catalogue(3)
    full, empty = _of_popular(catalogue, 4, 0), _of_popular(catalogue, 0, 4)
    both = Candidates(*(np.concatenate(pair) for pair in zip(full, empty, strict=True)))
    held = share_cap(catalogue, ShareCap(share=0.4, popular=0.1))(REQUEST, both)
    free = share_cap(catalogue, ShareCap(share=0.6, popular=0.1))(REQUEST, both)
    assert np.asarray(held).tolist() == [[0.5] * 4 + [1] * 2, [1] * 6]
    assert np.asarray(free).tolist() == [[1] * 6] * 2


def test_of_items_exposed_alike_the_first_rows_are_popular_and_one_item_at_least():
    catalogue = _catalogue(0)._replace(exposures=jnp.ones(ITEMS))
    item = np.arange(ITEMS, dtype=np.int32)[None]
    candidates = Candidates(_codes(catalogue)[item], item, np.zeros(item.shape, np.float32))
    for share, size in ((0.1, 4), (0.001, 1)):
        factor = share_cap(catalogue, ShareCap(share=0.001, popular=share))(REQUEST, candidates)
        assert np.flatnonzero(np.asarray(factor)[0] < 1).tolist() == list(range(size))
