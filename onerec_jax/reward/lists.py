"""The learnt rewards of served lists, outside of training. N requests, K items of a list."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from onerec_jax.config import Recipe
from onerec_jax.data.batch import make_batch
from onerec_jax.data.store import Dataset
from onerec_jax.parallel.mesh import data_parallel, on_mesh
from onerec_jax.parallel.sharding import put_batch
from onerec_jax.reward.candidates import Candidates, Catalogue, make_catalogue
from onerec_jax.reward.pscore import RewardModel, learnt_rewards
from onerec_jax.reward.training import reward_recipe
from onerec_jax.tokenizer.semantic_ids import SemanticIds


class ListScorer:
    """A reward model over one dataset, compiled once; requests are read as that model was trained to read them."""

    def __init__(self, recipe: Recipe, dataset: Dataset, ids: SemanticIds, model: RewardModel, params: Any, mesh: Mesh):
        self._recipe, self._dataset, self._ids, self._params, self._mesh = recipe, dataset, ids, params, mesh
        self._reads = reward_recipe(recipe.model_copy(update={"reward": model.config})).model
        self._catalogue: Catalogue = make_catalogue(dataset, ids.codes)

        @jax.jit
        def score(params: Any, catalogue: Catalogue, batch: Any, item_BxK: Any) -> dict[str, Any]:
            nothing = jnp.zeros(item_BxK.shape, jnp.float32)
            given = Candidates(catalogue.codes[jnp.maximum(item_BxK, 0)], item_BxK, nothing)
            return learnt_rewards(model, params, catalogue)(batch, given)

        self._score = on_mesh(mesh, score)

    def __call__(self, examples: np.ndarray, items_NxK: np.ndarray) -> dict[str, np.ndarray]:
        """Every learnt reward by name, float32 [N,K], of item rows int [N,K] (-1 = nothing, which earns 0)."""
        ways = data_parallel(self._mesh)
        size = -(-min(self._recipe.evaluate.batch_size, max(1, len(examples))) // ways) * ways
        parts = []
        for first in range(0, len(examples), size):
            rows = np.resize(np.arange(first, min(first + size, len(examples))), size)
            batch = make_batch(self._dataset, self._ids.codes, self._reads, examples[rows], 1, frozen=True)
            given = put_batch((batch, items_NxK[rows].astype(np.int32)), self._mesh)
            found = self._score(self._params, self._catalogue, *given)
            parts.append({name: np.asarray(x)[: min(size, len(examples) - first)] for name, x in found.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def means(self, examples: np.ndarray, items_NxK: np.ndarray) -> dict[str, float]:
        """Over all that is served, the mean P-Score and that of every learnt reward that `rl.rewards` weighs."""
        found, served = self(examples, items_NxK), items_NxK >= 0
        names = dict.fromkeys(
            ("p_score", *(n for n, weight in self._recipe.rl.rewards.items() if weight and n in found))
        )
        return {name: float(np.mean(found[name][served])) for name in names}
