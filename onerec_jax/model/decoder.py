"""The point-wise decoder: BOS, s1, .. -> s1, s2, ..; causal self-attention, cross-attention, FFN or MoE (REFERENCE 1.4).

T targets of a request share its context: cross-attention keys and values are computed once per request and block, for all
targets in training and for all beams in generation.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from onerec_jax.config import ModelConfig
from onerec_jax.data.schema import Vocabulary
from onerec_jax.model.attention import Attention
from onerec_jax.model.encoder import Context
from onerec_jax.model.layers import CodeEmbedding, Linear, RMSNorm, dropout
from onerec_jax.model.stack import FeedForwardOrMoE, Stack, residual
from onerec_jax.parallel.sharding import by_batch


class DecoderBlock(nnx.Module):
    """d <- d + CausalSelfAttn(norm d); d <- d + CrossAttn(norm d, Z, Z); d <- d + FFN or MoE(norm d)."""

    def __init__(self, config: ModelConfig, moe: bool, rngs: nnx.Rngs):
        scale = (3 * config.decoder_layers) ** -0.5
        self.rate = config.dropout
        self.self_norm = RMSNorm(config.d_model)
        self.self_attention = Attention(config, rngs, scale=scale)
        self.cross_norm = RMSNorm(config.d_model)
        self.cross_attention = Attention(config, rngs, scale=scale)
        self.ffn_norm = RMSNorm(config.d_model)
        self.ffn = FeedForwardOrMoE(config, moe, rngs, scale=scale)

    def __call__(self, x_BxTxCxD, past, cross, cross_mask, valid_BxT, bias_E, key):
        """All levels of targets at once (C of them), or the next one (C = 1) of beams whose `past` are this block's keys and
        values of each level before, a tuple of pairs [B,T,H,K].

        Returns x, what was routed, and keys and values of these levels, [B,T,H,K] of one.
        """
        b, t, c, d = x_BxTxCxD.shape
        normed = self.self_norm(x_BxTxCxD).reshape(b * t, c, d)
        keys, values = self.self_attention.keys_values(normed)
        if c == 1:
            own = keys.reshape(b, t, *keys.shape[2:]), values.reshape(b, t, *values.shape[2:])
            y = self.self_attention.over_levels(normed.reshape(b, t, d), (*past, own))
        else:
            own = None  # nothing follows the last level
            y = self.self_attention(normed, keys, values, jnp.tril(jnp.ones((1, c, c), bool)))
        x = residual(x_BxTxCxD, y.reshape(x_BxTxCxD.shape), self.rate, key, 0)
        cross_keys, cross_values = cross
        y = self.cross_attention(self.cross_norm(x).reshape(b, t * c, d), cross_keys, cross_values, cross_mask)
        x = residual(x, y.reshape(x.shape), self.rate, key, 1)
        y, routed = self.ffn(self.ffn_norm(x), bias_E, jnp.broadcast_to(valid_BxT[:, :, None], (b, t, c)))
        return residual(x, y, self.rate, key, 2), routed, own


class Decoder(nnx.Module):
    """Code embeddings (shared with the encoder's item input), the stack, and one head per level."""

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary, rngs: nnx.Rngs):
        d, sizes = config.d_model, vocabulary.codebook_sizes
        self.config = config
        self.codes = CodeEmbedding(sizes, d, rngs)
        self.bos = nnx.Param(jax.random.normal(rngs.params(), (d,)) * 0.02)
        self.position = nnx.Param(jax.random.normal(rngs.params(), (len(sizes), d)) * 0.02)
        moe = bool(config.moe.experts)
        self.stack = Stack(lambda m, r: DecoderBlock(config, m, r), config, config.decoder_layers, moe, rngs)
        self.norm = RMSNorm(d)
        self.heads = nnx.List([Linear(d, size, rngs, scale=config.width_share**0.5) for size in sizes])

    def cross_keys_values(self, context: Context) -> Any:
        """Every block's cross-attention keys and values, stacked [G, every, B, N, H, K]."""

        def per_block(block: DecoderBlock, x: Array, *_):
            return x, None, block.cross_attention.keys_values(x)

        unused = jnp.zeros((self.stack.size, 1))
        return self.stack(context.tokens, per_block, unused, None)[2]

    @jax.named_scope("decoder")
    def decode(self, x_BxTxCxD, past, cross, cross_mask, valid_BxT, bias_GxE, key=None):
        """Runs the stack on embedded levels; `past` are pairs [G, every, B, T, H, K] of keys and values, one a level before.

        Returns normed hidden states, what was routed, and the pair of this level where it is one alone.
        """

        def per_block(block: DecoderBlock, x: Array, bias: Array, key: Array | None, extra: Any):
            past, cross = extra
            return block(x, past, cross, cross_mask, valid_BxT, bias, key)

        x, routed, own = self.stack(x_BxTxCxD, per_block, bias_GxE, key, (past, cross))
        return by_batch(self.norm(x)), routed, own

    def embed_level(self, level: int, codes: Array, latest: Array | None, dtype: jnp.dtype) -> Array:
        """Input of position `level`: BOS for 0 (codes give the shape), else the code of the level before.

        Where the encoder is causal, BOS carries the `latest` token that the target may see: positions there count from the
        first event, so that cross-attention alone could not tell which event is the most recent.
        """
        position = self.position[...][level].astype(dtype)
        if level:
            return self.codes.level(level - 1, codes, dtype) + position
        start = jnp.broadcast_to(self.bos[...].astype(dtype) + position, (*codes.shape, self.bos.shape[0]))
        return start if latest is None else start + latest

    def latest(self, context: Context, visible_BxT: Array) -> Array | None:
        """What BOS of each target carries [B,T,D], see `embed_level`."""
        return context.last_seen(visible_BxT) if self.config.causal else None

    @jax.named_scope("decoder")
    def __call__(self, context: Context, targets_BxTxC, visible_BxT, valid_BxT, bias_GxE, key: Array | None):
        """Teacher-forced logits per level, a tuple of float32 [B,T,V_level], and what was routed, stacked [G]."""
        dtype = context.tokens.dtype
        levels = targets_BxTxC.shape[2]
        latest = self.latest(context, visible_BxT)
        inputs = [self.embed_level(i, targets_BxTxC[..., max(0, i - 1)], latest, dtype) for i in range(levels)]
        x = dropout(jnp.stack(inputs, axis=2), self.config.dropout, None if key is None else jax.random.fold_in(key, 3))
        mask = context.valid[:, None, :]
        if self.config.causal:
            mask = jnp.repeat(mask & (context.position[None, None, :] < visible_BxT[:, :, None]), levels, axis=1)
        x, routed, _ = self.decode(
            x, (), self.cross_keys_values(context), mask, valid_BxT, bias_GxE,
            None if key is None else jax.random.fold_in(key, 4),
        )  # fmt: skip
        return tuple(head(x[:, :, i]).astype(jnp.float32) for i, head in enumerate(self.heads)), routed
