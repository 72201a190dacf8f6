"""One model, four ways to its lists: the training forward, the recommend step, the StableHLO file, and PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from made_exports import random_recommender
from scaled_recipes import distinct, recipes
from test_stablehlo import examples_of, excluded, features_of_all

from onerec_jax.data.batch import make_batch
from onerec_jax.export import pytorch_model, recommend
from onerec_jax.export.artifact import load_artifact, write_artifact
from onerec_jax.export.contents import contents_of
from onerec_jax.generate.recommender import Recommender, scores_of_items
from onerec_jax.generate.step import ListOptions, Lists, make_recommend_step

CONFIGURATIONS = distinct(recipes())
K, WIDTH = 50, 64


class Exported(NamedTuple):
    """An export of a recipe's model with random parameters, and what is asked of it."""

    place: Path
    recommender: Recommender
    served: recommend.Served
    features: recommend.Features
    exclude: np.ndarray
    examples: np.ndarray
    lists: Lists  # of the step, for the sample users


@pytest.fixture(scope="module", params=list(CONFIGURATIONS))
def exported(request: pytest.FixtureRequest, tiny_recipe, tmp_path_factory) -> Exported:
    folder = tmp_path_factory.mktemp("export")
    recommender = random_recommender(tiny_recipe, folder, **CONFIGURATIONS[request.param].model_dump())
    place = folder / "exported"
    write_artifact(contents_of(recommender, "float32", K, WIDTH, 4), place)
    loaded, served = load_artifact(place), recommend.load(place)
    features, exclude, examples = features_of_all(served), excluded(served), examples_of(loaded, recommender)
    config = recommender.model.config
    batch = make_batch(recommender.dataset, recommender.ids.codes, config, examples, 1, frozen=True)
    step = make_recommend_step(recommender.model, ListOptions(**loaded.config["lists"]))
    lists = Lists(*map(np.asarray, step(*loaded.parameters, loaded.on_device, batch, exclude, None)))
    return Exported(place, recommender, served, features, exclude, examples, lists)


def test_the_file_of_stablehlo_lists_the_same_fifty_items(exported: Exported):
    items, scores = exported.served.recommend(exported.features, exported.exclude)
    assert (items >= 0).all()
    np.testing.assert_array_equal(items, exported.lists.items)
    np.testing.assert_allclose(scores, exported.lists.scores, atol=1e-4)


def test_pytorch_lists_the_same_fifty_items(exported: Exported):
    model = pytorch_model.load(exported.place)
    request = {name: torch.from_numpy(array) for name, array in exported.features.items()}
    exclude = torch.from_numpy(exported.exclude).long()
    items, scores = model.recommend(request, exclude, k=K, width=WIDTH)
    np.testing.assert_array_equal(items.numpy(), exported.lists.items)
    np.testing.assert_allclose(scores.numpy(), exported.lists.scores, atol=1e-4)


def test_the_training_forward_gives_listed_items_the_scores_of_the_file(exported: Exported):
    """log P of each item by its codes, summed; of a model with an item head that is one part of the list's score."""
    by_codes = exported.served.score(exported.features, exported.lists.items).sum(axis=-1)
    trained = scores_of_items(exported.recommender, exported.examples, exported.lists.items)
    np.testing.assert_allclose(by_codes, trained, atol=1e-4)
    if exported.recommender.model.config.head == "codes":
        np.testing.assert_allclose(trained, exported.lists.scores, atol=1e-4)
