"""Fits scaling laws to runs, and says how far each number can be trusted.

    runs = read_runs("runs.csv")
    fit = fit_law(runs, parametric())                  # L(N,D) = E + A / N^alpha + B / D^beta
    fit.constants()["alpha"]                           # value and 95 % interval
    fit.optimum(1e21)                                  # parameters and tokens of least loss at this budget

Intervals are bias-corrected percentiles of a bootstrap over runs (Efron 1981); what other kinds cover is in docs/scaling.md.
Equal runs and seed give equal bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.stats import norm

from onerec_jax.errors import InputError
from onerec_jax.evaluate.jackknife import Interval
from onerec_jax.scaling.law import Law, Objective, Problem, make_problem, starts
from onerec_jax.scaling.minimise import minimise, polish, total_loss
from onerec_jax.scaling.runs import Runs, check_budget

KEPT_STARTS = 400  # of the grid, those with the least loss, that are followed to their minima
Quantity = Callable[[np.ndarray], np.ndarray]  # constants theta [S,P] -> [S]


def parametric(objective: Objective = "huber_log", asymptote: float | None = None) -> Law:
    """L(N,D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, approach 3)."""
    return Law(("params", "tokens"), objective, asymptote)


def power(variable: str, objective: Objective, asymptote: float | None, rising: bool = False) -> Law:
    """E + A / x^alpha, or for a rising metric E - A / x^alpha, of one variable: params, tokens or flops."""
    return Law((variable,), objective, asymptote, rising)


class HeldOut(NamedTuple):
    """What the law of all other runs says of the largest ones."""

    runs: int
    predicted: float  # means over these runs
    measured: float
    error: float  # mean of predicted / measured - 1


class Optimum(NamedTuple):
    """Where a compute budget gives the least loss."""

    flops: float
    params: Interval
    tokens: Interval
    loss: Interval


@dataclasses.dataclass(frozen=True)
class Fit:
    """A law fitted to all runs, to resamples of them, and without each of them."""

    law: Law
    runs: Runs
    theta_P: np.ndarray  # log E, log A, alpha, ..
    objective: float  # summed over runs
    rmse: float  # of the metric
    resampled_SP: np.ndarray
    without_RP: np.ndarray

    def interval(self, quantity: Quantity) -> Interval:
        """Value and 95 % interval of a function of the constants."""
        with np.errstate(all="ignore"):
            return bias_corrected(float(quantity(self.theta_P[None])[0]), quantity(self.resampled_SP), self._width)

    @property
    def _width(self) -> float:
        """Resampled least squares are too narrow by the constants that the residuals paid for; a Huber loss this small is not."""
        spare = len(self.runs) - self.law.size
        return float(np.sqrt(len(self.runs) / spare)) if self.law.objective == "squares" else 1.0

    def constants(self) -> dict[str, Interval]:
        """By name; E and A on their own scale. A given asymptote is none of them."""
        found = {}
        for i, name in enumerate(self.law.names):
            interval = self.interval(lambda theta_SP, i=i: theta_SP[:, i])
            found[name] = interval if name in ("alpha", "beta") else exp_interval(interval)
        return found

    def leave_one_out(self) -> dict[str, tuple[float, float]]:
        """Least and greatest value of every constant, and of a and b, over the fits that leave out one run."""
        found = self.law.constants(self.without_RP)
        if len(self.law.variables) == 2:
            found |= {"a": _share(self.law, self.without_RP), "b": 1 - _share(self.law, self.without_RP)}
        return {name: (float(values.min()), float(values.max())) for name, values in found.items()}

    def predict(self, **sizes: float) -> Interval:
        """The metric at `params=.., tokens=..`, or whatever the law's variables are."""
        if set(sizes) != set(self.law.variables):
            raise InputError(
                f"the law is of {' and '.join(self.law.variables)}, not of {', '.join(sizes) or 'nothing'}"
            )
        return self.interval(lambda theta_SP: self.law.predict(theta_SP, sizes))

    def exponents(self) -> tuple[Interval, Interval]:
        """a and b of N_opt ~ C^a and D_opt ~ C^b: beta / (alpha + beta) and alpha / (alpha + beta)."""
        self._check_optimum()
        return self.interval(lambda theta: _share(self.law, theta)), self.interval(lambda t: 1 - _share(self.law, t))

    def optimum(self, flops: float) -> Optimum:
        """Parameters and tokens of least loss at C = factor N D, in closed form (Hoffmann et al. 2022, equation 4).

        Raises:
            InputError: a law of one variable or that does not fall with both, or a budget that is no positive number.
        """
        self._check_optimum()
        check_budget(flops)
        product = flops / self.runs.factor

        def log_params(theta_SP: np.ndarray) -> np.ndarray:
            return optimal_log_params(self.law, theta_SP, product)

        def loss(theta_SP: np.ndarray) -> np.ndarray:
            params = np.exp(log_params(theta_SP))
            return self.law.predict(theta_SP, {"params": params, "tokens": product / params})  # type: ignore[dict-item]

        return Optimum(
            flops,
            exp_interval(self.interval(log_params)),
            exp_interval(self.interval(lambda theta: np.log(product) - log_params(theta))),
            self.interval(loss),
        )

    def _check_optimum(self) -> None:
        if self.law.variables != ("params", "tokens"):
            raise InputError(
                f"a law of {' and '.join(self.law.variables)} has no optimum: that takes params and tokens"
            )
        constants = self.law.constants(self.theta_P)
        if min(constants["alpha"], constants["beta"]) <= 0:
            raise InputError(
                f"no optimum: the law has alpha {constants['alpha']:.3g} and beta {constants['beta']:.3g}, and falls with "
                "params and tokens only where both are positive"
            )

    def held_out(self) -> HeldOut | None:
        """The law of all but the largest runs (by FLOPs where known, else by all variables) on those; None of too few runs."""
        sizes = (
            [self.runs.size("flops")] if "flops" in self.runs.sizes else [self.runs.size(v) for v in self.law.variables]
        )
        extent_R = np.sum(np.log(sizes), axis=0)
        largest_R = extent_R >= extent_R.max() - 1e-9
        try:
            theta_P, _ = _point(make_problem(self.law, self.runs.where(~largest_R)))
        except InputError:
            return None
        rows = np.flatnonzero(largest_R)
        predicted = np.array(
            [self.law.predict(theta_P, {v: float(self.runs.size(v)[row]) for v in self.law.variables}) for row in rows]
        )
        measured = self.runs.metric[rows]
        return HeldOut(
            len(rows), float(predicted.mean()), float(measured.mean()), float(np.mean(predicted / measured - 1))
        )


