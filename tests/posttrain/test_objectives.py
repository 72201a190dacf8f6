from __future__ import annotations

import functools
import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from onerec_jax.config import RLConfig
from onerec_jax.posttrain.group import Group
from onerec_jax.posttrain.objectives import OBJECTIVES, ecpo_of, gbpo_of, grpo_of, kl_to_reference, normalised
from onerec_jax.train.metrics import Metrics, add

B, G, C = 8, 7, 3
SETTINGS = RLConfig(clip=0.2, early_clip=0.1, beta=0.7, negatives=3)
OF_REWARDS = ("grpo", "ecpo", "gbpo", "dpo", "ipa", "best_of")
ALL = (*OBJECTIVES, "kl")
OF_ADVANTAGES = {"grpo": grpo_of, "ecpo": ecpo_of, "gbpo": gbpo_of}


def random_group(seed: int, batch: int = B) -> Group:
    """Uneven masks, rewards with ties, policies far enough apart for every clip; the last two may be logged items."""
    rng = np.random.default_rng(seed)
    log_p = -3 * rng.random((batch, G, C))
    log_p[:, :2] *= 0.1  # probable codes, whose 1 − π is small
    old, reference = (np.minimum(log_p + rng.normal(0, 0.3, log_p.shape), -0.01) for _ in range(2))
    valid = rng.random((batch, G)) < rng.uniform(0.3, 1.0, (batch, 1))
    logged = (np.arange(G) >= G - 2) & (rng.random((batch, G)) < 0.7)
    valid[0, :-2] = False  # a request for which nothing was generated
    valid[1], logged[1] = True, False  # and one that the log says nothing of
    reward = rng.random(4)[rng.integers(0, 4, (batch, G))]
    reward[2], reward[1, 0] = 0.1, 5.0
    return as_group(log_p, old, reference, reward, valid, logged, rng.random((batch, G)))


def as_group(log_p, old, reference, reward, valid, logged, chance) -> Group:
    log_p, old, reference, reward, chance = (
        jnp.asarray(x, jnp.float32) for x in (log_p, old, reference, reward, chance)
    )
    return Group(log_p, old, reference, reward, jnp.asarray(valid, bool), jnp.asarray(logged, bool), chance)


@functools.cache
def compiled(name: str, settings: tuple = ()):
    """Group -> ((loss, metrics), gradients with respect to log_p, old and reference), jitted."""
    config = SETTINGS.model_copy(update=dict(settings))

    def loss(policies, group: Group):
        group = group._replace(**policies)
        return kl_to_reference(group) if name == "kl" else OBJECTIVES[name](group, config)

    function = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return lambda group: function({key: getattr(group, key) for key in ("log_p", "old", "reference")}, group)


def evaluated(name: str, group: Group, **settings):
    (total, metrics), gradients = compiled(name, tuple(settings.items()))(group)
    return float(total), on_host(metrics), np.asarray(gradients["log_p"])


@functools.cache
def compiled_of_advantages(name: str):
    def loss(log_p, group: Group, advantage_BxG):
        return OF_ADVANTAGES[name](group._replace(log_p=log_p), advantage_BxG, SETTINGS)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def evaluated_of_advantages(name: str, group: Group, advantage: list[float] | np.ndarray):
    """Of one request, whose first candidates have these advantages."""
    padded = np.zeros((1, G), np.float32)
    padded[0, : len(advantage)] = advantage
    (total, metrics), gradient = compiled_of_advantages(name)(group.log_p, group, padded)
    return float(total), on_host(metrics), np.asarray(gradient)[0]


def on_host(metrics: Metrics) -> dict[str, tuple[float, float]]:
    return {key: (float(total), float(weight)) for key, (total, weight) in metrics.items()}


def request(b: int, group: Group) -> Group:
    return jax.tree.map(lambda a: a[b : b + 1], group)


