"""Collectives read from a compiled program are those that were asked for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from onerec_jax.config import MeshConfig
from onerec_jax.parallel.mesh import make_mesh
from onerec_jax.plan.collectives import Collective, collectives
from onerec_jax.plan.program import array_bytes, read

SPEC = PartitionSpec(("data", "tensor"), None)


def _of(function, *shapes: tuple[int, ...]) -> list[Collective]:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=SPEC, out_specs=SPEC, check_vma=False)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, SPEC)) for shape in shapes]
    return collectives(read(jax.jit(mapped).lower(*arrays).compile().as_text()), mesh)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x + jax.lax.psum(x, "data"), Collective("all-reduce", ("data",), 2, 4 * 2 * 6, 1)),
        (lambda x: x + jax.lax.psum(x, ("data", "fsdp")), Collective("all-reduce", ("data", "fsdp"), 4, 48, 1)),
        (
            lambda x: jax.lax.all_gather(x, "tensor", axis=0, tiled=True)[:2],
            Collective("all-gather", ("tensor",), 2, 4 * 4 * 6, 1),
        ),
        (
            lambda x: jnp.tile(jax.lax.psum_scatter(x, "fsdp", tiled=True), (2, 1)),
            Collective("reduce-scatter", ("fsdp",), 2, 48, 1),
        ),
        (lambda x: jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True), Collective("all-to-all", ("fsdp",), 2, 48, 1)),
    ],
)
def test_kind_axes_devices_and_bytes(function, expected: Collective):
    assert _of(function, (8, 6)) == [expected]


def test_what_a_loop_runs_counts_as_often_as_it_runs():
    def seven_times(x):
        return jax.lax.fori_loop(0, 7, lambda i, x: jnp.sin(x) + jax.lax.psum(x, "tensor"), x)

    (found,) = _of(seven_times, (8, 6))
    assert (found.kind, found.axes, found.count, found.total_bytes) == ("all-reduce", ("tensor",), 7, 7 * 48)


def test_a_program_without_any_has_none():
    assert _of(jnp.sin, (8, 6)) == []


def test_bytes_of_a_shape():
    assert array_bytes("(bf16[3,4]{1,0}, s32[], pred[5]{0})") == [24, 4, 5]
    assert sum(array_bytes("f32[0,4]")) == 0
