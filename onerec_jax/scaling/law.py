"""Saturating power laws in one variable or two, as problems that an optimiser can be given.

    falling:  L(x) = E + sum_j A_j / x_j^alpha_j        a loss
    rising:   R(x) = E - sum_j A_j / x_j^alpha_j        Recall@k, NDCG@k

The constants that are searched are theta = (log E, log A_1, alpha_1, log A_2, ..), so that E and A are positive; with a given
asymptote, theta has no log E. Objectives, summed over runs (Hoffmann et al. 2022, appendix D.3; a mean in their place lets the
optimiser's tolerance stop it early, Besiroglu et al. 2024):

    huber_log:  Huber_delta(log L(x) - log L),  delta = 1e-3, the logarithm of the sum by log-sum-exp
    squares:    (L(x) - L)^2 / 2

Axis letters: S starts or resamples, P constants of theta, R runs, J variables.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal, get_args

import numpy as np

from onerec_jax.errors import InputError
from onerec_jax.scaling.runs import SIZES, Runs

DELTA = 1e-3
Objective = Literal["huber_log", "squares"]
LEAST = 1e-3  # share of its largest term below which a rising law's logarithm goes on along its tangent


@dataclasses.dataclass(frozen=True)
class Law:
    """What is fitted, of which variables (`params`, `tokens`, `flops`), and by which objective.

    Raises:
        InputError: a variable or an objective there is not, or an asymptote that is no number >= 0 (> 0 for a rising law).
    """

    variables: tuple[str, ...]
    objective: Objective
    asymptote: float | None  # E where it is given, 0 = none; None: fitted
    rising: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in self.variables if name not in SIZES]
        if unknown or not 1 <= len(self.variables) <= 2:
            raise InputError(
                f"a law is of one or two of {', '.join(SIZES)}, not of '{', '.join(unknown or self.variables)}'"
            )
        if self.objective not in get_args(Objective):
            raise InputError(f"objective must be one of {', '.join(get_args(Objective))}, not '{self.objective}'")
        least = "above 0" if self.rising else "0 or more"
        if self.asymptote is not None and not (self.asymptote > 0 or (self.asymptote == 0 and not self.rising)):
            raise InputError(f"the asymptote must be {least}, or fitted, not {self.asymptote}")

    @property
    def fitted_asymptote(self) -> bool:
        return self.asymptote is None

    @property
    def size(self) -> int:
        """P, constants that are fitted."""
        return 2 * len(self.variables) + int(self.fitted_asymptote)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the constants that are fitted: E, A, alpha, and B, beta of a second variable."""
        terms = ("A", "alpha", "B", "beta")[: 2 * len(self.variables)]
        return ("E", *terms) if self.fitted_asymptote else terms

    def constants(self, theta_SP: np.ndarray) -> dict[str, np.ndarray]:
        """Float64 [S] by name."""
        theta_SP = np.asarray(theta_SP)
        with np.errstate(over="ignore"):
            return {
                name: theta_SP[..., i] if name in ("alpha", "beta") else np.exp(theta_SP[..., i])
                for i, name in enumerate(self.names)
            }

    def predict(self, theta_SP: np.ndarray, sizes: dict[str, float]) -> np.ndarray:
        """The metric at one point, float64 [S]."""
        theta_SP, first = np.asarray(theta_SP), int(self.fitted_asymptote)
        value = np.exp(theta_SP[..., 0]) if self.fitted_asymptote else np.full(theta_SP.shape[:-1], self.asymptote)
        for j, name in enumerate(self.variables):
            log_a, alpha = theta_SP[..., first + 2 * j], theta_SP[..., first + 2 * j + 1]
            value = value + (-1 if self.rising else 1) * np.exp(log_a - alpha * np.log(sizes[name]))
        return value


