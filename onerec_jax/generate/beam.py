"""Beam search over the levels of a semantic ID, constrained by the trie of IDs that exist, or free.

The encoder and every block's cross-attention keys and values run once per request; beams share them. The score of a beam is
its log-probability, summed over levels, in float32: under the distribution over all codes of a level, whatever the trie
leaves of them, or with `model.softmax: legal` under the one over the codes that go on to an item.

Extra axis letters: W beams of a level, J candidates of one beam.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from onerec_jax.model.batch import Batch
from onerec_jax.model.encoder import Context
from onerec_jax.model.onerec import Model, OneRec
from onerec_jax.model.prefixes import DeviceTrie, children, legal_log_softmax
from onerec_jax.model.table_rows import Table
from onerec_jax.tokenizer.trie import Trie


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beams:
    """The beams of a search, best first; a beam that does not exist scores -inf."""

    codes: Array  # int32 [B,W,C]
    leaf: Array  # int32 [B,W], leaf of the trie; -1 in a free search and where there is no beam
    score: Array  # float32 [B,W]
    item_score: Array | None = None  # float32 [B,I], log P of every item by the item head of a model with both


def _pick(values: Array, parent: Array) -> Array:
    """values [B,W,..] at parent [B,W'] -> [B,W',..]."""
    index = parent.reshape(parent.shape + (1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, index, axis=1)


class _Search:
    """Decoder state of all beams of a batch, one level after the other."""

    def __init__(self, module: OneRec, context: Context, bias: dict[str, Array]):
        assert module.decoder is not None, "a model with an item head has no codes to search"
        self.decoder = module.decoder
        self.bias = bias["decoder"]
        self.cross = self.decoder.cross_keys_values(context)
        self.mask = context.valid[:, None, :]
        events = jnp.sum(context.valid & (context.position >= 0), axis=1, keepdims=True) // context.per_event
        self.latest = self.decoder.latest(context, events)
        self.dtype = context.tokens.dtype
        self.past = self.decoder.empty_past(context.tokens.shape[0], 1, self.dtype)

    def logits(self, level: int, last_BxW: Array) -> Array:
        """Those of every code of this level [B,W,V] after the code `last` of each beam."""
        x = self.decoder.embed_level(level, last_BxW, self.latest, self.dtype)[:, :, None, :]
        valid = jnp.ones(last_BxW.shape, bool)
        x, _, self.past = self.decoder.decode(x, self.past, self.cross, self.mask, valid, self.bias)
        return self.decoder.heads[level](x[:, :, 0]).astype(jnp.float32)

    def reorder(self, parent_BxW: Array) -> None:
        """Beams continue those they came from; the cache is [G, every, B, W, C', H, K]."""
        pick = jax.vmap(jax.vmap(_pick, in_axes=(0, None)), in_axes=(0, None))
        self.past = jax.tree.map(lambda a: pick(a, parent_BxW), self.past)


def _search(module: OneRec, context: Context, bias: dict[str, Array], trie: DeviceTrie | None, width: int) -> Beams:
    search = _Search(module, context, bias)
    batch = context.tokens.shape[0]
    score = jnp.zeros((batch, 1), jnp.float32)
    codes = jnp.zeros((batch, 1, 0), jnp.int32)
    node = last = jnp.zeros((batch, 1), jnp.int32)
    for level in range(len(search.decoder.heads)):
        logits_BxWxV = search.logits(level, last)
        if trie is None:
            candidate = jnp.broadcast_to(jnp.arange(logits_BxWxV.shape[-1]), logits_BxWxV.shape)
            child = candidate
            total = score[..., None] + jax.nn.log_softmax(logits_BxWxV)
        else:
            child, candidate, exists = children(trie, level, node)
            if search.decoder.config.softmax == "legal":
                log_p = legal_log_softmax(logits_BxWxV, candidate, exists)[0]
            else:
                log_p = jax.nn.log_softmax(logits_BxWxV)
            total = score[..., None] + jnp.take_along_axis(log_p, candidate, axis=-1)
            total = jnp.where(exists, total, -jnp.inf)
        per_beam = total.shape[-1]
        flat = total.reshape(batch, -1)
        score, chosen = jax.lax.top_k(flat, min(width, flat.shape[-1]))
        parent = chosen // per_beam
        last = jnp.take_along_axis(candidate.reshape(batch, -1), chosen, axis=-1)
        node = jnp.take_along_axis(child.reshape(batch, -1), chosen, axis=-1)
        codes = jnp.concatenate([_pick(codes, parent), last[..., None]], axis=-1)
        search.reorder(parent)
    leaf = jnp.full_like(node, -1) if trie is None else jnp.where(jnp.isfinite(score), node, -1)
    return Beams(codes=codes, leaf=leaf, score=score)


def make_beam_search(model: Model, width: int, *, free: bool = False) -> Callable[..., Beams]:
    """A jitted search: (params, tables, bias, batch, trie) -> `width` beams per request, best first.

    Fewer beams come back where fewer exist. `free` ignores the trie: what the model says without its help.
    """

    @jax.jit
    def search(params: Any, tables: dict[str, Table], bias: dict[str, Array], batch: Batch, trie: DeviceTrie) -> Beams:
        context = model.encode(params, tables, bias, batch)
        module = model.bind(params)
        beams = _search(module, context, bias, None if free else trie, width)
        if free or module.head is None:
            return beams
        return dataclasses.replace(beams, item_score=model.item_scores(params, batch, context, trie))

    return search


def resolve_items(
    trie: Trie, leaf_NxW: np.ndarray, score_NxW: np.ndarray, k: int, seen: tuple[np.ndarray, np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray]:
    """The first `k` items of each request's beams: beams best first, items of one ID in the trie's resolve order.

    Args:
        seen: item rows and offsets [N+1] of items to leave out, or None.

    Returns:
        items int32 [N,k], -1 where the beams hold no more, and their beams' scores float32 [N,k].
    """
    n = len(leaf_NxW)
    exists = leaf_NxW >= 0
    leaf, score = leaf_NxW[exists], score_NxW[exists]
    request = np.nonzero(exists)[0]
    counts = trie.item_start[leaf + 1] - trie.item_start[leaf]
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    item = trie.items[np.repeat(trie.item_start[leaf], counts) + within]
    request, score = np.repeat(request, counts), np.repeat(score, counts)
    if seen is not None:
        rows, offsets = seen
        stride = np.int64(len(trie.items))
        known = np.repeat(np.arange(n), np.diff(offsets)) * stride + rows
        keep = ~np.isin(request * stride + item, known)
        request, item, score = request[keep], item[keep], score[keep]
    start = np.searchsorted(request, np.arange(n))
    rank = np.arange(len(request)) - start[request]
    keep = rank < k
    items, scores = np.full((n, k), -1, np.int32), np.full((n, k), -np.inf, np.float32)
    items[request[keep], rank[keep]] = item[keep]
    scores[request[keep], rank[keep]] = score[keep]
    return items, scores
