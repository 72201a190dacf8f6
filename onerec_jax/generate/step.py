"""One recommend step, features in, items and their scores out: a pure function of arrays, the same offline, exported and served.

By trie-constrained beam search. A model with only an item head scores every item. One with both heads takes the items of all
beams and as many of its best items, and ranks them by the sum of their log-probability by codes and `item_weight` times that
by the item head. No score is divided by a length: all semantic IDs are as long as each other.

Extra axis letters: X items to leave out, A items to keep to, J candidates, M of them in all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from onerec_jax.config import ModelConfig
from onerec_jax.generate.beam import Generated, beam_search, better_of_group, penalise_repeats
from onerec_jax.generate.scoring import code_log_p
from onerec_jax.generate.top_k import top_k
from onerec_jax.generate.trie_mask import Allowed, contains, leave_out, only
from onerec_jax.model.batch import Batch
from onerec_jax.model.encoder import Context
from onerec_jax.model.onerec import Model, OneRec
from onerec_jax.model.prefixes import DeviceTrie, device_trie
from onerec_jax.model.table_rows import Table
from onerec_jax.tokenizer.trie import Trie


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["trie", "codes", "author", "tag", "item_start", "items", "leaf", "shift"],
    meta_fields=["items_per_id"],
)
@dataclasses.dataclass(frozen=True)
class Catalogue:
    """What the step knows of all items, on the device."""

    trie: DeviceTrie
    codes: Array  # int32 [I,C]
    author: Array  # int32 [I]
    tag: Array  # int32 [I]
    item_start: Array  # int32 [leaves + 1]
    items: Array  # int32 [I], item rows by leaf, the first to be served first
    leaf: Array  # int32 [I], the leaf of every item
    shift: Array | None  # float32 [I], what is added to the item head's log P (`generate/label_shift.py`)
    items_per_id: int  # most items of one semantic ID


def make_catalogue(
    trie: Trie, config: ModelConfig, author: np.ndarray, tag: np.ndarray, shift: np.ndarray | None = None
) -> Catalogue:
    """The catalogue of a trie and of the features [I] of its items."""
    counts = np.diff(trie.item_start)
    leaf = np.empty(len(trie.items), np.int32)
    leaf[trie.items] = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    on_device = device_trie(trie, config)
    return Catalogue(
        trie=on_device,
        codes=jnp.asarray(trie.codes) if on_device.item_codes is None else on_device.item_codes,
        author=jnp.asarray(author, jnp.int32),
        tag=jnp.asarray(tag, jnp.int32),
        item_start=jnp.asarray(trie.item_start),
        items=jnp.asarray(trie.items),
        leaf=jnp.asarray(leaf),
        shift=None if shift is None else jnp.asarray(shift, jnp.float32),
        items_per_id=int(counts.max(initial=1)),
    )


@dataclasses.dataclass(frozen=True)
class ListOptions:
    """How lists are made.

    Attributes:
        k: items of a list.
        width: beams.
        item_weight: weight of an item's own log-probability beside its semantic ID's (model.head both).
        diversity: what every better item of its group costs an item, in log-probability; 0 = nothing.
        diverse_by: the group: items of one first code, which holds for beams of every level, or of one author.
    """

    k: int
    width: int
    item_weight: float = 1.0
    diversity: float = 0.0
    diverse_by: Literal["code", "author"] = "code"

    def __post_init__(self) -> None:
        if self.k < 1 or self.width < 1 or self.diversity < 0:
            raise ValueError(
                f"k {self.k} and width {self.width} must be 1 at least, diversity {self.diversity} 0 or more"
            )


class Lists(NamedTuple):
    """The lists of a batch, best first."""

    items: Array  # int32 [B,k], item rows, -1 = no more
    scores: Array  # float32 [B,k], log P, with both heads as weighed; -inf where there is no item


class _Candidates(NamedTuple):
    """Items that may be listed, -1 where there is none, and their scores, -inf there."""

    items: Array  # int32 [B,M]
    scores: Array  # float32 [B,M]


def make_recommend_step(model: Model, options: ListOptions) -> Callable[..., Lists]:
    """The jitted step: (params, tables, bias, catalogue, batch, exclude, allow) -> Lists.

    `exclude` int32 [B,X] are items that a request may not list, -1 = none; `allow` int32 [B,A] the only ones that it may, or None.
    Both are masks of the trie, so that beams are spent on nothing else. Targets of the batch are not read. Fewer than k items
    are listed where fewer exist or, without an item head, where the beams hold no more.
    """

    @jax.jit
    def step(
        params: Any,
        tables: dict[str, Table],
        bias: dict[str, Array],
        catalogue: Catalogue,
        batch: Batch,
        exclude: Array,
        allow: Array | None,
    ) -> Lists:
        context = model.encode(params, tables, bias, batch)
        return list_items(model, options, params, bias, catalogue, batch, context, exclude, allow)

    return step


def list_items(
    model: Model,
    options: ListOptions,
    params: Any,
    bias: dict[str, Array],
    catalogue: Catalogue,
    batch: Batch,
    context: Context,
    exclude: Array,
    allow: Array | None,
) -> Lists:
    """What the step of `make_recommend_step` does once a batch is encoded, of `context`."""
    module = model.bind(params)
    own = _item_log_p(model, params, batch, context, catalogue) if module.head is not None else None
    if own is None:
        found = _items_of_beams(_search(module, context, bias, catalogue, options, exclude, allow), catalogue)
        return _listed(_permitted(found, exclude, allow), catalogue, options)
    own = jnp.where(_may_list(own.shape, exclude, allow), own, -jnp.inf)
    if module.decoder is None:
        return _listed(_best(own, options), catalogue, options)
    generated = _search(module, context, bias, catalogue, options, exclude, allow)
    found = _permitted(_items_of_beams(generated, catalogue), exclude, allow)
    return _listed(_joined(module, context, bias, catalogue, options, found, own), catalogue, options)


def _item_log_p(model: Model, params: Any, batch: Batch, context: Context, catalogue: Catalogue) -> Array:
    """log P of every item by the item head [B,I], corrected where the catalogue has a shift."""
    own = model.item_scores(params, batch, context, catalogue.trie)
    return own if catalogue.shift is None else jax.nn.log_softmax(own + catalogue.shift)


def _search(
    module: OneRec,
    context: Context,
    bias: dict[str, Array],
    catalogue: Catalogue,
    options: ListOptions,
    exclude: Array,
    allow: Array | None,
) -> Generated:
    allowed: Allowed | None = None
    if allow is not None:
        kept = jnp.where(contains(exclude, allow), -1, allow)
        allowed = only(catalogue.trie, catalogue.leaf, kept)
    elif exclude.shape[1]:
        allowed = leave_out(catalogue.trie, catalogue.leaf, catalogue.item_start, exclude)
    by_code = options.diversity and options.diverse_by == "code"
    perturb = penalise_repeats(options.diversity) if by_code else None
    return beam_search(module, context, bias, catalogue.trie, options.width, perturb, allowed, free=False)


def _items_of_beams(found: Generated, catalogue: Catalogue) -> _Candidates:
    """All items of all beams, those of one beam in the order in which they are served."""
    leaf = jnp.maximum(found.leaf, 0)[..., None]
    place = catalogue.item_start[leaf] + jnp.arange(catalogue.items_per_id, dtype=jnp.int32)
    exists = (place < catalogue.item_start[leaf + 1]) & (found.leaf >= 0)[..., None]
    items = jnp.where(exists, catalogue.items[jnp.minimum(place, len(catalogue.items) - 1)], -1)
    scores = jnp.where(exists, found.score[..., None], -jnp.inf)
    flat = (items.shape[0], -1)  # which may be symbolic
    return _Candidates(items.reshape(flat), scores.reshape(flat))


def _permitted(found: _Candidates, exclude: Array, allow: Array | None) -> _Candidates:
    """Without what a request may not list: of the items of one ID some may be, and others not."""
    gone = contains(exclude, found.items)
    if allow is not None:
        gone |= ~contains(allow, found.items)
    return _Candidates(jnp.where(gone, -1, found.items), jnp.where(gone, -jnp.inf, found.scores))


def _may_list(shape: tuple[int, ...], exclude: Array, allow: Array | None) -> Array:
    """Which items of the catalogue a request may list, bool [B,I]."""

    def marked(mask: Array, items: Array, value: bool) -> Array:
        place = jnp.where(items >= 0, items, shape[1])
        return jax.vmap(lambda row, at: row.at[at].set(value, mode="drop"))(mask, place)

    mask = jnp.ones(shape, bool) if allow is None else marked(jnp.zeros(shape, bool), allow, True)
    return marked(mask, exclude, False)


def _best(score_BxI: Array, options: ListOptions) -> _Candidates:
    """The best items by the item head; for diverse lists all of them, which any of them may enter."""
    if options.diversity:
        rows = jnp.broadcast_to(jnp.arange(score_BxI.shape[1], dtype=jnp.int32), score_BxI.shape)
        return _Candidates(jnp.where(jnp.isfinite(score_BxI), rows, -1), score_BxI)
    scores, items = top_k(score_BxI, options.k)
    return _Candidates(jnp.where(jnp.isfinite(scores), items.astype(jnp.int32), -1), scores)


def _joined(
    module: OneRec,
    context: Context,
    bias: dict[str, Array],
    catalogue: Catalogue,
    options: ListOptions,
    found: _Candidates,
    own_BxI: Array,
) -> _Candidates:
    """The items of the beams and the item head's best ones, scored by both heads."""
    best = _best(own_BxI, dataclasses.replace(options, k=max(options.k, options.width), diversity=0.0))
    by_codes = jnp.sum(
        code_log_p(module, context, bias, catalogue.trie, catalogue.codes[jnp.maximum(best.items, 0)]), -1
    )
    known = jnp.any(best.items[:, :, None] == found.items[:, None, :], axis=-1)
    items = jnp.concatenate([found.items, jnp.where(known, -1, best.items)], axis=1)
    scores = jnp.concatenate([found.scores, by_codes], axis=1)
    scores = scores + options.item_weight * jnp.take_along_axis(own_BxI, jnp.maximum(items, 0), axis=1)
    return _Candidates(items, jnp.where(items < 0, -jnp.inf, scores))


def _listed(found: _Candidates, catalogue: Catalogue, options: ListOptions) -> Lists:
    """The k best candidates, where asked for after what better ones of their group cost them; padded to k."""
    ranks = found.scores
    if options.diversity:
        of = catalogue.codes[:, 0] if options.diverse_by == "code" else catalogue.author
        ranks = ranks - options.diversity * better_of_group(ranks, of[jnp.maximum(found.items, 0)])
    ranks, chosen = top_k(ranks, options.k)
    exists = jnp.isfinite(ranks)
    items = jnp.where(exists, jnp.take_along_axis(found.items, chosen, axis=1), -1)
    scores = jnp.where(exists, jnp.take_along_axis(found.scores, chosen, axis=1), -jnp.inf)
    short = ((0, 0), (0, options.k - items.shape[1]))
    return Lists(jnp.pad(items, short, constant_values=-1), jnp.pad(scores, short, constant_values=-jnp.inf))
