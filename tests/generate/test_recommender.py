"""Lists of a model with both heads, against the scores of every item by each of them."""

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny import ALONE, tiny_model

from onerec_jax.data.pipeline import make_batch
from onerec_jax.data.store import Dataset
from onerec_jax.generate.beam import make_beam_search
from onerec_jax.generate.recommender import Recommender, scores_of_items
from onerec_jax.model.onerec import build
from onerec_jax.model.prefixes import device_trie
from onerec_jax.tokenizer.semantic_ids import SemanticIds


def both_heads(tiny_recipe, **evaluate) -> Recommender:
    """A model with both heads and random parameters, large enough for distributions that are far from uniform."""
    dataset, ids = Dataset(tiny_recipe.dataset_directory), SemanticIds.load(tiny_recipe.tokenizer_directory)
    config = tiny_model(**ALONE, head="both", softmax="legal", causal=True)
    settings = tiny_recipe.evaluate.model_copy(update=evaluate)
    recipe = tiny_recipe.model_copy(update={"model": config, "evaluate": settings})
    model = build(config, dataset.vocabulary(ids.codebook_sizes))
    params, tables = model.init(0)
    params["decoder"]["heads"] = jax.tree.map(lambda x: 5 * x, params["decoder"]["heads"])
    params["head"] = jax.tree.map(lambda x: 9 * x, params["head"])
    state = SimpleNamespace(params=params, tables=tables, bias=model.init_bias())
    return Recommender(Path(), recipe, dataset, ids, model, state)  # type: ignore[arg-type]


def scores_by_both(recommender: Recommender, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log P of every item [N,I] by the item head, its vectors written out, and with that by codes added to it."""
    dataset, ids, model = recommender.dataset, recommender.ids, recommender.model
    batch = make_batch(dataset, ids.codes, model.config, examples, 1, frozen=True)
    params, tables, bias = recommender.state.params, recommender.state.tables, recommender.state.bias
    module = model.bind(params)
    assert module.head is not None
    context = module.encode(*model.read(tables, batch), bias, None)[0]
    table, sizes = np.asarray(params["decoder"]["codes"]["embedding"]), ids.codebook_sizes
    first = np.cumsum([0, *sizes[:-1]])
    vectors = np.asarray(params["head"]["items"]["embedding"]) + table[ids.codes + first].sum(axis=1)
    own = jax.nn.log_softmax(np.asarray(module.head.states(context, batch.short.item, batch.visible)[:, 0]) @ vectors.T)
    everything = np.tile(np.arange(dataset.num_items), (len(examples), 1))
    weight = recommender.recipe.evaluate.item_weight
    return np.array(own), scores_of_items(recommender, examples, everything) + weight * np.asarray(own)


@pytest.mark.parametrize(("inferences", "weight"), [(1, 0.0), (1, 2.5), (2, 1.0)])
def test_beams_of_both_heads_are_ranked_by_both(tiny_recipe, inferences: int, weight: float):
    recommender = both_heads(tiny_recipe, beam_width=200, item_weight=weight, inferences=inferences, left_out=0.0)
    examples = np.asarray(recommender.dataset.examples("test")[:5])
    k = recommender.dataset.num_items
    found, scores = recommender.recommend(examples, None, k)
    expected = scores_by_both(recommender, examples)[1]
    assert (np.sort(found, axis=1) == np.arange(k)).all()
    np.testing.assert_allclose(scores, np.take_along_axis(expected, found, axis=1), atol=1e-4)
    assert (np.diff(scores, axis=1) <= 1e-6).all()


def test_narrow_beams_are_joined_by_the_best_items_of_the_other_head(tiny_recipe):
    """Seen items left out; five requests in batches of two, so that the last one is padded."""
    recommender = both_heads(tiny_recipe, beam_width=4, item_weight=1.5, batch_size=2)
    examples, k = np.asarray(recommender.dataset.examples("test")[:5]), 6
    seen = [recommender.dataset.history(user).item[:cut] for user, cut in examples[:, :2].tolist()]
    ragged = np.concatenate(seen), np.cumsum([0, *map(len, seen)])
    found, scores = recommender.recommend(examples, ragged, k)
    own, both = scores_by_both(recommender, examples)
    trie, config = recommender.ids.trie, recommender.model.config
    batch = make_batch(recommender.dataset, recommender.ids.codes, config, examples, 1, frozen=True)
    given = recommender.state.params, recommender.state.tables, recommender.state.bias
    leaves = np.asarray(make_beam_search(recommender.model, 4)(*given, batch, device_trie(trie, config)).leaf)
    joined = 0
    for n in range(len(examples)):
        by_codes = {int(item) for leaf in leaves[n] for item in trie.leaf_items(int(leaf))}
        own[n, seen[n]] = -np.inf
        by_items = set(np.argsort(-own[n], kind="stable")[:k].tolist())
        candidates = sorted((by_codes | by_items) - set(seen[n].tolist()), key=lambda item: -both[n, item])
        assert found[n].tolist() == candidates[:k]
        np.testing.assert_allclose(scores[n], both[n, found[n]], atol=1e-4)
        joined += len(by_items - by_codes)
    assert joined


def test_lists_are_corrected_to_what_was_liked_of_late(tiny_recipe):
    """Every item a candidate; the model's own frequencies of the next request after each user's train part."""
    recommender = both_heads(tiny_recipe, beam_width=200, item_weight=2.0, label_shift_days=3.0, label_shift_prior=7.0)
    dataset = recommender.dataset
    stops = np.array([dataset.train_stop(user) for user in range(dataset.num_users)])
    ends = np.stack([np.arange(dataset.num_users), stops, stops - 1, stops - 1], axis=1)[stops > 0]
    frequency = np.exp(scores_by_both(recommender, ends)[0]).mean(axis=0)
    histories = [dataset.history(user) for user in range(dataset.num_users)]
    last = max(h.timestamp_ms[:stop].max(initial=0) for h, stop in zip(histories, stops, strict=True))
    liked = np.zeros(dataset.num_items)
    for history, stop in zip(histories, stops, strict=True):
        for item, time, positive in zip(history.item[:stop], history.timestamp_ms, history.positive, strict=False):
            liked[item] += bool(positive) and time > last - 3 * 86_400_000
    assert 0 < liked.sum() < sum(h.positive[:stop].sum() for h, stop in zip(histories, stops, strict=True))
    examples = np.asarray(dataset.examples("test")[:5])
    own, both = scores_by_both(recommender, examples)
    moved = own + np.log((liked + 7 * frequency) / frequency)
    expected = both + 2.0 * (np.asarray(jax.nn.log_softmax(moved)) - own)
    found, scores = recommender.recommend(examples, None, dataset.num_items)
    np.testing.assert_allclose(scores, np.take_along_axis(expected, found, axis=1), atol=2e-4)
    assert (np.diff(scores, axis=1) <= 1e-6).all()
