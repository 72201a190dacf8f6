"""The trie of semantic IDs on the device: the codes that go on from a prefix, for beams and for a softmax over them alone.

Extra axis letter: J children of a node, as many as the fullest node of its depth has.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from onerec_jax.config import ModelConfig
from onerec_jax.tokenizer.trie import Trie


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["child_start", "token", "item_codes"], meta_fields=["branching"]
)
@dataclasses.dataclass(frozen=True)
class DeviceTrie:
    """The part of a trie that is walked from the root down (see `tokenizer.trie.Trie`)."""

    child_start: tuple[Array, ...]
    token: tuple[Array, ...]
    branching: tuple[int, ...]
    item_codes: Array | None = None  # int32 [I,C], the semantic ID of every item


def device_trie(trie: Trie, config: ModelConfig) -> DeviceTrie:
    """The trie, with the semantic IDs of all items where the model's item vectors hold them."""
    return DeviceTrie(
        tuple(jnp.asarray(a) for a in trie.child_start),
        tuple(jnp.asarray(a) for a in trie.token),
        trie.branching,
        jnp.asarray(trie.codes) if config.coded_items else None,
    )


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
        child, token, exists = children(trie, level, node)
        found.append(legal_log_softmax(level_logits, token, exists))
        own = (token == codes_xC[..., level, None]) & exists
        node = jnp.sum(jnp.where(own, child, 0), axis=-1)
    return found
