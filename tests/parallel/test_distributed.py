from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from onerec_jax.config import DistributedConfig, MeshConfig
from onerec_jax.errors import InputError
from onerec_jax.parallel import mesh as mesh_module
from onerec_jax.parallel.distributed import launched_with_others, start
from onerec_jax.parallel.mesh import make_mesh, share_of_process


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `jax.distributed.initialize` was called with; no launcher is there."""
    for name in (
        "SLURM_STEP_NUM_TASKS",
        "TPU_WORKER_HOSTNAMES",
        "MEGASCALE_NUM_SLICES",
        "OMPI_COMM_WORLD_SIZE",
        "JOBSET_NAME",
    ):
        monkeypatch.delenv(name, raising=False)
    found: list[tuple[Any, ...]] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments: found.append(arguments))
    return found


def test_a_process_alone_joins_nobody(calls):
    start(DistributedConfig())
    assert not launched_with_others() and calls == []


@pytest.mark.parametrize(
    ("name", "alone", "several"),
    [
        ("SLURM_STEP_NUM_TASKS", "1", "2"),
        ("TPU_WORKER_HOSTNAMES", "host-0", "host-0,host-1"),
        ("MEGASCALE_NUM_SLICES", "1", "4"),
        ("OMPI_COMM_WORLD_SIZE", "1", "8"),
    ],
)
def test_a_launcher_of_several_processes_is_left_to_jax(name, alone, several, calls, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, alone)
    start(DistributedConfig())
    assert calls == []
    monkeypatch.setenv(name, several)
    start(DistributedConfig())
    assert calls == [()]


def test_explicit_settings_win_over_a_launcher(calls, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    start(DistributedConfig(coordinator="10.0.0.1:1234", processes=3, process=1))
    assert calls == [("10.0.0.1:1234", 3, 1)]


def test_others_that_are_not_there_are_one_sentence(monkeypatch: pytest.MonkeyPatch):
    def fail(*arguments: Any) -> None:
        raise RuntimeError("Barrier timed out.\nline two")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(InputError, match=r"not found: Barrier timed out. line two; see distributed.coordinator"):
        start(DistributedConfig(coordinator="10.0.0.1:1234", processes=2, process=1))


@pytest.mark.parametrize(
    "settings", [{"coordinator": "a:1"}, {"processes": 2}, {"coordinator": "a:1", "processes": 2, "process": 2}]
)
def test_half_of_the_settings_are_refused(settings: dict[str, Any]):
    with pytest.raises(ValueError, match="distributed"):
        DistributedConfig(**settings)


class Device:
    """As much of a device as placing it takes."""

    platform = device_kind = "cpu"

    def __init__(self, number: int, slices: int, processes: int, count: int):
        self.id = number
        self.slice_index = number * slices // count
        self.process_index = number * processes // count


class Mesh:
    """As much of a mesh as sharing out a batch takes."""

    def __init__(self, devices: np.ndarray, *_: Any, **__: Any):
        self.devices = devices
        self.shape = dict(zip(mesh_module.AXES, devices.shape, strict=True))


@pytest.mark.parametrize(("slices", "processes"), [(2, 4), (1, 2)])
def test_only_the_data_axis_crosses_slices(slices: int, processes: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mesh_module, "Mesh", Mesh)
    devices = [Device(i, slices, processes, 16) for i in range(16)]
    mesh = make_mesh(MeshConfig(data=4, fsdp=2, tensor=2, slices=2), devices)
    granule = np.vectorize(lambda d: d.slice_index if slices == 2 else d.process_index)(mesh.devices)
    assert granule.shape == (4, 2, 1, 2)
    assert (granule[:2] == 0).all() and (granule[2:] == 1).all()


def test_slices_that_are_not_there_are_refused():
    devices = [Device(i, 1, 1, 4) for i in range(4)]
    with pytest.raises(InputError, match=r"mesh.slices is 2 but the devices are of 1 slices and 1 processes"):
        make_mesh(MeshConfig(slices=2), devices)
    with pytest.raises(InputError, match=r"mesh.data 3 must be a multiple of mesh.slices 2"):
        make_mesh(MeshConfig(data=3, slices=2), devices[:3])


@pytest.mark.parametrize(
    ("shape", "processes", "shares"),
    [
        ((8, 1, 1, 1), 2, [(0, 2), (1, 2)]),
        ((2, 2, 2, 1), 4, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ((2, 1, 1, 4), 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # two processes along `tensor` load the same rows
        ((1, 1, 1, 8), 2, [(0, 1), (0, 1)]),
    ],
)
def test_a_process_loads_the_rows_of_its_devices(shape, processes, shares, monkeypatch: pytest.MonkeyPatch):
    devices = np.empty(shape, object)
    devices.reshape(-1)[:] = [Device(i, 1, processes, 8) for i in range(8)]
    found = []
    for i in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda i=i: i)
        found.append(share_of_process(Mesh(devices)))  # type: ignore[arg-type]
    assert found == shares


def test_a_tensor_axis_across_parts_of_processes_is_refused(monkeypatch: pytest.MonkeyPatch):
    devices = np.empty((2, 1, 1, 3), object)
    devices.reshape(-1)[:] = [Device(i, 1, 3, 6) for i in range(6)]
    with pytest.raises(InputError, match=r"mesh.tensor must divide"):
        share_of_process(Mesh(devices))  # type: ignore[arg-type]
