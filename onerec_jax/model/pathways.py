"""The four input pathways: static, short-term, positive-feedback and lifelong (REFERENCE 1.2, TR 2.2.1)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from onerec_jax.config import ModelConfig
from onerec_jax.data.schema import ItemFeatures, Vocabulary
from onerec_jax.model.attention import Attention
from onerec_jax.model.layers import CodeEmbedding, Embedding, FeedForward, PathwayMLP, RMSNorm
from onerec_jax.model.tables import lookup
from onerec_jax.parallel.sharding import by_batch

BUCKETS = 64


def bucket(value: Array) -> Array:
    """Log-spaced bucket of a non-negative quantity (2.5 per octave), 0 for unknown (negative)."""
    log = jnp.log2(1.0 + jnp.maximum(value, 0.0))
    return jnp.where(value < 0, 0, 1 + jnp.minimum(BUCKETS - 2, (2.5 * log).astype(jnp.int32)))


def blank_padding(events: ItemFeatures) -> tuple[ItemFeatures, Array]:
    """Features with every padded position set to 0, and the validity [B,L]; what padding held cannot matter after this."""
    valid = events.item >= 0

    def blank(x: Array) -> Array:
        return jnp.where(valid.reshape(valid.shape + (1,) * (x.ndim - 2)), x, 0)

    cleaned = {f.name: blank(getattr(events, f.name)) for f in dataclasses.fields(events)}
    return ItemFeatures(**cleaned), valid


class ItemEncoder(nnx.Module):
    """Embeds one event: the item (semantic ID, id, or both) and `event_features`, joined; [.., D + their widths]."""

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary, rngs: nnx.Rngs):
        self.item_input = config.item_input
        self.features = config.event_features
        sizes = {
            "tag": vocabulary.tags,
            **dict.fromkeys(("age", "playtime", "duration"), BUCKETS),
            "feedback": max(1, len(vocabulary.labels)),
        }
        chosen = {name: size for name, size in sizes.items() if name in self.features}
        self.feature = nnx.Dict({name: Embedding(size, config.feature_dim, rngs) for name, size in chosen.items()})

    @jax.named_scope("pathways")
    def __call__(
        self, events: ItemFeatures, rows: dict[str, Array], codes: CodeEmbedding | None, dtype: jnp.dtype
    ) -> Array:
        item, labels = 0.0, events.feedback.shape[-1]
        if codes is not None and self.item_input in ("sid", "both"):
            item = codes.item(events.codes, dtype)
        if self.item_input in ("id", "both"):
            item = item + lookup(rows["item"], events.item, dtype)
        embed = {
            "author": lambda: lookup(rows["author"], events.author, dtype),
            "tag": lambda: self.feature["tag"](events.tag, dtype),
            "age": lambda: self.feature["age"](bucket(events.age_s), dtype),
            "playtime": lambda: self.feature["playtime"](bucket(events.playtime_s), dtype),
            "duration": lambda: self.feature["duration"](bucket(events.duration_s), dtype),
            "feedback": lambda: (
                events.feedback.astype(dtype) @ self.feature["feedback"].embedding[...].astype(dtype)[:labels]
            ),
        }
        return by_batch(jnp.concatenate([item, *(embed[name]() for name in self.features)], axis=-1))


class QFormer(nnx.Module):
    """N_q learned queries read a long sequence by cross-attention: h <- h + CrossAttn(h, v, v); h <- h + FFN(RMSNorm(h)).

    The report prints no residual; without one the stack forgets its queries, so both are added (REFERENCE 8.4).
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        d, layers = config.d_model, config.lifelong_layers
        self.queries = nnx.Param(jax.random.normal(rngs.params(), (config.lifelong_queries, d)) * 0.02)
        self.input_norm = RMSNorm(d)
        self.attention = nnx.List([Attention(config, rngs) for _ in range(layers)])
        self.query_norm = nnx.List([RMSNorm(d) for _ in range(layers)])
        self.ffn_norm = nnx.List([RMSNorm(d) for _ in range(layers)])
        self.ffn = nnx.List([FeedForward(d, config.ffn_hidden, rngs) for _ in range(layers)])

    @jax.named_scope("pathways")
    def __call__(self, events_BxLxD: Array, valid_BxL: Array) -> Array:
        v = by_batch(self.input_norm(events_BxLxD))
        h = jnp.broadcast_to(self.queries[...].astype(v.dtype), (v.shape[0], *self.queries.shape))
        # a request with no lifelong event attends to blanks; its tokens are masked out of the context instead
        mask = (valid_BxL | ~jnp.any(valid_BxL, axis=-1, keepdims=True))[:, None, :]
        for attention, query_norm, ffn_norm, ffn in zip(
            self.attention, self.query_norm, self.ffn_norm, self.ffn, strict=True
        ):
            h = by_batch(h + attention(query_norm(h), *attention.keys_values(v), mask))
            h = by_batch(h + ffn(ffn_norm(h)))
        return h


class StaticPathway(nnx.Module):
    """The user's id and categorical features as one token h_u [B,1,D]."""

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary, rngs: nnx.Rngs):
        self.user_id = config.user_id
        self.features = nnx.List([Embedding(n, config.static_dim, rngs) for n in vocabulary.user_features])
        width = config.static_dim * (int(config.user_id) + len(self.features))
        self.mlp = PathwayMLP(max(1, width), config.pathway_hidden or 2 * config.d_model, config.d_model, rngs)

    @jax.named_scope("pathways")
    def __call__(self, user_Bx1F: Array, rows: dict[str, Array], dtype: jnp.dtype) -> Array:
        parts = [lookup(rows["user"], user_Bx1F[:, 0], dtype)] if self.user_id else []
        parts += [table(user_Bx1F[:, 1 + i], dtype) for i, table in enumerate(self.features)]
        f = jnp.concatenate(parts, axis=-1) if parts else jnp.ones((user_Bx1F.shape[0], 1), dtype)
        return self.mlp(f)[:, None, :]
