"""Legality on the device against the trie on the host, and the choice of the format reward against its definition."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from onerec_jax.model.prefixes import DeviceTrie
from onerec_jax.reward.format import format_advantage, is_legal, legality
from onerec_jax.tokenizer.trie import Trie

SIZES = (6, 5, 4)
advantage_of = jax.jit(format_advantage, static_argnums=3)


def _tries(items: int) -> tuple[Trie, DeviceTrie]:
    rng = np.random.default_rng(items)
    codes = np.stack([rng.integers(0, size, items) for size in SIZES], axis=1).astype(np.int32)
    trie = Trie.build(codes, rng.random(items))
    return trie, DeviceTrie(trie.child_start, trie.token, trie.branching)


@pytest.mark.parametrize("items", [1, 30, 90])
def test_every_combination_of_codes_is_judged_as_the_trie_finds_it(items: int):
    """Codes outside of the codebooks among them."""
    trie, device = _tries(items)
    codes = np.array(list(itertools.product(*(range(-1, size + 2) for size in SIZES))), np.int32)
    codes = np.random.default_rng(0).permutation(codes).reshape(8, -1, 3)  # codes that share a prefix lie apart
    legal, leaf = jax.jit(is_legal)(codes, device)
    expected = trie.find(codes.reshape(-1, 3)).reshape(codes.shape[:2])
    assert leaf.dtype == np.int32
    np.testing.assert_array_equal(leaf, expected)
    np.testing.assert_array_equal(legal, expected >= 0)
    assert np.sum(legal) == trie.leaves


def test_codes_far_outside_of_the_codebooks_are_illegal():
    _, device = _tries(90)
    codes = np.array([[[1 << 30, 0, 0], [0, 1 << 30, 0], [0, 0, -(1 << 30)]]], np.int32)
    legal, leaf = is_legal(codes, device)
    assert not np.any(legal) and (np.asarray(leaf) == -1).all()


@pytest.mark.parametrize("k", [0, 1, 3, 8, 20])
def test_the_k_existing_candidates_of_least_chance_are_chosen_and_the_legal_of_them_rewarded(k: int):
    rng = np.random.default_rng(k)
    legal, exists = rng.random((2, 12, 8)) < 0.6
    exists[0] = False
    chance = rng.integers(0, 5, (12, 8)).astype(np.float32) / 5  # with ties
    chance[~exists] = rng.choice([np.nan, np.inf, -np.inf, -1], np.sum(~exists))
    advantage, chosen = advantage_of(legal, exists, chance, k)
    for b in range(12):
        there = sorted(np.flatnonzero(exists[b]), key=lambda g: chance[b, g])[:k]
        assert np.flatnonzero(chosen[b]).tolist() == sorted(there)
        assert np.asarray(advantage[b]).tolist() == [float(g in there and legal[b, g]) for g in range(8)]
    assert advantage.dtype == np.float32


def test_every_candidate_is_chosen_equally_often():
    """K of the E that exist: each with probability K/E, within 4.5 standard deviations."""
    draws, k = 4000, 2
    exists = np.tile([True, True, False, True, True, True], (draws, 1))
    chance = np.random.default_rng(0).random((draws, 6), np.float32)
    chosen = np.asarray(advantage_of(exists, exists, chance, k)[1])
    share, probability = chosen.mean(axis=0), k / 5
    assert (abs(share[exists[0]] - probability) < 4.5 * np.sqrt(probability * (1 - probability) / draws)).all()
    assert share[2] == 0


def test_legality_counts_the_candidates_that_exist():
    legal = np.array([[True, True, False], [True, False, True]])
    exists = np.array([[True, True, True], [True, True, False]])
    assert tuple(map(float, legality(legal, exists))) == (3.0, 5.0)
