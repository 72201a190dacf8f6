"""The result of an A/B test: as a table, as JSON, as a plot, and as one HTML page that loads nothing."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.table import Table

from onerec_jax.evaluate.jackknife import Estimate, Interval, interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Change(NamedTuple):
    """How a metric of an arm differs from the first arm's; the users are the same, so their differences are paired."""

    absolute: Interval
    percent: Interval | None  # of the first arm's value, None where that is 0
    overlap: bool  # whether the two arms' own intervals have a point in common


@dataclasses.dataclass(frozen=True)
class ABResult:
    """Metrics of every arm, and their changes from the first arm to each of the others, with 95 % intervals."""

    protocol: str
    arms: dict[str, dict[str, Interval]]  # arm -> metric -> value
    changes: dict[str, dict[str, Change]]  # arm, all but the first -> metric -> change

    def save(self, path: Path) -> None:
        """Writes the result as JSON; intervals as {value, low, high}."""
        plain = {
            "protocol": self.protocol,
            "arms": {arm: {m: i._asdict() for m, i in found.items()} for arm, found in self.arms.items()},
            "changes": {arm: {m: _plain(c) for m, c in found.items()} for arm, found in self.changes.items()},
        }
        path.write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def table(self) -> Table:
        """One row per metric: every arm's value, and the change from the first; * where the arms' intervals are apart."""
        table = Table(title=self.protocol, title_justify="left", caption=_LEGEND, caption_justify="left")
        table.add_column("")
        for name in _heads(self):
            table.add_column(name, justify="right")
        for metric, cells in _rows(self):
            table.add_row(metric, *cells)
        return table


def _plain(change: Change) -> dict:
    percent = None if change.percent is None else change.percent._asdict()
    return {"absolute": change.absolute._asdict(), "percent": percent, "overlap": change.overlap}


def compare(measured: dict[str, dict[str, Estimate]], protocol: str) -> ABResult:
    """The result of metrics by arm, the first arm being the baseline."""
    arms = {arm: {m: interval(lambda x: x, e) for m, e in found.items()} for arm, found in measured.items()}
    baseline, *others = measured
    changes = {
        arm: {
            metric: _change(measured[baseline][metric], estimate, arms[baseline][metric], arms[arm][metric])
            for metric, estimate in measured[arm].items()
        }
        for arm in others
    }
    return ABResult(protocol, arms, changes)


def _change(first: Estimate, other: Estimate, first_is: Interval, other_is: Interval) -> Change:
    known = first.value > 0 and bool((first.without > 0).all())
    percent = interval(lambda a, b: 100 * (b / a - 1), first, other) if known else None
    overlap = first_is.low <= other_is.high and other_is.low <= first_is.high
    return Change(interval(lambda a, b: b - a, first, other), percent, overlap)


_LEGEND = "95 % intervals over users; * the intervals of the two arms are apart"


def _heads(result: ABResult) -> list[str]:
    baseline = next(iter(result.arms))
    return [*result.arms, *(f"{arm} against {baseline}" for arm in result.changes)]


def _rows(result: ABResult) -> list[tuple[str, list[str]]]:
    """(metric, cells) as both tables show them."""
    rows = []
    for metric in next(iter(result.arms.values())):
        values = [found[metric] for found in result.arms.values()]
        cells = [f"{v.value:.4g} ± {v.high - v.value:.2g}" for v in values]
        for changes in result.changes.values():
            change = changes[metric]
            if change.percent is None:
                cells.append(f"{change.absolute.value:+.3g}")
            else:
                value, low, high = change.percent
                cells.append(f"{value:+.2f} % [{low:+.2f}, {high:+.2f}]{'' if change.overlap else ' *'}")
        rows.append((metric, cells))
    return rows


def draw(result: ABResult) -> Figure:
    """Relative change of every metric from the first arm to each of the others, with its interval."""
    from matplotlib.figure import Figure

    baseline, metrics = next(iter(result.arms)), list(next(iter(result.arms.values())))
    figure = Figure(figsize=(8, 1.6 + 0.36 * len(metrics)), layout="constrained")
    axes = figure.subplots()
    for number, (arm, changes) in enumerate(result.changes.items()):
        known = [
            (row, change.percent)
            for row, metric in enumerate(metrics)
            if (change := changes[metric]).percent is not None
        ]
        if not known:
            continue
        rows = np.array([row for row, _ in known]) + 0.22 * (number - (len(result.changes) - 1) / 2)
        value, low, high = np.array([percent for _, percent in known]).T
        axes.errorbar(value, rows, xerr=[value - low, high - value], fmt="o", markersize=4, capsize=3, label=arm)
    axes.axvline(0, color="0.6", linewidth=1, zorder=0)
    axes.set_yticks(range(len(metrics)), metrics)
    axes.invert_yaxis()
    axes.set_xlabel(f"change from {baseline}, % (95 % interval)")
    axes.legend(loc="best", frameon=False)
    return figure


def write_report(result: ABResult, folder: Path) -> Path:
    """Writes `ab_test.json`, `ab_test.png` and `ab_test.html`; the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    result.save(folder / "ab_test.json")
    picture = io.BytesIO()
    draw(result).savefig(picture, format="png", dpi=150)
    (folder / "ab_test.png").write_bytes(picture.getvalue())
    head = "".join(f"<th>{escape(name)}</th>" for name in ["", *_heads(result)])
    body = ""
    for metric, cells in _rows(result):
        body += f"<tr><td>{escape(metric)}</td>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>\n"
    page = _PAGE.format(
        protocol=escape(result.protocol), legend=_LEGEND, head=head, body=body,
        picture=base64.b64encode(picture.getvalue()).decode(),
    )  # fmt: skip
    (folder / "ab_test.html").write_text(page, encoding="utf-8")
    return folder / "ab_test.html"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>A/B test</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 32px auto; padding: 0 20px; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: 5px 12px; border-bottom: 1px solid #8884; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
img {{ width: 100%; max-width: 800px; margin-top: 24px; }}
</style>
</head>
<body>
<h1>A/B test</h1>
<p>{protocol}.</p>
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>
{body}</tbody></table></div>
<p>{legend}.</p>
<img alt="change of every metric, with 95 % intervals" src="data:image/png;base64,{picture}">
</body>
</html>
"""
