"""Multi-head attention with one mask rule: a key is seen where the mask is true; softmax in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from onerec_jax.config import ModelConfig
from onerec_jax.model.layers import Linear, RMSNorm


def attend(q_BxQxHxK: Array, k_BxNxHxK: Array, v_BxNxHxK: Array, mask: Array | None, implementation: str) -> Array:
    """softmax(q k^T / sqrt(K)) v over the keys that `mask` [B or 1, Q or 1, N] shows; returns [B,Q,H,K].

    Every query must see at least one key: the static token and the first position always are visible.
    """
    if implementation == "fused":
        return jax.nn.dot_product_attention(
            q_BxQxHxK, k_BxNxHxK, v_BxNxHxK, mask=None if mask is None else mask[:, None, :, :]
        )
    scores = jnp.einsum("bqhk,bnhk->bhqn", q_BxQxHxK * q_BxQxHxK.shape[-1] ** -0.5, k_BxNxHxK)
    scores = scores.astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask[:, None, :, :], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BxNxHxK.dtype)
    return jnp.einsum("bhqn,bnhk->bqhk", weights, v_BxNxHxK)


class Attention(nnx.Module):
    """Projections around `attend`; self-attention when queries and keys come from the same array."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, scale: float = 1.0):
        d, width = config.d_model, config.heads * config.width_of_head
        self.heads = config.heads
        self.implementation = config.attention
        self.query = Linear(d, width, rngs)
        self.key = Linear(d, width, rngs)
        self.value = Linear(d, width, rngs)
        self.out = Linear(width, d, rngs, scale=scale)
        self.query_norm = RMSNorm(config.width_of_head) if config.qk_norm else None
        self.key_norm = RMSNorm(config.width_of_head) if config.qk_norm else None

    def _split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.heads, -1)

    def keys_values(self, x_BxNxD: Array) -> tuple[Array, Array]:
        """Keys and values [B,N,H,K] of a context, computed once however many queries follow."""
        k = self._split(self.key(x_BxNxD))
        return (k if self.key_norm is None else self.key_norm(k)), self._split(self.value(x_BxNxD))

    def __call__(self, x_BxQxD: Array, keys: Array, values: Array, mask: Array | None) -> Array:
        q = self._split(self.query(x_BxQxD))
        q = q if self.query_norm is None else self.query_norm(q)
        y = attend(q, keys, values, mask, self.implementation)
        return self.out(y.reshape(*x_BxQxD.shape[:-1], -1))
