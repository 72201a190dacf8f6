"""The train step: localise ids, gradients over micro-batches, dense update, table update, balancing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from onerec_jax.config import Recipe
from onerec_jax.model.batch import Batch
from onerec_jax.model.moe.router import Routed, rebalance
from onerec_jax.model.onerec import Model
from onerec_jax.model.prefixes import DeviceTrie
from onerec_jax.model.tables import gather, this_step, update_tables
from onerec_jax.parallel.mesh import on_mesh
from onerec_jax.parallel.sharding import batch_sharding
from onerec_jax.train.divergence import counted, where_finite
from onerec_jax.train.item_loss import item_loss
from onerec_jax.train.loss import next_token_loss
from onerec_jax.train.metrics import Metrics, mean
from onerec_jax.train.optimizer import learning_rate
from onerec_jax.train.state import TrainState


def micro_batches(batch: Any, count: int) -> Any:
    """[B,..] -> [count, B/count, ..], strided so that every device keeps its own rows."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1), batch)


def _expert_metrics(routed: dict[str, Routed]) -> Metrics:
    """Max over mean load and entropy (nats) per stack, averaged over its MoE groups, and the share of choices dropped."""
    metrics: Metrics = {}
    for name, (load, dropped, _) in routed.items():
        if load.shape[-1] < 2:  # no experts
            continue
        metrics[f"experts/{name}_dropped"] = (jnp.sum(dropped), jnp.sum(load))
        share = load / (jnp.sum(load, axis=-1, keepdims=True) + 1e-20)
        metrics[f"experts/{name}_max_over_mean"] = mean(jnp.mean(jnp.max(share, axis=-1)) * load.shape[-1])
        metrics[f"experts/{name}_entropy"] = mean(-jnp.mean(jnp.sum(share * jnp.log(share + 1e-20), axis=-1)))
    return metrics


def _z_loss(routed: dict[str, Routed], weight: float) -> Array:
    """weight * mean over MoE blocks of the mean squared logsumexp of the router's logits (Zoph et al. 2022, eq. 5)."""
    z = jnp.concatenate([r.z.reshape(-1) for r in routed.values() if r.load.shape[-1] > 1])
    return weight * jnp.mean(z)


def make_loss(
    model: Model, smoothing: float, sampled_items: int = 0, item_weight: float = 1.0, code_targets: int = 0
) -> Callable[..., tuple[Array, tuple[Metrics, dict[str, Routed]]]]:
    """(params, rows, bias, batch, key, trie) -> weighted loss sum, (metrics, what was routed).

    With `code_targets` the loss over codes is of so many first targets of a request, that over items of all of them.
    """
    first = slice(None, code_targets or None)

    def loss(params: Any, rows: Any, bias: Any, batch: Batch, key: Array | None, trie: DeviceTrie | None = None):
        legal = trie if model.config.softmax == "legal" else None
        if model.config.softmax == "legal" and trie is None:
            raise ValueError("model.softmax legal needs the trie of the semantic IDs")
        found = model.bind(params).outputs(batch, rows, bias, key, trie, first)
        total, metrics = jnp.zeros(()), {}
        if found.logits is not None:
            total, metrics = next_token_loss(
                found.logits, batch.targets[:, first], batch.target_weight[:, first], smoothing, legal
            )
        if found.states is not None and found.items is not None:
            sampling = None if key is None else jax.random.fold_in(key, 5)
            own, of_items = item_loss(
                found.states, found.items, batch.target_item, batch.target_weight, smoothing, sampled_items, sampling
            )
            if found.logits is None:
                return own, (of_items, found.routed)
            total = total + item_weight * own
            metrics |= {"loss/item": of_items["loss"], **of_items, "loss": (total, of_items["loss"][1])}
        if model.config.moe.experts > 1 and model.config.moe.z_loss:  # with one expert nothing is routed
            z = _z_loss(found.routed, model.config.moe.z_loss)
            weight = jnp.sum(batch.target_weight)
            total, metrics["loss/router_z"] = total + weight * z, (weight * z, weight)
        return total, (metrics, found.routed)

    return loss


