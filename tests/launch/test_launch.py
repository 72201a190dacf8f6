"""`onerec launch`: what it prints, writes, submits and refuses."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from clusters import GKE, gke_cluster, quickstart, slurm_cluster

from onerec_jax.config import GkeCluster, SlurmCluster
from onerec_jax.launch import gke
from onerec_jax.launch.gke import manifest, render_gke
from onerec_jax.launch.job import make_job
from onerec_jax.launch.launch import launch
from onerec_jax.launch.slurm import render_slurm, slurm_words
from onerec_jax.recipe import load_recipe, load_section

ROOT = Path(__file__).resolve().parents[2]
TPU = [f"cluster.{name}={value}" for name, value in GKE.items()] + ["cluster.topology=v5e:4x4"]


def test_a_dry_run_prints_what_would_run_here_and_does_nothing(onerec, tmp_path: Path):
    answer = onerec("launch", "quickstart", "--on", "local", "cluster.processes=2", "--dry-run", "train.steps=3")
    assert (answer.code, answer.err, list(tmp_path.iterdir())) == (0, "", [])
    first, second = (shlex.split(line) for line in answer.out.splitlines())
    assert first[1:4] == ["-m", "onerec_jax.cli", "pretrain"]
    assert first[-2:] == ["distributed.processes=2", "distributed.process=0"] and second[-1] == "distributed.process=1"
    assert first[5] == second[5] and re.fullmatch(r"distributed\.coordinator=127\.0\.0\.1:\d+", first[5])


def test_what_is_submitted_to_slurm_is_what_a_dry_run_prints(onerec, program, tmp_path: Path):
    program("sbatch", "cat $1 > sent; echo Submitted batch job 7")
    words = ["launch", "quickstart", "--on", "slurm", "train.steps=3", "cluster.nodes=2"]
    printed = onerec(*words, "--dry-run")
    assert (printed.code, printed.err, [path.name for path in tmp_path.iterdir()]) == (0, "", ["bin"])
    answer = onerec(*words)
    assert (answer.code, answer.out, answer.err) == (0, "Submitted batch job 7\n", "")
    assert Path("sent").read_text() == printed.out
    recipe = re.search(r"pretrain (\S+)\)", printed.out)
    assert recipe is not None
    assert load_recipe(recipe[1]) == load_recipe("quickstart", ["train.steps=3"])


def test_what_is_submitted_to_gke_is_what_a_dry_run_prints(onerec, program):
    program(
        "kubectl", 'echo $* > words; cat > sent; printf "configmap/a created\\njobset.jobset.x-k8s.io/a created\\n"'
    )
    printed = onerec("launch", "quickstart", "--on", "gke", *TPU, "--dry-run")
    assert (printed.code, printed.err, Path("sent").exists()) == (0, "", False)
    answer = onerec("launch", "quickstart", "--on", "gke", *TPU)
    assert (answer.code, answer.err) == (0, "")
    assert (Path("words").read_text(), Path("sent").read_text()) == ("apply -f -\n", printed.out)
    program("kubectl", 'cat > sent; printf "configmap/a unchanged\\njobset.jobset.x-k8s.io/a unchanged\\n"')
    again = onerec("launch", "quickstart", "--on", "gke", *TPU)
    assert again.code == 2 and "this very JobSet is there already, and nothing was started" in again.err


def test_the_exit_code_of_a_job_that_runs_here_is_that_of_the_command(onerec):
    answer = onerec("launch", "quickstart", "--on", "local", "--verb", "evaluate")
    assert answer.code == 2
    assert answer.out.splitlines() == [
        "[0] onerec: no run 'runs/quickstart': neither a run folder nor in runs/, where there is none yet"
    ]


def test_settings_of_a_cluster_come_from_a_file_and_those_of_the_command_win(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("nodes: 2\naccount: 1234\nenvironment: {A: 1}\n")
    cluster = load_section(SlurmCluster, "cluster", str(path), ["cluster.nodes=3", "cluster.environment.B=--c=d e"])
    assert cluster == SlurmCluster(nodes=3, account="1234", environment={"A": "1", "B": "--c=d e"})


REFUSED = [
    (["--on", "moon"], "--on moon is none of local, slurm, gke"),
    (["--on", "local", "--verb", "train"], "--verb train is none of pretrain, rsft, reward, rl, run, board, evaluate"),
    (["--on", "local", "train.stepz=1"], "unknown setting 'train.stepz', did you mean 'steps'?"),
    (["--on", "slurm", "cluster.nodez=1"], "cluster: unknown setting 'cluster.nodez', did you mean 'nodes'?"),
    (["--on", "slurm", "cluster.nodes=0"], "'cluster.nodes' is 0: input should be greater than or equal to 1"),
    (["--on", "slurm", "cluster.partition=a b"], "'cluster.partition' is 'a b': string should match pattern"),
    (["--on", "slurm", "cluster.options=[rm -r]"], "'cluster.options.0' is 'rm -r': string should match pattern"),
    (["--on", "slurm", "--cluster", "missing.yaml"], "no file 'missing.yaml' of cluster settings"),
    (["--on", "slurm"], "there is no `sbatch` on this machine's PATH: launch on a machine of the Slurm cluster"),
    (["--on", "gke", *TPU], "there is no `kubectl` on this machine's PATH: launch where kubectl reaches the cluster"),
    (
        ["--on", "gke"],
        "'cluster.image' is required; 'cluster.bucket' is required; 'cluster.service_account' is required",
    ),
    (["--on", "gke", *TPU[:-1]], "give one of cluster.topology (TPU slices) and cluster.gpu (GPU nodes)"),
    (["--on", "gke", *TPU, "cluster.gpu=nvidia-l4"], "give one of cluster.topology"),
    (["--on", "gke", *TPU, "cluster.nodes=2"], "cluster.nodes is of GPUs"),
    (["--on", "gke", *TPU, "cluster.bucket=mine"], "'cluster.bucket' is 'mine': string should match pattern"),
    (["--on", "gke", *TPU, "cluster.image=onerec"], "'cluster.image' is 'onerec': string should match pattern"),
    (
        ["--on", "local", "distributed={coordinator: a:1, processes: 1, process: 0}"],
        "leave distributed.* out of the recipe",
    ),
    (["--on", "local", "cluster.processes=2", "--verb", "run"], "--verb run is for one process, and the job has 2"),
    (["--on", "local", "cluster.environment.HF_TOKEN=x"], "has HF_TOKEN: a job's file is no place for a secret"),
    (["--on", "gke", *TPU, "cluster.environment.WANDB_API_KEY=x"], "has WANDB_API_KEY: a job's file is no place for"),
    (["--on", "local", "cluster.environment={a b: x}"], "has 'a b', which is no name of a variable"),
]


@pytest.mark.parametrize(
    ("words", "said"), REFUSED, ids=[" ".join(words[:3])[-40:] + said[:20] for words, said in REFUSED]
)
def test_what_is_wrong_is_one_sentence_before_anything_is_started(
    onerec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
):
    monkeypatch.setenv("PATH", "")
    answer = onerec("launch", "quickstart", *words)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("onerec: ") and said in answer.err and len(answer.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_a_cluster_says_when_it_does_not_take_a_job_is_passed_on(onerec, program):
    program("sbatch", "echo 'sbatch: error: invalid partition' >&2; exit 1")
    answer = onerec("launch", "quickstart", "--on", "slurm")
    assert answer.code == 2
    assert answer.err == "onerec: `sbatch` did not take the job: sbatch: error: invalid partition\n"


def test_a_board_travels_with_its_recipe(tmp_path: Path):
    job = make_job("simulator", ["train.steps=9"], "board")
    job.write(tmp_path)
    assert job.words(tmp_path) == ["board", str(tmp_path / "board.yaml"), "train.steps=9"]
    again = make_job(job.words(tmp_path)[1], job.words(tmp_path)[2:], "board")
    assert again.board is not None and job.board is not None
    assert again.board.rows == job.board.rows and again.board.recipe == str(tmp_path / "recipe.yaml")
    assert again.recipe == job.recipe


def test_an_evaluation_is_of_the_recipes_run_with_the_settings_it_is_given():
    job = quickstart("name=mine", "evaluate.beam_width=7", "train.steps=9", verb="evaluate")
    assert job.words(Path()) == ["evaluate", "runs/mine", "evaluate.beam_width=7"]
    assert job.name == "mine-evaluate"


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_kept_examples_render(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    first = path.read_text().splitlines()[0]
    words = shlex.split(first.split("onerec launch RECIPE ")[1])
    monkeypatch.chdir(ROOT)
    assert words[:4] == ["--on", path.stem.split("_")[0], "--cluster", f"launch/{path.name}"]
    assert launch("quickstart", words[4:], on=words[1], cluster=words[3], dry_run=True) == 0
    assert capsys.readouterr().out


def test_the_image_is_what_the_manifests_expect():
    text = (ROOT / "launch" / "Dockerfile").read_text()
    assert re.findall(r"^USER (.*)$", text, re.M) == [f"{gke.USER}:{gke.USER}"]
    assert f'ENTRYPOINT ["{gke.CONTAINER}"]' in text and f"WORKDIR {gke.BUCKET}" in text
    extras = (ROOT / "pyproject.toml").read_text()
    accelerators = re.search(r"in ([a-z |]+)\) ;;", text)
    assert accelerators is not None
    assert all(re.search(rf"^{extra} = \[", extras, re.M) for extra in accelerators[1].split(" | "))
    ignored = (ROOT / "launch" / "Dockerfile.dockerignore").read_text().splitlines()
    for words in re.findall(r"^COPY (.*) \S+$", text, re.M):
        for name in words.split():
            assert (ROOT / name).exists() and f"!{name.split('/')[0]}" in ignored


def test_a_gke_job_of_a_board_names_the_files_as_they_are_mounted():
    cluster = load_section(GkeCluster, "cluster", overrides=[*TPU[:-1], "cluster.topology=v5e:2x2"])
    settings, jobset = render_gke(make_job("simulator", [], "board"), cluster)
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert container["args"] == ["board", f"{mounted['settings']}/board.yaml"]
    assert yaml.safe_load(settings["data"]["board.yaml"])["recipe"] == f"{mounted['settings']}/recipe.yaml"


SLURM_FLIPS = {
    "name": "b", "max_restarts": 1, "environment": {"A": "b"}, "nodes": 2, "gpus_per_node": 2, "cpus_per_task": 2,
    "memory": "1G", "hours": 1, "warn_s": 9, "partition": "b", "account": "b", "qos": "b", "options": ["--exclusive"],
    "parallel": 2, "python": "b", "backoff_s": 9, "folder": "b",
}  # fmt: skip
GKE_FLIPS = {
    "name": "b", "max_restarts": 1, "environment": {"A": "b"}, "image": "b:1", "bucket": "gs://other/onerec",
    "service_account": "b", "topology": "v5e:2x4", "slices": 2, "gpu": "nvidia-l4", "nodes": 2, "gpus_per_node": 2,
    "namespace": "b", "queue": "b", "node_selector": {"a": "b"}, "grace_s": 9, "backoff_s": 9, "keep_s": 9,
}  # fmt: skip


def test_no_setting_of_a_cluster_is_ignored():
    def slurm(**changes) -> tuple[str, list[str]]:
        cluster, job = slurm_cluster(**changes), quickstart()
        folder = job.folder(cluster)
        return render_slurm("a", [["a"], ["b"]], cluster, folder), slurm_words(job, cluster, folder)

    def gke_manifest(**changes) -> str:
        of_gpus = {"gpu", "nodes", "gpus_per_node"} & set(changes)
        hardware = {"gpu": "nvidia-h100-80gb"} if of_gpus else {"topology": "v5e:4x4"}
        job = quickstart(f"mesh.slices={changes.get('slices', 1)}")
        return manifest(render_gke(job, gke_cluster(**hardware | changes)))

    assert set(SLURM_FLIPS) == set(SlurmCluster.model_fields) and set(GKE_FLIPS) == set(GkeCluster.model_fields)
    for name, value in SLURM_FLIPS.items():
        assert slurm(**{name: value}) != slurm(), name
    for name, value in GKE_FLIPS.items():
        default = {"slices": 1, "nodes": 1, "gpus_per_node": 8, "gpu": "nvidia-h100-80gb"}
        assert gke_manifest(**{name: value}) != gke_manifest(**{name: default[name]} if name in default else {}), name
