"""Where a job runs: the settings of `onerec launch`, which belong to a cluster and to no recipe."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from onerec_jax.config.section import Section, setting

WORD = r"^[A-Za-z0-9._,:@/-]*$"  # what needs no quoting anywhere
_SECRET = {"KEY", "APIKEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "CREDENTIALS"}


def _no_secrets(environment: dict[str, str]) -> dict[str, str]:
    for name in environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"cluster.environment has '{name}', which is no name of a variable")
        if _SECRET & set(name.upper().split("_")):
            raise ValueError(
                f"cluster.environment has {name}: a job's file is no place for a secret; on GKE use "
                "cluster.service_account, elsewhere the environment you launch from"
            )
    return environment


class ClusterConfig(Section):
    """What all clusters have."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    name: str = setting("", "name of the job; empty: the recipe's", pattern=r"^[A-Za-z0-9._-]*$")
    max_restarts: int = setting(
        10, "how often a job that failed is started again; exit codes 2 and 3 never are, 6 (preempted) always", ge=0
    )
    environment: Annotated[dict[str, str], AfterValidator(_no_secrets)] = setting(
        {}, "variables of every process, such as XLA_FLAGS; no secrets"
    )


class LocalCluster(ClusterConfig):
    """Processes of this machine."""

    processes: int = setting(1, "how many processes train as one", ge=1)
    gpus_per_process: int = setting(0, "GPUs that each process sees, 0 = all of them", ge=0)
    port: int = setting(0, "loopback port on which the processes meet, 0 = a free one", ge=0, le=65535)
    grace_s: float = setting(60.0, "seconds from SIGTERM to SIGKILL", gt=0)
    backoff_s: float = setting(60.0, "seconds before a job is started again that storage failed (exit code 4)", ge=0)
    folder: str = setting("jobs", "folder of the files that jobs read", min_length=1, pattern=WORD)


class SlurmCluster(ClusterConfig):
    """A Slurm cluster whose nodes see this folder at the same path."""

    nodes: int = setting(1, "nodes of the job", ge=1)
    gpus_per_node: int = setting(0, "GPUs of a node, one process each; 0 = one process a node (CPU, TPU)", ge=0)
    cpus_per_task: int = setting(0, "CPUs of a process, 0 = as the partition says", ge=0)
    memory: str = setting("", "memory of a node, such as 200G; empty: as the partition says", pattern=WORD)
    hours: float = setting(
        0.0, "time limit, 0 = as the partition says; at the limit a job saves and goes on in line", ge=0
    )
    warn_s: int = setting(
        300, "seconds before the time limit at which the processes get SIGTERM, to save", ge=1, le=65535
    )
    partition: str = setting("", "partition", pattern=WORD)
    account: str = setting("", "account", pattern=WORD)
    qos: str = setting("", "quality of service", pattern=WORD)
    options: tuple[Annotated[str, Field(pattern=r"^--[a-z-]+(=\S+)?$")], ...] = setting(
        (), "further options of sbatch, such as --constraint=h100"
    )
    parallel: int = setting(0, "points of a job array that run at a time, 0 = all", ge=0)
    python: str = setting("", "interpreter on the nodes; empty: this one")
    backoff_s: int = setting(60, "seconds before a job is started again that storage failed (exit code 4)", ge=0)
    folder: str = setting("jobs", "folder of the job's files and output", min_length=1, pattern=r"^[A-Za-z0-9._/-]+$")


class GkeCluster(ClusterConfig):
    """A GKE cluster with JobSet, and the Cloud Storage FUSE driver. Give either `topology` or `gpu`."""

    image: str = setting(
        ..., "container image made from launch/Dockerfile, with a tag or digest", pattern=r"^\S+[:@]\S+$"
    )
    bucket: str = setting(
        ...,
        "gs://BUCKET or gs://BUCKET/FOLDER, which is the job's working folder: datasets, runs and checkpoints lie there. "
        "With hierarchical namespace, which renames a folder at once: checkpoints appear by being renamed",
        pattern=r"^gs://[a-z0-9][a-z0-9._-]+(/[A-Za-z0-9._/-]+)?$",
    )
    service_account: str = setting(
        ...,
        "Kubernetes service account that may read and write the bucket (workload identity)",
        pattern=r"^[a-z0-9.-]+$",
    )
    topology: str = setting("", "TPU slice, such as v5e:4x4 or v5p:4x4x8", pattern=WORD)
    slices: int = setting(1, "TPU slices, joined by the data-centre network", ge=1)
    gpu: str = setting("", "accelerator of the GPU nodes, such as nvidia-h100-80gb", pattern=WORD)
    nodes: int = setting(1, "GPU nodes", ge=1)
    gpus_per_node: int = setting(8, "GPUs of a node, one process for all of them", ge=1)
    namespace: str = setting("default", "namespace of the JobSet", pattern=r"^[a-z0-9-]+$")
    queue: str = setting("", "Kueue's local queue; empty: none", pattern=r"^[a-z0-9.-]*$")
    node_selector: dict[str, str] = setting(
        {}, 'further labels of the nodes, such as {cloud.google.com/gke-spot: "true"}'
    )
    grace_s: int = setting(120, "seconds from SIGTERM to SIGKILL, to save in", ge=1)
    backoff_s: int = setting(60, "seconds before a job is started again that storage failed (exit code 4)", ge=0)
    keep_s: int = setting(86_400, "seconds after which an ended JobSet is removed", ge=0)

    @model_validator(mode="after")
    def _one_kind(self) -> GkeCluster:
        if bool(self.topology) == bool(self.gpu):
            raise ValueError("give one of cluster.topology (TPU slices) and cluster.gpu (GPU nodes)")
        if self.gpu and self.slices > 1:
            raise ValueError(
                "cluster.slices is of TPUs (cluster.topology); cluster.nodes is how many GPU nodes there are"
            )
        if self.topology and self.nodes > 1:
            raise ValueError(
                "cluster.nodes is of GPUs (cluster.gpu); a TPU slice has the hosts of its cluster.topology"
            )
        return self
