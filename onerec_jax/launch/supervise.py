"""Processes that are started, watched, ended and started again together."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

from onerec_jax.config import LocalCluster
from onerec_jax.errors import ExitCode

FINAL = (0, ExitCode.INPUT, ExitCode.STOPPED)  # what is not started again
Write = Callable[[str], None]


class Command(NamedTuple):
    """One process: its words, and the variables it has beside those of this process."""

    words: list[str]
    environment: dict[str, str]

    def __str__(self) -> str:
        return shlex.join([*(f"{name}={value}" for name, value in self.environment.items()), *self.words])


def say(line: str) -> None:
    print(line, flush=True)


def supervise(make: Callable[[], list[Command]], cluster: LocalCluster, write: Write = say) -> int:
    """Runs what `make` gives until it ends for good; returns the exit code of the job.

    What failed is started again, `cluster.max_restarts` times at most, but not after the codes of `FINAL`, nor where this
    process was told to end. PREEMPTED does not count, and after STORAGE there is a pause.
    """
    failures = 0
    while True:
        code, told = run_together(make(), cluster.grace_s, write)
        if code in FINAL or told:
            return code
        failures += code != ExitCode.PREEMPTED
        if failures > cluster.max_restarts:
            write(f"the job ended with exit code {code} and was started again {cluster.max_restarts} times already")
            return code
        if code == ExitCode.STORAGE:
            time.sleep(cluster.backoff_s)
        write(f"the job ended with exit code {code}: starting it again")


def run_together(started: list[Command], grace_s: float, write: Write) -> tuple[int, bool]:
    """Runs processes until all have ended; returns the exit code of them all, and whether this process was told to end.

    The first to fail ends the others: SIGTERM, and SIGKILL `grace_s` seconds later. SIGTERM and SIGINT of this process go to
    all of them. The code is that of the first failure, or that of one which says that trying again is of no use. Death by a
    signal counts as 128 and its number, as in a shell.
    """
    running: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []
    lock = threading.Lock()
    first, deadline, told = 0, float("inf"), 0

    def tell(number: int, _: FrameType | None = None) -> None:
        nonlocal told, deadline
        told, deadline = number, min(deadline, time.monotonic() + grace_s)
        _signal(running, number)

    try:
        with handling((signal.SIGTERM, signal.SIGINT), tell):
            for i, command in enumerate(started):
                running.append(_start(command))
                readers.append(threading.Thread(target=_copy, args=(i, running[i], write, lock)))
                readers[i].start()
            if told:  # while they were being started
                _signal(running, told)
            while None in [process.poll() for process in running]:
                failed = [process.returncode for process in running if process.returncode]
                if failed and not first:
                    first = failed[0]
                    deadline = min(deadline, time.monotonic() + grace_s)
                    if not told:
                        _signal(running, signal.SIGTERM)
                if time.monotonic() > deadline:
                    _signal(running, signal.SIGKILL)
                time.sleep(0.05)
    finally:
        _signal(running, signal.SIGKILL)
        for process, reader in zip(running, readers, strict=False):
            reader.join(timeout=5)
            if reader.is_alive():  # what the process started has outlived it, and holds its output
                kill_group(process, signal.SIGKILL)
                reader.join()
    codes = [code for code in (first, *(process.returncode for process in running)) if code]
    code = next((code for code in codes if code in FINAL), codes[0] if codes else 0)
    return (128 - code if code < 0 else code), bool(told)


def _start(command: Command) -> subprocess.Popen[str]:
    # a session of its own: a Ctrl-C reaches it through this process alone
    return subprocess.Popen(
        command.words, env={**os.environ, **command.environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip


def _copy(i: int, process: subprocess.Popen[str], write: Write, lock: threading.Lock) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        with lock:  # a line and its end are two writes of `print`
            write(f"[{i}] {line.rstrip()}")


def _signal(running: list[subprocess.Popen[str]], number: int) -> None:
    """To each process that still runs, and those that it started."""
    for process in running:
        if process.poll() is None:
            kill_group(process, number)


def kill_group(process: subprocess.Popen[Any], number: int) -> None:
    """A signal to a process and those that it started, which all have ended if there are none."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


@contextlib.contextmanager
def handling(numbers: tuple[int, ...], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Signals of this process go to `handler` until the end of the block."""
    former = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, what in former.items():
            signal.signal(number, what)
