"""What is done with the rewards of a group of candidates: eight objectives of one signature, and two divergences.

An objective returns the sum over requests of each request's loss, which is a mean over its candidates that count, and
metrics. `metrics["rl/loss"]` holds that sum and the number of requests that count, by which the loop divides after it has
added up its micro-batches. A request without what its objective needs (rewards that differ, a pair, a candidate that is
accepted) does not count: its loss and gradient are exactly zero, and a metric says how many there are.

π is the probability of a whole semantic ID, the product over its codes, in all but GBPO, where it is that of one code.
sg is stop_gradient. The first of equally rewarded candidates is the one that is taken.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from onerec_jax.config import RLConfig
from onerec_jax.posttrain.group import Group, Objective
from onerec_jax.train.metrics import Metrics


def _generated(group: Group) -> Array:
    return group.valid & ~group.logged


def _whole_id(log_p_BxGxC: Array, counts_BxG: Array) -> Array:
    """log π [B,G]; 0 where a candidate does not count, so that no gradient passes through what stands there."""
    return jnp.sum(jnp.where(counts_BxG[..., None], log_p_BxGxC, 0.0), axis=-1)


def _mean(value_BxG: Array, counts_BxG: Array) -> Array:
    """Mean over the candidates of each request that count [B]; 0 where none does."""
    total_B = jnp.sum(jnp.where(counts_BxG, value_BxG, 0.0), axis=1)
    return total_B / jnp.maximum(jnp.sum(counts_BxG, axis=1), 1)


def _number(true_x: Array) -> Array:
    return jnp.sum(true_x, dtype=jnp.float32)


def _total(name: str, loss_B: Array, counts_B: Array) -> tuple[Array, Metrics]:
    total = jnp.sum(jnp.where(counts_B, loss_B, 0.0))
    return total, {name: (total, _number(counts_B))}


def _missing(has_B: Array) -> tuple[Array, Array]:
    """The number of requests without, and of all."""
    return _number(~has_B), jnp.asarray(len(has_B), jnp.float32)


def normalised(reward_BxG: Array, valid_BxG: Array) -> tuple[Array, Array]:
    """A_i = (r_i − mean(r)) / std(r) over the valid candidates of a request, of population std (DeepSeekMath, 2402.03300).

    Returns the advantages [B,G], 0 at what is not valid and, exactly, in a request whose rewards are all the same or that
    has fewer than two; and which requests are not of that kind, bool [B].
    """
    lowest_B = jnp.min(reward_BxG, axis=1, where=valid_BxG, initial=jnp.inf)
    spread_B = jnp.max(reward_BxG, axis=1, where=valid_BxG, initial=-jnp.inf) - lowest_B
    # The mean of equal floats may differ from them, their spread is 0; a NaN is no 0 and goes on into the loss.
    varied_B = (jnp.sum(valid_BxG, axis=1) >= 2) & (spread_B != 0)
    counts_BxG = valid_BxG & varied_B[:, None]
    # Within [0,1] the squares of small differences do not underflow.
    scaled_BxG = (reward_BxG - lowest_B[:, None]) / jnp.where(varied_B, spread_B, 1.0)[:, None]
    centred_BxG = jnp.where(counts_BxG, scaled_BxG - _mean(scaled_BxG, counts_BxG)[:, None], 0.0)
    std_B = jnp.sqrt(_mean(jnp.square(centred_BxG), counts_BxG))
    return centred_BxG / jnp.where(varied_B, std_B, 1.0)[:, None], varied_B


def _clipped(
    log_ratio_BxG: Array, advantage_BxG: Array, counts_BxG: Array, settings: RLConfig
) -> tuple[Array, Metrics]:
    """−min(r A, clip(r, 1−ε, 1+ε) A), summed over requests."""
    highest, lowest = jnp.log1p(settings.clip), jnp.log1p(-settings.clip)
    rises_BxG = advantage_BxG >= 0
    cut_BxG = jnp.where(rises_BxG, log_ratio_BxG > highest, log_ratio_BxG < lowest)
    # Cut before exp: beyond its range the gradient of what is cut would be 0 times infinity.
    bounded_BxG = jnp.where(cut_BxG, jnp.where(rises_BxG, highest, lowest), log_ratio_BxG)
    loss_B = _mean(-jnp.exp(bounded_BxG) * advantage_BxG, counts_BxG)
    total, metrics = _total("rl/loss", loss_B, jnp.any(counts_BxG, axis=1))
    candidates = _number(counts_BxG)
    metrics["rl/clipped"] = (_number(cut_BxG & counts_BxG & (advantage_BxG != 0)), candidates)
    ratio_BxG = jnp.exp(stop_gradient(log_ratio_BxG))
    metrics["rl/ratio"] = (jnp.sum(jnp.where(counts_BxG, ratio_BxG, 0.0)), candidates)
    return total, metrics


def grpo_of(group: Group, advantage_BxG: Array, settings: RLConfig) -> tuple[Array, Metrics]:
    """GRPO of given advantages A: −1/G Σ_i min(r_i A_i, clip(r_i, 1−ε, 1+ε) A_i), r = π/π_old (DeepSeekMath, 2402.03300).

    ε is `rl.clip`. On-policy the gradient is −A/π · ∂π: for A < 0 it has no bound as π goes to 0.

    Args:
        advantage_BxG: what stands at candidates that are logged or not valid is not looked at.

    Returns:
        The sum over requests and metrics: `rl/clipped`, the share of candidates whose gradient the clip cuts, and
        `rl/ratio`, the mean r.
    """
    counts_BxG = _generated(group)
    log_ratio_BxG = _whole_id(group.log_p, counts_BxG) - stop_gradient(_whole_id(group.old, counts_BxG))
    return _clipped(log_ratio_BxG, advantage_BxG, counts_BxG, settings)


def ecpo_of(group: Group, advantage_BxG: Array, settings: RLConfig) -> tuple[Array, Metrics]:
    """ECPO of given advantages: GRPO with r = π/π'_old, π'_old = max(sg(π)/(1+ε+δ), π_old) (OneRec, 2506.13695 §2.4).

    ε is `rl.clip`, δ is `rl.early_clip`. For A < 0 the ratio never exceeds 1+ε+δ while its gradient stays; for A ≥ 0 it is
    GRPO. The format reward is this with A = 1 at legal candidates, the others not valid.

    Args:
        advantage_BxG: what stands at candidates that are logged or not valid is not looked at.

    Returns:
        The sum over requests and GRPO's metrics, r being that of π'_old; and `rl/early_clipped`, the share of candidates
        that π'_old makes a difference to.
    """
    counts_BxG = _generated(group)
    log_p_BxG = _whole_id(group.log_p, counts_BxG)
    stale_BxG = stop_gradient(log_p_BxG - _whole_id(group.old, counts_BxG))
    bound = jnp.log1p(settings.clip + settings.early_clip)
    # π/π'_old has the value min(π/π_old, 1+ε+δ) and, in logarithms, the gradient of π. Written so, rounding of log π, which
    # may be far below 0, cannot carry it over the bound.
    log_ratio_BxG = (log_p_BxG - stop_gradient(log_p_BxG)) + jnp.minimum(stale_BxG, bound)
    total, metrics = _clipped(log_ratio_BxG, advantage_BxG, counts_BxG, settings)
    early_BxG = (stale_BxG > bound) & (advantage_BxG < 0) & counts_BxG
    return total, {**metrics, "rl/early_clipped": (_number(early_BxG), _number(counts_BxG))}


def gbpo_of(group: Group, advantage_BxG: Array, settings: RLConfig) -> tuple[Array, Metrics]:
    """GBPO of given advantages: −1/G Σ_i A_i · mean over codes of π/π'_old (OneRec-V2, 2508.20900, post-training).

    π'_old = max(π_old, sg(π)) where A ≥ 0, max(π_old, 1 − sg(π)) where A < 0. There is no clip; the gradient of a bad code
    is at most that of binary cross-entropy, |A| / (1 − π).

    Args:
        advantage_BxG: what stands at candidates that are logged or not valid is not looked at.

    Returns:
        The sum over requests and metrics over codes: `rl/bounded`, the share of them whose π'_old is not π_old, and
        `rl/ratio`, the mean of π/π'_old.
    """
    counts_BxG = _generated(group)
    counts_BxGx1 = counts_BxG[..., None]
    log_p_BxGxC = jnp.where(counts_BxGx1, group.log_p, 0.0)
    old_BxGxC = stop_gradient(jnp.where(counts_BxGx1, group.old, 0.0))
    fixed_BxGxC = jnp.minimum(stop_gradient(log_p_BxGxC), 0.0)  # a probability that rounding left above 1 has no 1 − π
    bound_BxGxC = jnp.where(advantage_BxG[..., None] >= 0, fixed_BxGxC, jnp.log(-jnp.expm1(fixed_BxGxC)))
    ratio_BxGxC = jnp.exp(log_p_BxGxC - jnp.maximum(old_BxGxC, bound_BxGxC))
    loss_B = _mean(-jnp.mean(ratio_BxGxC, axis=-1) * advantage_BxG, counts_BxG)
    total, metrics = _total("rl/loss", loss_B, jnp.any(counts_BxG, axis=1))
    codes = _number(counts_BxG) * group.log_p.shape[-1]
    metrics["rl/bounded"] = (_number((bound_BxGxC > old_BxGxC) & counts_BxGx1), codes)
    metrics["rl/ratio"] = (jnp.sum(jnp.where(counts_BxGx1, stop_gradient(ratio_BxGxC), 0.0)), codes)
    return total, metrics


def _of_rewards(inner: Callable[[Group, Array, RLConfig], tuple[Array, Metrics]]) -> Objective:
    """The objective whose advantages are the normalised rewards; `rl/zero_variance` counts requests that have none."""

    def objective(group: Group, settings: RLConfig) -> tuple[Array, Metrics]:
        advantage_BxG, varied_B = normalised(group.reward, _generated(group))
        total, metrics = inner(group._replace(valid=group.valid & varied_B[:, None]), advantage_BxG, settings)
        return total, {**metrics, "rl/zero_variance": _missing(varied_B)}

    return objective


def _highest(value_BxG: Array, among_BxG: Array) -> Array:
    """The first candidate of highest value among some, as a mask [B,G]; empty where there are none."""
    best_B = jnp.argmax(jnp.where(among_BxG, value_BxG, -jnp.inf), axis=1)
    return (jnp.arange(value_BxG.shape[1]) == best_B[:, None]) & among_BxG


def _best_and_worse(group: Group) -> tuple[Array, Array]:
    """The generated candidate of highest reward and all those of lower, as masks [B,G]."""
    best_BxG = _highest(group.reward, _generated(group))
    reward_B = jnp.max(group.reward, axis=1, where=best_BxG, initial=-jnp.inf)
    return best_BxG, _generated(group) & (group.reward < reward_B[:, None])


def _drawn(chance_BxG: Array, among_BxG: Array, number: int) -> Array:
    """The `number` candidates of smallest chance among some, all if there are fewer, as a mask [B,G]."""
    order_BxG = jnp.argsort(jnp.where(among_BxG, chance_BxG, jnp.inf), axis=1)
    return (jnp.argsort(order_BxG, axis=1) < number) & among_BxG


def _preference(
    group: Group, reference_BxGxC: Array, winner_BxG: Array, losers_BxG: Array, beta: float
) -> tuple[Array, Metrics]:
    """−log σ(−log Σ_l exp(−m_l)), m_l = β (Δ_w − Δ_l), Δ = log π − log π_ref; of one loser it is −log σ(m_l).

    `rl/margin` is the mean m_l, `rl/preferred` the share of positive ones, `rl/no_pair` that of requests without a pair.
    """
    pair_B = jnp.any(winner_BxG, axis=1) & jnp.any(losers_BxG, axis=1)
    losers_BxG = losers_BxG & pair_B[:, None]
    counts_BxG = (winner_BxG & pair_B[:, None]) | losers_BxG
    gain_BxG = _whole_id(group.log_p, counts_BxG) - stop_gradient(_whole_id(reference_BxGxC, counts_BxG))
    margin_BxG = beta * (jnp.sum(jnp.where(winner_BxG, gain_BxG, 0.0), axis=1, keepdims=True) - gain_BxG)
    loss_B = jax.nn.softplus(jax.nn.logsumexp(-margin_BxG, axis=1, where=losers_BxG))
    total, metrics = _total("rl/loss", loss_B, pair_B)
    pairs, margin_BxG = _number(losers_BxG), stop_gradient(margin_BxG)
    metrics["rl/margin"] = (jnp.sum(jnp.where(losers_BxG, margin_BxG, 0.0)), pairs)
    metrics["rl/preferred"] = (_number((margin_BxG > 0) & losers_BxG), pairs)
    metrics["rl/no_pair"] = _missing(pair_B)
    return total, metrics


def dpo(group: Group, settings: RLConfig) -> tuple[Array, Metrics]:
    """−log σ(β (log π_w/π_ref,w − log π_l/π_ref,l)), β of `rl.beta`, π_ref where RL started (Rafailov 2023, 2305.18290).

    The winner is the generated candidate of highest reward, the loser one drawn among those of lower reward.
    """
    winner_BxG, worse_BxG = _best_and_worse(group)
    return _preference(group, group.reference, winner_BxG, _drawn(group.chance, worse_BxG, 1), settings.beta)


def ipa(group: Group, settings: RLConfig) -> tuple[Array, Metrics]:
    """DPO of the highest- and the lowest-rewarded generated candidate (OneRec v1, 2502.18965, Algorithm 2).

    Its reference is the snapshot M_t that generated them, `group.old`.
    """
    winner_BxG, worse_BxG = _best_and_worse(group)
    return _preference(group, group.old, winner_BxG, _highest(-group.reward, worse_BxG), settings.beta)


def s_dpo(group: Group, settings: RLConfig) -> tuple[Array, Metrics]:
    """−log σ(−log Σ_l exp(β (Δ_l − Δ_w))), Δ = log π/π_ref: softmax-DPO, several losers at once (Chen 2024, 2406.09215).

    The winner is a logged candidate, drawn; the losers are `rl.negatives` generated ones, drawn, or all if there are fewer.
    """
    winner_BxG = _drawn(group.chance, group.valid & group.logged, 1)
    losers_BxG = _drawn(group.chance, _generated(group), settings.negatives)
    return _preference(group, group.reference, winner_BxG, losers_BxG, settings.beta)


def sprec(group: Group, settings: RLConfig) -> tuple[Array, Metrics]:
    """Self-play: DPO of a logged candidate against one that the model itself generated, both drawn (Gao 2024, 2412.09243).

    Its reference is the policy of the current iteration, `group.old`, of which the loser is a sample.
    """
    winner_BxG = _drawn(group.chance, group.valid & group.logged, 1)
    loser_BxG = _drawn(group.chance, _generated(group), 1)
    return _preference(group, group.old, winner_BxG, loser_BxG, settings.beta)


def best_of(group: Group, settings: RLConfig) -> tuple[Array, Metrics]:
    """Reject sampling: −log π of the generated candidate of highest reward, where that stands out.

    It does where its reward is more than one std of the group above the mean of the other candidates, so that it does not
    lift its own bar. `rl/accepted` is the share of requests where it does.
    """
    counts_BxG = _generated(group)
    advantage_BxG, varied_B = normalised(group.reward, counts_BxG)
    best_BxG = _highest(group.reward, counts_BxG)
    number_B = jnp.sum(counts_BxG, axis=1)
    # r_best − mean of the others = (r_best − mean) n / (n − 1)
    above_B = jnp.max(advantage_BxG, axis=1) * number_B / jnp.maximum(number_B - 1, 1)
    accepted_B = varied_B & (above_B > 1)
    loss_B = -jnp.sum(_whole_id(group.log_p, best_BxG), axis=1)
    total, metrics = _total("rl/loss", loss_B, accepted_B)
    requests = jnp.asarray(len(accepted_B), jnp.float32)
    return total, {
        **metrics,
        "rl/accepted": (_number(accepted_B), requests),
        "rl/zero_variance": _missing(varied_B),
    }


def kl_to_reference(group: Group) -> tuple[Array, Metrics]:
    """k3, r − 1 − log r with r = π_ref/π, which estimates KL(π ‖ π_ref) (Schulman 2020, "Approximating KL divergence").

    Summed over requests, of each the mean over its generated candidates; `rl/kl` holds that sum and how many requests have
    any.
    """
    counts_BxG = _generated(group)
    log_r_BxG = stop_gradient(_whole_id(group.reference, counts_BxG)) - _whole_id(group.log_p, counts_BxG)
    kl_B = _mean(jnp.expm1(log_r_BxG) - log_r_BxG, counts_BxG)
    return _total("rl/kl", kl_B, jnp.any(counts_BxG, axis=1))


def kl_of_rest(log_p_BxI: Array, reference_BxI: Array, item_BxG: Array, valid_BxG: Array) -> tuple[Array, Metrics]:
    """KL(π_ref ‖ π) over the items that are no valid candidate, each distribution made one of them alone; exact.

    A reordering of the candidates costs nothing, what an objective on them does to other items by the parameters that they
    share does.

    Args:
        log_p_BxI: log-probability of every item, that of the policy being trained.
        reference_BxI: the same of the run that RL started from.

    Returns:
        The sum over requests, and `rl/rest_kl`, that sum and the number of requests.
    """
    requests, items = log_p_BxI.shape
    place_BxG = jnp.where(valid_BxG, item_BxG, items)  # beyond the end: dropped
    rest_BxI = jnp.ones((requests, items), bool).at[jnp.arange(requests)[:, None], place_BxG].set(False, mode="drop")
    rest_BxI &= jnp.isfinite(reference_BxI)

    def alone(value_BxI: Array) -> Array:
        return jax.nn.log_softmax(jnp.where(rest_BxI, value_BxI, -1e30))  # finite, for a request of no other item

    reference_BxI = stop_gradient(alone(reference_BxI))
    apart_BxI = jnp.where(rest_BxI, jnp.exp(reference_BxI) * (reference_BxI - alone(log_p_BxI)), 0.0)
    return _total("rl/rest_kl", jnp.sum(apart_BxI, axis=1), jnp.ones(requests, bool))


OBJECTIVES: dict[str, Objective] = {
    "grpo": _of_rewards(grpo_of),
    "ecpo": _of_rewards(ecpo_of),
    "gbpo": _of_rewards(gbpo_of),
    "dpo": dpo,
    "s_dpo": s_dpo,
    "ipa": ipa,
    "sprec": sprec,
    "best_of": best_of,
}
