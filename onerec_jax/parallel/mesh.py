"""The device mesh of a recipe: axes data, fsdp, expert, tensor, always in this order and with explicit axis types."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from onerec_jax.config import MeshConfig
from onerec_jax.errors import InputError
from onerec_jax.parallel.sharding import LAYOUT

AXES = ("data", "fsdp", "expert", "tensor")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices (or those given).

    Raises:
        InputError: the product of the axes is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [config.data, config.fsdp, config.expert, config.tensor]
    fixed = math.prod(sizes[1:])
    if config.data == -1:
        sizes[0] = max(1, len(devices) // fixed)
    if math.prod(sizes) != len(devices):
        wanted = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
        raise InputError(
            f"mesh {wanted} needs {math.prod(sizes)} devices but {len(devices)} are there; "
            "make the product of the mesh axes equal to the device count"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def on_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, called and traced under the mesh: what a jitted function with experts needs, to keep them where they are."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        with jax.set_mesh(mesh):
            return function(*arguments)

    return run


def data_parallel(mesh: Mesh) -> int:
    """Over how many ways the batch is split."""
    return math.prod(mesh.shape[axis] for axis in LAYOUT["batch"])


def check_batch(mesh: Mesh, batch_size: int, accumulation: int) -> None:
    """Raises InputError unless every micro-batch divides over the data axes."""
    ways = data_parallel(mesh)
    if (batch_size // accumulation) % ways:
        raise InputError(
            f"train.batch_size {batch_size} in {accumulation} micro-batches does not divide over the {ways} "
            f"data-parallel devices of the mesh; use a multiple of {ways * accumulation}"
        )
