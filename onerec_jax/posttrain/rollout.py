"""Candidates of a request, generated for reinforcement learning, and their log-probabilities with a gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from onerec_jax.config import Recipe, RLConfig
from onerec_jax.generate.beam import beam_search, events_seen
from onerec_jax.generate.sample import sample
from onerec_jax.generate.step import Catalogue, ListOptions, list_items
from onerec_jax.model.batch import Batch
from onerec_jax.model.encoder import Context
from onerec_jax.model.onerec import Model, OneRec
from onerec_jax.model.prefixes import DeviceTrie, legal_log_probabilities
from onerec_jax.model.table_rows import Table
from onerec_jax.tokenizer.trie import Trie


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """G different candidates per request: the most probable first under beam search, else in the order drawn."""

    codes: Array  # int32 [B,G,C], semantic ID; 0 where there is no candidate
    leaf: Array  # int32 [B,G], leaf of the trie; -1 where there is no candidate, or it is no item's
    item: Array  # int32 [B,G], row of the item that is served first for the leaf; -1 where there is no leaf
    exists: (
        Array  # bool [B,G]; fewer than G candidates exist where the catalogue, or what top_k and top_p leave, is small
    )
    score: Array  # float32 [B,G], log-probability by which it was generated; -inf where there is no candidate
    log_p_all: Array  # float32 [B,G,C], log P of each code after those before it, among all of its level
    log_p_legal: Array  # float32 [B,G,C], the same among those that go on to an item; -inf for any other


def first_items(trie: Trie) -> np.ndarray:
    """Row of the item that is served first for each leaf, int32 [leaves]."""
    return trie.items[trie.item_start[:-1]]


def make_rollout(
    model: Model, config: RLConfig, *, free: bool | None = None, width: int | None = None
) -> Callable[..., Rollout]:
    """Jitted: (params, tables, bias, batch, trie, leaf_item int32 [leaves], key) -> the candidates of each request.

    `leaf_item` is that of `first_items`. Beam search does not use the key.

    Args:
        free: ignore the trie while searching; None: as `rl.constrained` says.
        width: G; None: `rl.group`.
    """
    unbound = not config.constrained if free is None else free
    group = config.group if width is None else width

    @jax.jit
    def rollout(
        params: Any,
        tables: dict[str, Table],
        bias: dict[str, Array],
        batch: Batch,
        trie: DeviceTrie,
        leaf_item: Array,
        key: Array,
    ) -> Rollout:
        context = model.encode(params, tables, bias, batch)
        module = model.bind(params)
        if config.rollout == "sample":
            found = sample(
                module, context, bias, trie, group, key,
                free=unbound, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
            )  # fmt: skip
        else:
            found = beam_search(module, context, bias, trie, group, free=unbound)

        def padded(values: Array, value: float) -> Array:
            rest = [(0, 0)] * (values.ndim - 2)
            return jnp.pad(values, [(0, 0), (0, group - values.shape[1]), *rest], constant_values=value)

        score, leaf = padded(found.score, -jnp.inf), padded(found.leaf, -1)
        exists = jnp.isfinite(score)
        return Rollout(
            codes=jnp.where(exists[..., None], padded(found.codes, 0), 0),
            leaf=leaf,
            item=jnp.where(leaf >= 0, leaf_item[jnp.maximum(leaf, 0)], -1),
            exists=exists,
            score=score,
            log_p_all=padded(found.log_p_all, -jnp.inf),
            log_p_legal=padded(found.log_p_legal, -jnp.inf),
        )

    return rollout


def make_served(model: Model, recipe: Recipe) -> Callable[..., Rollout]:
    """Jitted: (params, tables, bias, batch, catalogue) -> the first `rl.group` items of the list that would be served.

    Made as `evaluate` says: of both heads by `evaluate.beam_width` and `evaluate.item_weight`, corrected where the catalogue
    has a shift, without items that the user met where `evaluate.exclude_seen` leaves those out.
    """
    settings = recipe.evaluate
    options = ListOptions(k=recipe.rl.group, width=settings.beam_width, item_weight=settings.item_weight)

    @jax.jit
    def served(
        params: Any, tables: dict[str, Table], bias: dict[str, Array], batch: Batch, catalogue: Catalogue
    ) -> Rollout:
        met = batch.short.item if settings.exclude_seen else jnp.zeros((batch.user.shape[0], 0), jnp.int32)
        context, module = model.encode(params, tables, bias, batch), model.bind(params)
        item, score = list_items(model, options, params, bias, catalogue, batch, context, met, None)
        exists, row = item >= 0, jnp.maximum(item, 0)
        codes = jnp.where(exists[..., None], catalogue.codes[row], 0)
        logits = _logits(module, context, codes, exists, bias)
        log_p_all, log_p_legal = (
            _of_codes(_distributions(logits, codes, catalogue.trie, kind), codes, exists) for kind in ("all", "legal")
        )
        leaf = jnp.where(exists, catalogue.leaf[row], -1)
        return Rollout(codes, leaf, item, exists, score, log_p_all, log_p_legal)

    return served


def read_request(model: Model, policy: dict[str, Any], request: Batch) -> tuple[OneRec, Context, Batch]:
    """The module of a policy (params, tables, bias), its context, and the request with rows of the tables in place of ids."""
    local, rows = model.read(policy["tables"], request)
    module = model.bind(policy["params"])
    return module, module.encode(local, rows, policy["bias"], None)[0], local


def candidate_distributions(
    module: OneRec,
    context: Context,
    codes_BxGxC: Array,
    valid_BxG: Array,
    bias: dict[str, Array],
    trie: DeviceTrie | None,
    distribution: Literal["all", "legal"],
) -> list[Array]:
    """log P of every code of a level after the codes s^1..s^{c-1} of each candidate, float32 [B,G,V] by level, differentiable.

    One teacher-forced pass without dropout: the G candidates of a request share its context, and each sees all of it.

    Args:
        codes_BxGxC: int; what stands where not valid can be anything.
        valid_BxG: bool; with `distribution` "legal" only semantic IDs of the trie may be valid.
        distribution: "all": the softmax over all codes of a level; "legal": that over the codes that go on to an item, -inf
            for any other.

    Raises:
        ValueError: "legal" without a trie.
    """
    codes = jnp.where(valid_BxG[..., None], codes_BxGxC, 0)
    return _distributions(_logits(module, context, codes, valid_BxG, bias), codes, trie, distribution)


def _logits(
    module: OneRec, context: Context, codes_BxGxC: Array, valid_BxG: Array, bias: dict[str, Array]
) -> tuple[Array, ...]:
    """Those of every level [B,G,V], from one pass of the decoder."""
    assert module.decoder is not None, "a model with an item head has no codes to score"
    visible = jnp.broadcast_to(events_seen(context), valid_BxG.shape)
    return module.decoder(context, codes_BxGxC, visible, valid_BxG, bias["decoder"], None)[0]


def _distributions(
    logits: tuple[Array, ...], codes_BxGxC: Array, trie: DeviceTrie | None, distribution: Literal["all", "legal"]
) -> list[Array]:
    """As `candidate_distributions`, of the decoder's logits."""
    if distribution == "all":
        return [jax.nn.log_softmax(level) for level in logits]
    if trie is None:
        raise ValueError("rl.distribution legal needs the trie of the semantic IDs")
    return [log_p for log_p, _ in legal_log_probabilities(logits, codes_BxGxC, trie)]


