"""Batch scripts: what `sbatch` is told, and what the script does after each exit code."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from clusters import quickstart, slurm_cluster

from onerec_jax.config import SlurmCluster
from onerec_jax.errors import InputError
from onerec_jax.launch.slurm import launch_slurm, render_slurm, slurm_words

FOLDER = Path("jobs/quickstart")
GPU = slurm_cluster(
    nodes=2, gpus_per_node=8, cpus_per_task=12, memory="900G", hours=36.5, warn_s=120, partition="gpu", account="team",
    qos="high", options=["--constraint=h100"], environment={"XLA_FLAGS": "--a=b --c='d'"}, max_restarts=3,
)  # fmt: skip


def script(name: str) -> str:
    job = quickstart("mesh.fsdp=8")
    if name == "slurm_array":
        points = [
            [*slurm_words(job, slurm_cluster(), FOLDER), f"train.learning_rate={rate}"] for rate in (1e-3, 2e-3, 4e-3)
        ]
        return render_slurm("sweep", points, slurm_cluster(parallel=2, hours=1), FOLDER)
    cluster = GPU if name == "slurm_gpu" else slurm_cluster(nodes=2)
    return render_slurm(job.name, [slurm_words(job, cluster, FOLDER)], cluster, FOLDER)


@pytest.mark.parametrize("name", ["slurm_cpu", "slurm_gpu", "slurm_array"])
def test_a_job_is_rendered_to_its_golden_file_which_bash_can_read(name: str, golden):
    golden(f"launch/{name}.sh", script(name))
    checked = subprocess.run(["bash", "-n"], input=script(name), text=True, capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.fixture
def run(tmp_path: Path, program, monkeypatch: pytest.MonkeyPatch):
    """Runs the script of a command where Slurm's are stand-ins; returns its exit code and whether it asked to be requeued.

    `srun` is one process of the job and answers with `highest`, as it does where another process has died of a signal.
    """
    monkeypatch.chdir(tmp_path)
    Path("jobs").mkdir()

    def once(command: str, highest: str = "$?", state: str = "RUNNING", **cluster) -> tuple[int, bool]:
        program("srun", f'until [ "$1" = bash ]; do shift; done\n"$@"; exit {highest}')
        program("squeue", f"echo {state}")
        program("scontrol", "echo $* > requeued")
        program("sleep", "echo $1 > slept")
        Path("requeued").unlink(missing_ok=True)
        text = render_slurm("a", [["bash", "-c", command]], slurm_cluster(**cluster), Path("jobs"))
        done = subprocess.run(
            ["bash", "-c", text], env=os.environ | {"SLURM_JOB_ID": "7"}, capture_output=True, text=True, check=False
        )
        requeued = Path("requeued").exists()
        assert not requeued or Path("requeued").read_text() == "requeue 7\n"
        return done.returncode, requeued

    return once


@pytest.mark.parametrize(
    ("code", "again"), [(0, False), (1, True), (2, False), (3, False), (4, True), (5, True), (6, True), (139, True)]
)
def test_a_job_is_started_again_by_its_exit_code(run, code: int, again: bool):
    assert run(f"exit {code}") == (0 if again else code, again)
    assert Path("slept").exists() == (code == 4)


def test_what_the_first_process_says_counts_and_not_what_ending_the_others_gives(run):
    assert run("exit 3", highest="143") == (3, False)
    assert run("exit 6", highest="137", max_restarts=0) == (0, True)
    assert run("kill -KILL $PPID", highest="137") == (0, True)  # not even the shell around it can say


def test_failures_are_counted_and_preemptions_are_not(run):
    codes = [1, 6, 4, 6, 6, 5]
    assert [run(f"exit {code}", max_restarts=2)[1] for code in codes] == [True, True, True, True, True, False]


def test_a_job_that_slurm_ends_is_left_to_slurm(run):
    assert run("exit 6", state="COMPLETING") == (6, False)


def test_the_shells_around_a_process_outlive_sigterm_to_pass_its_exit_code_on(run):
    assert run("trap 'exit 6' TERM; kill -TERM $PPID $$; exit 9", max_restarts=0) == (0, True)


def test_a_job_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match="needs 15 devices but 16 are there"):
        launch_slurm(quickstart("mesh.fsdp=3"), GPU, dry_run=True)
    with pytest.raises(InputError, match="--verb run is for one process, and the job has 2"):
        launch_slurm(quickstart(verb="run"), SlurmCluster(nodes=2), dry_run=True)
