"""The report of a sweep: one HTML page that loads nothing, its plots as PNG, and `runs.csv`."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from onerec_jax.scaling.findings import Findings, exponents, find, sentences, short
from onerec_jax.scaling.outcome import rows_of, spending, write_table
from onerec_jax.scaling.plots import Curve, plots
from onerec_jax.scaling.points import PointRun, SweepFolder, write
from onerec_jax.train.metrics import read_metrics

POINTS = 120  # of a curve, at most
WIDTH, HEIGHT = 420, 130
COLUMNS = {
    "params": "parameters: active", "params_total": "total", "params_tables": "tables", "targets": "targets",
    "tokens": "target tokens", "flops": "FLOPs", "epochs": "epochs", "loss": "loss", "valid_loss": "valid_loss",
    "seconds": "seconds",
}  # fmt: skip


def write_report(sweep: SweepFolder, metric: str = "", resamples: int = 1000) -> Path:
    """Writes `runs.csv`, `report.html` and `plots/*.png` of all finished runs; returns the page.

    Args:
        sweep: the sweep's folder.
        metric: the loss that is looked at, see `find`.
        resamples: for intervals.

    Raises:
        InputError: no run is finished, or one has no such metric.
    """
    write_table(sweep)
    findings = find(rows_of(sweep), metric, resamples)
    found = [curve_of(run, findings.metric) for run in sweep.points if run.done.exists()]
    curves = [curve for curve in found if curve is not None]
    pictures: dict[str, bytes] = {}
    for name, plot in plots(findings).items():
        path = sweep.folder / "plots" / f"{name}.png"
        if plot.missing:
            path.unlink(missing_ok=True)
            continue
        pictures[name] = _png(plot.draw(findings, curves))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pictures[name])
    write(sweep.folder / "report.html", _page(sweep, findings, curves, pictures))
    return sweep.folder / "report.html"


def curve_of(run: PointRun, metric: str) -> Curve | None:
    """A run's metric by compute, thinned; None where its log has no such metric."""
    lines = read_metrics(run.folder)
    spent = list(spending(lines, run.recipe.train.batch_size))
    steps, flops = [0.0, *(total["step"] for total in spent)], [0.0, *(total["flops"] for total in spent)]
    name = metric.replace("valid_loss", "valid/loss").replace("_level", "/level")
    own = [(line["step"], line[name]) for line in lines if name in line]
    if not own:
        return None
    kept = np.unique(np.linspace(0, len(own) - 1, min(len(own), POINTS)).round().astype(int))
    step, value = np.array(own)[kept].T
    return Curve(run.name, step, np.interp(step, steps, flops), value)


def _png(figure: Any) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    return picture.getvalue()


def _page(sweep: SweepFolder, findings: Findings, curves: list[Curve], pictures: dict[str, bytes]) -> str:
    points = {run.name: run.point for run in sweep.points}
    said = "".join(f"<li>{escape(sentence)}</li>\n" for sentence in sentences(findings, len(points), points))
    shown = ""
    for name, plot in plots(findings).items():
        shown += f"<h2>{plot.title}</h2>\n"
        if plot.missing:
            shown += f"<p>Not drawn: {escape(plot.missing)}.</p>\n"
            continue
        data = base64.b64encode(pictures[name]).decode()
        shown += f'<p>{escape(plot.says)}</p>\n<img alt="{escape(plot.title)}" src="data:image/png;base64,{data}">\n'
    settings = f", with {' '.join(sweep.overrides)} at every point" if sweep.overrides else ""
    return _PAGE.format(
        name=escape(sweep.folder.name), recipe=escape(sweep.recipe), settings=escape(settings), said=said, shown=shown,
        constants=_constants(findings), metric=escape(findings.metric), runs=_runs(sweep, findings),
        curves="".join(_chart(curve, findings.metric) for curve in curves),
    )  # fmt: skip


def _constants(findings: Findings) -> str:
    """Constants of the law and both pairs of exponents, with intervals."""
    rows = []
    if findings.law is not None:
        spread = findings.law.leave_one_out()
        for name, found in findings.law.constants().items():
            least, most = spread[name]
            rows.append((name, "law", found, f"{least:.4g} to {most:.4g}"))
    for way, pair in exponents(findings).items():
        rows += [(name, way, found, "") for name, found in zip("ab", pair, strict=True)]
    body = "".join(
        f"<tr><td>{name}</td><td>{way}</td><td>{found.value:.4g}</td><td>{found.low:.4g} to {found.high:.4g}</td>"
        f"<td>{spread}</td></tr>\n"
        for name, way, found, spread in rows
    )
    if not body:
        return "<p>None.</p>"
    head = "<tr><th></th><th>by</th><th>value</th><th>95 % interval</th><th>leaving out one run</th></tr>"
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>\n{body}</tbody></table></div>'


