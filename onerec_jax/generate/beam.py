"""Beam search over the levels of a semantic ID, constrained by the trie of IDs that exist, or free.

The encoder and every block's cross-attention keys and values run once per request; beams share them. The score of a beam is
its log-probability, summed over levels, in float32: under the distribution over all codes of a level, whatever the trie
leaves of them, or with `model.softmax: legal` under the one over the codes that go on to an item.

Extra axis letters: W beams of a level, J candidates of one beam.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from onerec_jax.generate.top_k import top_k
from onerec_jax.generate.trie_mask import Allowed
from onerec_jax.model.batch import Batch
from onerec_jax.model.encoder import Context
from onerec_jax.model.onerec import Model, OneRec
from onerec_jax.model.prefixes import DeviceTrie, children, legal_codes, step_down
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


class Generated(NamedTuple):
    """Beams with the log-probabilities of their codes; every float of a beam that does not exist is -inf."""

    codes: Array  # int32 [B,W,C]
    leaf: Array  # int32 [B,W], leaf of the trie; -1 where there is no beam, or it is no item's
    score: Array  # float32 [B,W], log-probability by which it was generated
    log_p_all: Array  # float32 [B,W,C], log P of each code after those before it, among all of its level
    log_p_legal: Array  # float32 [B,W,C], the same among those that go on to an item; -inf for any other


LogP = Callable[[Array, Array, Array | None], Array]
Perturb = Callable[[int, Array, Array, Array], Array]


def _pick(values: Array, parent: Array) -> Array:
    """values [B,W,..] at parent [B,W'] -> [B,W',..]."""
    index = parent.reshape(parent.shape + (1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, index, axis=1)


def events_seen(context: Context) -> Array:
    """How many events of `short` a request has, int [B,1]: all that its next item may see of a causal encoder's."""
    return jnp.sum(context.valid & (context.position >= 0), axis=1, keepdims=True) // context.per_event


class _Search:
    """Decoder state of all beams of a batch, one level after the other."""

    def __init__(self, module: OneRec, context: Context, bias: dict[str, Array]):
        assert module.decoder is not None, "a model with an item head has no codes to search"
        self.decoder = module.decoder
        self.bias = bias["decoder"]
        self.cross = self.decoder.cross_keys_values(context)
        self.mask = context.valid[:, None, :]
        self.latest = self.decoder.latest(context, events_seen(context))
        self.dtype = context.tokens.dtype
        self.past: tuple[tuple[Array, Array], ...] = ()

    def logits(self, level: int, last_BxW: Array) -> Array:
        """Those of every code of this level [B,W,V] after the code `last` of each beam."""
        x = self.decoder.embed_level(level, last_BxW, self.latest, self.dtype)[:, :, None, :]
        valid = jnp.ones(last_BxW.shape, bool)
        x, _, own = self.decoder.decode(x, self.past, self.cross, self.mask, valid, self.bias)
        self.past = (*self.past, own)
        return self.decoder.heads[level](x[:, :, 0]).astype(jnp.float32)

    def reorder(self, parent_BxW: Array) -> None:
        """Beams continue those they came from; the cache is [G, every, B, W, H, K] a level."""
        pick = jax.vmap(jax.vmap(_pick, in_axes=(0, None)), in_axes=(0, None))
        self.past = jax.tree.map(lambda a: pick(a, parent_BxW), self.past)


class _Candidates(NamedTuple):
    """How beams may go on at one level: J places each, which are codes where `token` is None, else children."""

    logits: Array  # [B,W,J]
    exists: Array | None  # bool [B,W,J]; None in a free search, where every code does
    token: Array | None  # int32 [B,W,J]
    legal: Array  # log of the sum of exp(logits) of the codes that go on to an item [B,W]


def _candidates(trie: DeviceTrie, level: int, node_BxW: Array, logits_BxWxV: Array, *, free: bool) -> _Candidates:
    node = jnp.maximum(node_BxW, 0)
    if trie.is_dense(level):
        exists = legal_codes(trie, level, node, logits_BxWxV.shape[-1])
        legal = jax.nn.logsumexp(logits_BxWxV, axis=-1, where=exists)
        return _Candidates(logits_BxWxV, None if free else exists, None, legal)
    _, token, exists = children(trie, level, node)
    own = jnp.take_along_axis(logits_BxWxV, token, axis=-1)
    legal = jax.nn.logsumexp(own, axis=-1, where=exists)
    return _Candidates(logits_BxWxV, None, None, legal) if free else _Candidates(own, exists, token, legal)


