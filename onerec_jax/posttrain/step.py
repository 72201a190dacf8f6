"""The RL step: the loss of RSFT on logged requests, and the objective on generated candidates, in one update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from onerec_jax.config import Recipe
from onerec_jax.data.schema import Batch
from onerec_jax.model.onerec import Model
from onerec_jax.model.prefixes import DeviceTrie
from onerec_jax.model.tables import gather, this_step, update_tables
from onerec_jax.posttrain.group import Group
from onerec_jax.posttrain.objectives import OBJECTIVES, ecpo_of, kl_of_rest, kl_to_reference
from onerec_jax.posttrain.rollout import candidate_log_p, item_distribution, item_log_p
from onerec_jax.train.divergence import counted, where_finite
from onerec_jax.train.metrics import Metrics, mean
from onerec_jax.train.state import TrainState
from onerec_jax.train.step import make_loss, micro_batches

AGAINST_THE_LOG = ("s_dpo", "sprec")  # objectives whose winner is an item of the log
FROM_THE_START = ("dpo", "s_dpo")  # objectives that compare with the run that RL started from


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experience:
    """What one step learns from on the side of RL: requests, their candidates, what they earned. All of it is data."""

    request: Batch
    codes: Array  # int32 [B,G,C]
    group: Group  # its log_p is not used
    format_codes: Array  # int32 [B,K,C], legal candidates of a free search that were chosen to be looked at
    format_old: Array  # float32 [B,K,C]
    format_valid: Array  # bool [B,K]
    item: Array | None = None  # int32 [B,G], the candidates' items, where `rl.item_weight` asks for them
    item_group: Group | None = None  # as `group`, of the item head's probabilities [B,G,1]
    item_start: Array | None = None  # float32 [B,I], log P of every item where RL began, for `rl.rest_weight`


class Sums(NamedTuple):
    """Gradients and metrics of micro-batches, to be added up."""

    grads: Any
    metrics: Metrics


def make_rl_loss(model: Model, recipe: Recipe) -> Callable[..., tuple[Array, Metrics]]:
    """(params, (rows, rows of the experience), bias, logged requests, key, trie, experience, 1 / weights) -> loss, metrics.

    The loss is ntp_weight x L_NTP + weight x (objective + item_weight x the same on the item head) + kl_weight x KL +
    rest_weight x KL of what was not generated + format_weight x ECPO of the format reward, each the mean over all that
    counts of the whole step: L_NTP over target weights, the others over requests.
    """
    settings, train = recipe.rl, recipe.train
    next_token = make_loss(model, train.label_smoothing, train.sampled_items, train.item_weight, train.code_targets)
    objective = OBJECTIVES[settings.objective]

    def loss(params: Any, rows: Any, bias: Any, logged: Batch, key: Any, trie: Any, seen: Experience, per: Array):
        per_target, per_request = per
        total, metrics = jnp.zeros(()), {}
        if settings.ntp_weight:
            ntp, (metrics, _) = next_token(params, rows[0], bias, logged, key, trie)
            total = settings.ntp_weight * per_target * ntp
        module = model.bind(params)
        context = module.encode(seen.request, rows[1], bias, None)[0]

        def log_p(codes: Array, valid: Array, distribution: Any) -> Array:
            return candidate_log_p(module, context, codes, valid, bias, trie, distribution)

        group = seen.group._replace(log_p=log_p(seen.codes, seen.group.valid, settings.distribution))
        own, of_objective = objective(group, settings)
        total, metrics = total + settings.weight * per_request * own, metrics | of_objective
        if seen.item is not None and seen.item_group is not None:
            log_p_items = item_distribution(module, context, seen.request, trie)
            of_items = seen.item_group._replace(log_p=item_log_p(log_p_items, seen.item, seen.item_group.valid))
            own, of_objective = objective(of_items, settings)
            total += settings.weight * settings.item_weight * per_request * own
            metrics["rl/item_loss"] = of_objective["rl/loss"]
            metrics["policy/item_log_p"] = _log_p_of(of_items)
            if seen.item_start is not None:
                apart, of_rest = kl_of_rest(log_p_items, seen.item_start, seen.item, seen.item_group.valid)
                total, metrics = total + settings.rest_weight * per_request * apart, metrics | of_rest
        if settings.kl_weight:
            divergence, of_kl = kl_to_reference(group)
            total, metrics = total + settings.kl_weight * per_request * divergence, metrics | of_kl
        if settings.format_weight and settings.format_samples:
            nothing = jnp.zeros(seen.format_valid.shape)
            looked_at = Group(
                log_p=log_p(seen.format_codes, seen.format_valid, "all"),
                old=seen.format_old,
                reference=seen.format_old,
                reward=nothing,
                valid=seen.format_valid,
                logged=nothing > 0,
                chance=nothing,
            )
            of_format, _ = ecpo_of(looked_at, nothing + 1.0, settings)
            total = total + settings.format_weight * per_request * of_format
        metrics["policy/log_p"] = _log_p_of(group)
        return total, metrics

    return loss


def _log_p_of(group: Group) -> tuple[Array, Array]:
    """Mean log-probability of a generated candidate, as (sum, weight): it rises as the policy narrows."""
    counts = group.valid & ~group.logged
    whole = jnp.sum(jnp.where(counts[..., None], group.log_p, 0.0), axis=-1)
    return jnp.sum(jax.lax.stop_gradient(whole)), jnp.sum(counts)


def make_rl_step(
    model: Model, recipe: Recipe, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, Metrics]]:
    """A pure function (state, logged requests, experience, trie) -> (state, metrics); jit it with the state donated.

    With `train.accumulation` N the gradient is that of the whole step, whatever the masks of its N parts. A step whose gradient
    is not finite changes nothing but its number, and is counted as `skipped`.
    """
    loss, train = make_rl_loss(model, recipe), recipe.train
    gradients = jax.grad(loss, argnums=(0, 1), has_aux=True)

    def step(state: TrainState, logged: Batch, seen: Experience, trie: DeviceTrie) -> tuple[TrainState, Metrics]:
        requests = seen.request.user.shape[0]
        now, settings = this_step(recipe.seed, state.step), model.config.tables
        logged, touched = model.localise(logged, touched_only=True)
        request, generated_for = model.localise(seen.request, touched_only=True)
        seen = dataclasses.replace(seen, request=request)
        rows = gather(state.tables, touched, settings, now), gather(state.tables, generated_for, settings, now)
        key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
        per = jnp.stack([1 / (jnp.sum(logged.target_weight) + 1e-20), jnp.asarray(1.0 / requests)])

        def micro(i: Any, part: Batch, experience: Experience) -> Sums:
            own = jax.random.fold_in(key, i) if model.config.dropout or train.sampled_items else None
            return Sums(*gradients(state.params, rows, state.bias, part, own, trie, experience, per))

        if train.accumulation == 1:
            grads, metrics = micro(0, logged, seen)
        else:
            parts = (jnp.arange(train.accumulation), *(micro_batches(x, train.accumulation) for x in (logged, seen)))
            shapes = jax.eval_shape(micro, *jax.tree.map(lambda x: x[0], parts))
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            (grads, metrics), _ = jax.lax.scan(
                lambda carry, xs: (jax.tree.map(jnp.add, carry, micro(*xs)), None), zeros, parts
            )
        norm = optax.global_norm(grads[0])
        finite = jnp.isfinite(norm)
        updates, optimizer_state = optimizer.update(grads[0], state.optimizer, state.params)
        metrics["gradient_norm"] = mean(norm)
        of_rows = where_finite(finite, grads[1], jax.tree.map(jnp.zeros_like, grads[1]))
        tables, _ = update_tables(state.tables, touched, of_rows[0], train.table_rate, settings, now)
        tables, of_tables = update_tables(tables, generated_for, of_rows[1], train.table_rate, settings, now)
        new = dataclasses.replace(
            state,
            step=state.step + 1,
            params=where_finite(finite, optax.apply_updates(state.params, updates), state.params),
            optimizer=where_finite(finite, optimizer_state, state.optimizer),
            tables=tables,
        )
        return new, counted(finite, metrics | of_tables)

    return step
