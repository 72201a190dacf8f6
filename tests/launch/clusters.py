"""Clusters and a job of the tests."""

from __future__ import annotations

from onerec_jax.config import GkeCluster, SlurmCluster
from onerec_jax.launch.job import Job, make_job

GKE = {"image": "registry/onerec:1", "bucket": "gs://my-bucket/onerec", "service_account": "trainer"}


def gke_cluster(**changes) -> GkeCluster:
    return GkeCluster.model_validate(GKE | changes)


def slurm_cluster(**changes) -> SlurmCluster:
    return SlurmCluster.model_validate({"python": "/opt/venv/bin/python"} | changes)


def quickstart(*overrides: str, verb: str = "pretrain") -> Job:
    return make_job("quickstart", list(overrides), verb)