def one_request(log_p, old, reward=(), reference=(), valid=None) -> Group:
    """One request of given candidates and codes, filled up with invalid candidates and with codes of probability one.

    All tests of one request have one shape so that what is compiled serves them all.
    """
    count = len(log_p)
    policies = [np.where(np.arange(G)[None, :, None] < count, np.zeros((1, G, C)), np.nan) for _ in range(3)]
    for policy, given_codes in zip(policies, (log_p, old, reference), strict=True):
        if len(given_codes):
            policy[0, :count, : np.shape(given_codes)[1]] = given_codes
    rewards, mask = np.zeros((1, G)), np.zeros((1, G), bool)
    rewards[0, : len(reward)] = reward
    mask[0, :count] = True if valid is None else valid
    return as_group(policies[0], policies[1], policies[2], rewards, mask, np.zeros((1, G)), np.zeros((1, G)))


# What the objectives are, candidate by candidate in float64. `fixed` is log_p under stop_gradient: differences of the loss
# in log_p alone are its gradient.


def plain_advantages(reward: np.ndarray, own: list[int]) -> dict[int, float]:
    chosen = [float(reward[i]) for i in own]
    if len(set(chosen)) < 2:
        return {}
    mean = sum(chosen) / len(chosen)
    std = math.sqrt(sum((r - mean) ** 2 for r in chosen) / len(chosen))
    return {i: (float(reward[i]) - mean) / std for i in own}


def plain_policy_gradient(name: str, log_p, fixed, old, advantage: float) -> float:
    """The loss of one candidate [C] with GRPO, ECPO or GBPO."""
    clip, early = SETTINGS.clip, SETTINGS.early_clip
    if name == "gbpo":
        terms = []
        for x, f, o in zip(log_p, fixed, old, strict=True):
            beside = math.exp(f) if advantage >= 0 else 1 - math.exp(f)
            terms.append(-advantage * math.exp(x) / max(math.exp(o), beside))
        return sum(terms) / len(terms)
    was = math.exp(sum(old))
    if name == "ecpo":
        was = max(math.exp(sum(fixed)) / (1 + clip + early), was)
    ratio = math.exp(sum(log_p)) / was
    return -min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)


def plain_preference(log_p, reference, winner: int, losers: list[int]) -> tuple[float, list[float]]:
    def gain(i: int) -> float:
        return float(sum(log_p[i]) - sum(reference[i]))

    margins = [SETTINGS.beta * (gain(winner) - gain(loser)) for loser in losers]
    inside = -math.log(sum(math.exp(-margin) for margin in margins))
    return -math.log(1 / (1 + math.exp(-inside))), margins


