"""On a real Slurm cluster: jobs that lose a node, are preempted, cancelled or end themselves."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import yaml
from slurm_cluster import Cluster, Unavailable, wait_for
from tiny import COMPILED, tiny_model, tiny_values, untimed

from onerec_jax import cli
from onerec_jax.config import SlurmCluster
from onerec_jax.data.prepare import prepare
from onerec_jax.data.store import Dataset
from onerec_jax.launch.slurm import render_slurm
from onerec_jax.recipe import load_recipe, make_recipe
from onerec_jax.tokenizer.semantic_ids import fit_and_save
from onerec_jax.train.metrics import read_metrics

STEPS, SAVED_EVERY, KILLED_AFTER = 40, 10, 15


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory):
    try:
        with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
            yield cluster
    except Unavailable as reason:
        pytest.fail(str(reason))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    values = tiny_values(folder)
    values["model"] = tiny_model(positive_length=0, lifelong_length=0).model_dump(mode="json")
    values["train"] |= {"steps": STEPS, "log_every": 1, "checkpoint_every": SAVED_EVERY}
    values["mesh"] = {"data": 2}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    loaded = make_recipe(values)
    fit_and_save(Dataset(prepare(loaded)), loaded.tokenizer, loaded.seed, loaded.tokenizer_directory)
    return path


@pytest.fixture
def launch(slurm: Cluster, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """`onerec launch` of the recipe on both nodes; gives the job's number and its run directory."""

    def start(name: str) -> tuple[str, Path]:
        monkeypatch.chdir(tmp_path)
        for variable, value in slurm.environment.items():
            monkeypatch.setenv(variable, value)
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
        monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        words = ["launch", str(recipe), f"name={name}", "--on", "slurm", "cluster.nodes=2"]
        monkeypatch.setattr(sys, "argv", ["onerec", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        return capsys.readouterr().out.split()[-1], load_recipe(str(recipe), [f"name={name}"]).run_directory

    return start


def values(run: Path) -> list[dict[str, float]]:
    return [untimed(line) for line in read_metrics(run)]


def output(folder: Path) -> str:
    return "\n".join(path.read_text() for path in folder.rglob("*.out"))


def test_a_job_that_loses_a_node_goes_on_and_ends_bit_for_bit_as_if_it_had_not(slurm: Cluster, launch, tmp_path: Path):
    number, undisturbed = launch("undisturbed")
    assert slurm.ended(number, 300)["JobState"] == "COMPLETED", output(tmp_path)
    expected = values(undisturbed)
    assert [line["step"] for line in expected] == [*range(1, STEPS + 1)]

    number, run = launch("disturbed")
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(values(run)) >= KILLED_AFTER, "it trains", 300)
    slurm.kill_node(slurm.nodes[1])
    assert values(run)[-1]["step"] < STEPS
    wait_for(lambda: slurm.job(number)["Restarts"] != "0", "the job is requeued", 120)
    slurm.start_node(slurm.nodes[1])
    job = slurm.ended(number, 300)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), output(tmp_path)
    assert f"resumed {run} at step " in output(tmp_path)
    assert values(run) == expected


# A process that does as the trainer does when it is told to end, but for one of the job's which first ends by itself.
STAND_IN = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(6))
code, seconds = sys.argv[1:]
if os.environ["SLURM_PROCID"] == "1" and code:
    sys.exit(int(code))
first = not int(os.environ.get("SLURM_RESTART_COUNT", 0))
time.sleep(float(seconds) if first else 0.5)
"""


@pytest.fixture
def submit(slurm: Cluster, tmp_path: Path):
    """Submits stand-ins on both nodes, of which one ends with a code and the others wait to be told to, on the first try."""

    def start(*points: tuple[str, float], **settings) -> str:
        cluster = SlurmCluster.model_validate({"nodes": 2, "max_restarts": 1} | settings)
        commands = [[sys.executable, "-c", STAND_IN, code, str(seconds)] for code, seconds in points]
        (tmp_path / "job.sh").write_text(render_slurm("stand-in", commands, cluster, tmp_path))
        return slurm.run("sbatch", "--parsable", str(tmp_path / "job.sh"))

    return start


def started(slurm: Cluster, number: str) -> None:
    wait_for(lambda: f"{number}.0" in slurm.run("squeue", "-h", "--steps", "-o", "%i"), "the processes have started")


def test_the_process_that_stopped_the_run_ends_the_job_though_the_others_end_as_preempted(slurm: Cluster, submit):
    job = slurm.ended(submit(("3", 60)))
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "3:0", "0")


def test_a_job_that_fails_is_started_again_as_often_as_it_may(slurm: Cluster, submit):
    job = slurm.ended(submit(("5", 60)), 120)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "5:0", "1")


def test_a_job_that_is_cancelled_stays_cancelled(slurm: Cluster, submit):
    number = submit(("", 60))
    started(slurm, number)
    slurm.run("scancel", number)
    job = slurm.ended(number)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")


def test_a_preempted_job_ends_in_time_and_goes_on_later(slurm: Cluster, submit, tmp_path: Path):
    number = submit(("", 60), max_restarts=0)
    started(slurm, number)
    slurm.ended(
        slurm.run("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=true")
    )
    job = slurm.ended(number, 120)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), output(tmp_path)
    assert not list(tmp_path.glob("*.failures"))


def test_a_job_at_its_time_limit_goes_on_in_another_turn(slurm: Cluster, submit, tmp_path: Path):
    # Slurm may warn in the first seconds of the second turn too, before its processes listen: a failure, of which some are let.
    number = submit(("", 300), hours=1 / 60, warn_s=30, max_restarts=5)
    job = slurm.ended(number, 180)
    assert job["JobState"] == "COMPLETED" and job["Restarts"] != "0", output(tmp_path)


def test_every_point_of_an_array_runs(slurm: Cluster, submit, tmp_path: Path):
    number = submit(("", 0.5), ("2", 60), parallel=1)
    jobs = [slurm.ended(f"{number}_{point}") for point in range(2)]
    assert [job["ExitCode"] for job in jobs] == ["0:0", "2:0"]
    assert sorted(path.name for path in tmp_path.glob("*.out")) == [f"{number}_{point}.out" for point in range(2)]