def fit_law(runs: Runs, law: Law, resamples: int = 1000, seed: int = 0) -> Fit:
    """Fits a law to runs.

    Raises:
        InputError: runs that do not determine the law (`make_problem`), or fewer than 100 resamples.
    """
    if resamples < 100:
        raise InputError(f"intervals of 95 % need 100 resamples at least, not {resamples}")
    problem = make_problem(law, runs)
    theta_P, objective = _point(problem)
    start_P, count = problem.centred(theta_P), len(runs)
    weight_SR = np.concatenate([_resample(problem, resamples, seed), 1.0 - np.eye(count)])
    y_R = problem.y_R[None]
    found_SP, _ = minimise(
        lambda theta, rows: problem.residuals(theta, y_R),
        np.repeat(start_P[None], len(weight_SR), axis=0), weight_SR, problem.huber, tol=1e-7,
    )  # fmt: skip
    found_SP = problem.centred(found_SP, back=True)
    with np.errstate(all="ignore"):
        points = [{name: float(runs.size(name)[row]) for name in law.variables} for row in range(count)]
        error_R = np.array([float(law.predict(theta_P, point)) for point in points]) - runs.metric
    rmse = float(np.sqrt(np.mean(error_R**2)))
    return Fit(law, runs, theta_P, objective, rmse, found_SP[:resamples], found_SP[resamples:])


