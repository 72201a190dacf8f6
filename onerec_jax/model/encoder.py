"""The context encoder: z = [h_u; h_s; h_p; h_l] + e_pos through fully visible pre-norm blocks (REFERENCE 1.3)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from onerec_jax.config import ModelConfig
from onerec_jax.data.schema import Batch, ItemFeatures, Vocabulary
from onerec_jax.model.attention import Attention
from onerec_jax.model.batch import pathways
from onerec_jax.model.hstu import HSTUBlock
from onerec_jax.model.layers import CodeEmbedding, PathwayMLP, RMSNorm, dropout
from onerec_jax.model.moe.router import Routed
from onerec_jax.model.pathways import ItemEncoder, QFormer, StaticPathway, blank_padding
from onerec_jax.model.stack import FeedForwardOrMoE, Stack, residual
from onerec_jax.parallel.sharding import by_batch


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["tokens", "valid", "position"], meta_fields=["per_event"]
)
@dataclasses.dataclass(frozen=True)
class Context:
    """An encoded request. N = 1 static token + short + positive + lifelong queries."""

    tokens: Array  # [B,N,D], normed
    valid: Array  # bool [B,N]
    position: Array  # int32 [N], index of the event within `short`, -1 for tokens every target may see
    per_event: int = 1  # tokens of one event

    def last_seen(self, visible_BxT: Array) -> Array:
        """The last token of `short` that each target may see [B,T,D], the static one where it sees no event."""
        return jnp.take_along_axis(self.tokens, self.per_event * visible_BxT[..., None], axis=1)


class EncoderBlock(nnx.Module):
    """z <- z + SelfAttn(RMSNorm(z)); z <- z + FFN or MoE(RMSNorm(z))."""

    def __init__(self, config: ModelConfig, moe: bool, rngs: nnx.Rngs):
        scale = (2 * config.encoder_layers) ** -0.5
        self.rate = config.dropout
        self.attention_norm = RMSNorm(config.d_model)
        self.attention = Attention(config, rngs, scale=scale)
        self.ffn_norm = RMSNorm(config.d_model)
        self.ffn = FeedForwardOrMoE(config, moe, rngs, scale=scale)

    def __call__(self, z: Array, mask: Array, valid: Array, time_BxN: Array, bias_E: Array, key: Array | None):
        normed = self.attention_norm(z)
        z = residual(z, self.attention(normed, *self.attention.keys_values(normed), mask), self.rate, key, 0)
        y, routed = self.ffn(self.ffn_norm(z), bias_E, valid)
        return residual(z, y, self.rate, key, 1), routed


class Encoder(nnx.Module):
    """Pathways, their projections, positions, and the stack."""

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary, rngs: nnx.Rngs):
        d = config.d_model
        self.config = config
        self.lengths = {"short": config.short_length, "positive": config.positive_length}
        if config.lifelong_length:
            self.lengths["lifelong"] = config.lifelong_queries
        self.lengths = {name: n for name, n in self.lengths.items() if n}
        self.item = ItemEncoder(config, vocabulary, rngs)
        self.static = StaticPathway(config, vocabulary, rngs)
        features = d + sum(config.feature_widths().values())
        hidden = config.pathway_hidden or 2 * d
        projected = self.lengths if config.project_events else ()
        self.projection = nnx.Dict({name: PathwayMLP(features, hidden, d, rngs) for name in projected})
        self.qformer = QFormer(config, rngs) if config.lifelong_length else None
        self.per_event = config.tokens_per_event(vocabulary.levels)
        positions = 1 + self.per_event * sum(self.lengths.values())
        self.position = nnx.Param(jax.random.normal(rngs.params(), (positions, d)) * 0.02)
        moe = bool(config.moe.experts) and config.moe.location == "both"

        def make_block(moe: bool, rngs: nnx.Rngs) -> nnx.Module:
            return HSTUBlock(config, positions, rngs) if config.block == "hstu" else EncoderBlock(config, moe, rngs)

        self.stack = Stack(make_block, config, config.encoder_layers, moe, rngs)
        self.norm = RMSNorm(d)

    @jax.named_scope("encoder")
    def __call__(
        self, batch: Batch, rows: dict[str, Array], codes: CodeEmbedding | None, bias_GxE: Array, key: Array | None
    ) -> tuple[Context, Routed]:
        """Context of each request and what the encoder's experts were given, stacked [G]."""
        dtype = jnp.dtype(self.config.dtype)
        tokens = [self.static(batch.user, rows, dtype) + self.position[...][:1].astype(dtype)]
        valid = [jnp.ones((batch.user.shape[0], 1), bool)]
        start = 1
        for name, events in pathways(batch).items():
            clean, mask = blank_padding(events)
            h, mask = self._events(name, clean, mask, rows, codes, dtype)
            e_pos = self.position[...][start : start + self.per_event * self.lengths[name]].astype(dtype)
            if name == "lifelong":
                assert self.qformer is not None
                h = self.qformer(h, mask) + e_pos
                mask = jnp.broadcast_to(jnp.any(mask, axis=-1, keepdims=True), h.shape[:2])
            else:
                h = h + self._event_positions(e_pos, mask)
            tokens.append(h)
            valid.append(mask)
            start += self.per_event * self.lengths[name]
        z, seen = by_batch(jnp.concatenate(tokens, axis=1)), jnp.concatenate(valid, axis=1)
        position = jnp.full((z.shape[1],), -1, jnp.int32)
        visible = seen[:, None, :]
        if self.config.causal:
            position = (jnp.arange(z.shape[1], dtype=jnp.int32) + self.per_event - 1) // self.per_event - 1
            visible = visible & (position[None, :, None] >= position[None, None, :])
        z = dropout(z, self.config.dropout, None if key is None else jax.random.fold_in(key, 1))

        time = self._times(batch.short) if self.config.block == "hstu" else jnp.zeros(())

        def per_block(block: EncoderBlock | HSTUBlock, z: Array, bias: Array, key: Array | None, _):
            z, routed = block(z, visible, seen, time, bias, key)
            return z, routed, None

        z, routed, _ = self.stack(z, per_block, bias_GxE, None if key is None else jax.random.fold_in(key, 2))
        return Context(tokens=by_batch(self.norm(z)), valid=seen, position=position, per_event=self.per_event), routed

    def _events(self, name: str, events: ItemFeatures, valid_BxL: Array, rows: dict[str, Array], codes, dtype):
        """Tokens of one pathway's events and their validity, [B, L * tokens per event]."""
        # as in SASRec: beside what the blocks add, an embedding of .02 would be lost
        scale = (self.config.base_width or self.config.d_model) ** 0.5
        if self.per_event > 1:
            return codes.tokens(events.codes, dtype) * scale, jnp.repeat(valid_BxL, self.per_event, axis=1)
        h = self.item(events, rows, codes, dtype)
        return (self.projection[name](h) if self.config.project_events else h * scale), valid_BxL

    def _times(self, short: ItemFeatures) -> Array:
        """Seconds [B,N] of the static token and of every token of `short`, from any origin."""
        age = blank_padding(short)[0].age_s
        time = jnp.cumsum(age, axis=1) if self.config.causal else -age
        time = jnp.repeat(time, self.per_event, axis=1)
        return jnp.concatenate([time[:, :1], time], axis=1)

    def _event_positions(self, e_pos_LxD: Array, valid_BxL: Array) -> Array:
        """e_pos of the events that a batch has room for, which may be fewer than the pathway's length.

        Positions count back from the most recent event, so that it always has the same one; a causal encoder's
        events have no common last one and count from the first."""
        length, present = len(e_pos_LxD), valid_BxL.shape[1]
        if self.config.causal:
            return e_pos_LxD[:present]
        shift = length - jnp.sum(valid_BxL, axis=-1, keepdims=True)
        return jnp.take(e_pos_LxD, jnp.minimum(jnp.arange(present) + shift, length - 1), axis=0)