@dataclasses.dataclass(frozen=True)
class Problem:
    """A law and the runs it is fitted to. Logarithms of the variables are taken from their means, which conditions the search."""

    law: Law
    log_x_JR: np.ndarray
    middle_J: np.ndarray
    y_R: np.ndarray
    scale: float  # residuals are in units of it: Huber's delta, or as small a share of the metric

    def residuals(self, theta_SP: np.ndarray, y_SR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Residuals [S,R] and their derivatives [S,P,R] for centred constants and metrics of each resample."""
        law, first = self.law, int(self.law.fitted_asymptote)
        sign = -1.0 if law.rising else 1.0
        shape = (len(theta_SP), len(self.y_R))
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            log_e = theta_SP[:, :1] if first else np.log(np.full((len(theta_SP), 1), law.asymptote))
            terms = [np.broadcast_to(log_e, shape)]
            for j, log_x in enumerate(self.log_x_JR):
                terms.append(theta_SP[:, first + 2 * j, None] - theta_SP[:, first + 2 * j + 1, None] * log_x)
            largest = np.max(terms, axis=0)
            parts = [(sign if i else 1.0) * np.exp(term - largest) for i, term in enumerate(terms)]
            total = sum(parts)
            if law.objective == "huber_log":
                logarithm = np.log(np.maximum(total, LEAST)) + np.minimum(total / LEAST - 1, 0)
                z_SR, slope = largest + logarithm - np.log(y_SR), 1 / np.maximum(total, LEAST)
            else:
                slope = np.exp(largest)
                z_SR = total * slope - y_SR
            jacobian = [parts[0] * slope] * first
            for part, log_x in zip(parts[1:], self.log_x_JR, strict=True):
                jacobian += [part * slope, -part * slope * log_x]
            return z_SR / self.scale, np.stack(jacobian, axis=1) / self.scale

    @property
    def huber(self) -> bool:
        return self.law.objective == "huber_log"

    def centred(self, theta_SP: np.ndarray, back: bool = False) -> np.ndarray:
        """Constants for logarithms taken from their means; `back`: from those to the law's own."""
        theta_SP = np.array(theta_SP, np.float64)
        for j, middle in enumerate(self.middle_J):
            at = int(self.law.fitted_asymptote) + 2 * j
            theta_SP[..., at] += (1 if back else -1) * theta_SP[..., at + 1] * middle
        return theta_SP


def make_problem(law: Law, runs: Runs) -> Problem:
    """The problem of fitting a law to runs.

    Raises:
        InputError: fewer runs than constants and one, fewer distinct values of a variable than its constants, or an asymptote
            on the wrong side of every run.
    """
    x_JR = np.stack([runs.size(name) for name in law.variables])
    if len(runs) <= law.size:
        raise InputError(
            f"{runs.origin}: {len(runs)} runs are too few for {law.size} constants ({', '.join(law.names)}): "
            f"{law.size + 1} at least, one more than constants, so that something is left to judge them by"
        )
    least = 2 + int(law.fitted_asymptote)
    for name, values in zip(law.variables, x_JR, strict=True):
        distinct = len(np.unique(values))
        if distinct < least:
            held = "with a fitted asymptote" if law.fitted_asymptote else "with a given asymptote"
            raise InputError(f"{runs.origin}: {distinct} distinct '{name}', but {held} the law needs {least} at least")
    y_R = runs.metric
    if law.asymptote is not None and (law.asymptote <= y_R.min() if law.rising else law.asymptote >= y_R.max()):
        side, extreme = ("above", y_R.min()) if law.rising else ("below", y_R.max())
        raise InputError(
            f"{runs.origin}: an asymptote of {law.asymptote:g} is not {side} any '{runs.metric_name}' ({extreme:g})"
        )
    log_x_JR = np.log(x_JR)
    middle_J = log_x_JR.mean(axis=1)
    scale = DELTA if law.objective == "huber_log" else DELTA * float(np.median(y_R))
    return Problem(law, log_x_JR - middle_J[:, None], middle_J, y_R, scale)


def starts(problem: Problem) -> np.ndarray:
    """Centred constants [S,P] to search from: the grid of Hoffmann et al. for a falling law, and one in the data's own units."""
    law, variables = problem.law, len(problem.law.variables)
    extreme = problem.y_R.max() if law.rising else problem.y_R.min()
    beyond = (1.01, 1.05, 1.2, 1.5, 3.0) if law.rising else (0.99, 0.95, 0.8, 0.5, 0.1)
    asymptotes = [extreme * share for share in beyond] if law.asymptote is None else [law.asymptote]
    found = []
    for asymptote, *alphas in itertools.product(asymptotes, *[(0.1, 0.25, 0.5, 1.0)] * variables):
        gap = max(abs(float(np.median(problem.y_R)) - asymptote), 1e-3 * extreme) / variables
        found.append(
            [np.log(asymptote)] * int(law.fitted_asymptote) + [v for alpha in alphas for v in (np.log(gap), alpha)]
        )
    if law.rising:
        return np.array(found)
    axes = [np.arange(-1, 1.01, 0.5)] * int(law.fitted_asymptote)
    axes += [np.arange(0, 25.1, 5), np.arange(0, 2.01, 0.5)] * variables
    return np.concatenate([problem.centred(np.array(list(itertools.product(*axes)))), found])
