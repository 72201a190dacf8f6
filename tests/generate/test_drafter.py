"""The drafter: what a profile is made of, what its map is fitted to, and on which items."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.config import Recipe
from onerec_jax.data.store import Dataset
from onerec_jax.errors import InputError
from onerec_jax.generate.drafter import (
    DECAY,
    RECENT,
    Drafter,
    DrafterOptions,
    contrast,
    fit_drafter,
    item_content,
    profiles,
)

OPTIONS = DrafterOptions(steps=60, batch_size=64)


@pytest.fixture(scope="module")
def dataset(tiny_recipe: Recipe) -> Dataset:
    return Dataset(tiny_recipe.dataset_directory)


@pytest.fixture(scope="module")
def content(tiny_recipe: Recipe, dataset: Dataset) -> np.ndarray:
    return item_content(dataset, tiny_recipe.tokenizer, 0)


def test_content_has_length_one_and_nothing_of_behaviour(tiny_recipe: Recipe, dataset: Dataset, content: np.ndarray):
    np.testing.assert_allclose(np.linalg.norm(content, axis=1), 1, rtol=1e-5)
    both = tiny_recipe.tokenizer.model_copy(update={"content": ("behaviour", "embedding")})
    np.testing.assert_array_equal(item_content(dataset, both, 0), content)
    with pytest.raises(InputError, match="behaviour alone"):
        item_content(dataset, both.model_copy(update={"content": ("behaviour",)}), 0)


def test_a_profile_is_two_decayed_means_of_what_came_before_the_cut(dataset: Dataset, content: np.ndarray):
    examples = np.asarray(dataset.examples("test"))[:9]
    found = profiles(dataset, content, examples)
    width = content.shape[1]
    for row, (user, cut, _, _) in zip(found, examples.tolist(), strict=True):
        history = dataset.history(user)
        events = list(range(max(0, cut - RECENT), cut))
        for kept, part in ((events, row[:width]), ([e for e in events if history.positive[e]], row[width:-1])):
            total, weights = np.zeros(width), 0.0
            for back, event in enumerate(reversed(kept)):
                total += DECAY**back * content[history.item[event]]
                weights += DECAY**back
            np.testing.assert_allclose(part, total / weights if kept else total, atol=1e-5)
        assert row[-1] == 1


def test_a_request_without_history_has_a_profile_of_zeros(dataset: Dataset, content: np.ndarray):
    assert profiles(dataset, content, np.array([[0, 0, 0, 1]])).tolist() == [[0.0] * (2 * content.shape[1]) + [1.0]]


def test_drafts_are_the_nearest_items_by_brute_force(content: np.ndarray):
    rng = np.random.default_rng(0)
    drafter = Drafter(rng.normal(size=(5, content.shape[1])).astype(np.float32), content)
    x = rng.normal(size=(3, 5)).astype(np.float32)
    by_hand = [[sum((row @ drafter.weights) * item) for item in content] for row in x]
    np.testing.assert_allclose(drafter.scores(x), by_hand, atol=1e-5)


def test_a_target_is_told_from_all_other_negatives_and_never_from_itself():
    rng = np.random.default_rng(1)
    weights, x, items = rng.normal(size=(4, 3)), rng.normal(size=(2, 4)), rng.normal(size=(6, 3))
    targets, negatives = [2, 5], [0, 2, 3]
    expected = []
    for row, target in zip(x, targets, strict=True):
        among = [target, *(n for n in negatives if n != target)]
        scores = np.array([(row @ weights) @ items[i] for i in among])
        expected.append(np.log(np.exp(scores).sum()) - scores[0])
    found = contrast(*map(jnp.asarray, (weights, x, np.array(targets), np.array(negatives), items)))  # type: ignore[call-arg]
    np.testing.assert_allclose(found, np.mean(expected), rtol=1e-4)


def test_a_fitted_drafter_puts_what_was_taken_first_more_often_than_chance(dataset: Dataset, content: np.ndarray):
    drafter = fit_drafter(dataset, content, 0, OPTIONS)
    examples = np.asarray(dataset.examples("train"))
    scores = drafter.scores(profiles(dataset, content, examples))
    places = []
    for row, (user, _, start, stop) in zip(scores, examples.tolist(), strict=True):
        history = dataset.history(user)
        places += [(row > row[i]).mean() for i in history.item[start:stop][history.positive[start:stop]]]
    assert np.mean(places) < 0.42, np.mean(places)  # chance is a half


def test_what_new_items_are_like_plays_no_part_in_the_fit(tiny_recipe: Recipe, content: np.ndarray):
    """Of items that no train event is of, whether as context, target or negative."""
    dataset = Dataset(tiny_recipe.dataset_directory)
    new = np.setdiff1d(np.arange(dataset.num_items), np.flatnonzero(dataset.items.train_count))
    assert len(new)
    other = content.copy()
    other[new] = -other[new][::-1]
    options = dataclasses.replace(OPTIONS, steps=5)
    found = [fit_drafter(dataset, vectors, 0, options).weights for vectors in (content, other)]
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0]).max() > 0
