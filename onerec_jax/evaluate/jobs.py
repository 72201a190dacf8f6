"""Runs the jobs of a board, in turn or several at a time, each of those in a process and on processors of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from onerec_jax.config import Recipe
from onerec_jax.data.store import Dataset
from onerec_jax.errors import FORESEEN, InputError
from onerec_jax.evaluate.evaluation import evaluate
from onerec_jax.evaluate.stages import Runs, Stage
from onerec_jax.generate.load import load_recommender
from onerec_jax.tokenizer.semantic_ids import fit_and_save
from onerec_jax.train.loop import Report, code_revision


@dataclasses.dataclass(frozen=True)
class Job:
    """One row of one seed."""

    row: str
    seed: int
    recipe: Recipe  # its run directory holds the result
    runs: Runs  # of which the last is evaluated; those of an earlier row where they are the same
    stage: Stage = ""

    @property
    def result(self) -> Path:
        return self.recipe.run_directory / "result.json"

    def __str__(self) -> str:
        return f"{self.row}, seed {self.seed}"


def fit_ids(job: Job, dataset: Dataset) -> None:
    """The job's semantic IDs, where they are missing."""
    recipe = job.recipe
    if not (recipe.tokenizer_directory / "card.json").exists():
        fit_and_save(dataset, recipe.tokenizer, recipe.seed, recipe.tokenizer_directory)


def run_job(job: Job, dataset: Dataset, report: Report = print) -> dict[str, Any]:
    """Tokenizer, training and evaluation of one job, each where it is missing; keeps and returns the result."""
    if job.result.exists():
        return json.loads(job.result.read_text())
    recipe, started = job.recipe, time.perf_counter()
    resumed = job.runs.pretraining.run_directory.exists()
    fit_ids(job, dataset)
    run = job.runs.make(report)
    recipe.run_directory.mkdir(parents=True, exist_ok=True)
    recommender = dataclasses.replace(load_recommender(str(run)), recipe=recipe, run=recipe.run_directory)
    evaluation = evaluate(recommender, report)
    result = {
        "metrics": evaluation.rows["model"],
        "seconds": round(time.perf_counter() - started, 1),
        "resumed": resumed,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "revision": code_revision(),
    }
    partial = job.result.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.rename(job.result)
    return result


def run_jobs(jobs: list[Job], dataset: Dataset, processes: int, report: Report) -> Iterator[Job]:
    """Each job when its result is there; with several processes in the order in which they end.

    Raises:
        InputError: a job's own, in turn; with several processes, one that names the jobs that failed, after all others ended.
    """
    if processes == 1:
        for job in jobs:
            report(str(job))
            run_job(job, dataset, report)
            yield job
        return
    for job in jobs:  # before the processes, of which several may need the same IDs
        fit_ids(job, dataset)
    failed = []
    for part in waves(jobs):
        waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        ended: queue.SimpleQueue[tuple[Job, bool]] = queue.SimpleQueue()
        for job in part:
            waiting.put(job)
        for share in _shares(processes):
            threading.Thread(target=_work, args=(waiting, ended, share), daemon=True).start()
        for _ in part:
            job, done = ended.get()
            if done:
                yield job
            else:
                failed.append(str(job))
    if failed:
        raise InputError(
            f"jobs failed, for the reasons above: {'; '.join(failed)}; the board goes on when called again"
        )


def waves(jobs: list[Job]) -> list[list[Job]]:
    """The jobs in parts that run one after the other, so that no two train the same run at a time."""
    found, made = [], set()
    while jobs:
        part, claimed = [], set()
        for job in jobs:
            needed = set(job.runs.names) - made
            if not needed & claimed:
                part.append(job)
                claimed |= needed
        made |= claimed
        found.append(part)
        jobs = [job for job in jobs if job not in part]
    return found


def _shares(processes: int) -> list[set[int] | None]:
    """The processors of each process, None where they cannot be chosen or are fewer than the processes."""
    if not hasattr(os, "sched_getaffinity"):
        return [None] * processes
    mine = sorted(os.sched_getaffinity(0))
    return [set(mine[i::processes]) or None for i in range(processes)]


def _work(waiting: queue.SimpleQueue[Job], ended: queue.SimpleQueue[tuple[Job, bool]], share: set[int] | None) -> None:
    context = multiprocessing.get_context("spawn")
    with contextlib.suppress(queue.Empty):
        while True:
            job = waiting.get_nowait()
            process = context.Process(target=_alone, args=(job, share), daemon=True)
            process.start()
            process.join()
            ended.put((job, process.exitcode == 0 and job.result.exists()))


def _alone(job: Job, share: set[int] | None) -> None:
    """A job as a process: what it reports is printed under its name."""

    def report(line: str) -> None:
        print(f"[{job}] {line}", flush=True)

    if share:
        os.sched_setaffinity(0, share)
    try:
        run_job(job, Dataset(job.recipe.dataset_directory), report)
    except FORESEEN as error:
        report(f"onerec: {error}")
        raise SystemExit(int(error.code)) from None
