"""All points of a sweep on one screen: what each has reached, and when it will be done."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.live import Live
from rich.table import Table

from onerec_jax.scaling.points import PointRun, SweepFolder

TAIL = 1 << 15  # bytes of metrics.jsonl that hold a few lines
EVERY_S = 60.0  # between two lines about all points, where there is no terminal
ORDER = ("failed", "running", "begun", "waiting", "done")


class Row(NamedTuple):
    """What is known of one point; None where nothing is."""

    name: str
    state: str
    step: int
    steps: int
    loss: float | None = None
    step_s: float | None = None
    left_s: float | None = None
    seen: float | None = None  # when it last said something, in seconds since the epoch
    error: str = ""

    def cells(self) -> tuple[str, ...]:
        loss = "" if self.loss is None else f"{self.loss:.4f}"
        step_s = "" if self.step_s is None else f"{self.step_s:.3g}"
        left = _time(self.left_s) if self.state in ("running", "begun") else ""
        age = "" if self.seen is None or self.state == "done" else f"{_time(time.time() - self.seen)} ago"
        said = self.error if self.state == "failed" else age
        return self.state, f"{self.step}/{self.steps}", loss, step_s, left, said


def row_of(run: PointRun, running: bool) -> Row:
    """What a point's files tell."""
    steps, state, line = run.recipe.train.steps, run.state(), last_line(run.folder / "metrics.jsonl")
    row = Row(run.name, "running" if running and state != "done" else state, 0, steps)
    if line is not None:
        step, step_s = int(line["step"]), line.get("step_ms", 0.0) / 1000
        row = row._replace(
            step=step, loss=line["loss"], step_s=step_s, left_s=(steps - step) * step_s, seen=line["time"]
        )
    failure = run.failure() if state == "failed" else None
    return row._replace(error=f"exit code {failure['code']}: {failure['error']}") if failure else row


def last_line(path: Path) -> dict[str, float] | None:
    """The last whole line of training of `metrics.jsonl`."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        whole = file.read().split(b"\n")[:-1]
    for line in reversed(whole):
        if b'"loss":' in line and line.startswith(b"{"):
            return json.loads(line)
    return None


def rows_of(sweep: SweepFolder, running: set[str]) -> list[Row]:
    return [row_of(run, run.name in running) for run in sweep.points]


def table(sweep: SweepFolder, rows: list[Row], height: int = 0) -> Table:
    """A row per point; where `height` lines are too few for all of them, first what failed or runs, and the others as counts."""
    counts = Counter(row.state for row in rows)
    caption = ", ".join(f"{counts[state]} {state}" for state in ORDER if counts[state])
    found = Table(title=f"{sweep.folder}", title_justify="left", caption=caption, caption_justify="left")
    found.add_column("point", overflow="fold")
    for name in ("state", "step", "loss", "s/step", "left", ""):
        found.add_column(name, justify="left" if name in ("state", "") else "right", overflow="fold")
    shown = sorted(rows, key=lambda row: ORDER.index(row.state)) if height and len(rows) > height else rows
    for row in shown[: height or None]:
        found.add_row(row.name, *row.cells(), style={"failed": "red", "running": "bold"}.get(row.state))
    if len(shown) > (height or len(shown)):
        found.add_row(f".. and {len(shown) - height} more", *[""] * 6)
    return found


class Progress:
    """The table of a sweep that is running, redrawn on stderr; where that is no terminal, a line for every change of a point."""

    def __init__(self, sweep: SweepFolder):
        self._sweep, self._console = sweep, Console(stderr=True)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._states: dict[str, str] = {}
        self._drawn, self._summed = 0.0, time.monotonic()

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._drawn = 0.0
        self.show(set())
        if self._live is not None:
            self._live.__exit__(None, None, None)

    def show(self, running: set[str]) -> None:
        """Where all points are, at most once a second; the named ones have a process."""
        if time.monotonic() < self._drawn + 1:
            return
        self._drawn, rows = time.monotonic(), rows_of(self._sweep, running)
        if self._live is not None:
            self._live.update(table(self._sweep, rows, max(3, self._console.height - 7)), refresh=True)
            return
        for row in rows:
            if self._states.get(row.name, "waiting") != row.state:
                self._say(row)
            self._states[row.name] = row.state
        if time.monotonic() > self._summed + EVERY_S:
            self._summed = time.monotonic()
            for row in rows:
                if row.state == "running" and row.step:
                    self._say(row)

    def _say(self, row: Row) -> None:
        state, step, loss, step_s, left, error = row.cells()
        parts = [state, f"step {step}", loss and f"loss {loss}", step_s and f"{step_s} s/step", left and f"{left} left"]
        parts.append(error if state == "failed" else "")
        print(f"{row.name}: {', '.join(filter(None, parts))}", file=self._console.file, flush=True)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 90:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60}:{minutes % 60:02} h"
