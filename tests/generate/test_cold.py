"""Drafts by content that the model verifies, against loops over every item."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import ALONE, tiny_model

from onerec_jax.config import Recipe
from onerec_jax.data.pipeline import make_batch
from onerec_jax.data.store import Dataset
from onerec_jax.errors import InputError
from onerec_jax.generate.beam import make_beam_search
from onerec_jax.generate.cold import ColdOptions, Verifier, draft_and_verify
from onerec_jax.generate.drafter import Drafter, item_content, profiles
from onerec_jax.generate.recommender import Recommender
from onerec_jax.model.onerec import build
from onerec_jax.model.prefixes import device_trie
from onerec_jax.tokenizer.semantic_ids import SemanticIds
from onerec_jax.train.state import TrainState

K, DRAFT, WIDTH = 6, 5, 7


def untrained(recipe: Recipe, new: np.ndarray, **model) -> Recommender:
    """A model with random parameters, large enough for distributions that are far from uniform; `new` are new items."""
    dataset, ids = Dataset(recipe.dataset_directory), SemanticIds.load(recipe.tokenizer_directory)
    count = np.maximum(dataset.items.train_count, 1)
    count[new] = 0
    dataset.items = dataclasses.replace(dataset.items, train_count=count)
    config = tiny_model(**ALONE, **model)
    settings = recipe.evaluate.model_copy(update={"batch_size": 4, "beam_width": WIDTH})
    built = build(config, dataset.vocabulary(ids.codebook_sizes))
    params, tables = built.init(0)
    if built.config.head != "items":
        params["decoder"]["heads"] = jax.tree.map(lambda x: 5 * x, params["decoder"]["heads"])
    state = TrainState(jnp.zeros((), jnp.int32), params, None, tables, built.init_bias())
    recipe = recipe.model_copy(update={"model": config, "evaluate": settings})
    return Recommender(Path(), recipe, dataset, ids, built, state)


@pytest.fixture(scope="module")
def new() -> np.ndarray:
    return np.arange(0, 150, 4)


@pytest.fixture(scope="module")
def recommender(tiny_recipe: Recipe, new: np.ndarray) -> Recommender:
    return untrained(tiny_recipe, new)


@pytest.fixture(scope="module")
def drafter(recommender: Recommender) -> Drafter:
    content = item_content(recommender.dataset, recommender.recipe.tokenizer, 0)
    weights = np.random.default_rng(3).normal(size=(2 * content.shape[1] + 1, content.shape[1]))
    return Drafter(weights.astype(np.float32), content)


def means_by_hand(recommender: Recommender, examples: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Mean log P [N,I] of the first `counted` codes of every item, from the logits of the whole forward pass."""
    codes, model, state = recommender.ids.codes, recommender.model, recommender.state
    batch = make_batch(recommender.dataset, codes, model.config, examples, 1, frozen=True)
    n, items = len(examples), len(codes)
    batch = dataclasses.replace(
        batch,
        targets=np.tile(codes, (n, 1, 1)),
        target_item=np.tile(np.arange(items, dtype=np.int32), (n, 1)),
        target_weight=np.ones((n, items), np.float32),
        visible=np.repeat(batch.visible, items, axis=1),
    )
    forward = jax.jit(lambda given, b: model.bind(given.params)(*model.read(given.tables, b), given.bias, None)[0])
    logits = forward(state, batch)
    found = np.zeros((n, items))
    for level, level_logits in enumerate(logits):
        z = np.asarray(level_logits, np.float64)
        log_p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
        own = np.take_along_axis(log_p, np.tile(codes[None, :, level, None], (n, 1, 1)), axis=-1)[..., 0]
        found += np.where(level < counted, own, 0)
    return found / counted


def lists_by_hand(drafts, means, beams, codes, seen, threshold):
    """One request, item by item: (the scores of its list, accepted, rounds, all that was looked at)."""
    tried: list[int] = []
    accepted: list[int] = []
    rounds = 0
    allowed = [i for i in range(len(codes)) if i not in seen]
    for depth in range(codes.shape[1]):
        if len(accepted) >= K:
            break
        begins = {tuple(beam[:depth]) for beam in beams}
        allowed = [i for i in allowed if tuple(codes[i, :depth]) in begins]
        best = sorted((i for i in allowed if i not in tried), key=lambda i: -drafts[i])[:DRAFT]
        rounds += bool(best)
        tried += best
        accepted += [i for i in best if means[i] > threshold]
    of_beams = [i for i in range(len(codes)) if tuple(codes[i]) in {tuple(b) for b in beams} and i not in seen]
    rest = sorted({*tried, *of_beams} - {*accepted}, key=lambda i: -means[i])
    listed = sorted(accepted, key=lambda i: -means[i])[:K]
    listed += rest[: K - len(listed)]
    listed.sort(key=lambda i: -means[i])
    return [means[i] for i in listed], len(accepted), rounds, {*tried, *of_beams}


