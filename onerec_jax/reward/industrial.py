"""Rewards for what a whole page should be: no flood of popular items, variety of content and of authors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from onerec_jax.config import ShareCap
from onerec_jax.model.batch import Batch
from onerec_jax.reward.candidates import Candidates, Catalogue, Reward


def share_cap(catalogue: Catalogue, settings: ShareCap) -> Reward:
    """What to multiply a reward by, float32 [B,G]: r' = α r for items of a group that takes too much (REFERENCE 1.9, SIR).

    The group is the share `popular` of the catalogue, one item at least, that was exposed most, of equal ones the first
    rows. Where more than the share `share` of all items that were generated for the batch are of it, α = `factor` for its
    items; 1 for all others.
    """
    items = catalogue.exposures.shape[0]
    most_exposed = jnp.argsort(-catalogue.exposures, stable=True)[: max(1, round(settings.popular * items))]
    popular_I = jnp.zeros(items, bool).at[most_exposed].set(True)

    def factor(request: Batch, candidates: Candidates) -> Array:
        del request
        exists_BxG = candidates.item >= 0
        popular_BxG = exists_BxG & popular_I[jnp.maximum(candidates.item, 0)]
        too_many = jnp.sum(popular_BxG) > settings.share * jnp.sum(exists_BxG)
        return jnp.where(popular_BxG & too_many, jnp.float32(settings.factor), jnp.float32(1))

    return factor


def diversity(catalogue: Catalogue) -> Reward:
    """How far a candidate is from the others of its request, on average; float32 [B,G] in [0,1].

    r_i = mean over j != i of d(i, j), d = 1 - (1/C) |longest common prefix of the semantic IDs of items i and j|: 0 for an
    item that all others share their whole ID with, 1 for one alone in its first code, or without others.
    """
    levels = catalogue.codes.shape[-1]

    def reward(request: Batch, candidates: Candidates) -> Array:
        del request
        exists_BxG = candidates.item >= 0
        sharing_BxGxC = _sharing(catalogue.codes[jnp.maximum(candidates.item, 0)], exists_BxG)
        # A prefix in common with j is one count at each of its levels, so the lengths of all are summed by counting.
        common_BxG = jnp.sum(sharing_BxGxC - 1, axis=-1)
        others_Bx1 = jnp.sum(exists_BxG, axis=-1, keepdims=True) - 1
        return jnp.where(exists_BxG, 1 - common_BxG / (levels * jnp.maximum(others_Bx1, 1)), 0.0)

    return reward


def author_spread(catalogue: Catalogue) -> Reward:
    """r = 1 / |candidates of the request by the same author, this one included|; float32 [B,G].

    So the sum over a request is the number of its authors. An unknown author (row 0) is taken for one of their own.
    """

    def reward(request: Batch, candidates: Candidates) -> Array:
        del request
        exists_BxG = candidates.item >= 0
        author_BxG = catalogue.author[jnp.maximum(candidates.item, 0)]
        own_G = -1 - jnp.arange(author_BxG.shape[-1])  # below every author's row
        key_BxG = jnp.where(author_BxG > 0, author_BxG, own_G)
        sharing_BxG = _sharing(key_BxG[..., None], exists_BxG)[..., 0]
        return jnp.where(exists_BxG, 1 / jnp.maximum(sharing_BxG, 1), 0.0)

    return reward


def _sharing(key_BxGxC: Array, exists_BxG: Array) -> Array:
    """How many of a request's candidates that exist, itself included, share a candidate's first 1..C keys; int32 [B,G,C].

    Anything stands where a candidate does not exist. Sorts by all keys, which brings every prefix together, and measures the
    runs: G log G, where comparing each with each would hold G^2 values a request.
    """
    batch, size, levels = key_BxGxC.shape
    place_BxG = jnp.broadcast_to(jnp.arange(size), (batch, size))
    keys = [(~exists_BxG).astype(jnp.int32), *jnp.moveaxis(key_BxGxC, -1, 0)]
    *keys, origin_BxG = jax.lax.sort([*keys, place_BxG], num_keys=levels + 1)
    opens_BxG = (place_BxG == 0) | _changes(keys[0])
    runs = []
    for key_BxG in keys[1:]:
        opens_BxG |= _changes(key_BxG)
        start = jax.lax.cummax(jnp.where(opens_BxG, place_BxG, 0), axis=1)
        closes = jnp.roll(opens_BxG, -1, axis=1)  # the first place opens a run, so that the last one closes one
        end = jax.lax.cummin(jnp.where(closes, place_BxG, size), axis=1, reverse=True)
        runs.append(end - start + 1)
    return jnp.stack(jax.lax.sort([origin_BxG, *runs], num_keys=1)[1:], axis=-1)


def _changes(key_BxG: Array) -> Array:
    """Which keys differ from the one before them; bool [B,G]."""
    return key_BxG != jnp.roll(key_BxG, 1, axis=1)
