"""Slurm jobs: one process a node, or one a GPU, that find each other by what `srun` tells them."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from onerec_jax.config import SlurmCluster
from onerec_jax.errors import ExitCode
from onerec_jax.launch.job import Job, check_devices, check_processes
from onerec_jax.launch.submit import require, submit

# What every process of the job runs. The first to fail writes down its exit code: that of srun is the highest of all, and so
# often that of a process which srun itself ended.
_TASK = """trap : TERM; "$@"; code=$?
[ $code = 0 ] || (set -C; echo $code > "$0") 2> /dev/null
exit $code"""

# `command` and `folder` are set above it.
_BODY = """
first=$folder/$SLURM_JOB_ID.exit failures=$folder/$SLURM_JOB_ID.failures
rm -f "$first"
trap : TERM  # to be here when the processes have ended

srun --kill-on-bad-exit=1 --label bash -c {task} "$first" "${{command[@]}}"
code=$?
[ ! -s "$first" ] || code=$(cat "$first")

# Neither success nor what would end the same way again; nor a job that Slurm itself ends or starts again.
case $code in 0 | {input} | {stopped}) exit "$code" ;; esac
[ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ] || exit "$code"

if [ "$code" != {preempted} ]; then
  echo "$code" >> "$failures"
  if [ "$(wc -l < "$failures")" -gt {max_restarts} ]; then
    echo "the job ended with exit code $code and was started again {max_restarts} times already" >&2
    exit "$code"
  fi
fi
[ "$code" != {storage} ] || sleep {backoff_s}
scontrol requeue "$SLURM_JOB_ID"
"""


def render_slurm(name: str, points: list[list[str]], cluster: SlurmCluster, folder: Path) -> str:
    """The batch script of one command, or of a job array of several: one point of a sweep each, `cluster.parallel` at a time.

    Args:
        name: of the job, where `cluster.name` is empty.
        points: the words of each command; an array, whatever their number, if there is not exactly one.
        cluster: where it runs.
        folder: of output and exit codes; what the commands read may lie there too.
    """
    array = len(points) != 1
    options = {
        "job-name": cluster.name or name,
        "nodes": cluster.nodes,
        "ntasks-per-node": cluster.gpus_per_node or 1,
        "gpus-per-node": cluster.gpus_per_node,
        "cpus-per-task": cluster.cpus_per_task,
        "mem": cluster.memory,
        "time": _time(cluster.hours),
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "array": (f"0-{len(points) - 1}" + (f"%{cluster.parallel}" if cluster.parallel else "")) if array else "",
        "signal": f"TERM@{cluster.warn_s}",
        "output": folder / ("%A_%a.out" if array else "%j.out"),
        "open-mode": "append",
    }
    lines = ["#!/usr/bin/env bash"]
    lines += [f"#SBATCH --{option}={value}" for option, value in options.items() if value]
    lines += [f"#SBATCH {option}" for option in ("--requeue", *cluster.options)]
    lines += ["", "set -u"]
    lines += [f"export {variable}={shlex.quote(value)}" for variable, value in cluster.environment.items()]
    lines += [f"folder={shlex.quote(str(folder))}"]
    if array:
        lines += ["case $SLURM_ARRAY_TASK_ID in"]
        lines += [f"  {i}) command=({shlex.join(words)}) ;;" for i, words in enumerate(points)]
        lines += ["esac"]
    else:
        lines += [f"command=({shlex.join(points[0])})"]
    return "\n".join(lines) + _BODY.format(
        task=shlex.quote(_TASK), max_restarts=cluster.max_restarts, backoff_s=cluster.backoff_s,
        **{code.name.lower(): code.value for code in ExitCode},
    )  # fmt: skip


def _time(hours: float) -> str:
    """D-HH:MM:SS, empty for none."""
    minutes, seconds = divmod(round(hours * 3600), 60)
    return f"{minutes // 1440}-{minutes // 60 % 24:02}:{minutes % 60:02}:{seconds:02}" if hours else ""


def slurm_words(job: Job, cluster: SlurmCluster, folder: Path) -> list[str]:
    """What each process of a job runs, whose files lie in `folder`."""
    return [cluster.python or sys.executable, "-m", "onerec_jax.cli", *job.words(folder)]


def launch_slurm(job: Job, cluster: SlurmCluster, dry_run: bool) -> int:
    """Submits a job, or only prints its script.

    Raises:
        InputError: a job that does not fit the cluster, or Slurm did not take it.
    """
    check_processes(job, cluster.nodes * max(1, cluster.gpus_per_node))
    if cluster.gpus_per_node:
        check_devices(job, cluster.nodes * cluster.gpus_per_node)
    folder = job.folder(cluster)
    script = render_slurm(job.name, [slurm_words(job, cluster, folder)], cluster, folder)
    if dry_run:
        print(script, end="")
        return 0
    require("sbatch", "on a machine of the Slurm cluster")
    job.write(folder)
    (folder / "job.sh").write_text(script, encoding="utf-8")
    print(submit(["sbatch", str(folder / "job.sh")]), end="")
    return 0
