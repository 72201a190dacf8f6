"""JobSets of GKE: TPU slices or GPU nodes, with the recipe in a ConfigMap and everything that is kept in a bucket.

The bucket is mounted as the working folder of every process, so that a recipe's relative paths are paths in it and the code
is that of any other machine. Nothing else of a pod is kept, and its root file system is read-only.
"""

from __future__ import annotations

import math
import re
from pathlib import PurePosixPath
from typing import Any

import yaml

from onerec_jax.config import GkeCluster
from onerec_jax.errors import BACKOFF, ExitCode, InputError
from onerec_jax.launch.job import Job, check_devices, check_processes
from onerec_jax.launch.submit import require, submit
from onerec_jax.plan.chips import parse_topology
from onerec_jax.storage import is_remote

BUCKET, SETTINGS, CACHE = PurePosixPath("/bucket"), PurePosixPath("/etc/onerec"), PurePosixPath("/cache")
ACCELERATORS = {"v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}
PORT = 8482  # of the first process, where GPU nodes meet
USER = 1000  # of launch/Dockerfile
NAME_LENGTH = 40  # leaves room for what JobSet and Job append, in 63 letters
CONTAINER = "onerec"


def slice_hosts(topology: str) -> tuple[int, int]:
    """Hosts of a TPU slice, and chips of a host, as GKE makes them (its page on planning TPUs).

    Raises:
        InputError: a topology that GKE has no slices of.
    """
    chip, sides = parse_topology(topology)
    chips, shape = math.prod(sides), "x".join(map(str, sides))
    if chip.dimensions == 2:
        alone = ("1x1", "2x2", "2x4")
        known = (*alone, "4x4", "4x8", "8x8", "8x16", "16x16")
        if shape not in known:
            raise InputError(f"cluster.topology {topology}: GKE has {chip.name} slices of {', '.join(known)}")
        return (1, chips) if shape in alone else (chips // 4, 4)
    small = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
    if shape not in small and (any(side % 4 for side in sides) or list(sides) != sorted(sides)):
        raise InputError(
            f"cluster.topology {topology}: GKE has {chip.name} slices of {', '.join(small)}, and of multiples of 4 that do "
            "not fall, such as 4x4x8"
        )
    return chips // 4, 4


def render_gke(job: Job, cluster: GkeCluster) -> list[dict[str, Any]]:
    """The ConfigMap and the JobSet of a job.

    Raises:
        InputError: a job that does not fit the cluster, or a name or path that has no place there.
    """
    if cluster.topology:
        hosts, chips = slice_hosts(cluster.topology)
    else:
        hosts, chips = cluster.nodes, cluster.gpus_per_node
    check_processes(job, cluster.slices * hosts)
    check_devices(job, cluster.slices * hosts * chips, cluster.slices)
    _check_paths(job)
    name = _name(cluster.name or job.name)
    labels = {"app.kubernetes.io/name": "onerec"}
    settings = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-{job.digest()}", "namespace": cluster.namespace, "labels": labels},
        "immutable": True,
        "data": job.files(SETTINGS),
    }
    queue = {"kueue.x-k8s.io/queue-name": cluster.queue} if cluster.queue else {}
    metadata = {"name": name, "namespace": cluster.namespace, "labels": labels | queue}
    if cluster.slices > 1:  # each slice on a node pool of its own
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    pod = _pod(job, cluster, name, settings["metadata"]["name"], hosts, chips)
    jobs = {
        "name": "slice" if cluster.topology else "nodes",
        "replicas": cluster.slices,
        "template": {"spec": _one_attempt(hosts) | {"template": pod}},
    }
    jobset = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "ttlSecondsAfterFinished": cluster.keep_s,
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": _restarts(cluster.max_restarts),
            "replicatedJobs": [jobs],
        },
    }
    return [settings, jobset]


