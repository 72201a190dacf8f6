"""A thread that ends a process whose steps no longer end, so that whoever started it can start it again."""

from __future__ import annotations

import collections
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from onerec_jax.config import FaultsConfig
from onerec_jax.errors import ExitCode

_REMEMBERED = 100
_FIRST = 3  # steps before there is a median to go by; the first of them compile


class Watchdog:
    """Ends the process, with the stacks of all threads, when a step takes too long.

    A hang is a wait inside of a collective or a system call: nothing can be raised there, so the process is ended by `end`
    at once; whatever is on disk is whole.

    Args:
        settings: how long is too long.
        stacks: file that the stacks are written to; they also go to stderr.
        end: called with `ExitCode.HANG`; it does not return.
        clock: seconds.
    """

    def __init__(
        self,
        settings: FaultsConfig,
        stacks: Path,
        end: Callable[[int], object] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._settings, self._stacks, self._end, self._clock = settings, stacks, end, clock
        self._took: collections.deque[float] = collections.deque(maxlen=_REMEMBERED)
        self._since: float | None = None
        self._closed = threading.Event()
        if settings.hang_factor:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def beat(self) -> None:
        """A step has ended, and the next one begins."""
        now = self._clock()
        if self._since is not None:
            self._took.append(now - self._since)
        self._since = now

    def rest(self) -> None:
        """What follows is no step; the next `beat` begins one."""
        self._since = None

    def close(self) -> None:
        self._closed.set()

    def limit(self) -> float | None:
        """Seconds after which a step is a hang; None while there is no median."""
        if len(self._took) < _FIRST:
            return None
        settings = self._settings
        return max(settings.hang_least_s, settings.hang_factor * statistics.median(self._took))

    def look(self) -> None:
        """Ends the process if the step has taken too long."""
        since, limit = self._since, self.limit()
        if since is None or limit is None or self._clock() - since <= limit:
            return
        message = f"onerec: no step has ended for {limit:.0f} s (faults.hang_factor, faults.hang_least_s); stacks: {self._stacks}"
        print(message, file=sys.stderr, flush=True)
        with self._stacks.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        self._end(ExitCode.HANG)

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._settings.hang_least_s / 4)):
            self.look()
