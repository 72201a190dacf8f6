"""JobSets: valid for the API server, of the right shape for the hardware, with nothing in them that should not be."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from clusters import gke_cluster, quickstart
from jsonschema import Draft202012Validator

from onerec_jax.errors import ExitCode, InputError
from onerec_jax.launch.gke import ACCELERATORS, manifest, render_gke, slice_hosts
from onerec_jax.plan.chips import CHIPS
from onerec_jax.recipe import load_recipe

JOBS = {
    "gke_tpu": (quickstart(), gke_cluster(topology="v5e:4x4", queue="tpus")),
    "gke_tpu_slices": (
        quickstart("mesh.slices=2", "mesh.fsdp=4"),
        gke_cluster(
            topology="v5p:2x2x2", slices=2, name="Two_slices", max_restarts=3, environment={"LIBTPU_INIT_ARGS": "--a=true"}
        ),
    ),
    "gke_gpu": (
        quickstart("mesh.fsdp=8", verb="rsft"),
        gke_cluster(
            gpu="nvidia-h100-80gb", nodes=2, bucket="gs://my-bucket", node_selector={"cloud.google.com/gke-spot": "true"},
            environment={"LEVEL": 3},
        ),
    ),
}  # fmt: skip


def strict(schema: Any) -> Any:
    """The schema as an API server in strict mode reads it: an object has the fields that are listed, and no others."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: strict(part) for name, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


SCHEMA = json.loads(Path(__file__).with_name("jobset.v1alpha2.schema.json").read_text())
VALIDATOR = Draft202012Validator(strict(SCHEMA))


def jobset_of(name: str) -> dict[str, Any]:
    """Through YAML, as kubectl reads it."""
    return list(yaml.safe_load_all(manifest(render_gke(*JOBS[name]))))[1]


def job_of(jobset: dict[str, Any]) -> dict[str, Any]:
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_rendered_to_its_golden_file(name: str, golden, short_files):
    golden(f"launch/{name}.yaml", manifest(render_gke(*JOBS[name])))


@pytest.mark.parametrize("name", JOBS)
def test_a_jobset_is_valid_where_unknown_fields_are_refused(name: str):
    assert [error.message for error in VALIDATOR.iter_errors(jobset_of(name))] == []


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("spec.replicatedJobs.0.replicas", "replica"),
        ("spec.failurePolicy.maxRestarts", "maxRestart"),
        ("spec.failurePolicy.rules.0.onJobFailureReasons", "onJobFailureReason"),
        ("spec.replicatedJobs.0.template.spec.podFailurePolicy.rules.0.onExitCodes.containerName", "container"),
        ("spec.replicatedJobs.0.template.spec.template.spec.nodeSelector", "nodeSelectors"),
        ("spec.replicatedJobs.0.template.spec.template.spec.containers.0.securityContext.readOnlyRootFilesystem", "readOnly"),
    ],
)  # fmt: skip
def test_a_misspelt_field_is_not_valid(path: str, wrong: str):
    jobset = copy.deepcopy(jobset_of("gke_gpu"))
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
    place: Any = jobset
    for part in parents:
        place = place[part]
    place[wrong] = place.pop(last)
    assert any(wrong in error.message for error in VALIDATOR.iter_errors(jobset))


@pytest.mark.parametrize("name", JOBS)
def test_the_rules_of_a_failure_policy_have_names_that_jobset_takes(name: str):
    policy = SCHEMA["properties"]["spec"]["properties"]["failurePolicy"]["properties"]
    described = policy["rules"]["items"]["properties"]["name"]["description"]
    pattern = re.search(r'regular expression "(.*)"', described)
    assert pattern is not None
    for rule in jobset_of(name)["spec"]["failurePolicy"]["rules"]:
        assert re.fullmatch(pattern[1], rule["name"])


def action_after(jobset: dict[str, Any], code: int = 0, condition: str = "") -> str:
    """What JobSet does after a pod's failure: Kubernetes' documentation of both policies, in Python."""
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job_of(jobset)["podFailurePolicy"]["rules"]):
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions", [])
        if (codes and code in codes["values"]) or condition in [c["type"] for c in conditions]:
            assert rule["action"] == "FailJob" and (not codes or codes["operator"] == "In")
            reason = "PodFailurePolicy"
            message = f"Container onerec for pod default/a failed with exit code {code} matching FailJob rule at index {index}"
            break
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


def test_a_job_is_started_again_by_its_exit_code():
    jobset = jobset_of("gke_tpu_slices")
    fails = {ExitCode.INPUT, ExitCode.STOPPED}
    for code in (*ExitCode, 128 + 9, 128 + 15):
        wanted = "FailJobSet" if code in fails else "RestartJobSet"
        assert action_after(jobset, code) == ("RestartJobSetAndIgnoreMaxRestarts" if code == 6 else wanted)
    assert action_after(jobset, condition="DisruptionTarget") == "RestartJobSetAndIgnoreMaxRestarts"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 3 and job_of(jobset)["backoffLimit"] == 0


