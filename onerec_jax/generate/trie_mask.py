"""Which nodes of the trie a request may go on to: lists of items to leave out, or of the only ones to list, as masks of beams.

A prefix all of whose items are left out is never a beam, so that no beam is spent on what would be taken out afterwards. What is
kept of a request is a path of nodes for each listed item and nothing of the size of the catalogue, so a mask costs the same
whatever the number of items.

Extra axis letters: X items of a list, J candidates of one beam, W beams.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from onerec_jax.model.prefixes import DeviceTrie

_NOWHERE = jnp.iinfo(jnp.int32).max

# (level, node of each beam [B,W], candidates of a beam J, whether these are codes and not children) -> which may follow, [B,W,J]
Allowed = Callable[[int, Array, int, bool], Array]


class Paths(NamedTuple):
    """For every level the nodes of a list's items before and after its code, int32 [B,X] each; -1 where there is none."""

    before: tuple[Array, ...]
    after: tuple[Array, ...]


def paths(trie: DeviceTrie, leaf_BxX: Array) -> Paths:
    """The way from the root to each leaf, -1 = none, by binary search in the children of every depth."""
    nodes = [leaf_BxX]
    for start in reversed(trie.child_start):
        parent = jnp.searchsorted(start, jnp.maximum(nodes[0], 0), side="right").astype(jnp.int32) - 1
        nodes.insert(0, jnp.where(nodes[0] >= 0, parent, -1))
    return Paths(tuple(nodes[:-1]), tuple(nodes[1:]))


def without_repeats(items_BxX: Array) -> Array:
    """A list sorted, with -1 in place of items that it names again."""
    ordered = jnp.sort(items_BxX, axis=-1)
    again = jnp.pad(ordered[:, 1:] == ordered[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(again, -1, ordered)


def contains(items_BxX: Array, item_BxM: Array) -> Array:
    """Whether each list names each item, bool [B,M]; -1 is no item."""
    if not items_BxX.shape[1]:
        return jnp.zeros(item_BxM.shape, bool)
    ordered = jnp.sort(items_BxX, axis=-1)
    place = jax.vmap(jnp.searchsorted)(ordered, item_BxM)
    there = jnp.take_along_axis(ordered, jnp.minimum(place, ordered.shape[1] - 1), axis=-1)
    return (there == item_BxM) & (item_BxM >= 0)


def _leaf_of(leaf_I: Array, items_BxX: Array) -> Array:
    return jnp.where(items_BxX >= 0, leaf_I[jnp.maximum(items_BxX, 0)], -1)


def _items_under(trie: DeviceTrie, item_start: Array, depth: int, node: Array) -> Array:
    """How many items there are under each node of a depth."""
    first, past = jnp.maximum(node, 0), jnp.maximum(node, 0) + 1
    for start in trie.child_start[depth:]:
        first, past = start[first], start[past]
    return item_start[past] - item_start[first]


def _places(
    trie: DeviceTrie, level: int, parent_BxX: Array, child_BxX: Array, node_BxW: Array, per_beam: int, by_code: bool
) -> Array:
    """Where among the candidates [B,W*J] of the beams each child stands; past the last one where it is of no beam."""
    beam = parent_BxX[:, :, None] == node_BxW[:, None, :]
    first = trie.child_start[level][jnp.maximum(parent_BxX, 0)]
    slot = trie.token[level][jnp.maximum(child_BxX, 0)] if by_code else child_BxX - first
    place = jnp.argmax(beam, axis=-1) * per_beam + slot
    return jnp.where(jnp.any(beam, axis=-1) & (child_BxX >= 0), place, node_BxW.shape[1] * per_beam)


def _marked(place_BxX: Array, node_BxW: Array, per_beam: int, value: bool) -> Array:
    """bool [B,W,J]: `value` at these places and its opposite elsewhere."""
    rows, beams = node_BxW.shape
    flat = jnp.full((rows, beams * per_beam), not value)
    marked = jax.vmap(lambda row, place: row.at[place].set(value, mode="drop"))(flat, place_BxX)
    return marked.reshape(rows, beams, per_beam)


def leave_out(trie: DeviceTrie, leaf_I: Array, item_start: Array, items_BxX: Array) -> Allowed:
    """All but the prefixes whose items are all on the list.

    Args:
        trie: the semantic IDs that exist.
        leaf_I: the leaf of every item.
        item_start: as `tokenizer.trie.Trie.item_start`.
        items_BxX: item rows in any order, -1 = none.
    """
    way = paths(trie, _leaf_of(leaf_I, without_repeats(items_BxX)))

    def allowed(level: int, node_BxW: Array, per_beam: int, by_code: bool) -> Array:
        child = way.after[level]
        ordered = jnp.sort(jnp.where(child >= 0, child, _NOWHERE), axis=-1)
        on_list = jax.vmap(lambda a, v: jnp.searchsorted(a, v, "right") - jnp.searchsorted(a, v, "left"))
        gone = on_list(ordered, child) == _items_under(trie, item_start, level + 1, child)
        place = _places(trie, level, way.before[level], jnp.where(gone, child, -1), node_BxW, per_beam, by_code)
        return _marked(place, node_BxW, per_beam, False)

    return allowed


def only(trie: DeviceTrie, leaf_I: Array, items_BxX: Array) -> Allowed:
    """Nothing but the prefixes of the items on the list; arguments as `leave_out`."""
    way = paths(trie, _leaf_of(leaf_I, items_BxX))

    def allowed(level: int, node_BxW: Array, per_beam: int, by_code: bool) -> Array:
        place = _places(trie, level, way.before[level], way.after[level], node_BxW, per_beam, by_code)
        return _marked(place, node_BxW, per_beam, True)

    return allowed
