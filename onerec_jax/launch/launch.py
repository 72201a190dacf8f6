"""`onerec launch`: from a recipe and a cluster to a job."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onerec_jax.config import ClusterConfig, GkeCluster, LocalCluster, SlurmCluster
from onerec_jax.errors import InputError
from onerec_jax.launch.gke import launch_gke
from onerec_jax.launch.job import make_job
from onerec_jax.launch.local import launch_local
from onerec_jax.launch.slurm import launch_slurm
from onerec_jax.recipe import load_section

PLATFORMS: dict[str, tuple[type[ClusterConfig], Callable[[Any, Any, bool], int]]] = {
    "local": (LocalCluster, launch_local),
    "slurm": (SlurmCluster, launch_slurm),
    "gke": (GkeCluster, launch_gke),
}


def launch(
    recipe: str, overrides: list[str], *, on: str, verb: str = "pretrain", cluster: str = "", dry_run: bool = False
) -> int:
    """Checks everything, then starts the job; returns its exit code where it runs here, 0 where it was submitted.

    Args:
        recipe: name or path of the recipe; with `verb` board, of a board.
        overrides: `key.path=value` settings of the recipe, and `cluster.key=value` of the cluster.
        on: a name of `PLATFORMS`.
        verb: what every process of the job runs.
        cluster: YAML file of settings of the cluster.
        dry_run: print what would be submitted, and do nothing.

    Raises:
        InputError: any setting out of place, a job that does not fit the cluster, or a cluster that did not take it.
    """
    if on not in PLATFORMS:
        raise InputError(f"--on {on} is none of {', '.join(PLATFORMS)}")
    section, start = PLATFORMS[on]
    own = [override for override in overrides if override.startswith("cluster.")]
    settings = load_section(section, "cluster", cluster, own)
    job = make_job(recipe, [override for override in overrides if override not in own], verb)
    return start(job, settings, dry_run)
