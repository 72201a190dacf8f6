"""Mixture-of-experts feed-forward: one router, one function per matmul backend, loss-free balancing (REFERENCE 1.5)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from onerec_jax.config import MoEConfig
from onerec_jax.model.moe.reference import reference_experts
from onerec_jax.model.moe.tiles import tiled_experts


def route(x_MxD: Array, kernel_DxE: Array, bias_E: Array, config: MoEConfig) -> tuple[Array, Array]:
    """Chosen experts and gate weights, both [M, active].

    The choice is the top-k of score + bias, the gates are the unbiased scores of the chosen, renormalised; no gradient
    reaches the bias. All of it in float32.
    """
    logits = x_MxD.astype(jnp.float32) @ kernel_DxE
    scores = jax.nn.softmax(logits) if config.router == "softmax" else jax.nn.sigmoid(logits)
    chosen = jax.lax.top_k(scores + jax.lax.stop_gradient(bias_E), config.active)[1]
    gates = jnp.take_along_axis(scores, chosen, axis=-1)
    return chosen, gates / (jnp.sum(gates, axis=-1, keepdims=True) + 1e-20)


def rebalance(bias: Array, load: Array, rate: float) -> Array:
    """b + rate * sign(mean load - load), per row of [G,E] (DeepSeek-V3's loss-free balancing)."""
    return bias + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)


def experts_backend(config: MoEConfig) -> str:
    return "tiles" if config.backend == "auto" else config.backend


class MoE(nnx.Module):
    """MoE(x) = sum over the chosen experts of gate * SwiGLU expert(x) (TR 2.3); dropless."""

    def __init__(self, d_model: int, config: MoEConfig, rngs: nnx.Rngs, *, scale: float = 1.0):
        self.config = config

        def init(*shape: int, scale: float = 1.0) -> nnx.Param:
            return nnx.Param(jax.random.truncated_normal(rngs.params(), -2, 2, shape) * scale * shape[-2] ** -0.5)

        self.router = init(d_model, config.experts)
        self.gate = init(config.experts, d_model, config.hidden)
        self.up = init(config.experts, d_model, config.hidden)
        self.down = init(config.experts, config.hidden, d_model, scale=scale)

    def __call__(self, x: Array, bias_E: Array, valid: Array) -> tuple[Array, Array]:
        """x [..., D] and valid [...] -> y [..., D] (zero where not valid) and the load [E] of valid rows."""
        x_MxD, valid_M = x.reshape(-1, x.shape[-1]), valid.reshape(-1)
        chosen, gates = route(x_MxD, self.router[...], bias_E, self.config)
        gates = jnp.where(valid_M[:, None], gates, 0.0)
        counted = jax.nn.one_hot(chosen, self.config.experts, dtype=jnp.float32) * valid_M[:, None, None]
        weights = [w[...].astype(x.dtype) for w in (self.gate, self.up, self.down)]
        if experts_backend(self.config) == "reference":
            y = reference_experts(x_MxD, chosen, gates, *weights)
        else:
            y = tiled_experts(x_MxD, chosen, gates, *weights, tile=self.config.tile)
        return y.reshape(x.shape), jnp.sum(counted, axis=(0, 1))