@pytest.mark.parametrize("name", JOBS)
def test_a_pod_is_restricted(name: str):
    """The "restricted" pod security standard of Kubernetes, and a root file system that nothing can be written to."""
    pod = job_of(jobset_of(name))["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(pod)
    assert all({"emptyDir", "configMap", "csi"} & set(volume) for volume in pod["volumes"])
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": True
        }  # fmt: skip


@pytest.mark.parametrize("name", JOBS)
def test_a_manifest_holds_no_secret(name: str):
    text = manifest(render_gke(*JOBS[name]))
    assert re.findall(r"(?i)\w*(?:secret|password|token|credential|api_?key)\w*", text.split("kind: JobSet")[1]) == [
        "automountServiceAccountToken"
    ]


def test_the_recipe_travels_as_it_was_resolved(tmp_path: Path):
    job = quickstart("train.steps=7", "runs=elsewhere")
    settings = next(yaml.safe_load_all(manifest(render_gke(job, gke_cluster(topology="v5e:4x4")))))
    assert settings["kind"] == "ConfigMap" and settings["immutable"]
    (tmp_path / "recipe.yaml").write_text(settings["data"]["recipe.yaml"])
    assert load_recipe(str(tmp_path / "recipe.yaml")) == load_recipe("quickstart", ["train.steps=7", "runs=elsewhere"])


def test_another_recipe_has_another_config_map():
    names = {
        render_gke(quickstart(f"train.steps={steps}"), gke_cluster(topology="v5e:4x4"))[0]["metadata"]["name"]
        for steps in (1, 2)
    }
    assert len(names) == 2


# GKE's page "Plan TPUs in GKE": nodes of a slice and chips of a node.
@pytest.mark.parametrize(
    ("topology", "hosts", "chips"),
    [
        ("v5e:1x1", 1, 1), ("v5e:2x2", 1, 4), ("v5e:2x4", 1, 8), ("v5e:4x4", 4, 4), ("v5e:16x16", 64, 4),
        ("v5p:2x2x1", 1, 4), ("v5p:2x2x2", 2, 4), ("v5p:4x4x4", 16, 4), ("v5p:8x8x16", 256, 4),
        ("v6e:1x1", 1, 1), ("v6e:2x4", 1, 8), ("v6e:4x8", 8, 4), ("v6e:8x8", 16, 4),
    ],
)  # fmt: skip
def test_a_slice_has_the_hosts_that_gke_gives_it(topology: str, hosts: int, chips: int):
    assert slice_hosts(topology) == (hosts, chips)


@pytest.mark.parametrize("topology", ["v5e:2x8", "v5e:8x4", "v6e:3x3", "v5p:1x1x1", "v5p:8x4x4", "v5p:4x4x6"])
def test_a_slice_that_gke_does_not_have_is_refused(topology: str):
    with pytest.raises(InputError, match=f"cluster.topology {topology}: GKE has"):
        slice_hosts(topology)


def test_every_chip_has_its_label():
    assert set(ACCELERATORS) == set(CHIPS)


@pytest.mark.parametrize(
    ("overrides", "cluster", "said"),
    [
        (["mesh.fsdp=3"], {"topology": "v5e:4x4"}, "needs 15 devices but 16 are there"),
        (
            ["train.batch_size=8"],
            {"topology": "v5e:4x4"},
            "train.batch_size 8 in 1 micro-batches does not divide over the 16",
        ),
        ([], {"topology": "v5e:4x4", "slices": 2}, "cluster.slices is 2 but mesh.slices 1"),
        (["runs=/scratch/runs"], {"topology": "v5e:4x4"}, "runs is /scratch/runs: in a pod nothing is kept but"),
        (["data.directory=gs://mine/x"], {"topology": "v5e:4x4"}, "data.directory is gs:/mine/x: in a pod"),
        (["data.directory=/data"], {"topology": "v5e:4x4"}, "data.directory is /data: in a pod"),
        ([], {"topology": "v5e:4x4", "name": "1st"}, "cluster.name '1st' must begin with a letter"),
        (["name=" + "long" * 11], {"topology": "v5e:4x4"}, "have 40 letters at most"),
    ],
)
def test_a_job_that_would_fail_there_is_refused_here(overrides: list[str], cluster: dict, said: str):
    with pytest.raises(InputError, match=re.escape(said)):
        render_gke(quickstart(*overrides), gke_cluster(**cluster))


@pytest.mark.parametrize("verb", ["run", "evaluate"])
def test_what_is_for_one_process_is_not_started_on_several(verb: str):
    with pytest.raises(InputError, match=f"--verb {verb} is for one process, and the job has 4"):
        render_gke(quickstart(verb=verb), gke_cluster(topology="v5e:4x4"))
    assert render_gke(quickstart(verb=verb), gke_cluster(topology="v5e:2x4"))