@pytest.mark.parametrize("cold_levels", [None, 1])
def test_candidates_score_as_the_whole_forward_pass_says_and_last_codes_of_new_items_do_not_count(
    recommender: Recommender, new: np.ndarray, cold_levels: int | None
):
    verifier, options = Verifier(recommender), ColdOptions(cold_levels=cold_levels)
    examples = np.asarray(recommender.dataset.examples("test")[:3])
    batch = make_batch(recommender.dataset, recommender.ids.codes, recommender.model.config, examples, 1, frozen=True)
    candidates = np.tile(np.arange(-1, 150), (3, 1))
    counted = np.full(150, 3)
    counted[new] = cold_levels or 2
    found = verifier.verify(verifier.open(batch), candidates, options.counted(verifier.new, 3))
    assert np.isneginf(found[:, 0]).all()
    np.testing.assert_allclose(found[:, 1:], means_by_hand(recommender, examples, counted), atol=1e-4)


@pytest.mark.parametrize("quantile", [None, 0.3, 0.97, 2.0])
def test_lists_are_those_of_rounds_made_item_by_item(
    recommender: Recommender, drafter: Drafter, new: np.ndarray, quantile: float | None
):
    """Seen items left out; six requests in batches of four, so that the last is padded."""
    codes, dataset, config = recommender.ids.codes, recommender.dataset, recommender.model.config
    examples = np.asarray(dataset.examples("test")[:6])
    seen = [dataset.history(user).item[:cut] for user, cut in examples[:, :2].tolist()]
    counted = np.full(150, 3)
    counted[new] = 2
    means = means_by_hand(recommender, examples, counted)
    threshold = -np.inf if quantile is None else np.inf if quantile > 1 else float(np.quantile(means, quantile))
    options = ColdOptions(DRAFT, threshold)
    ragged = np.concatenate(seen), np.cumsum([0, *map(len, seen)])
    found = draft_and_verify(Verifier(recommender), drafter, examples, ragged, K, options)
    batch = make_batch(dataset, codes, config, examples, 1, frozen=True)
    state = recommender.state
    trie = device_trie(recommender.ids.trie, config)
    beams = np.asarray(
        make_beam_search(recommender.model, WIDTH)(state.params, state.tables, state.bias, batch, trie).codes
    )
    drafts = drafter.scores(profiles(dataset, drafter.content, examples))
    for n in range(len(examples)):
        scores, accepted, rounds, looked_at = lists_by_hand(
            drafts[n], means[n], beams[n].tolist(), codes, {*seen[n].tolist()}, threshold
        )
        assert found.accepted[n] == accepted and found.rounds[n] == rounds
        np.testing.assert_allclose(found.scores[n], scores, atol=1e-4)
        listed = found.items[n].tolist()  # new items whose codes differ in the last alone score alike
        assert len({*listed}) == K and {*listed} <= looked_at
        np.testing.assert_allclose(means[n][listed], scores, atol=1e-4)


def test_where_everything_is_accepted_the_first_drafts_are_all_that_is_made(recommender: Recommender, drafter: Drafter):
    options = ColdOptions(draft=K, threshold=-np.inf)
    examples = np.asarray(recommender.dataset.examples("test")[:2])
    found = draft_and_verify(Verifier(recommender), drafter, examples, None, K, options)
    nearest = np.argsort(-drafter.scores(profiles(recommender.dataset, drafter.content, examples)), axis=1)[:, :K]
    assert (np.sort(found.items, axis=1) == np.sort(nearest, axis=1)).all()
    assert found.rounds.tolist() == [1, 1] and found.accepted.tolist() == [K, K]


def test_lists_longer_than_what_there_is_end_in_nothing(recommender: Recommender, drafter: Drafter):
    examples, options = np.asarray(recommender.dataset.examples("test")[:1]), ColdOptions(draft=2, threshold=np.inf)
    found = draft_and_verify(Verifier(recommender), drafter, examples, None, 40, options)
    listed = found.items[0] >= 0
    assert 0 < listed.sum() < 40 and (np.isneginf(found.scores[0]) == ~listed).all()


def test_a_model_without_semantic_ids_and_empty_drafts_are_refused(tiny_recipe: Recipe, new: np.ndarray):
    with pytest.raises(InputError, match="no semantic IDs to verify"):
        Verifier(untrained(tiny_recipe, new, head="items"))
    with pytest.raises(InputError, match="must be 1 at least"):
        ColdOptions(draft=0)