def plain_request(name: str, log_p, fixed, group: dict[str, np.ndarray], b: int) -> tuple[float | None, dict]:
    """The loss of a request, None where it does not count, and what metrics add up."""
    old, reference, reward = group["old"][b], group["reference"][b], group["reward"][b]
    chance = group["chance"][b]
    own = [i for i in range(G) if group["valid"][b, i] and not group["logged"][b, i]]
    logged = [i for i in range(G) if group["valid"][b, i] and group["logged"][b, i]]

    def by_chance(among: list[int]) -> list[int]:
        return sorted(among, key=lambda i: chance[i])

    if name == "kl":
        if not own:
            return None, {}
        ratios = [math.exp(sum(reference[i]) - sum(log_p[i])) for i in own]
        return sum(r - 1 - math.log(r) for r in ratios) / len(own), {}
    if name in ("grpo", "ecpo", "gbpo"):
        advantage = plain_advantages(reward, own)
        facts: dict[str, tuple] = {"rl/zero_variance": (not advantage, 1)}
        if not advantage:
            return None, facts
        losses = [plain_policy_gradient(name, log_p[i], fixed[i], old[i], a) for i, a in advantage.items()]
        if name == "gbpo":
            beside = {i: np.exp(fixed[i]) if a >= 0 else 1 - np.exp(fixed[i]) for i, a in advantage.items()}
            facts["rl/bounded"] = (sum((beside[i] > np.exp(old[i])).sum() for i in own), C * len(own))
            ratio = [np.exp(fixed[i]) / np.maximum(np.exp(old[i]), beside[i]) for i in own]
            facts["rl/ratio"] = (np.sum(ratio), C * len(own))
            return sum(losses) / len(own), facts
        ratio = {i: math.exp(sum(fixed[i]) - sum(old[i])) for i in own}
        top = 1 + SETTINGS.clip + SETTINGS.early_clip
        if name == "ecpo":
            facts["rl/early_clipped"] = (sum(ratio[i] > top and a < 0 for i, a in advantage.items()), len(own))
            ratio = {i: min(r, top) for i, r in ratio.items()}
        cut = [ratio[i] > 1 + SETTINGS.clip if a > 0 else ratio[i] < 1 - SETTINGS.clip for i, a in advantage.items()]
        facts |= {"rl/clipped": (sum(cut), len(own)), "rl/ratio": (sum(ratio.values()), len(own))}
        return sum(losses) / len(own), facts
    if name == "best_of":
        best = max(own, key=lambda i: reward[i], default=None)
        advantage = plain_advantages(reward, own)
        accepted = False
        if best is not None and advantage:
            others = [float(reward[i]) for i in own if i != best]
            accepted = reward[best] - sum(others) / len(others) > np.std(reward[own])
        facts = {"rl/accepted": (accepted, 1), "rl/zero_variance": (not advantage, 1)}
        return (-sum(log_p[best]) if accepted else None), facts
    if name in ("dpo", "ipa"):
        winner = max(own, key=lambda i: reward[i], default=None)
        worse = [i for i in own if reward[i] < reward[winner]]
        losers = by_chance(worse)[:1] if name == "dpo" else sorted(worse, key=lambda i: reward[i])[:1]
    else:
        winner = next(iter(by_chance(logged)), None)
        losers = by_chance(own)[: SETTINGS.negatives if name == "s_dpo" else 1]
    if winner is None or not losers:
        return None, {"rl/no_pair": (1, 1)}
    loss, margins = plain_preference(log_p, old if name in ("sprec", "ipa") else reference, winner, losers)
    positive = sum(m > 0 for m in margins)
    facts = {"rl/margin": (sum(margins), len(losers)), "rl/preferred": (positive, len(losers)), "rl/no_pair": (0, 1)}
    return loss, facts


def plain(name: str, group: dict[str, np.ndarray], log_p: np.ndarray) -> tuple[float, dict[str, tuple]]:
    """Losses and metrics of all requests, with log_p as it is and fixed as it is in the group."""
    main = "rl/kl" if name == "kl" else "rl/loss"
    total, metrics = 0.0, {main: (0.0, 0)}
    for b in range(len(log_p)):
        loss, facts = plain_request(name, log_p[b], group["log_p"][b], group, b)
        facts[main] = (0.0, 0) if loss is None else (loss, 1)
        total += loss or 0.0
        for key, (value, weight) in facts.items():
            before = metrics.get(key, (0.0, 0))
            metrics[key] = (before[0] + value, before[1] + weight)
    return total, metrics


def doubles(group: Group) -> dict[str, np.ndarray]:
    arrays = {name: np.asarray(value) for name, value in group._asdict().items()}
    return {name: a if a.dtype == bool else a.astype(np.float64) for name, a in arrays.items()}


