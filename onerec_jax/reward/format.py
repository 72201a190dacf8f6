"""The format reward: keeps free generation on semantic IDs that exist (REFERENCE 1.9)."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from onerec_jax.model.prefixes import DeviceTrie, children


def is_legal(codes_BxGxC: Array, trie: DeviceTrie) -> tuple[Array, Array]:
    """Which codes are the semantic ID of an item, bool [B,G], and its leaf of the trie, int32 [B,G], -1 where there is none.

    Any integers will do as codes int32 [B,G,C], with the C levels of the trie.
    """
    legal_BxG = jnp.ones(codes_BxGxC.shape[:-1], bool)
    node = jnp.zeros((), jnp.int32)  # the root, whose codes are compared once for all
    for level in range(len(trie.token)):
        child, token, exists = children(trie, level, node)
        own_BxGxJ = (token == codes_BxGxC[..., level, None]) & exists
        legal_BxG &= jnp.any(own_BxGxJ, axis=-1)
        node = jnp.sum(jnp.where(own_BxGxJ, child, 0), axis=-1)
    return legal_BxG, jnp.where(legal_BxG, node, -1)


def format_advantage(legal_BxG: Array, exists_BxG: Array, chance_BxG: Array, k: int) -> tuple[Array, Array]:
    """A = 1 where a chosen candidate is legal, else 0; float32 [B,G], and which are chosen, bool [B,G].

    Of the candidates of a request that exist, the `k` of least chance are chosen, all where there are fewer, of equal
    chances the first. At random, because the model learns to make legal what it knows to be looked at: chosen from the top,
    legality of all the others falls. An illegal one is discarded, not punished: pushing its probability down would push up
    whatever is most probable already (the squeezing effect).

    Args:
        legal_BxG: bool [B,G], candidates that are the semantic ID of an item.
        exists_BxG: bool [B,G]
        chance_BxG: float32 [B,G], uniform in [0,1) and independent; anything where there is no candidate.
    """
    order_BxG = jnp.argsort(jnp.where(exists_BxG, chance_BxG, jnp.inf), axis=-1, stable=True)
    chosen_BxG = (jnp.argsort(order_BxG, axis=-1) < k) & exists_BxG
    return (chosen_BxG & legal_BxG).astype(jnp.float32), chosen_BxG


def legality(legal_BxG: Array, exists_BxG: Array) -> tuple[Array, Array]:
    """The share of candidates that are legal, as (sum, weight)."""
    return jnp.sum(legal_BxG & exists_BxG, dtype=jnp.float32), jnp.sum(exists_BxG, dtype=jnp.float32)