def candidate_log_p(
    module: OneRec,
    context: Context,
    codes_BxGxC: Array,
    valid_BxG: Array,
    bias: dict[str, Array],
    trie: DeviceTrie | None,
    distribution: Literal["all", "legal"],
) -> Array:
    """log P(s^c | s^1..s^{c-1}, context) of each code of each candidate, float32 [B,G,C], differentiable.

    As `candidate_distributions`; what is not valid has log P 0 and no gradient.
    """
    levels = candidate_distributions(module, context, codes_BxGxC, valid_BxG, bias, trie, distribution)
    return _of_codes(levels, codes_BxGxC, valid_BxG)


def _of_codes(levels: list[Array], codes_BxGxC: Array, valid_BxG: Array) -> Array:
    """log P of the codes of each candidate [B,G,C], 0 where it is not valid."""
    codes = jnp.where(valid_BxG[..., None], codes_BxGxC, 0)
    own = [jnp.take_along_axis(log_p, codes[..., i, None], axis=-1) for i, log_p in enumerate(levels)]
    return jnp.where(valid_BxG[..., None], jnp.concatenate(own, axis=-1), 0.0)


def item_distribution(module: OneRec, context: Context, request: Batch, trie: DeviceTrie | None) -> Array:
    """log P(item | context) by the item head over the whole catalogue, float32 [B,I], differentiable."""
    assert module.head is not None, "a model without an item head has no probabilities of items"
    seen_Bx1 = jnp.sum(request.short.item >= 0, axis=1, keepdims=True)
    states = module.head.states(context, request.short.item, seen_Bx1)
    return jax.nn.log_softmax(module.item_logits(states, trie)[:, 0])


def item_log_p(log_p_BxI: Array, item_BxG: Array, valid_BxG: Array) -> Array:
    """log P(item | context) of each candidate, of `item_distribution`, float32 [B,G,1], differentiable.

    As `candidate_log_p`, of an ID of one code: what is not valid has log P 0 and no gradient.
    """
    own = jnp.take_along_axis(log_p_BxI, jnp.where(valid_BxG, item_BxG, 0), axis=-1)
    return jnp.where(valid_BxG, own, 0.0)[..., None]
