"""A fit as values that JSON can hold, nothing of them rounded, and these as tables."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table

from onerec_jax.errors import InputError
from onerec_jax.evaluate.jackknife import Interval
from onerec_jax.scaling.fit import Fit, fit_law
from onerec_jax.scaling.isoflop import IsoFlop, fit_isoflop, of_curves
from onerec_jax.scaling.law import Law
from onerec_jax.scaling.runs import Runs

KINDS = ("parametric", "power", "isoflop")


def fit_runs(
    runs: Runs,
    kind: str,
    by: str | None,
    objective: str | None,
    asymptote: float | None,
    rising: bool,
    budgets: Sequence[float],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """What `onerec fit` says: a fit of one kind, with the best sizes for the budgets.

    Raises:
        InputError: no such kind, an option that this kind has no use for, or what the fit refuses.
    """
    if kind not in KINDS:
        raise InputError(f"kind must be one of {', '.join(KINDS)}, not '{kind}'")
    if (by is not None) != (kind == "power"):
        raise InputError("kind power needs --by params, tokens or flops, and no other kind has it")
    if kind == "isoflop":
        if objective is not None or asymptote is not None:
            raise InputError("kind isoflop fits parabolas by least squares: it has neither --objective nor --asymptote")
        on_curves = runs.where(of_curves(runs))
        fit = fit_isoflop(on_curves, rising, resamples=resamples, seed=seed)
        return {**isoflop_summary(fit, on_curves, budgets), "left_out": len(runs) - len(on_curves)}
    variables = ("params", "tokens") if by is None else (by,)
    law = Law(variables, objective or "huber_log", asymptote, rising)  # type: ignore[arg-type]  # which refuses any other
    return law_summary(fit_law(runs, law, resamples, seed), budgets)


def law_summary(fit: Fit, budgets: Sequence[float] = ()) -> dict[str, Any]:
    """A fitted law."""
    law, spread, held_out = fit.law, fit.leave_one_out(), fit.held_out()
    sign = "-" if law.rising else "+"
    terms = [f"{sign} {a} / {x}^{alpha}" for x, a, alpha in zip(law.variables, "AB", ("alpha", "beta"), strict=False)]
    constants = {name: {**found._asdict(), "leave_one_out": spread[name]} for name, found in fit.constants().items()}
    if law.asymptote is not None:
        constants = {"E": {"value": law.asymptote, "given": True}, **constants}
    exponents = {}
    if len(law.variables) == 2 and min(constants[name]["value"] for name in ("alpha", "beta")) > 0:
        found = zip("ab", fit.exponents(), strict=True)
        exponents = {name: {**interval._asdict(), "leave_one_out": spread[name]} for name, interval in found}
    return {
        "law": f"{fit.runs.metric_name} = E {' '.join(terms)}",
        "runs": len(fit.runs),
        "objective": law.objective,
        "minimum": fit.objective,
        "rmse": fit.rmse,
        "factor": fit.runs.factor if len(law.variables) == 2 else None,
        "constants": constants,
        "exponents": exponents,
        "held_out": held_out and held_out._asdict(),
        "optima": [_plain(fit.optimum(flops)) for flops in budgets],
    }


def isoflop_summary(fit: IsoFlop, runs: Runs, budgets: Sequence[float] = ()) -> dict[str, Any]:
    """Fitted curves."""
    exponents = {name: found._asdict() for name, found in zip("ab", fit.exponents(), strict=True)}
    spread, error = fit.leave_one_out(), fit.held_out()
    if spread is not None:
        exponents["a"]["leave_one_out"] = spread
        exponents["b"]["leave_one_out"] = fit.leave_one_out(tokens=True)
    return {
        "law": f"{runs.metric_name} by log params at each budget; params ~ C^a, tokens ~ C^b",
        "runs": len(runs),
        "objective": "squares",
        "factor": runs.factor,
        "constants": {},
        "exponents": exponents,
        "held_out": None if error is None else {"runs": fit.curves[-1].runs, "error": error},
        "without_minimum": fit.without_minimum,
        "curves": [_plain(curve) for curve in fit.curves],
        "optima": [_plain(fit.optimum(flops)) for flops in budgets],
    }


def _plain(found: Any) -> dict[str, Any]:
    return {k: v._asdict() if isinstance(v, Interval) else v for k, v in found._asdict().items()}


def to_json(summary: dict[str, Any]) -> str:
    """JSON of a summary; what is not finite, such as an end of an interval that no resample bounds, is null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: finite(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [finite(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(summary), indent=1, allow_nan=False)


def tables(summary: dict[str, Any]) -> Group:
    """A summary for people: constants in full, intervals and spreads to four digits."""
    title = f"{summary['law']}\n{summary['runs']} runs, objective {summary['objective']}"
    if summary["factor"]:
        title += f", C = {summary['factor']:.4g} x params x tokens"
    constants = Table("", "value", "95 % interval", "leaving out one", title=title, title_justify="left")
    for name, found in {**summary["constants"], **summary["exponents"]}.items():
        if found.get("given"):
            constants.add_row(name, _full(found["value"]), "given, not fitted")
            continue
        spread = found.get("leave_one_out")
        constants.add_row(
            name, _full(found["value"]), _range(found["low"], found["high"]), _range(*spread) if spread else ""
        )
    if summary.get("left_out"):
        constants.caption = f"left out: {summary['left_out']} at budgets of fewer than three sizes"
    if "minimum" in summary:
        constants.caption = f"minimum {summary['minimum']:.10g}, RMSE {summary['rmse']:.4g}"
    parts: list[Any] = [constants]
    if "curves" in summary:
        parts.append(_sizes("at each budget", summary["curves"]))
    parts.append(_held_out(summary))
    if summary.get("without_minimum"):
        parts.append(f"resampled curves without a minimum: {summary['without_minimum']:.1%}")
    if summary["optima"]:
        parts.append(_sizes("best for a budget", summary["optima"]))
    return Group(*parts)


def _held_out(summary: dict[str, Any]) -> str:
    held_out = summary["held_out"]
    if held_out is None:
        return "largest left out: too few runs without it"
    if "predicted" not in held_out:
        return f"largest budget left out: the others' line has its best params {held_out['error']:+.2%} off"
    values = f"predicted {held_out['predicted']:.5g}, measured {held_out['measured']:.5g}"
    return f"largest left out ({held_out['runs']} of the runs): {values}, error {held_out['error']:+.2%}"


def _sizes(title: str, rows: list[dict[str, Any]]) -> Table:
    intervals = [name for name, value in rows[0].items() if isinstance(value, dict)]
    table = Table("FLOPs", *intervals, title=title, title_justify="left")
    for row in rows:
        cells = [
            "{} [{}, {}]".format(*(_short(row[name][part]) for part in ("value", "low", "high"))) for name in intervals
        ]
        table.add_row(_short(row["flops"]), *cells)
    return table


def _short(value: float) -> str:
    return f"{value:.3g}".replace("e+0", "e").replace("e+", "e")


def _full(value: float) -> str:
    return f"{value:.10g}"


def _range(low: float, high: float) -> str:
    return f"{low:.4g} to {high:.4g}"
