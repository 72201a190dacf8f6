"""IsoFLOP curves of parabolas that are known, and of a law whose optimum has a closed form."""

from __future__ import annotations

import numpy as np
import pytest
from known_law import ALPHA, BETA, A, B, E

from onerec_jax.errors import InputError
from onerec_jax.scaling.isoflop import fit_isoflop
from onerec_jax.scaling.runs import Runs, make_runs

EXPONENT, BUDGETS = 0.46, np.logspace(18, 21, 4)
OPTIMAL = 2e8 * (BUDGETS / 1e18) ** EXPONENT
LEAST = 2 + (BUDGETS / 1e18) ** -0.1


def parabolas(noise: float = 0.0, seed: int = 0, sizes: int = 7, **changes) -> Runs:
    """Runs around the least loss of every budget, which is at OPTIMAL parameters."""
    offset = np.tile(np.linspace(-2.3, 2.3, sizes), len(BUDGETS))
    loss = np.repeat(LEAST, sizes) + 0.05 * offset**2
    loss *= 1 + noise * np.random.default_rng(seed).normal(size=loss.size)
    columns = {"params": np.repeat(OPTIMAL, sizes) * np.exp(offset), "flops": np.repeat(BUDGETS, sizes), "loss": loss}
    return make_runs({**columns, **changes})


def test_minima_and_exponents_of_parabolas_come_back():
    fit = fit_isoflop(parabolas())
    for curve, flops, params, least in zip(fit.curves, BUDGETS, OPTIMAL, LEAST, strict=True):
        assert (curve.flops, curve.runs) == (pytest.approx(flops), 7)
        assert curve.params.value == pytest.approx(params) and curve.metric.value == pytest.approx(least)
        assert curve.tokens.value == pytest.approx(flops / 6 / params)
    a, b = fit.exponents()
    assert (a.value, b.value) == pytest.approx((EXPONENT, 1 - EXPONENT))
    optimum = fit.optimum(1e23)
    assert optimum.params.value == pytest.approx(2e8 * 1e5**EXPONENT)
    assert optimum.params.value * optimum.tokens.value == pytest.approx(1e23 / 6)
    assert fit.leave_one_out() == pytest.approx((EXPONENT, EXPONENT)) and fit.held_out() == pytest.approx(0, abs=1e-9)
    assert fit.without_minimum == 0


def test_each_parabola_is_numpys_polynomial_through_its_runs():
    runs = parabolas(noise=0.01)
    for k, curve in enumerate(fit_isoflop(runs).curves):
        own = slice(7 * k, 7 * k + 7)
        c2, c1, c0 = np.polyfit(np.log(runs.size("params")[own]), runs.metric[own], 2)
        assert np.log(curve.params.value) == pytest.approx(-c1 / 2 / c2)
        assert curve.metric.value == pytest.approx(c0 - c1**2 / 4 / c2)


def test_a_rising_metric_has_its_maxima_there():
    runs = parabolas(noise=0.01)
    other = make_runs({**runs.sizes, "ndcg@10": 9 - runs.metric}, "ndcg@10")
    falling, rising = fit_isoflop(runs), fit_isoflop(other, rising=True)
    for one, two in zip(falling.curves, rising.curves, strict=True):
        assert two.params == pytest.approx(one.params) and two.metric.value == pytest.approx(9 - one.metric.value)
    with pytest.raises(InputError, match="opens upward: it has no maximum"):
        fit_isoflop(runs, rising=True)


def test_tokens_are_read_off_the_runs_where_flops_are_counted_otherwise():
    params = np.tile(np.exp(np.linspace(-2.3, 2.3, 7)), 4) * np.repeat(OPTIMAL, 7)
    tokens = np.repeat(BUDGETS, 7) / (6 * params**0.9 * 1e8**0.1)  # wide models cost less than 6 N a token
    fit = fit_isoflop(parabolas(tokens=tokens))
    for curve, flops, n in zip(fit.curves, BUDGETS, OPTIMAL, strict=True):
        assert curve.tokens.value == pytest.approx(flops / (6 * n**0.9 * 1e8**0.1))


