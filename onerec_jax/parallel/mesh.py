"""The device mesh of a recipe: axes data, fsdp, expert, tensor, always in this order and with explicit axis types."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh

from onerec_jax.config import MeshConfig
from onerec_jax.errors import InputError
from onerec_jax.parallel.sharding import LAYOUT

AXES = ("data", "fsdp", "expert", "tensor")


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """Devices along each of `AXES`, of so many devices in all.

    Raises:
        InputError: the product of the axes is not the number of devices, or `data` does not divide among the slices.
    """
    sizes = [config.data, config.fsdp, config.expert, config.tensor]
    if config.data == -1:
        sizes[0] = max(1, devices // math.prod(sizes[1:]))
    if math.prod(sizes) != devices:
        wanted = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
        raise InputError(
            f"mesh {wanted} needs {math.prod(sizes)} devices but {devices} are there; "
            "make the product of the mesh axes equal to the device count"
        )
    if sizes[0] % config.slices:
        raise InputError(f"mesh.data {sizes[0]} must be a multiple of mesh.slices {config.slices}")
    return tuple(sizes)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices (or those given); neighbours of an axis are neighbours on the network where it has a shape.

    With `slices` the slow network between slices (of a TPU job; else between processes) carries the axis `data` alone.

    Raises:
        InputError: the product of the axes is not the number of devices, or `data` does not divide among the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(config, len(devices))
    types = (AxisType.Auto,) * len(AXES)
    if config.slices == 1:
        return Mesh(_placed(sizes, devices), AXES, axis_types=types)
    within, between = (sizes[0] // config.slices, *sizes[1:]), (config.slices, 1, 1, 1)
    slices = {getattr(device, "slice_index", None) for device in devices}
    processes = {device.process_index for device in devices}
    if config.slices not in (len(slices), len(processes)):
        raise InputError(
            f"mesh.slices is {config.slices} but the devices are of {len(slices)} slices and {len(processes)} processes; "
            "make it one of these, or 1"
        )
    by_process = config.slices != len(slices)
    placed = create_hybrid_device_mesh(within, between, devices, process_is_granule=by_process)
    return Mesh(placed, AXES, axis_types=types)


_platform = contextvars.ContextVar("platform", default="")


def platform() -> str:
    """What is being compiled for: the platform of the mesh of `use_mesh`, else JAX's default one; cpu, gpu or tpu."""
    return _platform.get() or jax.default_backend()


@contextlib.contextmanager
def on_platform(name: str) -> Iterator[None]:
    """Everything traced within is for this platform; any other name than JAX's for what is for all of them."""
    before = _platform.set(name)
    try:
        yield
    finally:
        _platform.reset(before)


def _placed(sizes: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """Devices in the shape of the mesh; an axis that is no product of sides of the torus (8 in 4 x 4 x 4) takes parts of them."""
    try:
        return create_device_mesh(sizes, devices)
    except NotImplementedError:
        return create_device_mesh(sizes, devices, allow_split_physical_axes=True)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Everything traced within is for this mesh, whose devices need not be of this machine."""
    with on_platform(mesh.devices.flat[0].platform), jax.set_mesh(mesh):
        yield


def on_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, called and traced under the mesh: what a jitted function with experts needs, to keep them where they are."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        with use_mesh(mesh):
            return function(*arguments)

    return run


def share_of_process(mesh: Mesh) -> tuple[int, int]:
    """Which share of a global batch this process loads, of how many: (index, count).

    Processes whose devices hold the same rows, which differ along `tensor` alone, load the same share.
    """
    ways = data_parallel(mesh)
    shares: dict[int, set[int]] = {}
    for place, device in np.ndenumerate(mesh.devices):
        row = int(np.ravel_multi_index(place[: len(LAYOUT["batch"])], mesh.devices.shape[: len(LAYOUT["batch"])]))
        shares.setdefault(device.process_index, set()).add(row)
    distinct = sorted({tuple(sorted(rows)) for rows in shares.values()})
    if sum(map(len, distinct)) != ways:
        raise InputError("mesh.tensor must divide the devices of a process, or be a multiple of them")
    return distinct.index(tuple(sorted(shares[jax.process_index()]))), len(distinct)


def data_parallel(mesh: Mesh | AbstractMesh) -> int:
    """Over how many ways the batch is split."""
    return math.prod(mesh.shape[axis] for axis in LAYOUT["batch"])


def check_batch(mesh: Mesh | AbstractMesh, batch_size: int, accumulation: int) -> None:
    """Raises InputError unless every micro-batch divides over the data axes."""
    ways = data_parallel(mesh)
    if (batch_size // accumulation) % ways:
        raise InputError(
            f"train.batch_size {batch_size} in {accumulation} micro-batches does not divide over the {ways} "
            f"data-parallel devices of the mesh; use a multiple of {ways * accumulation}"
        )