@pytest.mark.parametrize("name", ALL)
def test_values_and_metrics_are_those_of_a_restatement_in_plain_python(name: str):
    for seed in range(6):
        group = random_group(seed)
        expected_total, expected = plain(name, doubles(group), doubles(group)["log_p"])
        total, metrics, _ = evaluated(name, group)
        assert metrics.keys() == expected.keys()
        assert total == pytest.approx(expected_total, rel=1e-5)
        for key in expected:
            assert metrics[key] == pytest.approx(tuple(map(float, expected[key])), rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("name", ALL)
def test_gradients_are_the_differences_of_the_restatement(name: str):
    group = random_group(3)
    arrays, step = doubles(group), 1e-5
    expected = np.zeros((B, G, C))
    for place in np.ndindex(B, G, C):
        moved = [arrays["log_p"].copy(), arrays["log_p"].copy()]
        moved[0][place] += step
        moved[1][place] -= step
        row = {key: value[place[0] : place[0] + 1] for key, value in arrays.items()}
        up, down = (plain(name, row, m[place[0] : place[0] + 1])[0] for m in moved)
        expected[place] = (up - down) / (2 * step)
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(evaluated(name, group)[2], expected, rtol=1e-4, atol=1e-6)


def test_the_random_groups_reach_every_branch():
    shares: dict[str, float] = {}
    for name in ALL:
        sums = functools.reduce(add, [evaluated(name, random_group(seed))[1] for seed in range(6)])
        shares |= {f"{name} {key}": total / weight for key, (total, weight) in sums.items()}
    for key, share in shares.items():
        if key.split("/")[1] not in ("loss", "kl", "ratio", "margin"):
            assert 0.01 < share < 0.99, key


def test_every_objective_of_the_settings_is_there():
    assert set(OBJECTIVES) == set(get_args(RLConfig.model_fields["objective"].annotation))


def test_gradient_of_grpo_on_a_bad_candidate_grows_as_one_over_its_probability():
    for probability in (0.5, 1e-2, 1e-4, 1e-6):
        log_p = np.log([[probability], [0.3]])
        _, _, gradient = evaluated("grpo", one_request(log_p, log_p, [0.0, 1.0]))
        # Advantages of two candidates are −1 and 1; ∂loss/∂π = ∂loss/∂log π / π, and the loss is a mean of two.
        assert gradient[0, 0, 0] / probability == pytest.approx(0.5 / probability, rel=1e-5)
        assert gradient[0, 1, 0] / 0.3 == pytest.approx(-0.5 / 0.3, rel=1e-5)


logarithms = st.floats(-60, -1e-3)


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.tuples(*[logarithms] * 4), st.tuples(*[logarithms] * 4), st.tuples(*[st.floats(-3, 3)] * 2))
def test_ratio_of_ecpo_never_exceeds_its_bound_and_a_bad_candidate_keeps_its_gradient(p, old, advantages):
    """∂loss/∂log π = −r A / G, where the clip does not cut it."""
    group, bound = one_request(np.reshape(p, (2, 2)), np.reshape(old, (2, 2))), 1 + SETTINGS.clip + SETTINGS.early_clip
    _, metrics, gradient = evaluated_of_advantages("ecpo", group, advantages)
    assert metrics["rl/ratio"][0] <= 2 * bound * (1 + 1e-6)
    for i, a in enumerate(advantages):
        assert np.all(np.abs(gradient[i]) <= bound * abs(a) / 2 * (1 + 1e-6))
        stale = math.exp(min(sum(p[2 * i : 2 * i + 2]) - sum(old[2 * i : 2 * i + 2]), 80))
        ratio = min(stale, bound)
        cut = ratio > 1 + SETTINGS.clip if a >= 0 else ratio < 1 - SETTINGS.clip
        if min(abs(ratio - 1 - SETTINGS.clip), abs(ratio - 1 + SETTINGS.clip)) > 1e-4:
            np.testing.assert_allclose(gradient[i], 0.0 if cut else -ratio * a / 2, rtol=1e-4, atol=1e-30)


def test_ratio_of_ecpo_reaches_the_bound_where_that_of_grpo_runs_away():
    group = one_request(np.full((2, 3), -1.0), np.full((2, 3), -40.0))
    total, metrics, gradient = evaluated_of_advantages("ecpo", group, [-1.0, 1.0])
    assert metrics["rl/ratio"][0] / 2 == pytest.approx(1.3)
    np.testing.assert_allclose(gradient[:2], [[0.65] * 3, [0.0] * 3], rtol=1e-6)
    assert total == pytest.approx((1.3 - 1.2) / 2)
    total, _, gradient = evaluated_of_advantages("grpo", group, [-1.0, 1.0])
    assert total > 1e38
    assert np.all(gradient[1] == 0)


