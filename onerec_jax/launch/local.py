"""A job of this machine: processes that meet on a loopback port, and train as one."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

from onerec_jax.config import LocalCluster
from onerec_jax.launch.job import Job, check_processes
from onerec_jax.launch.supervise import Command, supervise


def commands(job: Job, cluster: LocalCluster, folder: Path) -> list[Command]:
    """The processes of a job whose files lie in `folder`."""
    check_processes(job, cluster.processes)
    coordinator = f"127.0.0.1:{cluster.port or _free_port()}"
    found = []
    for i in range(cluster.processes):
        words = [sys.executable, "-m", "onerec_jax.cli", *job.words(folder)]
        if cluster.processes > 1:
            words += [
                f"distributed.coordinator={coordinator}",
                f"distributed.processes={cluster.processes}",
                f"distributed.process={i}",
            ]
        environment = dict(cluster.environment)
        if n := cluster.gpus_per_process:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu) for gpu in range(i * n, (i + 1) * n))
        found.append(Command(words, environment))
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch_local(job: Job, cluster: LocalCluster, dry_run: bool) -> int:
    """Runs a job here; returns its exit code."""
    folder = job.folder(cluster)
    if dry_run:
        for command in commands(job, cluster, folder):
            print(command)
        return 0
    check_processes(job, cluster.processes)
    job.write(folder)
    return supervise(lambda: commands(job, cluster, folder), cluster)
