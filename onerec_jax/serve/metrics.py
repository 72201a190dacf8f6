"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import jax
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_COMPILED = "/jax/core/compile/backend_compile_duration"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Compiles:
    """Every program that XLA has made in this process since the first use, by whomever."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILED:
            with self._lock:
                self.count += 1


COMPILES = Compiles()


class Metrics:
    """Counters of one server.

    Args:
        depth: how many requests wait.
    """

    def __init__(self, depth: Callable[[], int]):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "onerec_requests", "answers, by path and HTTP status", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "onerec_recommend_seconds",
            "from the arrival of POST /recommend to its answer, where it was answered with a list",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch = Histogram(
            "onerec_batch_size",
            "requests that one run of the model answers",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=self.registry,
        )
        Gauge("onerec_queue_depth", "requests that wait for the model", registry=self.registry).set_function(depth)
        Gauge("onerec_compiles_total", "programs that XLA has compiled", registry=self.registry).set_function(
            lambda: COMPILES.count
        )

    def text(self) -> bytes:
        """In the text format of Prometheus."""
        return generate_latest(self.registry)
