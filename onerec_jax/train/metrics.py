"""Metrics are (sum, weight) pairs until they are printed: exact under accumulation, masks and uneven hosts."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
from jax import Array

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
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "metrics.jsonl"
        _drop_partial_line(path)
        self._file: TextIO = path.open("a", buffering=1)
        self._events = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(directory / "tensorboard"))

    def write(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def _drop_partial_line(path: Path) -> None:
    """Cuts off a last line without an end, which a kill may leave, so that the next line does not join it."""
    if path.exists():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)


def read_metrics(directory: Path) -> list[dict[str, float]]:
    """All whole lines of a run's `metrics.jsonl`; where a resumed run repeats a step, its last line counts."""
    whole_lines = (directory / "metrics.jsonl").read_text().split("\n")[:-1]
    lines = [json.loads(line) for line in whole_lines]
    latest = {(line["step"], *sorted(line)): line for line in lines}  # lines of one kind have the same names
    return [latest[key] for key in sorted(latest)]
