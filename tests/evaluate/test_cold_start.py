"""Recall of warm and of new items apart, and the verb that prints it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import ALONE, tiny_model

from onerec_jax.config import Recipe
from onerec_jax.data.store import Dataset
from onerec_jax.errors import InputError
from onerec_jax.evaluate import cold_start
from onerec_jax.evaluate.cold_start import choose_options, evaluate_cold, every_third, metrics_apart, only
from onerec_jax.evaluate.requests import collect_requests
from onerec_jax.generate import load
from onerec_jax.generate.cold import ColdOptions, Drafted, Verifier
from onerec_jax.generate.drafter import Drafter, fit_drafter, item_content, profiles
from onerec_jax.generate.recommender import Recommender
from onerec_jax.model.onerec import build
from onerec_jax.tokenizer.semantic_ids import SemanticIds
from onerec_jax.train.state import TrainState

OPTIONS = ColdOptions(draft=12, threshold=-2.0)


@pytest.fixture
def recommender(tiny_recipe: Recipe, tmp_path: Path) -> Recommender:
    """An untrained model; every third item is new."""
    dataset, ids = Dataset(tiny_recipe.dataset_directory), SemanticIds.load(tiny_recipe.tokenizer_directory)
    count = np.maximum(dataset.items.train_count, 1)
    count[::3] = 0
    dataset.items = dataclasses.replace(dataset.items, train_count=count)
    recipe = tiny_recipe.model_copy(update={"model": tiny_model(**ALONE)})
    model = build(recipe.model, dataset.vocabulary(ids.codebook_sizes))
    params, tables = model.init(0)
    state = TrainState(jnp.zeros((), jnp.int32), params, None, tables, model.init_bias())
    return Recommender(tmp_path, recipe, dataset, ids, model, state)


def test_recall_is_over_the_relevant_items_of_a_kind(tiny_recipe: Recipe):
    """Three requests, of which the first has both kinds, the second new items alone, the third warm ones alone."""
    relevant = np.array([1, 2, 3, 11, 12, 4], np.int32), np.array([0, 3, 5, 6])
    new = np.arange(20) > 10
    new[3] = True
    lists = np.array([[1, 3, -1, -1, -1], [0, 12, 5, 6, 7], [8, 9, -1, -1, -1]], np.int32)
    settings = tiny_recipe.evaluate.model_copy(update={"ks": (1, 5)})
    recipe = tiny_recipe.model_copy(update={"evaluate": settings})
    found = metrics_apart(lists, relevant, new, recipe)
    assert found == {
        "R@1 all": pytest.approx((1 / 3 + 0 + 0) / 3),
        "R@5 all": pytest.approx((2 / 3 + 1 / 2 + 0) / 3),
        "R@1 warm": pytest.approx((1 / 2 + 0) / 2),
        "R@5 warm": pytest.approx((1 / 2 + 0) / 2),
        "R@1 new": 0.0,
        "R@5 new": pytest.approx((1 + 1 / 2) / 2),
        "new in lists": pytest.approx(2 / 9),
    }
    assert [x.tolist() for x in only(relevant, new)] == [[3, 11, 12], [0, 1, 3, 3]]


def test_every_third_place_is_another_lists_and_no_item_comes_twice():
    lists = np.array([[1, 2, 3, 4, 5, 6, 7], [9, 8, 7, 6, 5, 4, 3]], np.int32)
    other = np.array([[20, 3, 21, 22, 23, 24, 25], [4, 9, 1, 2, 10, 11, 12]], np.int32)
    assert every_third(lists, other).tolist() == [[1, 2, 20, 4, 5, 3, 6], [8, 7, 4, 6, 5, 9, 3]]


def test_every_row_is_measured_and_kept_with_the_run(recommender: Recommender):
    lines: list[str] = []
    found = evaluate_cold(recommender, OPTIONS, report=lines.append)
    assert list(found.rows) == [
        "model", "drafted, verified", "drafter alone", "drafter, new alone", "model, 1/3 of those", "popularity",
    ]  # fmt: skip
    dataset, recipe = recommender.dataset, recommender.recipe
    requests, new = collect_requests(dataset, recipe), dataset.items.train_count == 0
    drafter = fit_drafter(dataset, item_content(dataset, recipe.tokenizer, recipe.seed), recipe.seed)
    scores = drafter.scores(profiles(dataset, drafter.content, requests.examples))
    flat, offsets = requests.context
    scores[np.repeat(np.arange(len(requests)), np.diff(offsets)), flat] = -np.inf
    fresh = np.argsort(-np.where(new, scores, -np.inf), axis=1, kind="stable")[:, :10]
    expected = {
        "drafter, new alone": fresh,
        "model": recommender.recommend(requests.examples, requests.context, 10)[0],
        "drafter alone": np.argsort(-scores, axis=1, kind="stable")[:, :10],
    }
    for name, lists in expected.items():
        assert found.rows[name] == metrics_apart(lists, requests.relevant, new, recipe), name
    assert found.rows["drafted, verified"] not in [found.rows[name] for name in expected]
    assert json.loads((recommender.run / "cold_start.json").read_text()) == dataclasses.asdict(found)
    assert found.threshold == -2.0 and "threshold -2.000" in found.protocol and "accepted" in lines[0]


@pytest.mark.parametrize("cold_levels", [None, 2])
def test_options_are_those_of_the_highest_recall_on_the_validation_split(
    recommender: Recommender, monkeypatch: pytest.MonkeyPatch, cold_levels: int | None
):
    """Drafts that score 0, -1, .., -11 and lists of which one threshold with two codes makes the best."""
    tried: list[ColdOptions] = []

    def lists(verifier, drafter, examples, seen, k, options):
        items = np.full((len(examples), k), -1, np.int32)
        if k != OPTIONS.draft:
            tried.append(options)
            if options.cold_levels == 2 and -3 < options.threshold < -2:
                for row, (user, _, start, stop) in enumerate(examples.tolist()):
                    history = recommender.dataset.history(user)
                    items[row, 0] = history.item[start:stop][history.positive[start:stop]][0]
        scores = np.tile(-np.arange(float(k), dtype=np.float32), (len(examples), 1))
        return Drafted(items, scores, np.zeros(len(examples), np.int32), np.zeros(len(examples), np.int32))

    monkeypatch.setattr(cold_start, "draft_and_verify", lists)
    content = np.ones((recommender.dataset.num_items, 1), np.float32)
    given = dataclasses.replace(OPTIONS, cold_levels=cold_levels)
    found = choose_options(Verifier(recommender), Drafter(np.zeros((3, 1), np.float32), content), given)
    assert cold_start.QUANTILES == (0.5, 0.75, 0.9)
    thresholds = [-5.5, -2.75, -1.0]
    levels = (1, 2) if cold_levels is None else (2,)
    assert [(o.cold_levels, o.threshold) for o in tried] == [(c, t) for c in levels for t in thresholds]
    assert (found.cold_levels, found.threshold, found.draft) == (2, thresholds[1], 12)


def test_a_dataset_without_new_items_is_refused(recommender: Recommender):
    items = recommender.dataset.items
    recommender.dataset.items = dataclasses.replace(items, train_count=items.train_count + 1)
    with pytest.raises(InputError, match="every item"):
        evaluate_cold(recommender, OPTIONS)


def test_the_verb_prints_the_table(recommender: Recommender, onerec, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(load, "load_recommender", lambda run, overrides: recommender)
    answer = onerec("cold", "tiny", "--draft", "12", "--threshold", "-2.0")
    assert answer.code == 0, answer.err
    printed = " ".join(answer.out.split())
    assert "drafted, verified" in printed and "threshold -2.000" in printed