def make_train_step(
    model: Model, recipe: Recipe, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, Metrics]]:
    """A pure function of (state, global batch, trie); jit it with the state donated.

    The trie of the semantic IDs is that of `prefixes.training_trie`.

    The gradient is that of sum(weight * loss) / sum(weight) over the whole batch, whatever the number of micro-batches. A
    step whose loss or gradient is not finite changes nothing but its number, and is counted as `skipped`.
    """
    train = recipe.train
    loss = make_loss(model, train.label_smoothing, train.sampled_items, train.item_weight, train.code_targets)
    gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    rate = learning_rate(train)

    def step(state: TrainState, batch: Batch, trie: DeviceTrie | None = None) -> tuple[TrainState, Metrics]:
        local, touched = model.localise(batch, touched_only=True)
        now = this_step(recipe.seed, state.step)
        rows = gather(state.tables, touched, model.config.tables, now)
        random = model.config.dropout or train.sampled_items
        key = jax.random.fold_in(jax.random.key(recipe.seed), state.step) if random else None

        def micro(i: Any, part: Batch):
            part_key = None if key is None else jax.random.fold_in(key, i)
            (_, (metrics, routed)), grads = gradients(state.params, rows, state.bias, part, part_key, trie)
            return grads, metrics, routed

        if train.accumulation == 1:
            grads, metrics, routed = micro(0, local)
        else:

            def accumulate(carry: Any, xs: Any):
                return jax.tree.map(jnp.add, carry, micro(*xs)), None

            parts = micro_batches(local, train.accumulation)
            shapes = jax.eval_shape(micro, 0, jax.tree.map(lambda x: x[0], parts))
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            (grads, metrics, routed), _ = jax.lax.scan(accumulate, zeros, (jnp.arange(train.accumulation), parts))
        grads = jax.tree.map(lambda g: g / (jnp.sum(batch.target_weight) + 1e-20), grads)
        norm = optax.global_norm(grads[0])
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"][0])
        with jax.named_scope("optimizer"):
            updates, optimizer_state = optimizer.update(grads[0], state.optimizer, state.params)
        metrics["gradient_norm"] = mean(norm)
        metrics["update_norm"] = mean(optax.global_norm(updates))
        metrics["learning_rate"] = mean(rate(state.step))
        metrics["targets"] = mean(jnp.sum(batch.target_weight > 0))
        metrics |= _expert_metrics(routed)
        balance = model.config.moe.balance_rate
        bias = {
            name: rebalance(b, routed[name].load, balance) if name in routed else b for name, b in state.bias.items()
        }
        of_rows = where_finite(finite, grads[1], jax.tree.map(jnp.zeros_like, grads[1]))
        tables, of_tables = update_tables(state.tables, touched, of_rows, train.table_rate, model.config.tables, now)
        new = TrainState(
            step=state.step + 1,
            params=where_finite(finite, optax.apply_updates(state.params, updates), state.params),
            optimizer=where_finite(finite, optimizer_state, state.optimizer),
            tables=tables,
            bias=where_finite(finite, bias, state.bias),
        )
        return new, counted(finite, metrics | of_tables)

    return step


def make_eval_step(model: Model) -> Callable[..., Metrics]:
    """Teacher-forced metrics of a batch in evaluation mode, without smoothing."""
    loss = make_loss(model, 0.0)

    def step(state: TrainState, batch: Batch, trie: DeviceTrie | None = None) -> Metrics:
        local, touched = model.localise(batch, touched_only=False)
        rows = gather(state.tables, touched, model.config.tables)
        return loss(state.params, rows, state.bias, local, None, trie)[1][0]

    return step


def compile_step(step: Callable[..., Any], abstract: TrainState, mesh: Mesh) -> Callable[..., Any]:
    """`step` jitted on the mesh: (state, batch, trie) -> (state, metrics).

    The state stays in place and is donated, the batch is split over the data axes, trie (or None) and metrics are replicated.
    """
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    given = (places, batch_sharding(mesh), NamedSharding(mesh, PartitionSpec()))
    return on_mesh(mesh, jax.jit(step, in_shardings=given, out_shardings=(places, None), donate_argnums=0))
