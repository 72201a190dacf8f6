"""Fits of laws against closed forms, numeric differences, other optimisers, published numbers, and truth that is known."""

from __future__ import annotations

import numpy as np
import pytest
from known_law import ALPHA, BETA, V2_RUNS, A, B, E, grid_runs
from scipy import optimize, special, stats

from onerec_jax.errors import InputError
from onerec_jax.scaling import fit as fitting
from onerec_jax.scaling.fit import bias_corrected, fit_law, optimal_log_params, parametric, power
from onerec_jax.scaling.law import Law, make_problem
from onerec_jax.scaling.runs import Runs, make_runs

LAWS = {
    "parametric": parametric(),
    "parametric by least squares": parametric("squares"),
    "parametric with a given asymptote": parametric(asymptote=1.5),
    "power": power("params", "huber_log", None),
    "power without asymptote": power("flops", "squares", 0.0),
    "rising": power("tokens", "huber_log", None, rising=True),
    "rising by least squares": power("tokens", "squares", 4.0, rising=True),
}


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_derivatives_of_residuals_are_numeric_differences(law: Law):
    problem = make_problem(law, grid_runs(noise=0.01))
    terms = [-0.7, 0.31, -0.4, 0.22][: 2 * len(law.variables)]
    theta = np.array([1.2, *terms] if law.fitted_asymptote else terms)
    y = problem.y_R[None]
    for i, row in enumerate(np.eye(law.size) * 1e-5):
        numeric = (problem.residuals(theta[None] + row, y)[0] - problem.residuals(theta[None] - row, y)[0]) / 2e-5
        np.testing.assert_allclose(problem.residuals(theta[None], y)[1][:, i], numeric, rtol=1e-5, atol=1e-3)


def test_constants_come_back_from_runs_without_noise():
    fit = fit_law(grid_runs(), parametric(), resamples=100)
    for name, truth in {"E": E, "A": A, "alpha": ALPHA, "B": B, "beta": BETA}.items():
        value, low, high = fit.constants()[name]
        assert value == pytest.approx(truth, rel=1e-6) and low == pytest.approx(high, rel=1e-4)
    assert fit.objective < 1e-15


@pytest.mark.parametrize("objective", ["huber_log", "squares"])
@pytest.mark.parametrize("variable", ["params", "tokens", "flops"])
def test_a_law_of_one_variable_comes_back_with_fitted_and_with_given_asymptote(variable: str, objective):
    runs = grid_runs(8, 1) if variable == "params" else grid_runs(3, 8)
    loss = 0.4 + 30 / runs.size(variable) ** 0.21
    runs = make_runs({**runs.sizes, "loss_level2": loss}, "loss_level2")
    free = fit_law(runs, power(variable, objective, None), resamples=100).constants()
    assert [free[name].value for name in ("E", "A", "alpha")] == pytest.approx([0.4, 30, 0.21], rel=1e-5)
    given = fit_law(runs, power(variable, objective, 0.4), resamples=100).constants()
    assert set(given) == {"A", "alpha"}
    assert [interval.value for interval in given.values()] == pytest.approx([30, 0.21], rel=1e-5)


@pytest.mark.parametrize("objective", ["huber_log", "squares"])
def test_a_rising_metric_saturates_at_its_own_asymptote(objective):
    params = np.logspace(5, 9, 9)
    runs = make_runs({"params": params, "recall@10": 0.12 - 1.4 / params**0.25}, "recall@10")
    fit = fit_law(runs, power("params", objective, None, rising=True), resamples=100)
    assert [c.value for c in fit.constants().values()] == pytest.approx([0.12, 1.4, 0.25], rel=1e-5)
    assert fit.predict(params=1e12).value == pytest.approx(0.12 - 1.4e-3, rel=1e-6)


def reference_objective(theta: np.ndarray, runs: Runs) -> float:
    """Hoffmann et al.'s, written down once more with SciPy's own log-sum-exp and Huber loss."""
    e, a, alpha, b, beta = theta
    n, d = np.log(runs.size("params")), np.log(runs.size("tokens"))
    predicted = special.logsumexp([a - alpha * n, b - beta * d, np.full(len(n), e)], axis=0)
    return float(np.sum(special.huber(1e-3, predicted - np.log(runs.metric))))


def test_the_minimum_is_that_of_an_optimiser_with_numeric_gradients():
    runs = grid_runs(noise=0.01)
    fit = fit_law(runs, parametric(), resamples=100)
    assert fit.objective == pytest.approx(reference_objective(fit.theta_P, runs), rel=1e-12)
    theta = np.array([np.log(E), np.log(A), ALPHA, np.log(B), BETA])
    for _ in range(4):  # a simplex stalls in a narrow valley, and goes on when it is set up anew
        options = {"maxiter": 20_000, "maxfev": 20_000, "xatol": 1e-12, "fatol": 1e-16, "adaptive": True}
        theta = optimize.minimize(reference_objective, theta, (runs,), "Nelder-Mead", options=options).x
    assert fit.objective <= reference_objective(theta, runs) * (1 + 1e-9)
    np.testing.assert_allclose(fit.theta_P, theta, rtol=2e-3)


