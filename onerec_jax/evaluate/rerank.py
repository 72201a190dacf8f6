"""Lists re-ranked by expected score: how likely an item is, times what a reward model says that it is worth to the user."""

from __future__ import annotations

import dataclasses

import numpy as np

from onerec_jax.errors import InputError
from onerec_jax.generate.recommender import Recommender
from onerec_jax.parallel.mesh import make_mesh
from onerec_jax.reward.lists import ListScorer
from onerec_jax.reward.training import load_reward

_LEAST = 1e-6  # a reward of nothing at all is still on a logarithmic scale


def by_expected_score(
    items_NxM: np.ndarray, scores_NxM: np.ndarray, reward_NxM: np.ndarray, weight: float, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k items [N,k] of the largest P * reward^weight of each list, and its logarithm; -1 and -inf where there are no more.

    Args:
        items_NxM: item rows, -1 = nothing.
        scores_NxM: log P of each.
        reward_NxM: what each is worth, at least 0.
        weight: 0 leaves the order as it is, 1 ranks by the expected reward.
    """
    scores = np.where(items_NxM < 0, -np.inf, scores_NxM + weight * np.log(np.maximum(reward_NxM, _LEAST)))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(items_NxM, order, axis=1), np.take_along_axis(scores, order, axis=1).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Reranker:
    """A recommender whose lists are the best of longer ones, by expected score."""

    recommender: Recommender
    scorer: ListScorer

    @classmethod
    def of(cls, recommender: Recommender) -> Reranker:
        """The reranker that `evaluate.rerank` and `evaluate.reward_run` ask for.

        Raises:
            InputError: `evaluate.reward_run` is missing, or of another dataset.
        """
        recipe = recommender.recipe
        if recipe.evaluate.reward_run is None:
            raise InputError("evaluate.rerank needs evaluate.reward_run: a reward model that says what items are worth")
        reward = load_reward(recipe.evaluate.reward_run, recipe)
        return cls(
            recommender, ListScorer(recipe, recommender.dataset, recommender.ids, *reward, make_mesh(recipe.mesh))
        )

    def recommend(
        self, examples: np.ndarray, seen: tuple[np.ndarray, np.ndarray] | None, k: int, *, progress: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `Recommender.recommend`; the scores are logarithms of expected scores."""
        settings = self.recommender.recipe.evaluate
        items, scores = self.recommender.recommend(examples, seen, max(k, settings.rerank), progress=progress)
        reward = self.scorer(examples, items)["p_score"]
        return by_expected_score(items, scores, reward, settings.rerank_weight, k)


def ranked(recommender: Recommender) -> Recommender | Reranker:
    """Who makes the lists of a run: itself, or where `evaluate.rerank` asks for it a reranker of its lists."""
    return Reranker.of(recommender) if recommender.recipe.evaluate.rerank else recommender
