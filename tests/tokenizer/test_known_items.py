"""Semantic IDs that are fitted on the items met in train alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from onerec_jax.config import Recipe, TokenizerConfig
from onerec_jax.data.store import Dataset
from onerec_jax.errors import InputError
from onerec_jax.tokenizer.content import content_vectors
from onerec_jax.tokenizer.known_items import fit_known_items
from onerec_jax.tokenizer.semantic_ids import SemanticIds

NEW = np.arange(0, 150, 5)


def grown(recipe: Recipe, moved: float = 0.0) -> Dataset:
    """The tiny dataset with `NEW` as items without train events, their embeddings moved."""
    dataset = Dataset(recipe.dataset_directory)
    count, embedding = np.maximum(dataset.items.train_count, 1), np.array(dataset.items.embedding)
    count[NEW] = 0
    embedding[NEW] += moved * np.random.default_rng(0).normal(size=embedding[NEW].shape)
    dataset.items = dataclasses.replace(dataset.items, train_count=count, embedding=embedding)
    return dataset


@pytest.fixture(scope="module")
def config(tiny_recipe: Recipe) -> TokenizerConfig:
    return tiny_recipe.tokenizer


def test_codebooks_and_ids_of_known_items_do_not_depend_on_new_ones(tiny_recipe: Recipe, config: TokenizerConfig):
    one, other = (fit_known_items(grown(tiny_recipe, moved), config, 0) for moved in (0.0, 3.0))
    known = np.setdiff1d(np.arange(150), NEW)
    np.testing.assert_array_equal(one.codes[known], other.codes[known])
    assert (one.codes[NEW] != other.codes[NEW]).any()
    assert all((one.arrays[name] == other.arrays[name]).all() for name in one.arrays)


def test_every_item_has_the_nearest_code_of_what_the_levels_before_left(tiny_recipe: Recipe, config: TokenizerConfig):
    dataset = grown(tiny_recipe)
    ids, residual = fit_known_items(dataset, config, 0), content_vectors(dataset, config, 0).astype(np.float64)
    for level in range(ids.levels):
        book = ids.arrays[f"codebook_{level}"]
        nearest = ((residual[:, None] - book) ** 2).sum(-1).argmin(1)
        np.testing.assert_array_equal(ids.codes[:, level], nearest)
        residual = residual - book[nearest]


@pytest.mark.parametrize("dedup", ["none", "extra_level"])
def test_the_trie_leads_to_every_item_and_the_ids_are_those_of_the_dataset(
    tiny_recipe: Recipe, config: TokenizerConfig, dedup: str, tmp_path
):
    dataset = grown(tiny_recipe)
    ids = fit_known_items(dataset, config.model_copy(update={"dedup": dedup, "codebook_sizes": (4, 4)}), 0)
    ids.save(tmp_path / "ids")
    ids = SemanticIds.load(tmp_path / "ids", dataset)
    for item, codes in enumerate(ids.codes):
        assert item in ids.items_of(codes)
    if dedup == "extra_level":
        assert len(np.unique(ids.codes, axis=0)) == 150
        assert ids.codebook_sizes == (4, 4, int(ids.codes[:, 2].max()) + 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"content": ("embedding", "behaviour")}, "'behaviour'"),
        ({"quantizer": {"kind": "product"}}, "residual_kmeans"),
        ({"alignment": {"steps": 3}}, "alignment"),
    ],
)
def test_settings_that_need_more_than_content_of_known_items_are_refused(
    tiny_recipe: Recipe, config: TokenizerConfig, changes: dict, message: str
):
    changed = TokenizerConfig.model_validate({**config.model_dump(), **changes})
    with pytest.raises(InputError, match=message):
        fit_known_items(grown(tiny_recipe), changed, 0)


def test_a_dataset_of_new_items_alone_is_refused(tiny_recipe: Recipe, config: TokenizerConfig):
    dataset = grown(tiny_recipe)
    dataset.items = dataclasses.replace(dataset.items, train_count=np.zeros(150, np.int64))
    with pytest.raises(InputError, match="no item"):
        fit_known_items(dataset, config, 0)
