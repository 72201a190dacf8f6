"""Steps whose loss or gradient is not finite change nothing; a loss that leaps ends the run's trust in its latest steps."""

from __future__ import annotations

import collections
import math
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from onerec_jax.config import FaultsConfig
from onerec_jax.errors import StoppedError
from onerec_jax.train.metrics import Metrics

_LOST = "no step had a finite loss and gradient"
_REMEMBERED = 10
_FIRST = 3  # log lines before there is a median to go by


def where_finite(finite: Array, new: Any, old: Any) -> Any:
    """`new` where `finite`, bool [], is true, and `old`, a tree of the same shape, bit for bit where it is not."""
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)


def counted(finite: Array, metrics: Metrics) -> Metrics:
    """The metrics of a step, of no weight where it was skipped, and `skipped`, the share of steps that were."""
    kept = {name: where_finite(finite, pair, jax.tree.map(jnp.zeros_like, pair)) for name, pair in metrics.items()}
    return kept | {"skipped": (1.0 - finite.astype(jnp.float32), jnp.ones(()))}


def stop_if_lost(step: int, values: dict[str, float]) -> None:
    """For a loop that does not go back.

    Raises:
        StoppedError: every step of a log line was skipped.
    """
    if values["skipped"] >= 1:
        raise StoppedError(
            f"stopped at step {step}: {_LOST} since the last log line; the last checkpoint is of before, and a lower "
            "learning rate may help"
        )


class Divergence:
    """Looks at every log line of a run, for a loss that is not what it was.

    A line is a divergence if all of its steps were skipped, or its loss is `faults.spike_factor` times the median of the
    last ten lines. The loss is a global mean, so all processes find the same.
    """

    def __init__(self, settings: FaultsConfig):
        self._factor = settings.spike_factor
        self._losses: collections.deque[float] = collections.deque(maxlen=_REMEMBERED)

    def found(self, values: dict[str, float]) -> str | None:
        """What is wrong with a log line; None if nothing is."""
        loss = values["loss"]
        if values["skipped"] >= 1 or not math.isfinite(loss):
            return _LOST
        usual = statistics.median(self._losses) if len(self._losses) >= _FIRST else math.inf
        if self._factor and loss > self._factor * usual:
            return f"the loss leapt from {usual:.3f} to {loss:.3f} (faults.spike_factor {self._factor:g})"
        self._losses.append(loss)
        return None