def test_the_law_of_two_variables_and_its_curves_agree_near_the_minimum():
    params = np.concatenate([np.exp(np.linspace(-0.5, 0.5, 9)) * n for n in (1e9, 3e9, 9e9)])
    g = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    budgets = 6 * (np.array([1e9, 3e9, 9e9]) / g) ** ((ALPHA + BETA) / BETA)
    tokens = np.repeat(budgets, 9) / 6 / params
    runs = make_runs({"params": params, "tokens": tokens, "loss": E + A / params**ALPHA + B / tokens**BETA})
    fit = fit_isoflop(runs)
    assert [curve.params.value for curve in fit.curves] == pytest.approx([1e9, 3e9, 9e9], rel=0.01)
    assert fit.exponents()[0].value == pytest.approx(BETA / (ALPHA + BETA), abs=1e-3)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    hits = []
    for trial in range(60):
        fit = fit_isoflop(parabolas(0.01, trial), resamples=300)
        (a, b), optimum = fit.exponents(), fit.optimum(1e22)
        truths = [(a, EXPONENT), (b, 1 - EXPONENT), (optimum.params, 2e8 * 1e4**EXPONENT)]
        truths += [(c.params, n) for c, n in zip(fit.curves, OPTIMAL, strict=True)]
        truths += [(c.metric, least) for c, least in zip(fit.curves, LEAST, strict=True)]
        hits += [interval.low <= truth <= interval.high for interval, truth in truths]
    assert 0.9 <= np.mean(hits) <= 0.99


def test_a_rerun_gives_the_same_bits_and_another_seed_does_not():
    runs = parabolas(noise=0.01)
    assert fit_isoflop(runs, seed=4).curves == fit_isoflop(runs, seed=4).curves
    assert fit_isoflop(runs, seed=4).curves != fit_isoflop(runs, seed=5).curves


def shifted(offset: float) -> Runs:
    """All runs on one side of the minimum."""
    runs = parabolas()
    return runs.where(np.log(runs.size("params") / np.repeat(OPTIMAL, 7)) * np.sign(offset) > 0.5)


SIX = np.repeat(OPTIMAL, 7)
REFUSED = {
    "opens downward": (
        lambda: fit_isoflop(parabolas(loss=9 - parabolas().metric)),
        "opens downward: it has no minimum",
    ),
    "minimum below": (lambda: fit_isoflop(shifted(1)), "outside of its runs"),
    "minimum above": (lambda: fit_isoflop(shifted(-1)), "add larger models"),
    "one budget": (lambda: fit_isoflop(parabolas().where(np.arange(7))), "all runs are of one budget"),
    "two sizes": (lambda: fit_isoflop(parabolas(sizes=2)), "2 distinct 'params', but a parabola needs three"),
    "nothing to spare": (lambda: fit_isoflop(parabolas(sizes=3)), "three runs at every budget leave nothing"),
    "few resamples": (lambda: fit_isoflop(parabolas(), resamples=10), "100 resamples"),
    "budget": (lambda: fit_isoflop(parabolas()).optimum(float("nan")), "budget must be a positive number"),
    "flops unknown": (lambda: fit_isoflop(make_runs({"params": SIX, "loss": SIX})), "no column 'flops'"),
}


@pytest.mark.parametrize(("call", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_minimum_is_refused_in_one_sentence(call, sentence: str):
    with pytest.raises(InputError) as caught:
        call()
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_budgets_may_differ_a_little_and_runs_may_come_in_any_order():
    runs = parabolas(noise=0.01)
    order = np.random.default_rng(0).permutation(len(runs))
    shaken = make_runs(
        {**runs.sizes, "flops": runs.size("flops") * (1 + 0.01 * np.sin(np.arange(len(runs)))), "loss": runs.metric}
    )
    for one, two in zip(fit_isoflop(runs).curves, fit_isoflop(shaken.where(order)).curves, strict=True):
        assert two.runs == 7 and two.params.value == pytest.approx(one.params.value)
    with pytest.raises(InputError, match="1 distinct 'params'"):
        fit_isoflop(shaken, tolerance=1e-6)
