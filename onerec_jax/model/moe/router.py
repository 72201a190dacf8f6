"""Which experts a row goes to, with what weight, and how their loads are kept even (REFERENCE 1.5)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from onerec_jax.config import MoEConfig


class Routed(NamedTuple):
    """What a MoE block did, summed over the whole batch; a stack of blocks adds a leading axis."""

    load: Array  # [E], choices of every expert by valid rows
    dropped: Array  # [], choices that found no room (an all_to_all of limited capacity)
    z: Array  # [], mean over valid rows of logsumexp(logits)^2


def nothing_routed(experts: int) -> Routed:
    """That of a block without experts."""
    return Routed(jnp.zeros((experts,)), jnp.zeros(()), jnp.zeros(()))


def route(x_MxD: Array, kernel_DxE: Array, bias_E: Array, config: MoEConfig) -> tuple[Array, Array, Array]:
    """Chosen experts and gate weights, both [M, active], and the squared logsumexp of the logits [M] (z-loss).

    The choice is the top-k of score + bias, the gates are the unbiased scores of the chosen, renormalised; no gradient
    reaches the bias. All of it in float32.
    """
    logits = x_MxD.astype(jnp.float32) @ kernel_DxE
    scores = jax.nn.softmax(logits) if config.router == "softmax" else jax.nn.sigmoid(logits)
    chosen = jax.lax.top_k(scores + jax.lax.stop_gradient(bias_E), config.active)[1]
    gates = jnp.take_along_axis(scores, chosen, axis=-1)
    gates = gates / (jnp.sum(gates, axis=-1, keepdims=True) + 1e-20)
    return chosen, gates, jnp.square(jax.nn.logsumexp(logits, axis=-1))


def loads(chosen: Array, experts: int) -> Array:
    """How often each expert was chosen, float32 [E]; what is not an expert's number counts for nobody."""
    return jnp.zeros((experts,)).at[chosen.reshape(-1)].add(1.0, mode="drop")


def rebalance(bias: Array, load: Array, rate: float) -> Array:
    """b + rate * sign(mean load - load), per row of [G,E] (DeepSeek-V3's loss-free balancing)."""
    return bias + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
