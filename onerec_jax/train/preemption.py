"""Leaving when asked to: SIGTERM to any process, and the step after which all of them save."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

from onerec_jax.errors import PreemptedError


class Preemption:
    """Whether the scheduler wants the machine back, from `with` on until its end.

    A process by itself listens for SIGTERM. Of several, those of `jax.distributed`, each that gets a SIGTERM tells the
    coordination service, which agrees with all on one step ahead; there `asked` is true in every process.
    """

    def __init__(self) -> None:
        self._came = False
        self._training = False
        self._before: signal.Handlers | None = None

    def __enter__(self) -> Preemption:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._on_sigterm)  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        if not self._training:
            raise PreemptedError("asked to leave by SIGTERM before the first step")
        self._came = True

    def asked(self, step: int) -> bool:
        """Whether to save and leave now; every process asks after every step."""
        self._training = True
        return self._came if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)