def _runs(sweep: SweepFolder, findings: Findings) -> str:
    """All points: the finished with their numbers and a link to the curve, the others with their state."""
    by_name = {row["name"]: row for row in findings.rows}
    used = [name for name in COLUMNS if any(row.get(name) is not None for row in findings.rows)]
    metrics = [name for name in findings.rows[0] if name.startswith(("R@", "N@"))]
    head = "".join(f"<th>{escape(COLUMNS.get(name, name))}</th>" for name in [*used, *metrics])
    body = ""
    for run in sweep.points:
        row = by_name.get(run.name)
        if row is None:
            failure = run.failure()
            why = f"failed with exit code {failure['code']}: {failure['error']}" if failure else run.state()
            body += f'<tr><td>{escape(run.name)}</td><td colspan="{len(used) + len(metrics)}">{escape(why)}</td></tr>\n'
            continue
        cells = "".join(f"<td>{_cell(row.get(name))}</td>" for name in [*used, *metrics])
        body += f'<tr><td><a href="#{escape(run.name)}">{escape(run.name)}</a></td>{cells}</tr>\n'
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>\n{body}</tbody></table>"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return escape(value)
    if abs(value) >= 10:
        return short(value) if abs(value) >= 100 else f"{value:.1f}"
    return f"{value:.4g}" if abs(value) < 0.01 else f"{value:.4f}"


def _chart(curve: Curve, metric: str) -> str:
    """One run's curve over steps."""
    low, high, last = curve.metric.min(), curve.metric.max(), curve.step[-1]
    x = WIDTH * curve.step / max(last, 1)
    y = HEIGHT - HEIGHT * (curve.metric - low) / max(high - low, 1e-9)
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return (
        f'<figure id="{escape(curve.name)}"><figcaption>{escape(curve.name)}</figcaption>'
        f'<svg viewBox="-52 -8 {WIDTH + 60} {HEIGHT + 30}"><path d="M0 0V{HEIGHT}H{WIDTH}"/><polyline points="{path}"/>'
        f'<text x="-6" y="8" text-anchor="end">{high:.3f}</text><text x="-6" y="{HEIGHT}" text-anchor="end">{low:.3f}</text>'
        f'<text x="0" y="{HEIGHT + 16}">{escape(metric)}, step 0</text>'
        f'<text x="{WIDTH}" y="{HEIGHT + 16}" text-anchor="end">{last:,.0f}</text></svg></figure>\n'
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{name}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 32px auto; padding: 0 20px; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }}
th, td {{ text-align: right; padding: 4px 10px; border-bottom: 1px solid #8884; white-space: nowrap; }}
th:first-child, td:first-child, td[colspan] {{ text-align: left; padding-left: 0; }}
img {{ width: 100%; max-width: 800px; }}
.curves {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 16px; }}
figure {{ margin: 0; }} figure:target {{ outline: 2px solid #c60; }}
figcaption {{ font-size: 12px; overflow-wrap: anywhere; }}
polyline {{ fill: none; stroke: hsl(210 65% 50%); stroke-width: 1.6; }} path {{ fill: none; stroke: #8888; }}
text {{ font-size: 11px; fill: currentColor; opacity: .7; }}
</style>
</head>
<body>
<h1>{name}</h1>
<p>A sweep of the recipe {recipe}{settings}.</p>
<ul>
{said}</ul>
{shown}
<h2>Constants</h2>
{constants}
<h2>Runs</h2>
<p>Parameters are counted three ways: <em>active</em>, what one token uses of the matrices; <em>total</em>, all experts of
them; <em>tables</em>, everything whose rows are a vocabulary. Laws are of the active ones. A target is an item, its target tokens
are its codes. <em>loss</em> is the mean training loss over the last tenth of the steps, <em>valid_loss</em> that of the last
validation; the plots and laws above are of {metric}. The same table is in runs.csv.</p>
<div class="scroll">{runs}</div>
<h2>Curves</h2>
<div class="curves">
{curves}</div>
</body>
</html>
"""