probabilities = st.floats(1e-5, 1 - 1e-4)


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.tuples(*[probabilities] * 6), st.tuples(*[probabilities] * 6), st.floats(-3, 3))
def test_gradient_of_gbpo_never_exceeds_that_of_binary_cross_entropy(p, old, advantage: float):
    """|∂loss/∂π| of a bad code is at most |A| / (1 − π) of its share of the mean; a good code's ratio is at most 1."""
    p, old = np.reshape(p, (2, 3)), np.reshape(old, (2, 3))
    _, _, gradient = evaluated_of_advantages("gbpo", one_request(np.log(p), np.log(old)), [advantage] * 2)
    by_probability = gradient[:2] / p * p.size
    limit = 1 / (1 - p) if advantage < 0 else 1 / p
    assert np.all(np.abs(by_probability) <= abs(advantage) * limit * (1 + 1e-3))
    expected = -advantage / np.maximum(old, p if advantage >= 0 else 1 - p)
    np.testing.assert_allclose(by_probability, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("advantages", [[-1.0, 1.0], [1.0, -1.0]])
def test_gbpo_of_a_code_of_probability_one_is_finite(advantages: list[float]):
    """The only code that goes on to an item has π = 1 in a softmax over legal codes."""
    group = one_request([[0.0, -1.0], [0.0, 1e-7]], [[0.0, -1.0], [0.0, 0.0]])
    total, _, gradient = evaluated_of_advantages("gbpo", group, advantages)
    assert np.isfinite(total) and np.isfinite(gradient).all()


@pytest.mark.parametrize("name", OF_REWARDS)
def test_a_group_of_equal_rewards_gives_exactly_zero_and_is_counted(name: str):
    group = random_group(0)
    reward = np.array(group.reward)
    # The mean of seven 0.1 is no 0.1 in float32; the logged items differ, which may not matter.
    reward[:4], reward[:4, -1] = 0.1, 9.0
    valid = np.ones((B, G), bool)
    valid[4] = np.arange(G) == 3  # a single candidate
    valid[5] = False
    logged = np.broadcast_to(np.arange(G) == G - 1, (B, G))
    group = group._replace(
        reward=jnp.asarray(reward),
        valid=jnp.asarray(valid),
        logged=jnp.asarray(logged),
        old=group.old.at[:6].set(-100.0),  # ratios beyond float32
    )
    _, metrics, gradient = evaluated(name, group)
    assert np.all(gradient[:6] == 0)
    missing = metrics["rl/no_pair" if name in ("dpo", "ipa") else "rl/zero_variance"]
    assert missing == (6, 8)
    total, metrics, gradient = evaluated(name, group._replace(valid=group.valid.at[6:].set(False)))
    assert total == 0 and metrics["rl/loss"] == (0, 0) and np.all(gradient == 0)


@pytest.mark.parametrize("name", ["s_dpo", "sprec"])
def test_a_request_without_a_logged_or_a_generated_candidate_gives_exactly_zero_and_is_counted(name: str):
    group = random_group(0)
    logged = np.broadcast_to(np.arange(G) >= G - 2, (B, G))
    valid = np.ones((B, G), bool)
    valid[0, -2:] = False
    valid[1, :-2] = False
    group = group._replace(valid=jnp.asarray(valid), logged=jnp.asarray(logged))
    _, metrics, gradient = evaluated(name, group)
    assert metrics["rl/no_pair"] == (2, B) and metrics["rl/loss"][1] == B - 2
    assert np.all(gradient[:2] == 0)
    assert np.all(np.any(gradient[2:] != 0, axis=(1, 2)))


@pytest.mark.parametrize("name", ALL)
def test_eight_batches_of_one_request_add_up_to_one_batch_of_eight(name: str):
    group = random_group(7)
    total, metrics, gradient = evaluated(name, group)
    totals, parts, gradients = zip(*(evaluated(name, request(b, group)) for b in range(B)), strict=True)
    assert sum(totals) == pytest.approx(total, rel=1e-6)
    sums = functools.reduce(add, parts)
    for key, pair in metrics.items():
        assert sums[key] == pytest.approx(pair, rel=1e-6, abs=1e-7), key
    np.testing.assert_allclose(np.concatenate(gradients), gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ALL)
def test_what_stands_where_nothing_is_valid_changes_nothing(name: str, junk: float):
    group = random_group(1)
    clean = evaluated(name, group)
    missing = ~np.asarray(group.valid)

    def spoiled(a: jax.Array) -> jax.Array:
        return jnp.where(missing.reshape(missing.shape + (1,) * (a.ndim - 2)), junk, a)

    floats = {key: spoiled(getattr(group, key)) for key in ("log_p", "old", "reference", "reward", "chance")}
    total, metrics, gradient = evaluated(name, group._replace(**floats, logged=group.logged ^ missing))
    assert total == clean[0] and metrics == clean[1]
    np.testing.assert_array_equal(gradient, clean[2])
    assert np.all(gradient[missing] == 0)


@pytest.mark.parametrize("junk", [np.nan, np.inf])
@pytest.mark.parametrize("name", OF_ADVANTAGES)
def test_advantages_of_what_does_not_count_change_nothing(name: str, junk: float):
    valid, logged = np.arange(G) != 1, np.arange(G) == 5
    group = request(2, random_group(0))._replace(valid=jnp.asarray(valid)[None], logged=jnp.asarray(logged)[None])
    counts = valid & ~logged
    advantage = np.linspace(-1, 2, G)
    total, _, gradient = evaluated_of_advantages(name, group, np.where(counts, advantage, junk))
    clean, _, clean_gradient = evaluated_of_advantages(name, group, np.where(counts, advantage, 0))
    assert total == clean != 0
    np.testing.assert_array_equal(gradient, clean_gradient)


@pytest.mark.parametrize("name", [*OF_REWARDS, "kl"])
def test_logged_candidates_do_not_enter_what_is_made_of_generated_ones(name: str):
    group = random_group(2)
    without = evaluated(name, group._replace(valid=group.valid & ~group.logged, logged=jnp.zeros((B, G), bool)))
    total, metrics, gradient = evaluated(name, group._replace(reward=jnp.where(group.logged, 99.0, group.reward)))
    assert total == without[0] and metrics == without[1]
    np.testing.assert_array_equal(gradient, without[2])


@pytest.mark.parametrize("name", ["s_dpo", "sprec"])
def test_rewards_do_not_matter_to_objectives_of_the_log(name: str):
    group = random_group(2)
    assert evaluated(name, group)[0] == evaluated(name, group._replace(reward=group.reward[::-1]))[0] > 0


@pytest.mark.parametrize("name", ALL)
def test_gradients_flow_through_the_trained_policy_alone(name: str):
    gradients = compiled(name)(random_group(5))[1]
    assert np.any(np.asarray(gradients["log_p"]) != 0)
    assert np.all(np.asarray(gradients["old"]) == 0) and np.all(np.asarray(gradients["reference"]) == 0)


def test_s_dpo_of_one_negative_is_dpo_of_that_pair():
    group = random_group(4)
    against_old = evaluated("sprec", group._replace(old=group.reference))
    total, metrics, gradient = evaluated("s_dpo", group, negatives=1)
    assert total == against_old[0] and metrics == against_old[1]
    np.testing.assert_array_equal(gradient, against_old[2])
    # The generated item alone, rewarded below the logged one, is the pair that DPO finds.
    valid = np.zeros((B, G), bool)
    valid[:, [2, G - 1]] = True
    pair = group._replace(valid=jnp.asarray(valid), reward=jnp.asarray(np.arange(B * G).reshape(B, G), jnp.float32))
    logged = pair._replace(logged=jnp.asarray(np.arange(G) == G - 1)[None].repeat(B, 0))
    ranked = pair._replace(logged=jnp.zeros((B, G), bool))
    assert evaluated("s_dpo", logged, negatives=1)[0] == pytest.approx(evaluated("dpo", ranked)[0], rel=1e-6)


def test_a_preference_of_any_margin_has_a_finite_loss():
    for margin in (-1e4, 1e4):
        group = one_request([[margin - 2.0], [-2.0]], [[-2.0], [-2.0]], [1.0, 0.0])
        total, _, gradient = evaluated("ipa", group)
        assert total == pytest.approx(max(0.0, -0.7 * margin))
        assert np.isfinite(gradient).all()


def test_losers_are_drawn_evenly():
    draws, count = 4000, 4
    chance = np.random.default_rng(0).random((draws, count))
    rewards = np.tile([1.0, 0.0, 0.5, 0.2], (draws, 1))
    flat, everywhere = -np.ones((draws, count, 1)), np.ones((draws, count))
    group = as_group(flat, flat, flat, rewards, everywhere, 1 - everywhere, chance)
    lost = (evaluated("dpo", group)[2][..., 0] > 0).sum(axis=0)
    assert lost[0] == 0 and lost.sum() == draws
    np.testing.assert_allclose(lost[1:] / draws, 1 / 3, atol=4 * math.sqrt(2 / 9 / draws))


def test_legal_candidates_of_advantage_one_become_more_probable_and_others_stay():
    """On-policy the loss of a legal candidate is −1 and its gradient −1 over how many there are, for every code."""
    log_p = -np.ones((5, C))
    legal = np.array([True, False, True, True, False])
    total, metrics, gradient = evaluated_of_advantages("ecpo", one_request(log_p, log_p, valid=legal), np.ones(5))
    assert total == -1 and metrics["rl/loss"] == (-1, 1)
    np.testing.assert_allclose(gradient[:5], np.where(legal, -1 / 3, 0.0)[:, None].repeat(C, 1), rtol=1e-6)


@pytest.mark.parametrize("old", [-40.0, -0.01])
@pytest.mark.parametrize("name", ["grpo", "ecpo"])
def test_a_candidate_of_advantage_zero_is_only_one_more_in_the_mean(name: str, old: float):
    """Whatever its ratio: it has no gradient that a clip could cut."""
    group = one_request(np.full((2, C), -1.0), [[old] * C, [-1.0] * C])
    total, metrics, gradient = evaluated_of_advantages(name, group, [0.0, 1.0])
    assert total == -0.5 and metrics["rl/clipped"] == (0, 2)
    assert np.all(gradient[0] == 0) and gradient[1] == pytest.approx(-0.5)


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-20, 20), st.booleans()), min_size=6, max_size=6),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
)
def test_normalised_rewards_have_mean_zero_and_std_one_at_any_scale(drawn, scale: float):
    reward, valid = np.array([r for r, _ in drawn]), np.array([v for _, v in drawn])
    advantage, varied = jax.jit(normalised)(jnp.asarray(reward * scale, jnp.float32)[None], jnp.asarray(valid)[None])
    advantage = np.asarray(advantage[0], np.float64)
    assert bool(varied[0]) == (len(set(reward[valid])) > 1)
    assert np.all(advantage[~valid] == 0)
    if varied[0]:
        expected = (reward[valid] - reward[valid].mean()) / reward[valid].std()
        np.testing.assert_allclose(advantage[valid], expected, rtol=1e-4, atol=1e-5)
    else:
        assert np.all(advantage == 0)


def test_a_reward_that_is_not_a_number_is_not_hidden_in_an_equal_group():
    group = random_group(1)
    assert math.isnan(evaluated("grpo", group._replace(reward=group.reward.at[1, 1].set(jnp.nan)))[0])


def test_divergence_is_zero_at_the_reference_and_its_mean_is_that_of_the_distributions():
    """Under samples of π the k3 estimate has the mean KL(π ‖ π_ref); here the samples are all outcomes, as often as π says."""
    group = random_group(1)
    assert evaluated("kl", group._replace(reference=group.log_p))[0] == 0
    p, reference = np.array([3, 2, 1, 1]) / G, np.array([1, 1, 2, 3]) / G
    outcomes = np.repeat(np.arange(4), [3, 2, 1, 1])
    log_p, log_reference = np.log(p)[outcomes, None], np.log(reference)[outcomes, None]
    sampled = one_request(log_p, log_p, reference=log_reference)
    assert evaluated("kl", sampled)[0] == pytest.approx((p * np.log(p / reference)).sum(), rel=1e-5)
