"""One process's stretch of a run: what every training loop does besides training.

It books the seconds, ends a process that hangs, notices that the machine is wanted back, and records a profile.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from onerec_jax.config import Recipe
from onerec_jax.errors import PreemptedError, StorageError
from onerec_jax.storage import is_remote, upload
from onerec_jax.train.goodput import Books
from onerec_jax.train.preemption import Preemption
from onerec_jax.train.served import Served
from onerec_jax.train.watchdog import Watchdog


class Session:
    """Use it as `with Session(recipe) as session:`, from joining the other processes to the end of the loop.

    In the loop `session.doing(kind)` wraps what is no step, and `session.stepped` follows every step.
    """

    def __init__(self, recipe: Recipe):
        self._run, self._profile = recipe.run_directory, recipe.train.profiled
        first = jax.process_index() == 0
        self.books = Books(self._run if first else None)
        here = Path(tempfile.gettempdir()) if is_remote(self._run) else self._run
        self._watchdog = Watchdog(recipe.faults, here / f"stacks-{jax.process_index()}.txt")
        self._preemption = Preemption()
        self._served = Served(recipe.faults.metrics_port) if first and recipe.faults.metrics_port else None
        self._pending: Any = None
        self._profiling: Path | None = None
        self._at = 0

    def __enter__(self) -> Session:
        self._preemption.__enter__()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._profiling is not None:
            self._end_profile()
        self._preemption.__exit__()
        self._watchdog.close()
        self.books.flush(self._at)
        if error is None:
            self.books.end()
        self.books.close()
        if self._served is not None:
            self._served.close()
        if isinstance(error, OSError):
            raise StorageError(f"data or a run's files could not be read or written: {error}") from error

    def begin(self, step: int) -> None:
        """All is loaded; the loop goes on from `step`."""
        self._at = step
        self.books.begin(step)
        self._profile_from(step)

    @contextlib.contextmanager
    def doing(self, kind: str) -> Iterator[None]:
        """Books what happens within as `data`, `checkpoint` or `evaluation`."""
        if kind != "data":
            self._watchdog.rest()
        with self.books(kind):
            yield

    def stepped(self, step: int, result: Any) -> bool:
        """Step number `step` is on its way to `result`, an array; whether to save and leave after it.

        Returns when the step before it is done, so that the device always has one waiting and the clock tells the truth.
        """
        if self._pending is not None:
            jax.block_until_ready(self._pending)
        self._pending, self._at = result, step
        self._watchdog.beat()
        self._profile_from(step)
        return self._preemption.asked(step)

    def log(self, step: int, values: dict[str, float]) -> None:
        """A log line has been written."""
        self.books.flush(step)
        if self._served is not None:
            self._served.show(step, values, self.books.total)

    def back(self, step: int) -> None:
        """The run has gone back to `step`."""
        self._at = step
        self.books.back(step)

    def leave(self, step: int, saved: Callable[[], None]) -> None:
        """Ends the process where `stepped` said so, once `saved` returns.

        Raises:
            PreemptedError: always.
        """
        with self.doing("checkpoint"):
            saved()
        raise PreemptedError(f"asked to leave after step {step}; it is saved, and the same command goes on from there")

    def _profile_from(self, step: int) -> None:
        """Starts and ends the trace of `train.profile_steps`, whose first step follows step number `first - 1`."""
        if self._profile is None:
            return
        first, last = self._profile
        if step == first - 1 and self._profiling is None:
            self._profiling = Path(tempfile.mkdtemp()) if is_remote(self._run) else self._run / "profile"
            jax.profiler.start_trace(str(self._profiling))
        elif step == last and self._profiling is not None:
            jax.block_until_ready(self._pending)
            self._end_profile()

    def _end_profile(self) -> None:
        jax.profiler.stop_trace()
        written, self._profiling = self._profiling, None
        if is_remote(self._run) and written is not None:
            upload(written, self._run / "profile")
            shutil.rmtree(written)
