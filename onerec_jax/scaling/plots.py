"""The plots of a sweep's report."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from onerec_jax.scaling.findings import NEXT, Findings, exponents

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Curve(NamedTuple):
    """A run's metric while it trained, float64 [P] each."""

    name: str
    step: np.ndarray
    flops: np.ndarray
    metric: np.ndarray


def envelope(curves: list[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """The lowest metric that any run has reached by each compute, at the points where it falls."""
    flops = np.concatenate([curve.flops for curve in curves])
    metric = np.concatenate([curve.metric for curve in curves])
    order = np.lexsort((metric, flops))
    flops, metric = flops[order], metric[order]
    falls = metric < np.concatenate([[np.inf], np.minimum.accumulate(metric)[:-1]])
    return flops[falls], metric[falls]


def _figure() -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _colours(values: np.ndarray) -> np.ndarray:
    """Dark for few parameters, light for many."""
    from matplotlib import colormaps

    distinct, place = np.unique(values, return_inverse=True)
    return colormaps["viridis"](0.9 * place / max(1, len(distinct) - 1))


def draw_compute(findings: Findings, curves: list[Curve]) -> Figure:
    """The metric against compute: every run thin, its end a dot, the envelope of them all, and what the law has for it."""
    figure, axes = _figure()
    runs = findings.runs
    flops, colours = runs.size("flops"), _colours(runs.size("params"))
    by_name = {row["name"]: colour for row, colour in zip(findings.rows, colours, strict=True)}
    for curve in curves:
        axes.plot(curve.flops, curve.metric, color=by_name[curve.name], linewidth=0.7, alpha=0.7)
    axes.scatter(flops, runs.metric, c=colours, s=22, zorder=3)
    _name_sizes(axes, runs.size("params"), colours)
    longest = [curve for curve in curves if len(curve.flops) > 1]
    if longest:
        axes.plot(*envelope(longest), color="black", linewidth=1.6, label="envelope", drawstyle="steps-post")
    if findings.law is not None and findings.parametric and exponents(findings).get("parametric"):
        budgets = np.geomspace(flops.min(), NEXT * flops.max(), 40)
        best = [findings.law.optimum(float(budget)).loss for budget in budgets]
        axes.plot(budgets, [loss.value for loss in best], "--", color="tab:red", label="best, by the law")
        axes.fill_between(
            budgets, [loss.low for loss in best], [loss.high for loss in best], color="tab:red", alpha=0.12, linewidth=0
        )
        axes.axvline(flops.max(), color="0.7", linewidth=0.8, linestyle=":")
    low, high = runs.metric.min(), max(runs.metric.max(), *(np.median(curve.metric) for curve in curves), -np.inf)
    margin = 0.15 * max(high - low, 1e-3 * high)
    axes.set(xscale="log", xlabel="training FLOPs", ylabel=findings.metric, ylim=(low - 2 * margin, high + 2 * margin))
    left = max(flops.min() / 30, min((curve.flops[0] for curve in curves), default=flops.min()))
    axes.set_xlim(left / 1.3, (NEXT if findings.parametric else 1) * flops.max() * 1.3)
    axes.legend(frameon=False, fontsize=9)
    return figure


def _name_sizes(axes: Axes, params: np.ndarray, colours: np.ndarray) -> None:
    """A legend entry per model size, or of the least and the greatest where there are many."""
    distinct, first = np.unique(params, return_index=True)
    chosen = list(zip(distinct, first, strict=True))
    for size, row in chosen if len(chosen) <= 6 else (chosen[0], chosen[-1]):
        axes.scatter([], [], color=colours[row], s=22, label=f"{size:.3g} parameters")


def draw_isoflop(findings: Findings, curves: list[Curve]) -> Figure:
    """The metric against parameters at each budget, with the minimum of the parabola through them."""
    figure, axes = _figure()
    isoflop, runs = findings.isoflop, findings.runs
    assert isoflop is not None
    colours = _colours(np.arange(len(isoflop.curves)))
    params, log_flops = runs.size("params"), np.log(runs.size("flops"))
    nearest_R = np.abs(log_flops[:, None] - isoflop.log_flops_K[None]).argmin(axis=1)
    for k, found in enumerate(isoflop.curves):
        own = (nearest_R == k) & findings.curves_R
        x, y = params[own], runs.metric[own]
        grid = np.geomspace(x.min(), x.max(), 60)
        middle = np.log(x).mean()
        parabola = np.polynomial.polynomial.polyfit(np.log(x) - middle, y, 2)
        axes.plot(
            grid, np.polynomial.polynomial.polyval(np.log(grid) - middle, parabola), color=colours[k], linewidth=1
        )
        axes.scatter(x, y, color=colours[k], s=20, label=f"{found.flops:.2e} FLOPs")
        ends = [[found.params.value - found.params.low], [found.params.high - found.params.value]]
        axes.errorbar(
            found.params.value, found.metric.value, xerr=np.nan_to_num(np.abs(ends)), fmt="D", color=colours[k],
            markeredgecolor="black", markersize=7, capsize=3,
        )  # fmt: skip
    axes.set(xscale="log", xlabel="active parameters", ylabel=findings.metric)
    axes.legend(frameon=False, fontsize=9)
    return figure


def draw_predicted(findings: Findings, curves: list[Curve]) -> Figure:
    """Predicted against measured, by the law of the runs below the largest compute."""
    figure, axes = _figure()
    measured, found = findings.runs.metric, findings.predicted()
    value, low, high = np.array(found).T
    held = findings.largest_R
    ends = [measured.min(), measured.max()]
    axes.plot(ends, ends, color="0.6", linewidth=1, zorder=0)
    axes.scatter(measured[~held], value[~held], facecolors="none", edgecolors="tab:blue", s=26, label="in the fit")
    errors = np.nan_to_num(np.abs([(value - low)[held], (high - value)[held]]))
    axes.errorbar(
        measured[held],
        value[held],
        yerr=errors,
        fmt="o",
        color="tab:red",
        capsize=3,
        label="held out: the largest compute",
    )
    axes.set(xlabel=f"measured {findings.metric}", ylabel=f"predicted {findings.metric}")
    axes.legend(frameon=False, fontsize=9)
    return figure


def draw_exponents(findings: Findings, curves: list[Curve]) -> Figure:
    """a and b by each way, with their intervals."""
    figure, axes = _figure()
    figure.set_figheight(2.6)
    for place, (way, found) in enumerate(exponents(findings).items()):
        for row, interval in enumerate(found):
            ends = np.nan_to_num(np.abs([[interval.value - interval.low], [interval.high - interval.value]]))
            axes.errorbar(
                interval.value,
                row + 0.2 * place,
                xerr=ends,
                fmt="o",
                color=f"C{place}",
                capsize=3,
                label=None if row else way,
            )
    axes.set_yticks([0.1, 1.1], ["a, of N ~ C^a", "b, of D ~ C^b"])
    axes.set_ylim(1.6, -0.4)
    axes.set_xlabel("exponent (95 % interval)")
    axes.legend(frameon=False, fontsize=9)
    return figure


class Plot(NamedTuple):
    """One plot of the page, and why it may be missing."""

    title: str
    says: str
    draw: Callable[[Findings, list[Curve]], Figure]
    missing: str = ""  # why it cannot be drawn


def plots(findings: Findings) -> dict[str, Plot]:
    """By the name of its file."""
    refused = findings.refused
    known = exponents(findings)
    return {
        "compute": Plot(
            "Loss against compute",
            "A thin line is a run while it trains, a dot its end, the black line the lowest that any run has reached by that "
            "compute. The dashed line is what the law says the best size reaches, with its 95 % interval.",
            draw_compute,
        ),
        "isoflop": Plot(
            "IsoFLOP curves",
            "Runs of equal compute by model size, a parabola through them, and its minimum: the best size for that compute.",
            draw_isoflop,
            refused.get("isoflop", ""),
        ),
        "predicted": Plot(
            "Predicted against measured",
            "The law was fitted to the hollow points alone. The full ones, the largest compute, it had not seen; on the line they "
            "are predicted exactly.",
            draw_predicted,
            refused.get("smaller", ""),
        ),
        "exponents": Plot(
            "Exponents",
            "How the best number of parameters N and of target tokens D grow with compute C, by two independent ways.",
            draw_exponents,
            "" if known else "; ".join(refused.get(way, "the law has no optimum") for way in ("law", "isoflop")),
        ),
    }
