"""`onerec sweep`: the points of a sweep as processes of this machine, a Slurm job array, or JobSets on GKE.

A point that is done is never run again, and one that failed only on request; everything else goes on from its last checkpoint.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from onerec_jax.config import LocalCluster
from onerec_jax.errors import ExitCode, InputError
from onerec_jax.launch.gke import manifest, render_gke
from onerec_jax.launch.job import POINT, Job, check_devices, check_processes
from onerec_jax.launch.launch import PLATFORMS
from onerec_jax.launch.slurm import render_slurm, slurm_words
from onerec_jax.launch.submit import require, submit
from onerec_jax.launch.supervise import Command, run_together
from onerec_jax.recipe import load_section
from onerec_jax.scaling.local import OUTPUT, locked, onerec, run_local
from onerec_jax.scaling.page import write_report
from onerec_jax.scaling.points import PointRun, SweepFolder, plan, write
from onerec_jax.scaling.sweep import load_sweep

Report = Callable[[str], None]


class Request(NamedTuple):
    """What is asked for, checked."""

    sweep: SweepFolder
    cluster: Any  # of the launcher
    launcher: str
    missing: list[PointRun]  # points to run
    evaluate: bool
    max_parallel: int | None

    def job(self, run: PointRun) -> Job:
        return Job(POINT, run.recipe, ("--evaluate",) if self.evaluate else ())


def make_request(
    name: str,
    overrides: list[str],
    *,
    launcher: str = "local",
    max_parallel: int | None = None,
    retry_failed: bool = False,
    folder_name: str = "",
    cluster: str = "",
    evaluate: bool = False,
) -> Request:
    """Reads and checks a sweep, its points and where they run; writes nothing.

    Args:
        name: name or path of the sweep.
        overrides: `key.path=value` settings of all points, and `cluster.key=value` of the cluster.
        launcher: a name of `PLATFORMS`.
        max_parallel: points at a time; by default one on this machine, and all elsewhere.
        retry_failed: run failed points again.
        folder_name: of the sweep's folder, by default that of its file.
        cluster: YAML file of settings of the cluster.
        evaluate: also measure Recall and NDCG of every point.

    Raises:
        InputError: any setting out of place, or what `plan` refuses.
    """
    if launcher not in PLATFORMS:
        raise InputError(f"--launcher {launcher} is none of {', '.join(PLATFORMS)}")
    if max_parallel is not None and launcher == "gke":
        raise InputError(
            "--max-parallel is not for --launcher gke, where Kueue says how many points run at a time: set cluster.queue to a "
            "queue with a quota of so many points"
        )
    own = [override for override in overrides if override.startswith("cluster.")]
    settings: Any = load_section(PLATFORMS[launcher][0], "cluster", cluster, own)
    if launcher == "local" and settings.processes > 1:
        raise InputError(
            f"cluster.processes is {settings.processes}, but a point of a sweep is one process here: see --max-parallel"
        )
    changes = [override for override in overrides if override not in own]
    sweep = plan(folder_name or Path(name).stem, load_sweep(name), changes)
    missing = [run for run in sweep.points if not run.finished(evaluate) and (retry_failed or run.failure() is None)]
    return Request(sweep, settings, launcher, missing, evaluate, max_parallel)


def launch_sweep(request: Request, dry_run: bool, report: Report) -> int:
    """Runs or submits the points that are missing; returns an exit code.

    Raises:
        InputError: points that do not fit the cluster, that are in its line already, or that failed.
    """
    start = {"local": _local, "slurm": _slurm, "gke": _gke}[request.launcher]
    return start(request, dry_run, report)


def _local(request: Request, dry_run: bool, report: Report) -> int:
    sweep, cluster = request.sweep, request.cluster
    if dry_run:
        for words in [*_preparation(sweep), *(request.job(run).words(run.folder) for run in request.missing)]:
            print(Command(onerec(words), dict(cluster.environment)))
        return 0
    with locked(sweep.folder):
        sweep.write()
        if code := _prepare(sweep, report):
            return code
        for run in request.missing:
            run.failed.unlink(missing_ok=True)
        jobs = {run.name: onerec(request.job(run).words(run.folder)) for run in request.missing}
        if code := run_local(sweep, jobs, cluster, request.max_parallel or 1):
            return code
    _report(sweep, report)
    return 0


def _report(sweep: SweepFolder, report: Report) -> None:
    """The page of what is done, and an error that names what failed."""
    if any(run.done.exists() for run in sweep.points):
        report(f"report: {write_report(sweep)}")
    failures = [
        (run, failure) for run in sweep.points if (failure := run.failure()) is not None and not run.done.exists()
    ]
    if failures:
        named = "; ".join(f"{run.name} (exit code {failure['code']}: {failure['error']})" for run, failure in failures)
        raise InputError(
            f"{len(failures)} of {len(sweep.points)} points failed: {named}; their output is in {sweep.folder}/POINT/{OUTPUT}, "
            "and the same command with --retry-failed runs them again"
        )


def _preparation(sweep: SweepFolder) -> list[list[str]]:
    return [words for there, words in sweep.prepared() if not there.exists()]


def _prepare(sweep: SweepFolder, report: Report) -> int:
    """Makes the datasets and semantic IDs that are missing, each in a process of its own, so that this one holds no device."""
    for words in _preparation(sweep):
        code, told = run_together([Command(onerec(words), {})], LocalCluster().grace_s, report)
        if code or told:
            return code or ExitCode.PREEMPTED
    return 0


def _slurm(request: Request, dry_run: bool, report: Report) -> int:
    sweep, cluster = request.sweep, request.cluster
    if request.max_parallel:
        cluster = cluster.model_copy(update={"parallel": request.max_parallel})
    for job in map(request.job, request.missing):
        check_processes(job, cluster.nodes * max(1, cluster.gpus_per_node))
        if cluster.gpus_per_node:
            check_devices(job, cluster.nodes * cluster.gpus_per_node)
    folder = sweep.folder / "slurm"
    points = [slurm_words(request.job(run), cluster, run.folder) for run in request.missing]
    script = render_slurm(sweep.folder.name, points, cluster, folder) if points else ""
    if dry_run:
        print(script, end="")
        return 0
    if not points:
        report("nothing to run")
        return 0
    require("sbatch", "on a machine of the Slurm cluster")
    _check_not_in_line(folder / "submitted")
    sweep.write()
    if code := _prepare(sweep, report):
        return code
    for run in request.missing:
        run.failed.unlink(missing_ok=True)
    write(folder / "job.sh", script)
    answer = submit(["sbatch", str(folder / "job.sh")])
    write(folder / "submitted", answer)
    print(answer, end="")
    return 0


def _check_not_in_line(submitted: Path) -> None:
    """Refuses to submit points a second time, of which two processes would then train the same run."""
    if not submitted.exists():
        return
    number = submitted.read_text().split()[-1]
    asked = subprocess.run(
        ["squeue", "--noheader", f"--jobs={number}"], capture_output=True, text=True, check=False
    )  # which fails for a job that has long ended
    if asked.stdout.strip():
        raise InputError(
            f"job {number} of this sweep is still in line or running: wait for it, or `scancel {number}` first"
        )


def _gke(request: Request, dry_run: bool, report: Report) -> int:
    sweep, cluster = request.sweep, request.cluster
    documents = []
    for run in request.missing:  # named by their digits, which stay where the sweep grows
        named = cluster.model_copy(update={"name": f"{cluster.name or sweep.folder.name}-{run.name[-8:]}"})
        documents += render_gke(request.job(run), named)
    if dry_run:
        print(manifest(documents), end="")
        return 0
    if not documents:
        report("nothing to run")
        return 0
    require("kubectl", "where kubectl reaches the cluster")
    sweep.write()
    print(submit(["kubectl", "apply", "-f", "-"], manifest(documents)), end="")
    return 0
