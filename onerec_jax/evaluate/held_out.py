"""What RL is watched by: recall, legality and reward of what a policy serves on held-out requests."""

from __future__ import annotations

from collections.abc import Callable

from onerec_jax.config import Recipe
from onerec_jax.data.store import Dataset
from onerec_jax.evaluate.metrics import ranking_metrics, value
from onerec_jax.evaluate.requests import collect_requests
from onerec_jax.generate.recommender import Recommender
from onerec_jax.reward.lists import ListScorer


def make_watch(recipe: Recipe, dataset: Dataset) -> Callable[[Recommender, ListScorer | None], dict[str, float]]:
    """(recommender, reward) -> Recall@`rl.watch_k`, legality of free beams, and the mean of P-Score and of every
    learnt reward that `rl.rewards` names over what is served.

    Over `rl.watch_examples` requests of the validation split, always the same.
    """
    settings, evaluate = recipe.rl, recipe.evaluate
    chosen = evaluate.model_copy(update={"split": "valid", "max_examples": settings.watch_examples})
    requests = collect_requests(dataset, recipe.model_copy(update={"evaluate": chosen}))
    seen = requests.context if evaluate.exclude_seen else None

    def watch(recommender: Recommender, reward: ListScorer | None) -> dict[str, float]:
        lists = recommender.recommend(requests.examples, seen, settings.watch_k)[0]
        found = ranking_metrics(lists, requests.relevant, (settings.watch_k,))
        kind = "pair_recall" if evaluate.recall == "pair" else "recall"
        values = {"recall": value(found[f"{kind}@{settings.watch_k}"])}
        if evaluate.free_examples and recipe.model.softmax == "all":
            values["legal"] = recommender.legality(requests.examples[: evaluate.free_examples])
        if reward is not None:
            values |= reward.means(requests.examples, lists)
        return values

    return watch