def grow_beams(
    module: OneRec,
    context: Context,
    bias: dict[str, Array],
    trie: DeviceTrie,
    width: int,
    log_p: LogP,
    perturb: Perturb | None = None,
    allowed: Allowed | None = None,
    *,
    free: bool,
) -> Generated:
    """What beam search and sampling share: of all continuations of all beams, the `width` best stay at each level.

    Args:
        log_p: (logits [B,W,V] of all codes, logits [B,W,J] of the continuations, which of these exist) -> log-probability
            [B,W,J] of every continuation, -inf where there is none. In a free search all codes are, and exist is None.
        perturb: (level, log-probability [B,W,J] of every longer prefix, rank [B,W] of the beams, their codes [B,W,level]) ->
            rank [B,W,J] of the prefixes. None: they rank by their log-probability.
        allowed: which prefixes a request may go on to (`generate.trie_mask`), of a search along the trie. None: all.

    Returns:
        The beams by descending rank; `score` is the sum of `log_p` over levels.
    """
    search = _Search(module, context, bias)
    batch = context.tokens.shape[0]
    score = rank = jnp.zeros((batch, 1), jnp.float32)
    codes = jnp.zeros((batch, 1, 0), jnp.int32)
    among_all = among_legal = jnp.zeros((batch, 1, 0), jnp.float32)
    node = last = jnp.zeros((batch, 1), jnp.int32)
    for level in range(len(search.decoder.heads)):
        logits_BxWxV = search.logits(level, last)
        may = _candidates(trie, level, node, logits_BxWxV, free=free)
        total = score[..., None] + log_p(logits_BxWxV, may.logits, may.exists)
        if allowed is not None:
            total = jnp.where(allowed(level, node, total.shape[-1], may.token is None), total, -jnp.inf)
        ranks = total if perturb is None else perturb(level, total, rank, codes)
        per_beam = total.shape[-1]
        flat = ranks.reshape(batch, -1)
        rank, chosen = top_k(flat, width)
        score = rank if perturb is None else jnp.take_along_axis(total.reshape(batch, -1), chosen, axis=-1)
        parent = chosen // per_beam
        last = chosen % per_beam
        if may.token is not None:
            last = jnp.take_along_axis(may.token.reshape(batch, -1), chosen, axis=-1)
        node = step_down(trie, level, _pick(node, parent), last)
        of_all = jax.nn.logsumexp(logits_BxWxV, axis=-1)
        places = parent * logits_BxWxV.shape[-1] + last
        logit = jnp.take_along_axis(logits_BxWxV.reshape(batch, -1), places, axis=-1)
        own_all = logit - _pick(of_all, parent)
        own_legal = jnp.where(node >= 0, logit - _pick(may.legal, parent), -jnp.inf)
        codes, among_all, among_legal = (
            jnp.concatenate([_pick(before, parent), own[..., None]], axis=-1)
            for before, own in ((codes, last), (among_all, own_all), (among_legal, own_legal))
        )
        search.reorder(parent)
    exists = jnp.isfinite(score)
    among_all, among_legal = (jnp.where(exists[..., None], x, -jnp.inf) for x in (among_all, among_legal))
    leaf = jnp.where(exists, node, -1)
    return Generated(codes, leaf, score, among_all, among_legal)


def penalise_repeats(penalty: float) -> Perturb:
    """Ranks by log-probability less `penalty` for every better prefix of the same first code: diverse beams.

    The order in which they are taken one after the other, each time the best once what its first code has had is paid for.
    """

    def perturb(level: int, total_BxWxJ: Array, rank_BxW: Array, codes_BxWxl: Array) -> Array:
        if not level:
            return total_BxWxJ
        group = jnp.broadcast_to(codes_BxWxl[:, :, :1], total_BxWxJ.shape)
        flat = total_BxWxJ.reshape(total_BxWxJ.shape[0], -1)
        return (flat - penalty * better_of_group(flat, group.reshape(flat.shape))).reshape(total_BxWxJ.shape)

    return perturb


def better_of_group(score_BxM: Array, group_BxM: Array) -> Array:
    """How many of the same group come before each by descending score, equals by place; int32 [B,M]."""

    def of_row(score: Array, group: Array) -> Array:
        order = jnp.lexsort((-score, group))
        place = jnp.arange(len(score), dtype=jnp.int32)
        opens = jnp.concatenate([jnp.ones(1, bool), group[order][1:] != group[order][:-1]])
        start = jax.lax.cummax(jnp.where(opens, place, 0))
        return jnp.zeros(len(score), jnp.int32).at[order].set(place - start)

    return jax.vmap(of_row)(score_BxM, group_BxM)


def beam_search(
    module: OneRec,
    context: Context,
    bias: dict[str, Array],
    trie: DeviceTrie,
    width: int,
    perturb: Perturb | None = None,
    allowed: Allowed | None = None,
    *,
    free: bool,
) -> Generated:
    """The `width` most probable beams of each encoded request, with the log-probabilities of their codes.

    `perturb` and `allowed` are as in `grow_beams`.
    """
    assert module.decoder is not None, "a model with an item head has no codes to search"
    legal = module.decoder.config.softmax == "legal"

    def log_p(logits_BxWxV: Array, own_BxWxJ: Array, exists: Array | None) -> Array:
        if exists is None:
            return jax.nn.log_softmax(logits_BxWxV)
        among, counted = (own_BxWxJ, exists) if legal else (logits_BxWxV, None)
        norm = jax.nn.logsumexp(among, axis=-1, keepdims=True, where=counted)
        return jnp.where(exists, own_BxWxJ - norm, -jnp.inf)

    return grow_beams(module, context, bias, trie, width, log_p, perturb, allowed, free=free)


def make_beam_search(model: Model, width: int, *, free: bool = False) -> Callable[..., Beams]:
    """A jitted search: (params, tables, bias, batch, trie) -> `width` beams per request, best first.

    Fewer beams come back where fewer exist. `free` ignores the trie: what the model says without its help, with no leaves.
    """

    @jax.jit
    def search(params: Any, tables: dict[str, Table], bias: dict[str, Array], batch: Batch, trie: DeviceTrie) -> Beams:
        context = model.encode(params, tables, bias, batch)
        module = model.bind(params)
        found = beam_search(module, context, bias, trie, width, free=free)
        leaf = jnp.full_like(found.leaf, -1) if free else found.leaf
        beams = Beams(codes=found.codes, leaf=leaf, score=found.score)
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
