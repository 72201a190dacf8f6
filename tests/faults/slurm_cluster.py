"""A real Slurm cluster of two nodes on this machine: `with Cluster(folder) as cluster: cluster.run("sbatch", ...)`.

Both nodes are this machine, under names of their own in /etc/hosts and with ports of their own. Needs root; installs Debian's
`slurm-wlm` and `munge` where they are missing. Keys, configuration and state are in the folder, apart from any other cluster.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import portpicker
import psutil

HOSTS = Path("/etc/hosts")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
SECONDS = 60


class Unavailable(RuntimeError):
    """Slurm cannot be had here; says why."""


def install() -> None:
    """Installs Slurm if it is missing.

    Raises:
        Unavailable: not root, or no package.
    """
    search = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin"
    if os.geteuid():
        raise Unavailable(
            "a Slurm cluster on this machine needs root: to install Slurm, and to name the nodes in /etc/hosts"
        )
    if all(shutil.which(program, path=search) for program in PROGRAMS):
        return
    for words in (["update"], ["install", "--yes", "--no-install-recommends", "slurm-wlm", "munge"]):
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        command = ["apt-get", "--quiet", *words]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        except OSError as error:
            raise Unavailable(f"slurm-wlm and munge are missing, and there is no apt-get: {error}") from None
        if done.returncode:
            raise Unavailable(f"`{' '.join(command)}` failed: {' '.join(done.stderr.split())[-500:]}")


def wait_for(condition: Callable[[], Any], what: str, seconds: float = SECONDS) -> Any:
    """What the condition gives when it gives something."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, f"after {seconds:.0f} s still not: {what}"
        time.sleep(0.2)
    return found


class Cluster:
    """Two nodes with one processor each, in a partition `all` and in `urgent`, whose jobs take nodes away from those of `all`.

    A node that does not answer is down after ten seconds; a job that is told to make room has ten seconds to end.
    """

    def __init__(self, folder: Path):
        install()
        self.folder = folder
        self.port = portpicker.pick_unused_port()
        self.nodes = (f"onerec-{self.port}-a", f"onerec-{self.port}-b")
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin",
        }
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            munge = self.folder / "munge"
            files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
            self._daemon(
                "munged", "--foreground", "--force", *(f"--{name}={munge / file}" for name, file in files.items())
            )
            wait_for((munge / "socket").exists, "munged listens")
            self._daemon("slurmctld", "-D", "-c")
            for node in self.nodes:
                self.start_node(node)
            wait_for(lambda: self.run("sinfo", "-h", "-o", "%D %t", "-p", "all") == "2 idle", "both nodes are there")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()
        _edit_hosts(lambda lines: [line for line in lines if self.nodes[0] not in line])

    def _configure(self) -> None:
        folder, host = self.folder, socket.gethostname().split(".")[0]
        for part in ("state", "spool", "munge"):
            (folder / part).mkdir(parents=True)
        (folder / "munge").chmod(0o711)  # munged refuses a folder that others may write to
        (folder / "munge" / "key").write_bytes(random.randbytes(128))
        (folder / "munge" / "key").chmod(0o600)
        _edit_hosts(lambda lines: [*lines, f"127.0.0.1 {' '.join(self.nodes)}"])
        ports = [portpicker.pick_unused_port() for _ in self.nodes]
        (folder / "slurm.conf").write_text(
            "\n".join(
                [
                    "ClusterName=onerec",
                    f"SlurmctldHost={host}(127.0.0.1)",
                    f"SlurmctldPort={self.port}",
                    "SlurmUser=root",
                    f"AuthInfo=socket={folder}/munge/socket,cred_expire=5",  # also how long a requeued job waits
                    f"StateSaveLocation={folder}/state",
                    f"SlurmdSpoolDir={folder}/spool/%n",
                    f"SlurmctldPidFile={folder}/slurmctld.pid",
                    f"SlurmdPidFile={folder}/%n.pid",
                    f"SlurmctldLogFile={folder}/slurmctld.log",
                    f"SlurmdLogFile={folder}/%n.log",
                    f"FirstJobId={random.randrange(1, 4000)}",  # from which jax.distributed makes its port
                    "ProctrackType=proctrack/pgid",
                    "TaskPlugin=task/none",
                    "SelectType=select/cons_tres",
                    "SelectTypeParameters=CR_CPU",
                    "SlurmdParameters=config_overrides",
                    "SlurmdTimeout=10",
                    "KillWait=5",
                    "ReturnToService=2",
                    "MpiDefault=none",
                    "PreemptType=preempt/partition_prio",
                    "PreemptMode=REQUEUE",
                    *(
                        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1"
                        for node, port in zip(self.nodes, ports, strict=True)
                    ),
                    "PartitionName=all Nodes=ALL Default=YES PriorityTier=1 GraceTime=10",
                    "PartitionName=urgent Nodes=ALL PriorityTier=2",
                    "",
                ]
            )
        )

    def _daemon(self, *words: str, **environment: str) -> None:
        with open(self.folder / f"{words[0]}.out", "ab") as output:
            self._daemons.append(
                subprocess.Popen(
                    words, env=self.environment | environment, stdout=output, stderr=output, start_new_session=True
                )
            )

    def _processes(self, node: str = "") -> list[psutil.Process]:
        """Daemons, steps and jobs of this cluster, or of one node.

        Its marks are in their environment; a step's daemon writes over its own, and is the parent of one that has it.
        """
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                marks = process.environ()
                ours = marks.get("SLURM_CONF") == self.environment["SLURM_CONF"] and process.pid != os.getpid()
                if ours and node in ("", marks.get("SLURMD_NODENAME")):
                    found.append(process)
                    parent = process.parent()
                    if parent is not None and parent.name() == "slurmstepd":
                        found.append(parent)
        return found

    def start_node(self, node: str) -> None:
        self._daemon("slurmd", "-D", "-N", node, SLURMD_NODENAME=node)

    def kill_node(self, node: str) -> None:
        """As when its power fails: its daemons first, which would tell how a job ended, then all else that runs there."""
        daemons = ("slurmd", "slurmstepd")
        victims = sorted(self._processes(node), key=lambda process: not process.name().startswith(daemons))
        assert victims, f"nothing runs on {node}"
        for process in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    def run(self, *words: str) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """`scontrol show job`, field by field."""
        fields = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(field.partition("=")[::2] for field in fields)

    def ended(self, number: str, seconds: float = SECONDS) -> dict[str, str]:
        """The job when it has ended for good."""

        def look() -> dict[str, str] | None:
            job = self.job(number)
            return job if job["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT") else None

        return wait_for(look, f"job {number} has ended", seconds)


def _edit_hosts(change: Callable[[list[str]], list[str]]) -> None:
    """In place, as the file may be a mount; under a lock, as another cluster may be starting."""
    with HOSTS.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        lines = change(file.read().splitlines())
        file.seek(0)
        file.truncate()
        file.write("\n".join(lines) + "\n")
