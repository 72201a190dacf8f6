"""Metrics are (sum, weight) pairs until they are printed: exact under accumulation, masks and uneven hosts."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from onerec_jax.storage import Growing, is_remote

Metrics = dict[str, tuple[Any, Any]]


def mean(value: Any) -> tuple[Array, Array]:
    """A metric that is already a mean, of weight one."""
    return jnp.asarray(value, jnp.float32), jnp.ones((), jnp.float32)


def add(a: Metrics, b: Metrics) -> Metrics:
    return jax.tree.map(lambda x, y: x + y, a, b)


def ratios(metrics: Metrics) -> dict[str, float]:
    """sum / weight of each metric, on the host."""
    return {name: float(total) / max(float(weight), 1e-20) for name, (total, weight) in jax.device_get(metrics).items()}


class MetricsLog:
    """`metrics.jsonl` (always) and TensorBoard events (optional) of a run; lines of one step are written together."""

    def __init__(self, directory: Path, tensorboard: bool):
        self._file = Lines(directory / "metrics.jsonl")
        self._events = None
        if tensorboard and not is_remote(directory):
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(directory / "tensorboard"))

    def write(self, step: int, values: dict[str, float]) -> None:
        self._file.write({"step": step, "time": round(time.time(), 3), **values})
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


class Lines:
    """A file of lines, open to append whole ones.

    A last line without an end, which a kill may leave, is cut off, so that the next one does not join it. A line that cannot
    be written is lost, and the first one said so on stderr: training goes on to where a checkpoint fails for the same reason.
    In a bucket lines are written by a thread, and those of an outage once it is over.
    """

    def __init__(self, path: Path):
        self._remote = Growing(path) if is_remote(path) else None
        if self._remote is not None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            content = path.read_bytes()
            if not content.endswith(b"\n"):
                os.truncate(path, content.rfind(b"\n") + 1)
        self._path, self._file, self._lost = path, path.open("ab", buffering=0), False

    def write(self, values: dict[str, Any]) -> None:
        line = json.dumps(values).encode() + b"\n"
        if self._remote is not None:
            self._remote.append(line)
            return
        end = self._file.tell()
        try:
            if self._file.write(line) == len(line):
                return
            reason = "the disk took a part of it only"
        except OSError as error:
            reason = error.strerror
        os.truncate(self._path, end)
        if not self._lost:
            print(f"warning: a line of {self._path} is lost: {reason}", file=sys.stderr)
        self._lost = True

    def close(self) -> None:
        (self._remote or self._file).close()


def read_metrics(directory: Path) -> list[dict[str, float]]:
    """All whole lines of a run's `metrics.jsonl`; where a resumed run repeats a step, its last line counts."""
    whole_lines = (directory / "metrics.jsonl").read_text().split("\n")[:-1]
    lines = [json.loads(line) for line in whole_lines]
    latest = {(line["step"], *sorted(line)): line for line in lines}  # lines of one kind have the same names
    return [latest[key] for key in sorted(latest)]
