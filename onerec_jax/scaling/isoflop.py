"""IsoFLOP curves: at each compute budget the model size of least loss, and how it grows with the budget.

Hoffmann et al. 2022, approach 2: per budget a parabola of the metric in log N, its minimum N_opt; over the budgets the lines

    log N_opt = log k_N + a log C,    log D_opt = log k_D + b log C

D_opt is read off the runs of the budget (log D as a parabola in log N), so that it holds under any rule of counting FLOPs.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

from onerec_jax.errors import InputError
from onerec_jax.evaluate.jackknife import Interval
from onerec_jax.scaling.fit import exp_interval
from onerec_jax.scaling.runs import Runs, check_budget

TINY = 1e-300
TOLERANCE = 0.05  # runs whose FLOPs differ by no more are of one budget


class Curve(NamedTuple):
    """One budget's parabola."""

    flops: float  # geometric mean of its runs
    runs: int
    params: Interval  # N_opt
    tokens: Interval  # D_opt
    metric: Interval  # at N_opt


class Point(NamedTuple):
    """The best size and amount of data for a budget, from the lines through those of all curves."""

    flops: float
    params: Interval
    tokens: Interval


@dataclasses.dataclass(frozen=True)
class _Minima:
    """Of every curve in all runs (row 0) and in resamples; NaN where a resample has none."""

    log_params_SK: np.ndarray
    log_tokens_SK: np.ndarray
    metric_SK: np.ndarray