def test_the_starts_that_are_followed_lead_where_the_whole_grid_does(monkeypatch: pytest.MonkeyPatch):
    runs = grid_runs(4, 3, noise=0.01)
    followed = fit_law(runs, parametric(), resamples=100)
    monkeypatch.setattr(fitting, "KEPT_STARTS", 10_000)
    whole = fit_law(runs, parametric(), resamples=100)
    assert followed.objective == pytest.approx(whole.objective, rel=1e-10)
    np.testing.assert_allclose(followed.theta_P, whole.theta_P, rtol=1e-7)


def test_a_resample_is_the_fit_of_a_table_with_its_runs_repeated():
    runs = grid_runs(5, 4, noise=0.01)
    problem = make_problem(parametric(), runs)
    fit = fit_law(runs, parametric(), resamples=100, seed=3)
    weights = fitting._resample(problem, 100, 3)
    assert weights.sum(axis=1) == pytest.approx(len(runs))
    for number in (0, 7):
        repeated = runs.where(np.repeat(np.arange(len(runs)), weights[number].astype(int)))
        again = fit_law(repeated, parametric(), resamples=100)
        found = reference_objective(fit.resampled_SP[number], repeated)
        assert found == pytest.approx(again.objective, rel=1e-7)
    left_out = runs.where(np.arange(len(runs)) != 4)
    assert reference_objective(fit.without_RP[4], left_out) == pytest.approx(
        fit_law(left_out, parametric(), resamples=100).objective, rel=1e-7
    )


def test_the_seven_sizes_of_onerec_v2_give_its_published_law_and_its_fragility():
    fit = fit_law(V2_RUNS, power("params", "squares", None))
    constants = {name: interval.value for name, interval in fit.constants().items()}
    assert (
        round(constants["E"], 3) == 3.130 and round(constants["A"]) == 3656 and round(constants["alpha"], 4) == 0.4893
    )
    assert round(fit.rmse, 4) == 0.0065
    assert fit.leave_one_out()["alpha"] == pytest.approx((0.444, 0.611), abs=5e-4)
    held_out = fit.held_out()
    assert held_out is not None and (held_out.runs, held_out.measured) == (1, 3.19)
    without = fit_law(V2_RUNS.where(V2_RUNS.size("params") < 8e9), power("params", "squares", None))
    assert held_out.error == pytest.approx(without.predict(params=8e9).value / 3.19 - 1, rel=1e-9)


def test_other_units_change_constants_as_the_algebra_says_and_nothing_else():
    runs = grid_runs(noise=0.01)
    first = fit_law(runs, parametric("squares"), resamples=100)
    other = make_runs(
        {"params": runs.size("params") / 1e6, "tokens": runs.size("tokens") / 1e9, "loss": runs.metric / np.log(2)}
    )
    second = fit_law(other, parametric("squares"), resamples=100)
    before, after = ({k: v.value for k, v in fit.constants().items()} for fit in (first, second))
    alpha, beta = before["alpha"], before["beta"]
    wanted = {
        "E": before["E"] / np.log(2), "A": before["A"] / 1e6**alpha / np.log(2), "alpha": alpha,
        "B": before["B"] / 1e9**beta / np.log(2), "beta": beta,
    }  # fmt: skip
    assert after == pytest.approx(wanted, rel=1e-6)
    assert second.optimum(1e6).params.value == pytest.approx(first.optimum(1e21).params.value / 1e6, rel=1e-6)


def test_a_rerun_gives_the_same_bits_and_another_seed_other_resamples():
    runs, law = grid_runs(noise=0.01), parametric()
    first, again, other = (fit_law(runs, law, resamples=100, seed=seed) for seed in (1, 1, 2))
    for name in ("theta_P", "resampled_SP", "without_RP"):
        assert np.array_equal(getattr(first, name), getattr(again, name)), name
    assert np.array_equal(first.theta_P, other.theta_P)
    assert not np.array_equal(first.resampled_SP, other.resampled_SP)


@pytest.mark.parametrize(
    ("constants", "flops", "ratio"),
    [((1.8172, 482.01, 0.3478, 2085.43, 0.3658), 5.88e23, 18.4), ((1.69, 406.4, 0.34, 410.7, 0.28), 5.88e23, 93)],
    ids=["Besiroglu et al.", "Hoffmann et al."],
)
def test_published_constants_give_the_published_tokens_per_parameter(constants, flops, ratio):
    e, a, alpha, b, beta = constants
    theta = np.array([[np.log(e), np.log(a), alpha, np.log(b), beta]])
    params = float(np.exp(optimal_log_params(parametric(), theta, flops / 6))[0])
    assert flops / 6 / params**2 == pytest.approx(ratio, rel=0.03)
    found = optimize.minimize_scalar(
        lambda n: a / np.exp(n) ** alpha + b / (flops / 6 / np.exp(n)) ** beta, bounds=(15, 30), method="bounded",
        options={"xatol": 1e-9},
    )  # fmt: skip
    assert np.log(params) == pytest.approx(found.x, abs=1e-5)


