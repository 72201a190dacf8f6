"""Where the seconds of a run go, over all of its starts: `goodput.jsonl`, and what it says.

A process writes one line when it knows the step it goes on from, and then one line of seconds by kind for every stretch of
steps. What no line covers between two starts, and the steps that a start has to take again, is lost to restarts. A run that
has come to its end says so, and the time until somebody starts it again is nobody's.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from onerec_jax.errors import InputError
from onerec_jax.train.metrics import Lines

FILE = "goodput.jsonl"
KINDS: tuple[str, ...] = ("step", "data", "checkpoint", "evaluation", "compile", "init")
LOST = "lost to restarts"

_COMPILING = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")


class Books:
    """The seconds of this process by kind; every second from its making on is of one kind.

    `with books("data"):` books what happens within as data, and what is compiled within as compile; what is in no such
    block is `init` until `begin`, and `step` after it. Nothing is written before `begin`.

    Args:
        directory: the run's, or None for a process that writes nothing.
        clock: seconds since the epoch.
    """

    def __init__(self, directory: Path | None, clock: Callable[[], float] = time.time):
        self._clock = clock
        self._directory, self._file = directory, None
        self._open = ["init"]
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self.total = dict.fromkeys(KINDS, 0.0)
        self._started = self._last = clock()
        self._compiled = 0.0
        self._from = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)

    def _on_duration(self, event: str, duration_secs: float, **_: object) -> None:
        if event in _COMPILING:
            self._compiled += duration_secs

    def _settle(self) -> None:
        now = self._clock()
        passed, compiled = now - self._last, 0.0
        if self._compiled:
            compiled, self._compiled = min(self._compiled, passed), 0.0
        for kind, seconds in (("compile", compiled), (self._open[-1], passed - compiled)):
            self._seconds[kind] += seconds
            self.total[kind] += seconds
        self._last = now

    @contextlib.contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        self._settle()
        self._open.append(kind)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def begin(self, step: int) -> None:
        """What came before was preparation; training goes on from `step`."""
        self._settle()
        if self._directory is not None:
            self._file = Lines(self._directory / FILE)
        self._open[0], self._from = "step", step
        self._write({"time": self._started, "start": step})
        self.flush(step)

    def back(self, step: int) -> None:
        """The steps after `step` are to be taken again."""
        self.flush(step)
        self._write({"time": self._last, "back": step})

    def flush(self, step: int) -> None:
        """Writes the seconds since the last call, which took the run to `step`."""
        self._settle()
        seconds = {kind: round(value, 6) for kind, value in self._seconds.items() if value}
        self._write({"time": self._last, "from": self._from, "to": step, "seconds": seconds})
        self._seconds, self._from = dict.fromkeys(KINDS, 0.0), step

    def end(self) -> None:
        """The run is done, as far as it was asked for."""
        self._write({"time": self._last, "end": self._from})

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_duration)
        if self._file is not None:
            self._file.close()

    def _write(self, line: dict[str, object]) -> None:
        if self._file is not None:
            self._file.write(line)


def goodput(run: Path) -> tuple[dict[str, float], int]:
    """Seconds of each kind from the first start of a run to its last line, and how often it was started.

    Their sum is the wall time without that between an end and the next start. A stretch whose steps were taken again later is
    lost, whatever it was spent on.

    Raises:
        InputError: the run has written no `goodput.jsonl`.
    """
    path = run / FILE
    if not path.is_file():
        raise InputError(f"{run} has no {FILE}: no training was started there with this version")
    lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    spent, starts, now = dict.fromkeys((*KINDS, LOST), 0.0), 0, None
    for line, again_from in zip(lines, _taken_again_from(lines), strict=True):
        if "seconds" in line:
            for kind, seconds in line["seconds"].items():
                spent[LOST if line["to"] > again_from else kind] += seconds
            now = line["time"]
        elif "start" in line:
            starts += 1
            spent[LOST] += 0.0 if now is None else max(0.0, line["time"] - now)
        elif "end" in line:
            now = None
    return spent, starts


def _taken_again_from(lines: list[dict[str, Any]]) -> list[float]:
    """For every line the first step that a later line goes back to."""
    least, found = float("inf"), []
    for line in reversed(lines):
        found.append(least)
        least = min(least, line.get("start", line.get("back", least)))
    return found[::-1]


def goodput_table(spent: dict[str, float], starts: int) -> Table:
    """A row per kind, with its share of the wall time."""
    wall = sum(spent.values())
    title = (
        f"{wall:,.0f} s over {starts} start{'s' if starts != 1 else ''}; goodput {spent['step'] / max(wall, 1e-9):.1%}"
    )
    table = Table("", "seconds", "share", title=title, title_justify="left")
    for kind, seconds in spent.items():
        table.add_row(kind, f"{seconds:,.1f}", f"{seconds / max(wall, 1e-9):.1%}")
    return table
