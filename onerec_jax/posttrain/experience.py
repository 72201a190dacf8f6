"""From logged requests to what an RL step learns from: candidates, what they earned, and their probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from onerec_jax.config import Recipe
from onerec_jax.data.schema import Batch
from onerec_jax.generate.step import Catalogue as Listed
from onerec_jax.model.onerec import Model
from onerec_jax.model.prefixes import DeviceTrie
from onerec_jax.posttrain.group import Group
from onerec_jax.posttrain.judge import make_judge
from onerec_jax.posttrain.rollout import (
    Rollout,
    candidate_log_p,
    item_distribution,
    item_log_p,
    make_rollout,
    make_served,
    read_request,
)
from onerec_jax.posttrain.step import AGAINST_THE_LOG, FROM_THE_START, Experience
from onerec_jax.reward.candidates import Catalogue
from onerec_jax.reward.format import format_advantage, legality
from onerec_jax.reward.pscore import RewardModel
from onerec_jax.train.metrics import Metrics

Policy = dict[str, Any]  # params, tables and bias, see `checkpoint.POLICY`


def looked_at(searched: Rollout, size: int, key: Array) -> tuple[Array, Array, Array]:
    """What the format reward looks at of a search: `size` random candidates of each request, in their order.

    Returns:
        Their codes [B,K,C], log-probabilities [B,K,C], and which of them are legal, bool [B,K].
    """
    legal = searched.leaf >= 0
    advantage, chosen = format_advantage(legal, searched.exists, jax.random.uniform(key, legal.shape), size)
    first_BxK = jnp.argsort(~chosen, axis=1, stable=True)[:, :size]

    def of_them(x: Array) -> Array:
        return jnp.take_along_axis(x, first_BxK.reshape(*first_BxK.shape, *[1] * (x.ndim - 2)), axis=1)

    return of_them(searched.codes), of_them(searched.log_p_all), of_them(advantage > 0)


class _Judged(NamedTuple):
    """Candidates and what is known of them."""

    codes: Array  # int32 [B,G,C]
    item: Array  # int32 [B,G]
    old: Array  # float32 [B,G,C], log-probabilities under the policy that generates
    reward: Array  # float32 [B,G]
    valid: Array  # bool [B,G]
    logged: Array  # bool [B,G], of the log and not generated


def _with_log(found: _Judged, request: Batch, liked_BxT: Array, old_BxTxC: Array) -> _Judged:
    """The candidates, less those that the log liked, and after them the targets of the log, which earn nothing."""
    same_BxGxT = jnp.all(found.codes[:, :, None] == request.targets[:, None], axis=-1)
    met_BxG = jnp.any(same_BxGxT & liked_BxT[:, None], axis=-1)
    log = _Judged(
        codes=request.targets,
        item=request.target_item,
        old=old_BxTxC,
        reward=jnp.zeros(liked_BxT.shape),
        valid=liked_BxT,
        logged=jnp.ones_like(liked_BxT),
    )
    found = found._replace(valid=found.valid & ~met_BxG)
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), found, log)


def make_experience(
    model: Model, recipe: Recipe, labels: tuple[str, ...], reward: RewardModel | None
) -> Callable[..., tuple[Experience, Metrics]]:
    """Jitted: (behaviour, start, reward's parameters, catalogue, listed, request, history, key) -> experience, metrics.

    `behaviour` is the policy that generates, `start` the one that RL began with; `catalogue` and `listed` are the items as the
    reward model and as the policy know them, `request` and `history` the same requests as either reads them. A pure function:
    with what it is given and the key, what is generated after a restart is what was generated before.
    """
    settings = recipe.rl
    served_of = make_served(model, recipe) if settings.rollout == "served" else None
    rollout_of = make_rollout(model, settings)
    shared = not settings.constrained  # the format reward then looks at the same candidates
    looks = settings.format_weight > 0 and settings.format_samples > 0
    free_of = None if shared or not looks else make_rollout(model, settings, free=True)
    from_the_start = settings.kl_weight > 0 or settings.objective in FROM_THE_START
    judge = make_judge(recipe, labels, reward)
    positive = tuple(i for i, name in enumerate(labels) if name in recipe.data.positive_labels)

    def log_p(policy: Policy, request: Batch, codes: Array, valid: Array, trie: DeviceTrie) -> Array:
        module, context, _ = read_request(model, policy, request)
        return candidate_log_p(module, context, codes, valid, policy["bias"], trie, settings.distribution)

    def of_items(policy: Policy, request: Batch, trie: DeviceTrie) -> Array:
        module, context, local = read_request(model, policy, request)
        return item_distribution(module, context, local, trie)

    @jax.jit
    def experience(
        behaviour: Policy,
        start: Policy,
        reward_params: Any,
        catalogue: Catalogue,
        listed: Listed,
        request: Batch,
        history: Batch,
        key: Array,
    ) -> tuple[Experience, Metrics]:
        keys, trie = jax.random.split(key, 4), listed.trie
        asked = (behaviour["params"], behaviour["tables"], behaviour["bias"], request)
        given = (*asked, trie, listed.items[listed.item_start[:-1]])
        rollout: Rollout = rollout_of(*given, keys[0]) if served_of is None else served_of(*asked, listed)
        judged = judge(reward_params, catalogue, request, history, rollout)
        metrics = dict(judged.metrics)
        old = rollout.log_p_legal if settings.distribution == "legal" else rollout.log_p_all
        found = _Judged(
            rollout.codes, rollout.item, old, judged.reward, judged.valid, jnp.zeros(judged.valid.shape, bool)
        )
        if settings.objective in AGAINST_THE_LOG:
            liked = request.target_weight > 0
            if positive:
                liked &= jnp.any(request.feedback[..., jnp.array(positive)] > 0, axis=-1)
            found = _with_log(found, request, liked, log_p(behaviour, request, request.targets, liked, trie))
        codes, item, old, reward, valid, logged = found
        reference = old
        if from_the_start:
            reference = log_p(start, request, codes, valid, trie)
        chance = jax.random.uniform(keys[1], valid.shape)
        group = Group(jnp.zeros(old.shape), old, reference, reward, valid, logged, chance)
        item_group = item_start = None
        if settings.item_weight:
            old = item_log_p(of_items(behaviour, request, trie), item, valid)
            reference = old
            if from_the_start or settings.rest_weight:
                item_start = of_items(start, request, trie)
                reference = item_log_p(item_start, item, valid)
            item_group = Group(jnp.zeros(old.shape), old, reference, reward, valid, logged, chance)

        searched = rollout
        if free_of is not None:
            searched = free_of(*given, keys[2])
        if free_of is not None or shared:
            metrics["legality"] = legality(searched.leaf >= 0, searched.exists)
        format_codes, format_old, format_valid = looked_at(searched, settings.format_samples if looks else 0, keys[3])
        return Experience(
            request=request,
            codes=codes,
            group=group,
            format_codes=format_codes,
            format_old=format_old,
            format_valid=format_valid,
            item=item if settings.item_weight else None,
            item_group=item_group,
            item_start=item_start if settings.rest_weight else None,
        ), metrics

    return experience
