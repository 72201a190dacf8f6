"""HSTU: pointwise gated attention without softmax, the sequential transducer of Zhai et al. 2024 (2402.17152, eq. 1-3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from onerec_jax.config import ModelConfig
from onerec_jax.model.layers import Linear, RMSNorm
from onerec_jax.model.pathways import BUCKETS, bucket
from onerec_jax.model.stack import residual


class HSTUBlock(nnx.Module):
    """U, V, Q, K = split(silu(norm(z) W)); z <- z + (norm(silu(Q K^T + bias) V / N) * U) W_out.

    The bias of a pair is of their distance in the sequence and, where the log has times, of the time between them.
    """

    def __init__(self, config: ModelConfig, tokens: int, rngs: nnx.Rngs):
        d, width = config.d_model, config.heads * config.width_of_head
        self.heads, self.rate = config.heads, config.dropout
        self.input_norm = RMSNorm(d)
        self.mix = Linear(d, 4 * width, rngs)
        self.gate_norm = RMSNorm(width)
        self.out = Linear(width, d, rngs, scale=config.encoder_layers**-0.5)
        self.distance_bias = nnx.Param(jax.random.normal(rngs.params(), (2 * tokens - 1,)) * 0.02)
        timed = "age" in config.event_features
        self.time_bias = nnx.Param(jax.random.normal(rngs.params(), (BUCKETS,)) * 0.02) if timed else None

    def __call__(self, z_BxNxD: Array, mask: Array, valid: Array, time_BxN: Array, bias_E: Array, key: Array | None):
        mixed = jax.nn.silu(self.mix(self.input_norm(z_BxNxD)))
        gate, *rest = jnp.split(mixed, 4, axis=-1)
        values, queries, keys = (x.reshape(*x.shape[:-1], self.heads, -1) for x in rest)
        n = z_BxNxD.shape[1]
        tokens = len(self.distance_bias) // 2 + 1  # of a batch that is not cut to fewer
        place = jnp.arange(n)
        bias = self.distance_bias[...][place[:, None] - place[None, :] + tokens - 1]
        if self.time_bias is not None:
            bias = bias + self.time_bias[...][bucket(jnp.abs(time_BxN[:, :, None] - time_BxN[:, None, :]))]
        scores = jnp.einsum("bqhk,bnhk->bhqn", queries, keys).astype(jnp.float32)
        weights = jax.nn.silu(scores + bias.reshape(-1, 1, n, n)) / tokens
        weights = jnp.where(mask[:, None], weights, 0.0).astype(z_BxNxD.dtype)
        y = jnp.einsum("bhqn,bnhk->bqhk", weights, values)
        y = self.out(self.gate_norm(y.reshape(gate.shape)) * gate)
        return residual(z_BxNxD, y, self.rate, key, 0), None
