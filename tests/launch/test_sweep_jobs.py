"""Sweeps under Slurm and on GKE: what is submitted, once, and for the points that are missing alone."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from clusters import GKE
from test_gke import VALIDATOR, job_of

from onerec_jax.scaling.sweep import load_sweep

RATES = {"recipe": "quickstart", "sweep": {"param": {"train.learning_rate": [1e-3, 2e-3, 4e-3]}}}


@pytest.fixture
def sweep(onerec):
    """Runs `onerec sweep` of three learning rates of the quickstart in an empty folder, whose dataset is there."""
    Path("rates.yaml").write_text(yaml.safe_dump(RATES))
    for card in ("datasets/quickstart/card.json", "datasets/quickstart/semantic_ids/card.json"):
        Path(card).parent.mkdir(parents=True)
        Path(card).touch()
    return lambda *words: onerec("sweep", "rates.yaml", *words)


def finish(number: int, kind: str = "done") -> None:
    folder = Path("runs/sweeps/rates") / list(load_sweep("rates.yaml").named)[number]
    folder.mkdir(parents=True, exist_ok=True)
    said = {"done": {"metrics": None}, "failed": {"code": 3, "error": "it diverged"}}[kind]
    (folder / f"{kind}.json").write_text(json.dumps(said))


SLURM = ("--launcher", "slurm", "cluster.python=/opt/venv/bin/python", "cluster.hours=1")
JOBSETS = ("--launcher", "gke", *(f"cluster.{name}={value}" for name, value in GKE.items()), "cluster.topology=v5e:2x2")


def test_a_sweep_under_slurm_is_one_job_array(sweep, golden):
    answer = sweep(*SLURM, "--max-parallel", "2", "--dry-run")
    golden("launch/sweep_slurm.sh", answer.out)
    assert subprocess.run(["bash", "-n"], input=answer.out, text=True, check=False).returncode == 0
    assert not Path("runs").exists(), "--dry-run does nothing"


def test_a_sweep_on_gke_is_a_jobset_per_point_that_the_api_server_takes(sweep, golden, short_files):
    answer = sweep(*JOBSETS, "cluster.queue=tpus", "--dry-run")
    golden("launch/sweep_gke.yaml", answer.out)
    documents = list(yaml.safe_load_all(answer.out))
    assert [document["kind"] for document in documents] == ["ConfigMap", "JobSet"] * 3
    for settings, jobset in zip(documents[::2], documents[1::2], strict=True):
        assert [error.message for error in VALIDATOR.iter_errors(jobset)] == []
        pod = job_of(jobset)["template"]["spec"]
        assert pod["containers"][0]["args"] == ["sweep", "point", "/etc/onerec/recipe.yaml"]
        assert {"name": "settings", "configMap": {"name": settings["metadata"]["name"]}} in pod["volumes"]
    names = [jobset["metadata"]["name"] for jobset in documents[1::2]]
    assert names == [f"rates-{name[-8:]}" for name in load_sweep("rates.yaml").named], (
        "a name stays where the sweep grows"
    )
    assert not Path("runs").exists()


@pytest.mark.parametrize("words", [SLURM, JOBSETS], ids=["slurm", "gke"])
def test_only_what_is_missing_is_submitted(sweep, words: tuple[str, ...]):
    finish(0)
    finish(1, "failed")
    names = list(load_sweep("rates.yaml").named)
    once, again = sweep(*words, "--dry-run").out, sweep(*words, "--retry-failed", "--dry-run").out
    digits = [name[-8:] for name in names]
    assert [digit in once for digit in digits] == [False, False, True]
    assert [digit in again for digit in digits] == [False, True, True]
    finish(1)
    finish(2)
    assert sweep(*words, "--dry-run").out == ""


def test_an_array_is_submitted_once_and_again_when_it_has_ended(sweep, program):
    program("sbatch", "echo x >> submissions; cp $1 script; echo Submitted batch job 42")
    program("squeue", "[ $2 = --jobs=42 ] && cat line 2> /dev/null")
    finish(1, "failed")
    assert sweep(*SLURM).out == "Submitted batch job 42\n"
    assert Path("script").read_text() == Path("runs/sweeps/rates/slurm/job.sh").read_text()
    for name in re.findall(r"sweep point (\S+)\)", Path("script").read_text()):
        assert Path(name).is_file(), "each point has its recipe"
    Path("line").write_text("42_1 PENDING\n")
    refused = sweep(*SLURM)
    assert refused.code == 2 and "job 42 of this sweep is still in line or running" in refused.err
    Path("line").unlink()
    assert sweep(*SLURM, "--retry-failed").code == 0
    assert Path("submissions").read_text() == "x\nx\n" and not list(Path("runs").rglob("failed.json"))


def test_jobsets_are_handed_to_kubectl_together(sweep, program):
    program("kubectl", "[ \"$*\" = 'apply -f -' ] && cat > applied && echo created")
    printed = sweep(*JOBSETS, "--dry-run").out
    answer = sweep(*JOBSETS)
    assert (answer.code, answer.out) == (0, "created\n") and Path("applied").read_text() == printed
    assert sweep("--dry-run").code == 0, "and may go on elsewhere"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*JOBSETS, "--max-parallel", "2"), "--max-parallel is not for --launcher gke"),
        (("--launcher", "cloud"), "--launcher cloud is none of local, slurm, gke"),
        ((*SLURM, "cluster.nodes=2", "--evaluate"), "--evaluate is for points of one process, and these have 2"),
        ((*SLURM, "cluster.gpus_per_node=8", "mesh.fsdp=3"), "needs 6 devices but 8 are there"),
        ((*JOBSETS, "runs=/elsewhere"), "/elsewhere/sweeps/rates: in a pod nothing is kept"),
        (("train.learning_rate=1",), "train.learning_rate is set by the points of the sweep"),
    ],
)
def test_a_sweep_that_would_fail_there_is_refused_here(sweep, words: tuple[str, ...], said: str):
    answer = sweep(*words, "--dry-run")
    assert answer.code == 2 and answer.out == "" and answer.err.startswith("onerec: ") and answer.err.count("\n") == 1
    assert said in answer.err
