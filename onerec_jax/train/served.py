"""The latest log line and the seconds by kind of a run as Prometheus text, on loopback."""

from __future__ import annotations

import re

from prometheus_client import CollectorRegistry, Gauge, start_http_server

from onerec_jax.errors import InputError


class Served:
    """`http://127.0.0.1:PORT/metrics`: `onerec_step`, a gauge `onerec_NAME` for every metric, `onerec_seconds{kind}`.

    Raises:
        InputError: the port is taken.
    """

    def __init__(self, port: int):
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._seconds = Gauge("onerec_seconds", "seconds of this process by kind", ["kind"], registry=self._registry)
        try:
            self._server, self._thread = start_http_server(port, "127.0.0.1", self._registry)
        except OSError as error:
            raise InputError(
                f"faults.metrics_port {port} cannot be listened on: {error.strerror}; 0 serves nothing"
            ) from None

    def show(self, step: int, values: dict[str, float], seconds: dict[str, float]) -> None:
        for name, value in {"step": float(step), **values}.items():
            gauge = "onerec_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
            if gauge not in self._gauges:
                self._gauges[gauge] = Gauge(gauge, name, registry=self._registry)
            self._gauges[gauge].set(value)
        for kind, value in seconds.items():
            self._seconds.labels(kind).set(value)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
