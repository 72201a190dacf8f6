"""`onerec recommend` and the lists of `Recommender.lists`, against `Recommender.recommend` and filters in NumPy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from onerec_jax.data.store import Dataset
from onerec_jax.errors import InputError
from onerec_jax.generate.recommendation import item_rows, recommend_to
from onerec_jax.generate.recommender import Recommender, padded_lists
from onerec_jax.generate.step import ListOptions
from onerec_jax.model.onerec import build
from onerec_jax.tokenizer.semantic_ids import SemanticIds


@pytest.fixture(scope="module")
def recommender(tiny_recipe) -> Recommender:
    """The tiny recipe's model with random parameters, large enough for distributions that are far from uniform."""
    dataset, ids = Dataset(tiny_recipe.dataset_directory), SemanticIds.load(tiny_recipe.tokenizer_directory)
    evaluate = tiny_recipe.evaluate.model_copy(update={"beam_width": dataset.num_items, "batch_size": 2})
    recipe = tiny_recipe.model_copy(update={"evaluate": evaluate})
    model = build(recipe.model, dataset.vocabulary(ids.codebook_sizes))
    params, tables = model.init(0)
    params["decoder"]["heads"] = jax.tree.map(lambda x: 4 * x, params["decoder"]["heads"])
    state = SimpleNamespace(params=params, tables=tables, bias=model.init_bias())
    return Recommender(Path(), recipe, dataset, ids, model, state)  # type: ignore[arg-type]


def _column(table, name: str) -> list[str]:
    return next(list(column.cells) for column in table.columns if column.header == name)


def test_where_beams_hold_everything_masks_and_filters_list_the_same(recommender: Recommender):
    examples = np.asarray(recommender.dataset.examples("test")[:3])
    seen = [recommender.dataset.history(user).item[:cut] for user, cut in examples[:, :2].tolist()]
    ragged = np.concatenate(seen), np.cumsum([0, *map(len, seen)])
    filtered, scores = recommender.recommend(examples, ragged, 12)
    masked, own = recommender.lists(examples, seen, None, ListOptions(k=12, width=recommender.dataset.num_items))
    np.testing.assert_array_equal(masked, filtered)
    np.testing.assert_allclose(own, scores, atol=1e-4)


def test_a_list_of_the_verb_follows_its_options(recommender: Recommender):
    user = str(recommender.dataset.user_ids[3])
    plain = _column(recommend_to(recommender, user, 9)[1], "item")
    without = _column(recommend_to(recommender, user, 9, leave_out=plain[0])[1], "item")
    assert without[:8] == plain[1:]
    only = _column(recommend_to(recommender, user, 9, only=", ".join(plain[4:1:-1]))[1], "item")
    assert only == plain[2:5]
    diverse = _column(recommend_to(recommender, user, 9, diversity=1e3)[1], "semantic ID")
    seen = recommender.dataset.history(3).item
    left = len(set(np.delete(recommender.ids.codes[:, 0], seen).tolist()))
    assert len({code.split("-")[0] for code in diverse}) == min(9, left)
    assert not {str(recommender.dataset.item_ids[i]) for i in seen} & set(plain)


def test_an_item_that_does_not_exist_is_named(recommender: Recommender):
    with pytest.raises(InputError, match="no item 'nothing'"):
        item_rows(recommender, "0,nothing")


def test_a_reranked_list_takes_no_other_options(recommender: Recommender):
    user = str(recommender.dataset.user_ids[3])
    with pytest.raises(InputError, match="no diversity"):
        recommend_to(recommender, user, 5, diversity=1.0, ranks=recommender)


def test_lists_of_items_are_padded_to_a_power_of_two():
    padded = padded_lists([np.array([4, 5, 6]), np.array([], np.int32)])
    assert padded.tolist() == [[4, 5, 6, -1], [-1, -1, -1, -1]]
    assert padded_lists([np.array([], np.int32)]).shape == (1, 1)
