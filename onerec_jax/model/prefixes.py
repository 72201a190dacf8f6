"""The trie of semantic IDs on the device: the codes that go on from a prefix, for beams and for a softmax over them alone.

Extra axis letter: J children of a node, as many as the fullest node of its depth has.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from onerec_jax.config import ModelConfig
from onerec_jax.tokenizer.trie import Trie

DENSE_SHARE = 8  # a level is dense where its fullest node has this share of the codes, one in so many
DENSE_BYTES = 1 << 27  # most bytes of one level's bits


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["child_start", "token", "item_codes", "bits"],
    meta_fields=["branching"],
)
@dataclasses.dataclass(frozen=True)
class DeviceTrie:
    """The part of a trie that is walked from the root down (see `tokenizer.trie.Trie`)."""

    child_start: tuple[Array, ...]
    token: tuple[Array, ...]
    branching: tuple[int, ...]
    item_codes: Array | None = None  # int32 [I,C], the semantic ID of every item
    bits: tuple[Array | None, ...] | None = None  # of a dense level uint32 [nodes, V/32]: which codes go on from a node

    def is_dense(self, level: int) -> bool:
        """Whether the codes that go on from a node of this depth are known as bits."""
        return self.bits is not None and self.bits[level] is not None


def device_trie(trie: Trie, config: ModelConfig) -> DeviceTrie:
    """The trie, with the semantic IDs of all items where the model's item vectors hold them."""
    return DeviceTrie(
        tuple(jnp.asarray(a) for a in trie.child_start),
        tuple(jnp.asarray(a) for a in trie.token),
        trie.branching,
        jnp.asarray(trie.codes) if config.coded_items else None,
        tuple(_bits(trie, level) for level in range(trie.levels)),
    )


def _bits(trie: Trie, level: int) -> Array | None:
    """Which codes go on from each node of a depth, a bit each; None where lists of children are cheaper."""
    start, token = trie.child_start[level], trie.token[level]
    nodes, codes = len(start) - 1, -(-(int(token.max(initial=0)) + 1) // 32) * 32
    if trie.branching[level] * DENSE_SHARE < codes or nodes * codes // 8 > DENSE_BYTES:
        return None
    legal = np.zeros((nodes, codes), bool)
    legal[np.repeat(np.arange(nodes), np.diff(start)), token] = True
    return jnp.asarray(np.packbits(legal, axis=1, bitorder="little").view("<u4").astype(np.uint32))


def legal_codes(trie: DeviceTrie, level: int, node_x: Array, codes: int) -> Array:
    """Which of the `codes` V of a dense level go on from each node, bool [..., V]."""
    assert trie.bits is not None
    words = trie.bits[level]
    assert words is not None
    bits = (words[node_x][..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    flat = bits.reshape(*node_x.shape, -1)[..., :codes].astype(bool)
    return jnp.pad(flat, [(0, 0)] * node_x.ndim + [(0, codes - flat.shape[-1])])


def step_down(trie: DeviceTrie, level: int, node_x: Array, code_x: Array) -> Array:
    """The node that a code leads to, int32 [...], by binary search among children; -1 where it leads to none, or node is -1."""
    start, token = trie.child_start[level], trie.token[level]
    low, end = start[jnp.maximum(node_x, 0)], start[jnp.maximum(node_x, 0) + 1]
    high = end
    for _ in range(max(1, trie.branching[level]).bit_length()):
        middle = (low + high) // 2
        right = (low < high) & (token[jnp.minimum(middle, len(token) - 1)] < code_x)
        low, high = jnp.where(right, middle + 1, low), jnp.where(right | (low >= high), high, middle)
    found = (low < end) & (token[jnp.minimum(low, len(token) - 1)] == code_x) & (node_x >= 0)
    return jnp.where(found, low, -1)


def training_trie(config: ModelConfig, trie: Trie) -> DeviceTrie | None:
    """The trie where the loss of this model needs one: with `model.softmax: legal`, or codes in its item vectors."""
    return device_trie(trie, config) if config.softmax == "legal" or config.coded_items else None


def children(trie: DeviceTrie, level: int, node_x: Array) -> tuple[Array, Array, Array]:
    """Child nodes, the codes that lead to them, and which of the places hold a child, each [..., J]."""
    slot = jnp.arange(trie.branching[level])
    first = trie.child_start[level][node_x]
    exists = slot < (trie.child_start[level][node_x + 1] - first)[..., None]
    child = jnp.where(exists, first[..., None] + slot, 0)
    return child, trie.token[level][child], exists


def legal_log_softmax(logits_xV: Array, token_xJ: Array, exists_xJ: Array) -> tuple[Array, Array]:
    """log P of every code among those of all children [..., V], and which codes those are; -inf elsewhere.

    The mask is made by comparing: a gather's gradient would be a scatter, which takes seconds a step on a CPU.
    """
    code = jnp.arange(logits_xV.shape[-1])
    legal = jnp.any((token_xJ[..., None] == code) & exists_xJ[..., None], axis=-2)
    return jax.nn.log_softmax(logits_xV, axis=-1, where=legal), legal


def legal_log_probabilities(logits: tuple[Array, ...], codes_xC: Array, trie: DeviceTrie) -> list[tuple[Array, Array]]:
    """Per level: log P of every code after the prefix of `codes` [..., V], -inf where it leads to no item, and where it does.

    `codes` must be semantic IDs of the trie.
    """
    node, found = jnp.zeros((), jnp.int32), []  # the root, whose codes are compared once for all
    for level, level_logits in enumerate(logits):
        if trie.is_dense(level):
            legal = legal_codes(trie, level, node, level_logits.shape[-1])
            found.append((jax.nn.log_softmax(level_logits, axis=-1, where=legal), legal))
            node = jnp.maximum(step_down(trie, level, node, codes_xC[..., level]), 0)
            continue
        child, token, exists = children(trie, level, node)
        found.append(legal_log_softmax(level_logits, token, exists))
        own = (token == codes_xC[..., level, None]) & exists
        node = jnp.sum(jnp.where(own, child, 0), axis=-1)
    return found