def test_the_optimum_spends_the_budget_and_moves_with_it_by_the_exponents():
    fit = fit_law(grid_runs(noise=0.003), parametric(), resamples=200)
    small, large = fit.optimum(1e21), fit.optimum(1e23)
    a, b = fit.exponents()
    for optimum in (small, large):
        assert 6 * optimum.params.value * optimum.tokens.value == pytest.approx(optimum.flops)
        assert optimum.params.low < optimum.params.value < optimum.params.high
        predicted = fit.predict(params=optimum.params.value, tokens=optimum.tokens.value)
        assert optimum.loss.value == pytest.approx(predicted.value)
    assert large.params.value / small.params.value == pytest.approx(100**a.value)
    assert large.tokens.value / small.tokens.value == pytest.approx(100**b.value)
    assert a.value + b.value == pytest.approx(1)


def test_an_interval_is_right_where_resamples_are_biased_on_a_bent_scale():
    """On a scale where resamples are normal, off by 0.4 of their own width, the interval is the estimate's, moved back."""
    normal = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    resampled = np.append(np.exp(2.0 + 0.3 * (normal - 0.4)), np.nan)
    for width in (1.0, 1.2):
        low, high = 2 + 0.3 * (0.4 - 1.96 * width), 2 + 0.3 * (0.4 + 1.96 * width)
        found = np.log(bias_corrected(float(np.exp(2.0)), resampled, width))
        assert found == pytest.approx([2, low, high], abs=0.004)


def test_least_squares_on_few_runs_have_intervals_wider_by_the_constants_they_fit():
    runs = grid_runs(8, 1, noise=0.01)
    fit = fit_law(runs, power("params", "squares", None), resamples=200)
    alpha = fit.constants()["alpha"]
    assert alpha == bias_corrected(alpha.value, fit.resampled_SP[:, 2], np.sqrt(8 / 5))
    assert fit_law(runs, power("params", "huber_log", None), resamples=200)._width == 1


def test_intervals_cover_the_truth_about_as_often_as_they_say(monkeypatch: pytest.MonkeyPatch):
    """tools/bench/fit_coverage.py is the same at full size; here 5 constants x 15 trials."""
    monkeypatch.setattr(fitting, "KEPT_STARTS", 20)
    hits = []
    for trial in range(15):
        fit = fit_law(grid_runs(noise=0.01, seed=trial), parametric(), resamples=200)
        truth = {"E": E, "A": A, "alpha": ALPHA, "B": B, "beta": BETA}
        hits += [low <= truth[name] <= high for name, (_, low, high) in fit.constants().items()]
    assert 0.88 <= np.mean(hits) <= 0.99


def one(**columns) -> Runs:
    return make_runs({name: np.array(values, float) for name, values in columns.items()})


def fit_line(law: Law, runs: int = 6, resamples: int = 100, **columns) -> fitting.Fit:
    table = {"params": SIZES, "loss": [2.5, 2.3, 2.2, 2.15, 2.1, 2.08], **columns}
    return fit_law(one(**{name: values[:runs] for name, values in table.items()}), law, resamples)


SIZES = [1e6, 2e6, 4e6, 8e6, 16e6, 32e6]
SQUARES = power("params", "squares", None)
REFUSED = {
    "too few runs": (lambda: fit_line(SQUARES, runs=3), "3 runs are too few for 3"),
    "one size": (lambda: fit_line(power("params", "squares", 0.0), params=[1e6] * 6), "1 distinct 'params'"),
    "two sizes and an asymptote": (lambda: fit_line(SQUARES, params=[1e6, 2e6] * 3), "2 distinct 'params'"),
    "tokens unknown": (lambda: fit_line(parametric()), "no column 'tokens'"),
    "asymptote above": (lambda: fit_line(power("params", "squares", 3.0)), "not below any 'loss' (2.5)"),
    "negative asymptote": (lambda: power("params", "squares", -1.0), "asymptote must be 0 or more"),
    "objective": (lambda: power("params", "mean", None), "one of huber_log, squares"),  # type: ignore[arg-type]
    "few resamples": (lambda: fit_line(SQUARES, resamples=10), "100 resamples"),
    "optimum of one variable": (lambda: fit_line(SQUARES).optimum(1e20), "no optimum"),
    "budget": (lambda: fit_law(grid_runs(), parametric(), 100).optimum(-1.0), "budget must be a positive number"),
    "sizes of a prediction": (lambda: fit_line(SQUARES).predict(tokens=1e9), "of params, not of tokens"),
}


@pytest.mark.parametrize(("call", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_fitted_is_refused_in_one_sentence(call, sentence: str):
    with pytest.raises(InputError) as caught:
        call()
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_law_that_rises_with_tokens_has_no_optimum():
    runs = grid_runs()
    rising = make_runs(
        {**runs.sizes, "loss": 2 + 480 / runs.size("params") ** 0.35 + 1e-4 * runs.size("tokens") ** 0.3}
    )
    with pytest.raises(InputError, match=r"no optimum: .* beta -0\.3"):
        fit_law(rising, parametric(), resamples=100).optimum(1e21)
