"""The rewards that a recipe names, weighed and added: what every candidate earned, and which candidates count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from onerec_jax.config import Recipe
from onerec_jax.data.schema import Batch
from onerec_jax.errors import InputError
from onerec_jax.posttrain.rollout import Rollout
from onerec_jax.reward.candidates import Candidates, Catalogue, Reward
from onerec_jax.reward.duration import watched_quantile
from onerec_jax.reward.industrial import author_spread, diversity, share_cap
from onerec_jax.reward.pscore import RewardModel, learnt_rewards, reward_names
from onerec_jax.reward.rules import hit, ndcg_rank, prefix_match
from onerec_jax.train.metrics import Metrics

BY_THE_LOG = ("hit", "prefix_match", "ndcg_rank")  # rules that ask what the user took next
RULES = (*BY_THE_LOG, "diversity", "author_spread", "watched_quantile")


class Judged(NamedTuple):
    """What a rollout earned."""

    reward: Array  # float32 [B,G]
    valid: Array  # bool [B,G]: an item, and one that may be served
    metrics: Metrics


def learnt(recipe: Recipe) -> list[str]:
    """Names of `rl.rewards` that are no rules, and weigh something: they need a reward model."""
    return [name for name, weight in recipe.rl.rewards.items() if weight and name not in RULES]


def check_rewards(recipe: Recipe, labels: tuple[str, ...]) -> None:
    """Raises InputError where `rl.rewards` names what there is not, of a log with these labels."""
    known = (*reward_names(labels), *RULES)
    for name in recipe.rl.rewards:
        if name not in known:
            raise InputError(f"rl.rewards names '{name}'; there are {', '.join(known)}")


def rule_rewards(catalogue: Catalogue, positive_labels: tuple[int, ...]) -> dict[str, Reward]:
    """Every reward that is not learnt; `positive_labels` are columns of the feedback."""
    return {
        "hit": hit(positive_labels),
        "prefix_match": prefix_match(positive_labels),
        "ndcg_rank": ndcg_rank(positive_labels),
        "diversity": diversity(catalogue),
        "author_spread": author_spread(catalogue),
        "watched_quantile": watched_quantile(catalogue),
    }


def make_judge(
    recipe: Recipe, labels: tuple[str, ...], model: RewardModel | None
) -> Callable[[Any, Catalogue, Batch, Batch, Rollout], Judged]:
    """A pure function (reward model's parameters, catalogue, request, the reward model's request, rollout) -> Judged.

    The two batches are of the same requests; they differ in the lengths of their pathways. The reward of a candidate is the
    weighted sum of `rl.rewards`, times what `rl.share_cap` leaves of it. Items that are left out of served lists, because the
    user met them (`evaluate.exclude_seen`), do not count.
    """
    settings = recipe.rl
    positive = tuple(i for i, name in enumerate(labels) if name in recipe.data.positive_labels)
    needs_model = learnt(recipe)

    def judge(params: Any, catalogue: Catalogue, request: Batch, history: Batch, rollout: Rollout) -> Judged:
        given = Candidates(rollout.codes, rollout.item, rollout.score)
        valid = rollout.item >= 0
        if recipe.evaluate.exclude_seen:
            met = history.short.item if needs_model else request.short.item
            valid &= ~jnp.any(rollout.item[:, :, None] == met[:, None, :], axis=-1)
        found = {name: reward(request, given) for name, reward in _chosen(catalogue).items()}
        if needs_model:
            assert model is not None
            scores = learnt_rewards(model, params, catalogue)(history, given)
            found |= {name: scores[name] for name in needs_model}
        count = jnp.sum(valid)
        metrics: Metrics = {f"reward/{n}": (jnp.sum(jnp.where(valid, r, 0.0)), count) for n, r in found.items()}
        total = jnp.zeros(rollout.item.shape)
        for name, reward in found.items():
            total = total + settings.rewards[name] * reward
        if settings.share_cap is not None:
            factor = share_cap(catalogue, settings.share_cap)(request, given)
            metrics["reward/held_back"] = (jnp.sum(jnp.where(valid, factor < 1, False)), count)
            total = total * factor
        metrics["reward"] = (jnp.sum(jnp.where(valid, total, 0.0)), count)
        best = jnp.max(total, axis=1, where=valid, initial=-jnp.inf)
        there = jnp.any(valid, axis=1)
        metrics["reward/best"] = (jnp.sum(jnp.where(there, best, 0.0)), jnp.sum(there))
        metrics["reward/valid"] = (count, jnp.sum(rollout.exists))
        return Judged(total, valid, metrics)

    def _chosen(catalogue: Catalogue) -> dict[str, Reward]:
        return {name: r for name, r in rule_rewards(catalogue, positive).items() if settings.rewards.get(name)}

    return judge