# The Job tells JobSet which of its rules a pod failed by in the message of the failure, by index (JobSet 0.10).
_FAILURES = (
    {
        "onExitCodes": {
            "containerName": CONTAINER,
            "operator": "In",
            "values": [ExitCode.INPUT.value, ExitCode.STOPPED.value],
        }
    },
    {"onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [ExitCode.PREEMPTED.value]}},
    {"onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
)


def _one_attempt(hosts: int) -> dict[str, Any]:
    """A Job whose pods fail together: one of them alone cannot go on."""
    return {
        "completionMode": "Indexed",
        "completions": hosts,
        "parallelism": hosts,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", **rule} for rule in _FAILURES]},
    }


def _restarts(most: int) -> dict[str, Any]:
    by_rule = {"onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "maxRestarts": most,
        "rules": [
            {
                "name": "wouldEndTheSameWay",
                "action": "FailJobSet",
                **by_rule,
                "onJobFailureMessagePatterns": ["matching FailJob rule at index 0$"],
            },
            {"name": "preempted", "action": "RestartJobSetAndIgnoreMaxRestarts", **by_rule},
        ],
    }


def _pod(job: Job, cluster: GkeCluster, name: str, settings: str, hosts: int, chips: int) -> dict[str, Any]:
    bucket, _, only = cluster.bucket.removeprefix("gs://").partition("/")
    options = ["implicit-dirs", f"uid={USER}", f"gid={USER}", *([f"only-dir={only.rstrip('/')}"] if only else [])]
    return {
        "metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": cluster.grace_s,
            "serviceAccountName": cluster.service_account,
            "automountServiceAccountToken": False,
            "nodeSelector": _node(cluster) | cluster.node_selector,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [_container(job, cluster, name, hosts, chips)],
            "volumes": [
                {
                    "name": "bucket",
                    "csi": {
                        "driver": "gcsfuse.csi.storage.gke.io",
                        "volumeAttributes": {"bucketName": bucket, "mountOptions": ",".join(options)},
                    },
                },
                {"name": "settings", "configMap": {"name": settings}},
                {"name": "tmp", "emptyDir": {}},
                {"name": "cache", "emptyDir": {}},
                {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},  # loader processes, NCCL
            ],
        },
    }


def _node(cluster: GkeCluster) -> dict[str, str]:
    if cluster.gpu:
        return {"cloud.google.com/gke-accelerator": cluster.gpu}
    chip, _, shape = cluster.topology.partition(":")
    return {
        "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[chip],
        "cloud.google.com/gke-tpu-topology": shape,
    }


def _container(job: Job, cluster: GkeCluster, name: str, hosts: int, chips: int) -> dict[str, Any]:
    words = job.words(SETTINGS)
    environment: list[dict[str, Any]] = [
        {"name": "HOME", "value": "/tmp"},
        {"name": "JAX_PLATFORMS", "value": "cuda,cpu" if cluster.gpu else "tpu,cpu"},  # never on CPU unasked
        {"name": "JAX_COMPILATION_CACHE_DIR", "value": str(CACHE)},
        {"name": BACKOFF, "value": str(cluster.backoff_s)},  # a JobSet starts again at once
        *({"name": variable, "value": value} for variable, value in cluster.environment.items()),
    ]
    if cluster.gpu and hosts > 1:  # hosts of a TPU know each other
        index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        environment.append({"name": "PROCESS", "valueFrom": {"fieldRef": {"fieldPath": index}}})
        words += [
            f"distributed.coordinator={name}-nodes-0-0.{name}:{PORT}",
            f"distributed.processes={hosts}",
            "distributed.process=$(PROCESS)",
        ]
    return {
        "name": CONTAINER,
        "image": cluster.image,
        "command": ["onerec"],
        "args": words,
        "workingDir": str(BUCKET),
        "env": environment,
        "resources": {"limits": {"nvidia.com/gpu" if cluster.gpu else "google.com/tpu": chips}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": [
            {"name": "bucket", "mountPath": str(BUCKET)},
            {"name": "settings", "mountPath": str(SETTINGS), "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "cache", "mountPath": str(CACHE)},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }


def _name(name: str) -> str:
    """A name that Kubernetes takes: `onerec_0.1b` -> `onerec-0-1b`."""
    found = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not re.fullmatch(r"[a-z][a-z0-9-]*", found) or len(found) > NAME_LENGTH:
        raise InputError(
            f"cluster.name '{name}' must begin with a letter and have {NAME_LENGTH} letters at most, to name pods by"
        )
    return found


def _check_paths(job: Job) -> None:
    """Refuses folders that a pod does not have, before hours of training cannot be saved."""
    recipe = job.recipe
    paths = {
        **({} if is_remote(recipe.runs) else {"runs": recipe.runs}),
        "data.directory": recipe.dataset_directory,
        "tokenizer.directory": recipe.tokenizer_directory,
    }
    for setting, path in paths.items():
        inside = PurePosixPath(path)
        if "gs:" in inside.parts or (inside.is_absolute() and not inside.is_relative_to(BUCKET)):
            raise InputError(
                f"{setting} is {path}: in a pod nothing is kept but cluster.bucket, its working folder; make the path "
                "relative to the bucket"
            )


class _Dumper(yaml.SafeDumper):
    """Text of several lines as a block, and quotes where Kubernetes' reader of YAML may see a number."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else '"' if re.match(r"[-+.\d]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
_Dumper.ignore_aliases = lambda *_: True  # type: ignore[method-assign]


def manifest(documents: list[dict[str, Any]]) -> str:
    """YAML that `kubectl apply` reads."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120)


def launch_gke(job: Job, cluster: GkeCluster, dry_run: bool) -> int:
    """Submits a job, or only prints its manifest.

    Raises:
        InputError: what `render_gke` raises; or kubectl did not take it, or has a JobSet of this name.
    """
    text = manifest(render_gke(job, cluster))
    if dry_run:
        print(text, end="")
        return 0
    require("kubectl", "where kubectl reaches the cluster")
    answer = submit(["kubectl", "apply", "-f", "-"], text)
    print(answer, end="")
    if re.search(r"^jobset\S* unchanged$", answer, re.M):
        raise InputError(
            "this very JobSet is there already, and nothing was started: `kubectl delete jobset NAME` first, or set cluster.name"
        )
    return 0
