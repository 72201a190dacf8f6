"""Points of a sweep as processes of this machine, so many at a time, each on processors and GPUs of its own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from onerec_jax.config import LocalCluster
from onerec_jax.errors import ExitCode, InputError
from onerec_jax.launch.supervise import handling, kill_group
from onerec_jax.scaling.outcome import write_failure
from onerec_jax.scaling.points import PointRun, SweepFolder
from onerec_jax.scaling.progress import Progress

OUTPUT = "output.log"


def onerec(words: list[str]) -> list[str]:
    return [sys.executable, "-m", "onerec_jax.cli", *words]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Refuses to run a sweep that another process of this machine runs."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{folder} is being run by another process: `onerec sweep status {folder}`") from None
        yield


class _Child(NamedTuple):
    run: PointRun
    process: subprocess.Popen[bytes]


def run_local(sweep: SweepFolder, commands: dict[str, list[str]], cluster: LocalCluster, at_a_time: int) -> int:
    """Runs the commands of these points; returns 0, or PREEMPTED where this process was told to end.

    Then the points are told too, and save; the same call goes on with them. The first of `at_a_time` places has the first
    processors and GPUs, and so on. What a point prints is in its `output.log`.
    """
    waiting = [run for run in sweep.points if run.name in commands]
    places: list[_Child | None] = [None] * at_a_time
    progress, told, deadline = Progress(sweep), False, float("inf")

    def tell(number: int, _: FrameType | None = None) -> None:
        nonlocal told, deadline
        told, deadline = True, min(deadline, time.monotonic() + cluster.grace_s)
        _signal(places, signal.SIGTERM)

    try:
        with handling((signal.SIGTERM, signal.SIGINT), tell), progress:
            while any(places) or (waiting and not told):
                for place, child in enumerate(places):
                    if child is not None and child.process.poll() is not None:
                        _ended(child)
                        places[place] = child = None
                    if child is None and waiting and not told:
                        run = waiting.pop(0)
                        places[place] = _Child(run, _start(run, commands[run.name], cluster, place, at_a_time))
                        if told:  # while it was being started
                            _signal(places, signal.SIGTERM)
                if time.monotonic() > deadline:
                    _signal(places, signal.SIGKILL)
                progress.show({child.run.name for child in places if child is not None})
                time.sleep(0.1)
    finally:
        _signal(places, signal.SIGKILL)
    return ExitCode.PREEMPTED if told else 0


def _start(run: PointRun, words: list[str], cluster: LocalCluster, place: int, places: int) -> subprocess.Popen[bytes]:
    environment = {"JAX_COMPILATION_CACHE_DIR": str((run.folder.parent / "cache").resolve()), **os.environ}
    environment |= cluster.environment
    if n := cluster.gpus_per_process:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu) for gpu in range(place * n, (place + 1) * n))
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / OUTPUT).open("ab") as output:
        process = subprocess.Popen(
            words, env=environment, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C reaches it through this process alone
        )  # fmt: skip
    if hasattr(os, "sched_setaffinity"):
        mine = sorted(os.sched_getaffinity(0))
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(process.pid, mine[place::places] or mine)
    return process


def _signal(places: list[_Child | None], number: int) -> None:
    for child in places:
        if child is not None and child.process.poll() is None:
            kill_group(child.process, number)


def _ended(child: _Child) -> None:
    """Writes down the failure of a process that could not do so itself."""
    code, run = child.process.returncode, child.run
    if code in (0, ExitCode.PREEMPTED) or run.failed.exists():
        return
    lines = (run.folder / OUTPUT).read_text(errors="replace").strip().splitlines()
    sentence = lines[-1] if lines else "it printed nothing"
    write_failure(run.folder, 128 - code if code < 0 else code, f"ended by signal {-code}" if code < 0 else sentence)
