"""Softmax over items: against all of them without ever holding all logits, or against a random sample.

Axis letters: N states, T targets of a state, D width, I items, S sampled items.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from onerec_jax.train.metrics import Metrics

CHUNK = 256


def item_loss(
    states_BxKxD: Array,
    items_IxD: Array,
    target_BxT: Array,
    weight_BxT: Array,
    smoothing: float,
    sampled_items: int = 0,
    key: Array | None = None,
) -> tuple[Array, Metrics]:
    """-log P(item) of every target; the sum over targets of weight * loss, and metrics as (sum, weight) pairs.

    A target has a state of its own (K = T), or all targets of a row share one (K = 1), which costs a T-th.
    With a key and `sampled_items` the softmax is over the target and that many items drawn at random, the same for the
    whole batch (see `sampled_softmax`); else over all items, with `smoothing` of the mass spread over them.
    """
    target = jnp.where(weight_BxT > 0, target_BxT, 0)
    weights = jnp.sum(weight_BxT)
    if sampled_items and key is not None:
        states = jnp.broadcast_to(states_BxKxD, (*target.shape, states_BxKxD.shape[-1]))
        flat = states.reshape(-1, states.shape[-1]), items_IxD, target.reshape(-1), weight_BxT.reshape(-1)
        total = sampled_softmax(*flat, sampled_items, key)
        return total, {"loss": (total, weights)}
    states = states_BxKxD.reshape(-1, states_BxKxD.shape[-1])
    per_state = (len(states), target.size // len(states))
    sums: Any = full_softmax(states, items_IxD, target.reshape(per_state), weight_BxT.reshape(per_state), smoothing)
    total, cross_entropy, correct = sums
    return total, {"loss": (total, weights), "loss/item": (cross_entropy, weights), "accuracy/item": (correct, weights)}


def sampled_softmax(
    states_NxD: Array, items_IxD: Array, target_N: Array, weight_N: Array, samples: int, key: Array
) -> Array:
    """Sum of weight * cross-entropy against `samples` uniform items; each stands for (I - 1) / samples of the others.

    A sample that is the target itself is left out (Jean et al. 2015; the logarithm of the proposal is added to its logit).
    """
    rows = items_IxD.shape[0]
    sample_S = jax.random.randint(key, (samples,), 0, rows)
    dtype = states_NxD.dtype
    own = jnp.sum(states_NxD * jnp.take(items_IxD, target_N, axis=0).astype(dtype), axis=-1).astype(jnp.float32)
    others = (states_NxD @ jnp.take(items_IxD, sample_S, axis=0).astype(dtype).T).astype(jnp.float32)
    others = jnp.where(sample_S == target_N[:, None], -jnp.inf, others + jnp.log((rows - 1) / samples))
    loss = jax.nn.logsumexp(jnp.concatenate([own[:, None], others], axis=-1), axis=-1) - own
    return jnp.sum(jnp.where(weight_N > 0, loss * weight_N, 0.0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def full_softmax(
    states_NxD: Array, items_IxD: Array, target_NxT: Array, weight_NxT: Array, smoothing: float
) -> tuple[Array, Array, Array]:
    """Sums of weight * loss (differentiable), of weight * cross-entropy and of weight * (top-1 is right).

    States are taken in chunks, those with a weighted target first, and chunks without any cost nothing. A loss is the end of
    the forward pass, so its gradients are made with it: three products per chunk, and no logits are kept.
    """
    return _chunks(states_NxD, items_IxD, target_NxT, weight_NxT, smoothing, gradients=False)[0]


def _forward(states: Array, items: Array, target: Array, weight: Array, smoothing: float):
    sums, gradients = _chunks(states, items, target, weight, smoothing, gradients=True)
    return sums, (gradients, items)


def _backward(smoothing: float, kept, upstream):
    (states, items), original = kept
    return (states * upstream[0]).astype(states.dtype), (items * upstream[0]).astype(original.dtype), None, None


full_softmax.defvjp(_forward, _backward)


def _chunks(
    states_NxD: Array, items_IxD: Array, target_NxT: Array, weight_NxT: Array, smoothing: float, *, gradients: bool
):
    states_NxD, items_IxD, target_NxT, weight_NxT = map(jnp.asarray, (states_NxD, items_IxD, target_NxT, weight_NxT))
    n, rows = len(states_NxD), items_IxD.shape[0]
    size = min(CHUNK, n)
    order = jnp.argsort(jnp.all(weight_NxT <= 0, axis=1), stable=True)
    order = jnp.concatenate([order, jnp.zeros(-n % size, order.dtype)])
    weighted = jnp.where(jnp.arange(len(order))[:, None] < n, weight_NxT[order], 0.0)
    table = items_IxD.astype(states_NxD.dtype)

    def chunk(total: Any, index: Array, weight: Array):
        h, y = states_NxD[index], target_NxT[index]
        logits = (h @ table.T).astype(jnp.float32)
        top = jnp.max(logits, axis=-1, keepdims=True)
        exponent = jnp.exp(logits - top)
        norm = jnp.sum(exponent, axis=-1, keepdims=True)
        own = jnp.take_along_axis(logits, y, axis=-1)
        cross_entropy = top + jnp.log(norm) - own
        loss = cross_entropy
        if smoothing:
            loss = loss + smoothing * (own - jnp.mean(logits, axis=-1, keepdims=True))
        sums = jnp.stack([jnp.sum(weight * x) for x in (loss, cross_entropy, own >= top)])
        if not gradients:
            return (total[0] + sums,), jnp.zeros((0, h.shape[1]), h.dtype)
        weights = jnp.sum(weight, axis=1, keepdims=True)
        error = exponent * (weights / norm)
        if smoothing:
            error = error - weights * (smoothing / rows)
        error = error.at[jnp.arange(size)[:, None], y].add(-weight * (1 - smoothing)).astype(h.dtype)
        return (total[0] + sums, total[1] + (error.T @ h).astype(jnp.float32)), error @ table

    def nothing(total: Any, index: Array, weight: Array):
        return total, jnp.zeros((size if gradients else 0, states_NxD.shape[1]), states_NxD.dtype)

    def step(total, part):
        return jax.lax.cond(jnp.any(part[1] > 0), chunk, nothing, total, *part)

    start: Any = (jnp.zeros(3), jnp.zeros(items_IxD.shape)) if gradients else (jnp.zeros(3),)
    parts = order.reshape(-1, size), weighted.reshape(-1, size, weighted.shape[1])
    total, by_chunk = jax.lax.scan(step, start, parts)
    sums = (total[0][0], total[0][1], total[0][2])
    if not gradients:
        return sums, None
    of_states = jnp.zeros_like(states_NxD).at[order[:n]].set(by_chunk.reshape(-1, states_NxD.shape[1])[:n])
    return sums, (of_states, total[1])