@dataclasses.dataclass(frozen=True)
class IsoFlop:
    """Curves of two budgets or more, and the lines through their minima."""

    curves: tuple[Curve, ...]
    log_flops_K: np.ndarray
    minima: _Minima
    without_minimum: float  # share of the resampled curves

    def exponents(self) -> tuple[Interval, Interval]:
        """a and b."""
        return tuple(_interval(self._line(log_SK)[0]) for log_SK in self._both())  # type: ignore[return-value]

    def optimum(self, flops: float) -> Point:
        """N and D for a budget.

        Raises:
            InputError: a budget that is no positive number.
        """
        check_budget(flops)
        found = []
        for log_SK in self._both():
            slope_S, middle_S = self._line(log_SK)
            found.append(exp_interval(_interval(middle_S + slope_S * (np.log(flops) - self.log_flops_K.mean()))))
        return Point(flops, *found)

    def leave_one_out(self, tokens: bool = False) -> tuple[float, float] | None:
        """Least and greatest a (or b, of `tokens`) over the fits that leave out one budget; None of two budgets."""
        log_SK = self._both()[int(tokens)][:1]
        budgets = np.arange(len(self.curves))
        if len(budgets) < 3:
            return None
        found = [_line(self.log_flops_K[budgets != left], log_SK[:, budgets != left])[0][0] for left in budgets]
        return float(min(found)), float(max(found))

    def held_out(self) -> float | None:
        """Relative error of N_opt of the largest budget, as the line of all others has it; None of two budgets."""
        if len(self.curves) < 3:
            return None
        x_K, y_K = self.log_flops_K, self.minima.log_params_SK[:1]
        slope, middle = _line(x_K[:-1], y_K[:, :-1])
        return float(np.expm1(middle[0] + slope[0] * (x_K[-1] - x_K[:-1].mean()) - y_K[0, -1]))

    def _both(self) -> tuple[np.ndarray, np.ndarray]:
        return self.minima.log_params_SK, self.minima.log_tokens_SK

    def _line(self, log_SK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _line(self.log_flops_K, log_SK)


def fit_isoflop(
    runs: Runs, rising: bool = False, tolerance: float = TOLERANCE, resamples: int = 1000, seed: int = 0
) -> IsoFlop:
    """Parabolas and lines, with intervals by resampled residuals, pooled over the budgets.

    A budget has few runs, and one resampled often misses an arm of the parabola; hence residuals and not runs.

    Raises:
        InputError: fewer than two budgets; a budget of fewer than three sizes; one whose parabola has no minimum (for a rising
            metric no maximum) within its sizes; no run more than constants; fewer than 100 resamples.
    """
    if resamples < 100:
        raise InputError(f"intervals of 95 % need 100 resamples at least, not {resamples}")
    parts = _budgets(runs, tolerance)
    fits = [_Parabola.of(part, rising) for part in parts]
    for part, fit in zip(parts, fits, strict=True):
        fit.check(part)
    spare = len(runs) - 3 * len(parts)
    if not spare:
        raise InputError(f"{runs.origin}: three runs at every budget leave nothing to judge the parabolas by: add runs")
    residuals = np.concatenate([fit.inflated() for fit in fits])
    residuals -= residuals.mean()
    # As wide as the noise is by its degrees of freedom, and wider by Student's quantile over the normal one: few runs are a
    # poor witness of their own noise.
    noise = (
        np.sqrt(sum(np.sum(fit.residual_R**2) for fit in fits) / spare) * student.ppf(0.975, spare) / norm.ppf(0.975)
    )
    residuals *= noise / max(float(np.sqrt(np.mean(residuals**2))), TINY)
    rng = np.random.default_rng(seed)
    minima = []
    for fit in fits:
        drawn_SR = rng.choice(residuals, size=(resamples, len(fit.residual_R)))
        minima.append(fit.minima(np.concatenate([np.zeros((1, drawn_SR.shape[1])), drawn_SR])))
    found = _Minima(*(np.stack(column, axis=1) for column in zip(*minima, strict=True)))
    log_flops_K = np.array([np.log(part.size("flops")).mean() for part in parts])
    curves = tuple(
        Curve(
            float(np.exp(log_flops_K[k])), len(part), exp_interval(_interval(found.log_params_SK[:, k])),
            exp_interval(_interval(found.log_tokens_SK[:, k])), _interval(found.metric_SK[:, k]),
        )
        for k, part in enumerate(parts)
    )  # fmt: skip
    return IsoFlop(curves, log_flops_K, found, float(np.mean(np.isnan(found.log_params_SK))))


def of_curves(runs: Runs, tolerance: float = TOLERANCE) -> np.ndarray:
    """Which runs bool [R] are of a budget that has three sizes or more; all of them where fewer than two budgets have.

    A sweep often ends in one large run at the size that the curves below it chose: no curve goes through it.
    """
    params_R = runs.size("params")
    curves = [group for group in _groups(runs, tolerance) if len(np.unique(params_R[group])) >= 3]
    if len(curves) < 2:
        return np.ones(len(runs), bool)
    return np.isin(np.arange(len(runs)), np.concatenate(curves))


def _groups(runs: Runs, tolerance: float) -> list[list[int]]:
    """Rows by budget, the smallest first: a run that is more than `tolerance` above the first of a budget opens the next."""
    flops_R = runs.size("flops")
    order = np.argsort(flops_R, kind="stable")
    groups: list[list[int]] = []
    for row in order:
        if not groups or flops_R[row] > (1 + tolerance) * flops_R[groups[-1][0]]:
            groups.append([])
        groups[-1].append(int(row))
    return groups


def _budgets(runs: Runs, tolerance: float) -> list[Runs]:
    groups = _groups(runs, tolerance)
    if len(groups) < 2:
        raise InputError(
            f"{runs.origin}: all runs are of one budget, {runs.size('flops').min():.3g} FLOPs to {tolerance:.0%}; "
            "isoflop needs two at least"
        )
    return [runs.where(np.array(group)) for group in groups]


@dataclasses.dataclass(frozen=True)
class _Parabola:
    """metric = c0 + c1 u + c2 u^2, u = log N from its mean over the runs of the budget."""

    design_R3: np.ndarray
    inverse_3R: np.ndarray
    middle: float
    metric_R: np.ndarray  # of a rising metric the negative
    log_tokens_3: np.ndarray  # coefficients of log D in the same powers
    sign: float

    @classmethod
    def of(cls, runs: Runs, rising: bool) -> _Parabola:
        log_params_R = np.log(runs.size("params"))
        if len(np.unique(log_params_R)) < 3:
            raise InputError(
                f"{runs.origin}: the budget of {runs.size('flops')[0]:.3g} FLOPs has {len(np.unique(log_params_R))} distinct "
                "'params', but a parabola needs three at least"
            )
        middle = float(log_params_R.mean())
        design_R3 = np.vander(log_params_R - middle, 3, increasing=True)
        inverse_3R = np.linalg.pinv(design_R3)
        sign = -1.0 if rising else 1.0
        log_tokens_3 = inverse_3R @ np.log(runs.size("tokens"))
        return cls(design_R3, inverse_3R, middle, sign * runs.metric, log_tokens_3, sign)

    @property
    def residual_R(self) -> np.ndarray:
        return self.metric_R - self.design_R3 @ (self.inverse_3R @ self.metric_R)

    def inflated(self) -> np.ndarray:
        """Residuals as wide as the noise of the runs: a fit takes a share of it, the run's leverage."""
        leverage_R = np.einsum("rp,pr->r", self.design_R3, self.inverse_3R)
        return self.residual_R / np.sqrt(np.maximum(1 - leverage_R, 1e-2))

    def check(self, runs: Runs) -> None:
        """Refuses a parabola without a minimum among the runs."""
        _, c1, c2 = self.inverse_3R @ self.metric_R
        budget = f"{runs.origin}: the parabola at {np.exp(np.log(runs.size('flops')).mean()):.3g} FLOPs"
        kind = "minimum" if self.sign > 0 else "maximum"
        if c2 <= 0:
            way = "downward" if self.sign > 0 else "upward"
            raise InputError(f"{budget} opens {way}: it has no {kind}; the budget needs a wider range of sizes")
        at, params = np.exp(self.middle - c1 / (2 * c2)), runs.size("params")
        if not params.min() <= at <= params.max():
            side = "smaller" if at < params.min() else "larger"
            raise InputError(
                f"{budget} has its {kind} at {at:.3g} parameters, outside of its runs ({params.min():.3g} to "
                f"{params.max():.3g}): add {side} models"
            )

    def minima(self, added_SR: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """log N, log D and the metric [S] at the minimum of the curve with these added to its fitted values (0: to its runs')."""
        c0, c1, c2 = (self.inverse_3R @ self.metric_R)[:, None] + self.inverse_3R @ added_SR.T
        with np.errstate(divide="ignore", invalid="ignore"):
            at = np.where(c2 > 0, -c1 / (2 * c2), np.nan)
        log_tokens = np.vander(at, 3, increasing=True) @ self.log_tokens_3
        return self.middle + at, log_tokens, self.sign * (c0 + c1 * at + c2 * at**2)


def _line(x_K: np.ndarray, y_SK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slope and value at the mean of x, [S] each, by least squares."""
    centred_K = x_K - x_K.mean()
    return y_SK @ centred_K / np.sum(centred_K**2), y_SK.mean(axis=1)


def _interval(values_S: np.ndarray) -> Interval:
    """Row 0 is the value, the others its resamples; those without a minimum are left out and counted elsewhere."""
    resampled = values_S[1:][np.isfinite(values_S[1:])]
    if not len(resampled):
        return Interval(float(values_S[0]), np.nan, np.nan)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(float(values_S[0]), float(low), float(high))
