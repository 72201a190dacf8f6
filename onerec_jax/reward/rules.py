"""Rewards by rule: how close a candidate comes to what the log says that the user took.

A maker takes `positive_labels`, columns of `Batch.feedback`. A target of the request is relevant where its weight is above 0
and it has one of these labels, or any target of such weight where none are named.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

from onerec_jax.model.batch import Batch
from onerec_jax.reward.candidates import Candidates, Reward


def hit(positive_labels: tuple[int, ...] = ()) -> Reward:
    """1 where the candidate's item is a relevant target of its request, else 0; float32 [B,G]."""

    def reward(request: Batch, candidates: Candidates) -> Array:
        return _hits(request, candidates, positive_labels).astype(jnp.float32)

    return reward


def prefix_match(positive_labels: tuple[int, ...] = ()) -> Reward:
    """r = max_t (1/C) |longest common prefix of the codes of the candidate and of relevant target t|; float32 [B,G].

    The rollout-beam reward of OneRec-Think (arXiv 2510.11639) for one candidate, over C levels and so in [0,1]: part of the
    credit for part of a semantic ID, where hits are rare. Codes count only behind equal ones, as a code means nothing alone.
    """

    def reward(request: Batch, candidates: Candidates) -> Array:
        same_BxGxTxC = candidates.codes[:, :, None] == request.targets[:, None]
        length_BxGxT = jnp.sum(jnp.cumprod(same_BxGxTxC, axis=-1), axis=-1)
        relevant_BxT = _relevant(request, positive_labels)
        longest_BxG = jnp.max(jnp.where(relevant_BxT[:, None], length_BxGxT, 0), axis=-1)
        share_BxG = longest_BxG.astype(jnp.float32) / candidates.codes.shape[-1]
        return jnp.where(candidates.item >= 0, share_BxG, 0.0)

    return reward


def ndcg_rank(positive_labels: tuple[int, ...] = ()) -> Reward:
    """r = hit / log2(2 + rank), the gain of NDCG; float32 [B,G].

    `rank` is the candidate's place in its request by descending score, from 0; equal scores in the order they are given.
    """

    def reward(request: Batch, candidates: Candidates) -> Array:
        best_first_BxG = jnp.argsort(-candidates.score, axis=-1, stable=True)
        rank_BxG = jnp.argsort(best_first_BxG, axis=-1)
        return jnp.where(_hits(request, candidates, positive_labels), 1 / jnp.log2(2.0 + rank_BxG), 0.0)

    return reward


def _relevant(request: Batch, positive_labels: tuple[int, ...]) -> Array:
    """Which targets a candidate should meet, bool [B,T]."""
    counts_BxT = request.target_weight > 0
    if not positive_labels:
        return counts_BxT
    return counts_BxT & jnp.any(request.feedback[..., np.array(positive_labels)] > 0, axis=-1)


def _hits(request: Batch, candidates: Candidates, positive_labels: tuple[int, ...]) -> Array:
    """Which candidates are relevant targets, bool [B,G]."""
    same_BxGxT = candidates.item[:, :, None] == request.target_item[:, None]
    met_BxG = jnp.any(same_BxGxT & _relevant(request, positive_labels)[:, None], axis=-1)
    return met_BxG & (candidates.item >= 0)