def _point(problem: Problem) -> tuple[np.ndarray, float]:
    """The law's own constants [P] of least loss over a grid of starts, and that loss in the objective's units."""
    y_R, weight_R = problem.y_R[None], np.ones((1, len(problem.y_R)))

    def residuals(theta_SP: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return problem.residuals(theta_SP, y_R)

    start_SP = starts(problem)
    loss_S = np.concatenate(  # in parts, for memory
        [total_loss(problem.residuals(part, y_R)[0], weight_R, problem.huber) for part in np.array_split(start_SP, 8)]
    )
    start_SP = start_SP[np.argsort(loss_S, kind="stable")[:KEPT_STARTS]]
    weight_SR = np.broadcast_to(weight_R, (len(start_SP), len(problem.y_R)))
    theta_SP, loss_S = minimise(residuals, start_SP, weight_SR, problem.huber)
    best_P, best = theta_SP[loss_S.argmin()], float(loss_S.min())
    polished_P, polished = polish(residuals, best_P, problem.huber)
    if polished < best:
        best_P, best = polished_P, polished
    return problem.centred(best_P, back=True), best * problem.scale**2


def _resample(problem: Problem, resamples: int, seed: int) -> np.ndarray:
    """How often each run is in each resample, [S,R]; only resamples that still determine the law."""
    rng, count = np.random.default_rng(seed), len(problem.y_R)
    least = 2 + int(problem.law.fitted_asymptote)
    levels = [np.unique(x, return_inverse=True)[1] for x in problem.log_x_JR]
    kept: list[np.ndarray] = []
    while len(kept) < resamples:
        weight_R = rng.multinomial(count, np.full(count, 1 / count))
        there = weight_R > 0
        if there.sum() >= problem.law.size and all(len(set(level[there])) >= least for level in levels):
            kept.append(weight_R.astype(np.float64))
    return np.stack(kept)


def _share(law: Law, theta_SP: np.ndarray) -> np.ndarray:
    """beta / (alpha + beta), NaN where a resample does not fall with both."""
    constants = law.constants(theta_SP)
    alpha, beta = constants["alpha"], constants["beta"]
    return np.where((alpha > 0) & (beta > 0), beta / (alpha + beta), np.nan)


def optimal_log_params(law: Law, theta_SP: np.ndarray, product: float) -> np.ndarray:
    """log N of least loss where N D = product: log G + beta / (alpha + beta) log(product).

    G = (alpha A / beta B)^(1 / (alpha + beta)).
    """
    log_a, alpha, log_b, beta = np.moveaxis(theta_SP[..., -4:], -1, 0)
    log_g = (np.log(alpha / beta) + log_a - log_b) / (alpha + beta)
    return log_g + _share(law, theta_SP) * np.log(product)


def bias_corrected(value: float, resampled_S: np.ndarray, width: float = 1.0) -> Interval:
    """The value and its 95 % interval: the percentiles of its resamples, moved by how far their median is from it.

    With z0 the normal quantile of the share of resamples below the value, those at Phi(2 z0 - 1.96 width) and
    Phi(2 z0 + 1.96 width). Resamples in which it does not exist (NaN) are left out.
    """
    resampled_S = resampled_S[np.isfinite(resampled_S)]
    if not len(resampled_S):
        return Interval(value, np.nan, np.nan)
    # Half of those that equal the value count as below it; never all or none, of which there is no quantile.
    below = np.mean(resampled_S < value) + 0.5 * np.mean(resampled_S == value)
    bias = norm.ppf(np.clip(below, 0.5 / len(resampled_S), 1 - 0.5 / len(resampled_S)))
    low, high = np.quantile(resampled_S, norm.cdf(2 * bias + width * norm.ppf([0.025, 0.975])), method="inverted_cdf")
    return Interval(value, float(low), float(high))


def exp_interval(interval: Interval) -> Interval:
    """Of the logarithm of a quantity, that of the quantity."""
    with np.errstate(over="ignore"):
        return Interval(*(float(np.exp(value)) for value in interval))
