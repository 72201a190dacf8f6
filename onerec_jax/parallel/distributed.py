"""Several processes as one: `jax.distributed`, from explicit settings, Slurm, GKE or TPU metadata, without a change of code."""

from __future__ import annotations

import os

import jax

from onerec_jax.config import DistributedConfig
from onerec_jax.errors import InputError

# variables by which a launcher says that a process is one of several, and what they hold then
_LAUNCHED = {
    "SLURM_STEP_NUM_TASKS": lambda value: int(value) > 1,  # srun
    "TPU_WORKER_HOSTNAMES": lambda value: "," in value,  # GKE
    "MEGASCALE_NUM_SLICES": lambda value: int(value) > 1,  # GKE, several slices
    "OMPI_COMM_WORLD_SIZE": lambda value: int(value) > 1,  # mpirun
    "JOBSET_NAME": bool,  # a JobSet of GPU hosts
}


def launched_with_others() -> bool:
    """Whether a launcher that `jax.distributed` knows started this process as one of several."""
    return any(name in os.environ and several(os.environ[name]) for name, several in _LAUNCHED.items())


def start(config: DistributedConfig) -> None:
    """Joins the other processes, if there are any; does nothing the second time. Call it before anything uses a device.

    Raises:
        InputError: the others were not found.
    """
    if jax.distributed.is_initialized():
        return
    try:
        if config.coordinator:
            jax.distributed.initialize(config.coordinator, config.processes, config.process)
        elif launched_with_others():
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the other processes were not found: {reason}; see distributed.coordinator") from error
