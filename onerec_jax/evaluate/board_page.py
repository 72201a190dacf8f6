"""A board as Markdown and as one HTML page that loads nothing, with the learning curves of its rows."""

from __future__ import annotations

import dataclasses
from html import escape

import numpy as np

_WIDTH, _HEIGHT = 640, 240
_HUES = (210, 25, 140, 280, 50, 330, 180, 0)


@dataclasses.dataclass(frozen=True)
class Row:
    """What is known of one row."""

    name: str
    metrics: list[dict[str, float]]  # one per seed
    seconds: list[float]  # wall time of the seeds that ran in one go
    curves: list[list[dict[str, float]]]  # lines of `metrics.jsonl` per seed
    floor: bool = False


def cells(row: Row, columns: list[str]) -> list[str]:
    """Mean and sample standard deviation over seeds of each column, the number of seeds, the mean wall time."""
    found = []
    for column in columns:
        values = [metrics[column] for metrics in row.metrics if column in metrics]
        spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
        found.append(f"{np.mean(values):.4f}{spread}" if values else "")
    seeds = "" if row.floor else str(len(row.metrics))
    return [*found, seeds, f"{np.mean(row.seconds) / 60:.1f} min" if row.seconds else ""]


def _columns(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for metrics in row.metrics for name in metrics))


def markdown(name: str, protocol: str, command: str, device: str, rows: list[Row]) -> str:
    """The table, under its protocol, command and device."""
    columns = _columns(rows)
    head = ["", *columns, "seeds", "wall time"]
    lines = [f"# {name}", "", f"`{command}`", "", f"{protocol}. {device}. Mean ± standard deviation over seeds.", ""]
    lines += ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        label = row.name if row.floor else f"**{row.name}**"
        lines.append("| " + " | ".join([label.replace("|", "\\|"), *cells(row, columns)]) + " |")
    return "\n".join(lines) + "\n"


def html(name: str, protocol: str, command: str, device: str, rows: list[Row]) -> str:
    """The table and the curves of training and validation loss."""
    columns = _columns(rows)
    head = "".join(f"<th>{escape(column)}</th>" for column in ["", *columns, "seeds", "wall time"])
    body = ""
    for row in rows:
        data = "".join(f"<td>{escape(cell)}</td>" for cell in cells(row, columns))
        body += f"<tr{' class=floor' if row.floor else ''}><td>{escape(row.name)}</td>{data}</tr>\n"
    trained = [row for row in rows if row.curves]
    charts = "".join(
        f"<h2>{title}</h2>{_chart(trained, key)}"
        for title, key in (("Training loss", "loss"), ("Validation loss", "valid/loss"))
        if any(key in line for row in trained for curve in row.curves for line in curve)
    )
    return _PAGE.format(
        name=escape(name), protocol=escape(protocol), command=escape(command), device=escape(device),
        head=head, body=body, charts=charts,
    )  # fmt: skip


def _chart(rows: list[Row], key: str) -> str:
    """One line per row and seed, from the first logged step to the last, with a legend."""
    lines = [
        (number, [(line["step"], line[key]) for line in curve if key in line])
        for number, row in enumerate(rows)
        for curve in row.curves
    ]
    points = np.array([point for _, line in lines for point in line], float)
    (left, low), (right, high) = points.min(0), points.max(0)
    scale = np.array([_WIDTH / max(right - left, 1e-9), _HEIGHT / max(high - low, 1e-9)])
    drawn = ""
    for number, line in lines:
        at = (np.array(line, float).reshape(-1, 2) - [left, low]) * scale
        path = " ".join(f"{x:.1f},{_HEIGHT - y:.1f}" for x, y in at)
        drawn += f'<polyline points="{path}" style="stroke:{_colour(number)}"/>'
    legend = "".join(
        f'<span><i style="background:{_colour(n)}"></i>{escape(row.name)}</span>' for n, row in enumerate(rows)
    )
    axes = (
        f'<text x="-8" y="8" text-anchor="end">{high:.2f}</text><text x="-8" y="{_HEIGHT}" text-anchor="end">{low:.2f}</text>'
        f'<text x="0" y="{_HEIGHT + 18}">step {left:.0f}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT + 18}" text-anchor="end">{right:.0f}</text>'
        f'<path d="M0 0V{_HEIGHT}H{_WIDTH}"/>'
    )
    return f'<svg viewBox="-60 -8 {_WIDTH + 70} {_HEIGHT + 34}">{axes}{drawn}</svg><p class="legend">{legend}</p>'


def _colour(number: int) -> str:
    return f"hsl({_HUES[number % len(_HUES)]} 65% {50 if number < len(_HUES) else 35}%)"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{name}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 32px auto; padding: 0 20px; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: 5px 12px; border-bottom: 1px solid #8884; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
tr.floor {{ opacity: .65; }}
svg {{ width: 100%; max-width: 800px; overflow: visible; }}
polyline {{ fill: none; stroke-width: 1.6; }} path {{ fill: none; stroke: #8888; }}
text {{ font-size: 11px; fill: currentColor; opacity: .7; }}
.legend span {{ margin-right: 18px; }}
.legend i {{ display: inline-block; width: 12px; height: 3px; margin-right: 6px; vertical-align: middle; }}
</style>
</head>
<body>
<h1>{name}</h1>
<p>{protocol}. {device}. Mean ± standard deviation over seeds.</p>
<p><code>{command}</code></p>
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>
{body}</tbody></table></div>
{charts}
</body>
</html>
"""
