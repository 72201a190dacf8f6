"""OneRec-V2's duration-aware reward: how long something was watched, compared with videos as long (REFERENCE 3.5).

Play time grows with duration, so that as a reward it would favour long videos; a quantile among the user's own play times of
like duration does not.

Extra axis letter: N impressions whose play time is judged.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from onerec_jax.model.batch import Batch
from onerec_jax.reward.candidates import Candidates, Catalogue, Reward

EPSILON = 1e-6


def duration_quantiles(
    history_playtime_BxL: Array,
    history_duration_BxL: Array,
    valid_x: Array,
    playtime_BxN: Array,
    duration_BxN: Array,
    base: float = 2.0,
) -> Array:
    """q_i = |{p_j in P_{u,b}: p_j <= p_i}| / |P_{u,b}|, float32 [B,N] in [0,1].

    P_{u,b} are the play times of the user's past events in the bucket b = floor(log_base(d_i + 1e-6)) of the impression's
    duration d_i. Where that bucket holds none, all past events are compared, by the share p / d that was watched; where there
    are none at all, or the impression's own play time or duration is unknown, q = 0.5.

    Args:
        history_playtime_BxL, history_duration_BxL: past events, in seconds; those with an unknown (negative) one of the two
            are left out.
        valid_x: bool [B,L], which of the past events exist, or [B,N,L], also which precede the impression.
        playtime_BxN, duration_BxN: impressions, in seconds, negative = unknown.

    Raises:
        ValueError: `base` is not above 1.
    """
    if base <= 1:
        raise ValueError(f"the base of duration buckets is {base}: it must be above 1, each being that much longer")
    known_BxL = (history_playtime_BxL >= 0) & (history_duration_BxL >= 0)
    past_BxNxL = (valid_x if valid_x.ndim == 3 else valid_x[:, None]) & known_BxL[:, None]
    alike_BxNxL = past_BxNxL & (_bucket(history_duration_BxL, base)[:, None] == _bucket(duration_BxN, base)[..., None])
    same_bucket, events = _quantile(history_playtime_BxL, playtime_BxN, alike_BxNxL)
    watched_BxL = history_playtime_BxL / (history_duration_BxL + EPSILON)
    of_all, all_events = _quantile(watched_BxL, playtime_BxN / (duration_BxN + EPSILON), past_BxNxL)
    known_BxN = (playtime_BxN >= 0) & (duration_BxN >= 0)
    q_BxN = jnp.where(events > 0, same_bucket, jnp.where(all_events > 0, of_all, 0.5))
    return jnp.where(known_BxN, q_BxN, 0.5)


def duration_advantage(q_x: Array, disliked_x: Array, valid_x: Array) -> Array:
    """A = +1 where q > τ_B and not disliked, -1 where disliked, else 0 (REFERENCE 3.5); float32, shaped like q.

    τ_B is the top-quartile cut of q over what is valid in the batch: the smallest q that at most a quarter are above. What is
    not valid can hold anything and gets 0. The advantage is not normalised: it is the whole of the objective's A.

    Args:
        q_x: float32 [...], quantiles of play time.
        disliked_x: bool [...], explicit negative feedback.
        valid_x: bool [...]
    """
    ascending = jnp.sort(jnp.where(valid_x, q_x, jnp.inf), axis=None)
    three_quarters = (3 * jnp.sum(valid_x) + 3) // 4  # rounded up
    cut = ascending[jnp.maximum(three_quarters - 1, 0)]
    liked = jnp.where(q_x > cut, 1.0, 0.0)
    return jnp.where(valid_x, jnp.where(disliked_x, -1.0, liked), 0.0)


def watched_quantile(catalogue: Catalogue, base: float = 2.0) -> Reward:
    """r = q of the logged target that the candidate's item is (`duration_quantiles`), 0 where it is none; float32 [B,G].

    The past events are those of the short pathway that precede the target. Targets count where their weight is above 0; of
    several with one item the highest q counts.
    """

    def reward(request: Batch, candidates: Candidates) -> Array:
        logged_BxT = (request.target_weight > 0) & (request.target_item >= 0)
        target_BxT = jnp.where(logged_BxT, request.target_item, 0)
        events = request.short
        precedes_BxTxL = jnp.arange(events.item.shape[-1]) < request.visible[..., None]
        q_BxT = duration_quantiles(
            events.playtime_s,
            events.duration_s,
            precedes_BxTxL,
            request.playtime_s,
            catalogue.duration_s[target_BxT],
            base,
        )
        met_BxGxT = (candidates.item[:, :, None] == target_BxT[:, None]) & logged_BxT[:, None]
        return jnp.max(jnp.where(met_BxGxT, q_BxT[:, None], 0.0), axis=-1)

    return reward


def _bucket(duration_x: Array, base: float) -> Array:
    """floor(log_base(d + 1e-6)), counted from the bucket of duration 0; int32 [...].

    By comparing with powers of the base: a float32 logarithm of the power itself may fall on either side of the whole number.
    """
    first, last = (math.log(d) / math.log(base) for d in (EPSILON, float(np.finfo(np.float32).max)))
    powers = np.power(np.float64(base), np.arange(math.ceil(first), math.floor(last))).astype(np.float32)
    return jnp.searchsorted(jnp.asarray(powers), duration_x + EPSILON, side="right", method="compare_all")


def _quantile(past_BxL: Array, value_BxN: Array, counts_BxNxL: Array) -> tuple[Array, Array]:
    """The share of past values, of those that count, up to a value, and how many count; float32 and int32 [B,N]."""
    below = jnp.sum(counts_BxNxL & (past_BxL[:, None] <= value_BxN[..., None]), axis=-1)
    total = jnp.sum(counts_BxNxL, axis=-1)
    return below / jnp.maximum(total, 1), total
