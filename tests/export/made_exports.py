"""Exports of tiny models with random parameters, large enough for distributions that are far from uniform."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from tiny import tiny_model

from onerec_jax.config import Recipe
from onerec_jax.data.store import Dataset
from onerec_jax.export.artifact import write_artifact
from onerec_jax.export.contents import contents_of
from onerec_jax.export.quantize import DType
from onerec_jax.generate.recommender import Recommender
from onerec_jax.model.onerec import Model, build
from onerec_jax.parallel.sharding import path_name
from onerec_jax.tokenizer.semantic_ids import SemanticIds

LISTS = {"k": 6, "width": 8}


def random_weights(model: Model) -> tuple[Any, dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """params, tables and bias; drawn here, as to compile an initialisation takes longer than all that follows."""
    rng = np.random.default_rng(0)

    def drawn(path: Any, leaf: Any) -> np.ndarray:
        values = rng.standard_normal(leaf.shape).astype(np.float32)
        if path_name(path).endswith("scale"):
            return 1 + values / 10
        return values * np.float32(2 * leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 0.1)

    params = jax.tree_util.tree_map_with_path(drawn, model.abstract)
    tables = {name: {"rows": rng.standard_normal(shape).astype(np.float32)} for name, shape in model.tables.items()}
    return params, tables, jax.tree.map(lambda x: rng.random(x.shape, np.float32) / 10, model.init_bias())


def random_recommender(recipe: Recipe, run: Path, **changes) -> Recommender:
    """A recommender of the tiny recipe, its model with these changes."""
    dataset, ids = Dataset(recipe.dataset_directory), SemanticIds.load(recipe.tokenizer_directory)
    config = tiny_model(**changes) if changes else recipe.model
    model = build(config, dataset.vocabulary(ids.codebook_sizes))
    params, tables, bias = random_weights(model)
    state = SimpleNamespace(params=params, tables=tables, bias=bias, step=6)
    return Recommender(run, recipe.model_copy(update={"model": config}), dataset, ids, model, state)  # type: ignore[arg-type]


def export(recommender: Recommender, folder: Path, dtype: DType = "float32", users: int = 5) -> Path:
    write_artifact(contents_of(recommender, dtype, users=users, **LISTS), folder, dtype)
    return folder
