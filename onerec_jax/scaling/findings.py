"""What the finished runs of a sweep say: laws where they determine one, and where not, why not.

Nothing is hidden for being inconvenient: a fit that is refused keeps its sentence, and the largest runs are also predicted from
the smaller ones alone.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np

from onerec_jax.errors import InputError
from onerec_jax.evaluate.jackknife import Interval
from onerec_jax.scaling.fit import Fit, fit_law, parametric, power
from onerec_jax.scaling.isoflop import IsoFlop, fit_isoflop, of_curves
from onerec_jax.scaling.law import Law
from onerec_jax.scaling.runs import Runs, make_runs

NEXT = 4.0  # compute of the next size up, in that of the largest run: twice the parameters on twice the tokens
T = TypeVar("T")
Row = dict[str, Any]


class Findings(NamedTuple):
    """Of the rows of `runs.csv`."""

    rows: list[Row]
    metric: str
    runs: Runs
    law: Fit | None
    isoflop: IsoFlop | None
    curves_R: np.ndarray  # runs that the IsoFLOP curves go through
    largest_R: np.ndarray  # runs that are held out below
    smaller: Fit | None  # the law of all others
    refused: dict[str, str]  # why there is no law, no isoflop, no smaller

    @property
    def parametric(self) -> bool:
        """Whether the law is of parameters and tokens, so that a budget has a best size."""
        return self.law is not None and len(self.law.law.variables) == 2

    def predicted(self) -> list[Interval]:
        """Of every run, by the law of the smaller ones."""
        assert self.smaller is not None
        return [self.smaller.predict(**self._sizes(row)) for row in range(len(self.runs))]

    def _sizes(self, row: int) -> dict[str, float]:
        assert self.smaller is not None
        return {name: float(self.runs.size(name)[row]) for name in self.smaller.law.variables}


def find(rows: list[Row], metric: str = "", resamples: int = 1000) -> Findings:
    """Fits what the rows determine.

    Args:
        rows: of finished runs, as in `runs.csv`.
        metric: a loss; by default valid_loss where all runs have one, else loss.
        resamples: for intervals.

    Raises:
        InputError: no rows, or one without the metric.
    """
    if not rows:
        raise InputError("no point of the sweep is done yet: there is nothing to report")
    metric = metric or ("valid_loss" if all(row.get("valid_loss") is not None for row in rows) else "loss")
    columns = {name: [row.get(name) for row in rows] for name in ("params", "tokens", "flops", metric)}
    if None in columns[metric]:
        raise InputError(f"not every run has a '{metric}'; columns: {', '.join(rows[0])}")
    runs = make_runs(columns, metric, origin="the sweep")
    refused: dict[str, str] = {}

    def attempt(what: str, fit: Callable[[], T]) -> T | None:
        try:
            return fit()
        except InputError as error:
            refused[what] = str(error)
            return None

    shape = _law_of(runs)
    largest_R = runs.size("flops") >= runs.size("flops").max() * (1 - 0.05)
    law = attempt("law", lambda: fit_law(runs, shape, resamples))
    curves_R = of_curves(runs)
    isoflop = attempt("isoflop", lambda: fit_isoflop(runs.where(curves_R), resamples=resamples))
    smaller = attempt("smaller", lambda: fit_law(runs.where(~largest_R), shape, resamples))
    return Findings(rows, metric, runs, law, isoflop, curves_R, largest_R, smaller, refused)


def _law_of(runs: Runs) -> Law:
    """Of parameters and tokens, or of the one of them that varies."""
    varying = [name for name in ("params", "tokens") if len(np.unique(runs.size(name))) > 1]
    return power(varying[0], "huber_log", None) if len(varying) == 1 else parametric()


def varied(rows: list[Row], points: list[dict[str, Any]]) -> str:
    """What the points differ in: `model.d_model (3 values, 32 to 128)`."""
    values: dict[str, list[Any]] = {}
    for point in points:
        for key, value in point.items():
            known = values.setdefault(key, [])
            if value not in known:
                known.append(value)
    parts = []
    for key, known in values.items():
        if len(known) > 3 and all(isinstance(value, int | float) for value in known):
            parts.append(f"{key} ({len(known)} values, {min(known):g} to {max(known):g})")
        else:
            parts.append(f"{key} ({', '.join(map(_word, known))})")
    return "; ".join(parts) or "nothing"


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def seed_spread(findings: Findings, points: dict[str, dict[str, Any]]) -> float | None:
    """Standard deviation of the metric over seeds, pooled over points that differ in the seed alone; None of no such points."""
    groups: dict[str, list[float]] = {}
    for row in findings.rows:
        settings = {key: value for key, value in points[row["name"]].items() if key != "seed"}
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(row[findings.metric])
    several = [group for group in groups.values() if len(group) > 1]
    if not several:
        return None
    spare = sum(len(group) - 1 for group in several)
    return float(np.sqrt(sum(np.var(group) * len(group) for group in several) / spare))


def sentences(findings: Findings, planned: int, points: dict[str, dict[str, Any]]) -> list[str]:
    """The findings in words, for someone who was not there."""
    runs, metric = findings.runs, findings.metric
    best = int(np.argmin(runs.metric))
    flops = runs.size("flops")
    said = [
        f"{len(runs)} of {planned} points are done. What was varied: {varied(findings.rows, list(points.values()))}.",
        f"Parameters go from {short(runs.size('params').min())} to {short(runs.size('params').max())} active ones, data from "
        f"{short(runs.size('tokens').min())} to {short(runs.size('tokens').max())} target tokens, compute from "
        f"{short(flops.min())} to {short(flops.max())} FLOPs a run.",
        f"The lowest {metric} is {runs.metric[best]:.4f}, of {findings.rows[best]['name']}; the highest {runs.metric.max():.4f}.",
    ]
    if (spread := seed_spread(findings, points)) is not None:
        said.append(f"Seeds alone move it by a standard deviation of {spread:.2g}: differences below that say nothing.")
    epochs = max(row["epochs"] for row in findings.rows)
    if epochs > 1:
        said.append(
            f"Runs see the training examples up to {epochs:.2g} times. Beyond once, tokens are no longer new data: a law of them "
            "is of this dataset, and a training loss flatters."
        )
    return [*said, *_law_sentences(findings)]


def _law_sentences(findings: Findings) -> list[str]:
    law = findings.law
    if law is None:
        return [f"No law is fitted: {findings.refused['law']}."]
    said = []
    if findings.isoflop is not None and not findings.curves_R.all():
        said.append(
            f"IsoFLOP curves go through {findings.curves_R.sum()} of the runs; "
            "the others are of budgets with fewer than three sizes."
        )
    if findings.smaller is not None:
        rows = np.flatnonzero(findings.largest_R)
        guessed = np.mean([findings.predicted()[row].value for row in rows])
        measured = findings.runs.metric[rows].mean()
        said.append(
            f"The law of the smaller runs predicts {guessed:.4f} for the largest compute, where {measured:.4f} was measured "
            f"({guessed / measured - 1:+.2%})."
        )
    return [*said, next_size(findings), agreement(findings)]


def next_size(findings: Findings) -> str:
    """What the next size up should reach."""
    assert findings.law is not None
    law, budget = findings.law, NEXT * findings.runs.size("flops").max()
    if not findings.parametric:
        (variable,) = law.law.variables
        size = 2 * findings.runs.size(variable).max()
        loss = law.predict(**{variable: float(size)})
        return f"With {short(size)} {variable}, twice the most that was run, the law predicts {_range(loss, '{:.4f}'.format)}."
    try:
        optimum = law.optimum(float(budget))
    except InputError as error:
        return f"The next size up cannot be predicted: {error}."
    return (
        f"The next size up, {NEXT:g} times the largest compute ({short(budget)} FLOPs), is predicted to reach "
        f"{_range(optimum.loss, '{:.4f}'.format)} at best, with {_range(optimum.params, short)} parameters and "
        f"{_range(optimum.tokens, short)} target tokens."
    )


def exponents(findings: Findings) -> dict[str, tuple[Interval, Interval]]:
    """a and b of N_opt ~ C^a and D_opt ~ C^b by each way that gives them."""
    found = {}
    if findings.law is not None and findings.parametric:
        with contextlib.suppress(InputError):  # a law that does not fall with both
            found["parametric"] = findings.law.exponents()
    if findings.isoflop is not None:
        found["IsoFLOP"] = findings.isoflop.exponents()
    return found


def agreement(findings: Findings) -> str:
    """Whether the two ways to the exponents agree."""
    found = exponents(findings)
    if len(found) < 2:
        missing = findings.refused.get("isoflop") or "the law has no optimum"
        return f"The exponents are not known by two ways ({missing}), so nothing confirms them."
    (one, _), (two, _) = found.values()
    apart = one.high < two.low or two.high < one.low
    verdict = "disagree, and neither should be believed" if apart else "agree within their intervals"
    two_digits = "{:.2f}".format
    return f"The parametric law has a = {_range(one, two_digits)}, the IsoFLOP curves {_range(two, two_digits)}: they {verdict}."


def _range(found: Interval, written: Callable[[float], str]) -> str:
    low, high = sorted((found.low, found.high))
    return f"{written(found.value)} [{written(low)}, {written(high)}]"


def short(value: float) -> str:
    """1.2e18, 34,500."""
    return f"{value:,.0f}" if value < 1e6 else f"{value:.3g}".replace("e+0", "e").replace("e+", "e")
