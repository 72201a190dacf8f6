"""How rows and experts meet on a mesh: `local`, `allgather`, `all_to_all`, inside one `shard_map`.

Rows are split over data, fsdp and expert, experts over expert, their widths over fsdp (gathered for use) and tensor.
Where the experts do not divide over the axis, every device has all of them and the transport is local.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, PartitionSpec

from onerec_jax.config import MoEConfig
from onerec_jax.model.layers import KEPT
from onerec_jax.model.moe.backends import experts_of
from onerec_jax.model.moe.router import Routed, loads, route
from onerec_jax.parallel.sharding import LAYOUT, partition_spec


def transport_name(config: MoEConfig) -> str:
    """`auto` resolved: all_to_all where a capacity bounds what is sent, else allgather, which never drops a row."""
    if config.transport != "auto":
        return config.transport
    return "all_to_all" if config.capacity else "allgather"


def _chosen(config: MoEConfig, x_MxD: Array, valid_M: Array, bias_E: Array, router: Array):
    """Experts (config.experts, nobody's number, for rows that are not valid), gates and squared logsumexps."""
    chosen, gates, z_M = route(x_MxD, router, bias_E, config)
    return jnp.where(valid_M[:, None], chosen, config.experts), gates, jnp.where(valid_M, z_M, 0.0)


def on_one_device(
    config: MoEConfig, x: Array, valid: Array, bias_E: Array, router: Array, gate: Array, up: Array, down: Array
) -> tuple[Array, Routed]:
    """y [...,D] and what was routed, without a mesh."""
    x_MxD, valid_M = x.reshape(-1, x.shape[-1]), valid.reshape(-1)
    chosen, gates, z_M = _chosen(config, x_MxD, valid_M, bias_E, router)
    y = experts_of(config)(x_MxD, chosen, gates, gate, up, down)
    routed = Routed(loads(chosen, config.experts), jnp.zeros(()), jnp.sum(z_M) / jnp.maximum(1.0, jnp.sum(valid_M)))
    return y.reshape(x.shape), routed


def over_mesh(
    config: MoEConfig, x: Array, valid: Array, bias_E: Array, router: Array, gate: Array, up: Array, down: Array
) -> tuple[Array, Routed]:
    """The same on the mesh of `jax.set_mesh`, whose batch axes the leading axis of x is split over."""
    mesh = jax.sharding.get_abstract_mesh()
    batch_axes = tuple(axis for axis in LAYOUT["batch"] if mesh.shape[axis] > 1)
    rows, whole = PartitionSpec(batch_axes), PartitionSpec()
    named = (("gate", gate), ("up", up), ("down", down))
    weights = [_split_axes(partition_spec(f"moe/{name}", w.shape, mesh), mesh) for name, w in named]
    sharded = jax.shard_map(
        functools.partial(_on_a_device, config, mesh, batch_axes, weights),
        mesh=mesh,
        in_specs=(rows, rows, whole, whole, *weights),
        out_specs=(rows, whole),
    )
    return sharded(x, valid, bias_E, router, gate, up, down)


def _split_axes(spec: PartitionSpec, mesh: AbstractMesh) -> PartitionSpec:
    """A spec of single axes without those of size one."""
    return PartitionSpec(*(axis if axis and mesh.shape[axis] > 1 else None for axis in spec))


def _on_a_device(
    config: MoEConfig, mesh: AbstractMesh, batch_axes: tuple[str, ...], specs: list[PartitionSpec],
    x, valid, bias_E, router, *weights: Array,
) -> tuple[Array, Routed]:  # fmt: skip
    split_experts = specs[0][0] is not None
    split_hidden = specs[0][2] is not None
    axes = (*batch_axes, "tensor") if split_hidden else batch_axes

    def varying(value: Array, over: Sequence[Any]) -> Array:
        """A value split `over` some axes, to be differentiated on each device by itself; the sum over the others comes last."""
        return jax.lax.pcast(value, tuple(axis for axis in axes if axis not in over), to="varying")

    x_MxD, valid_M = x.reshape(-1, x.shape[-1]), valid.reshape(-1)
    chosen, gates, z_M = _chosen(config, x_MxD, valid_M, bias_E, router)
    load = jax.lax.psum(loads(chosen, config.experts), batch_axes)
    weights = tuple(_whole_width(w, spec) for w, spec in zip(weights, specs, strict=True))
    dropped = jnp.zeros(())
    transport = transport_name(config) if split_experts else "local"
    if transport == "local" and split_experts:
        weights = tuple(jax.lax.all_gather(w, "expert", axis=0, tiled=True) for w in weights)
    weights = tuple(varying(w, tuple(spec)) for w, spec in zip(weights, specs, strict=True))
    x_MxD, gates, chosen = (varying(value, batch_axes) for value in (x_MxD, gates, chosen))
    experts = experts_of(config)
    if transport == "local":
        y = experts(x_MxD, chosen, gates, *weights)
    elif transport == "allgather":
        y = _allgather(experts, x_MxD, chosen, gates, weights)
    else:
        y, dropped = _all_to_all(config, mesh.shape["expert"], experts, x_MxD, chosen, gates, weights)
        dropped = jax.lax.psum(dropped, batch_axes)
        dropped = jax.lax.pmean(dropped, "tensor") if split_hidden else dropped
    if split_hidden:
        y = jax.lax.psum(y, "tensor")
    total = jax.lax.psum(jnp.sum(valid_M.astype(jnp.float32)), batch_axes)
    routed = Routed(load, dropped, jax.lax.psum(jnp.sum(z_M), batch_axes) / jnp.maximum(1.0, total))
    return checkpoint_name(y, KEPT).reshape(x.shape), routed


def _whole_width(weight: Array, spec: PartitionSpec) -> Array:
    """A weight gathered over fsdp, along the axis that is split over it."""
    for axis, over in enumerate(spec):
        if over == "fsdp":
            return jax.lax.all_gather(weight, "fsdp", axis=axis, tiled=True)
    return weight


def _own(chosen: Array, experts: int) -> Array:
    """Experts numbered from this device's first; those of others fall outside 0..experts-1."""
    return chosen - jax.lax.axis_index("expert") * experts


def _allgather(experts: Any, x_MxD: Array, chosen: Array, gates: Array, weights: tuple[Array, ...]) -> Array:
    """Every device of the axis sees all of its rows, computes what its own experts add, and the sums are scattered."""
    x_PMxD, chosen, gates = (
        checkpoint_name(jax.lax.all_gather(value, "expert", axis=0, tiled=True), KEPT)
        for value in (x_MxD, chosen, gates)
    )
    y_PMxD = experts(x_PMxD, _own(chosen, weights[0].shape[0]), gates, *weights)
    return jax.lax.psum_scatter(y_PMxD, "expert", scatter_dimension=0, tiled=True)


def capacity(config: MoEConfig, rows: int, devices: int) -> int:
    """Choices that one device may send to each other one: `capacity` even shares, or as many as there can be."""
    most = rows * min(config.active, config.experts // devices)
    if not config.capacity:
        return most
    return min(most, max(1, math.ceil(config.capacity * rows * config.active / devices)))


def _all_to_all(
    config: MoEConfig,
    devices: int,
    experts: Any,
    x_MxD: Array,
    chosen_MxA: Array,
    gates: Array,
    weights: tuple[Array, ...],
) -> tuple[Array, Array]:
    """Rows go to the devices of their experts and come back; y [M,D] and the choices that found no room."""
    m, active = chosen_MxA.shape
    own, room = weights[0].shape[0], capacity(config, m, devices)
    expert = chosen_MxA.reshape(-1)
    device = jnp.minimum(expert // own, devices)  # `devices` for what is nobody's
    order = jnp.argsort(device, stable=True)
    first = jnp.searchsorted(device[order], jnp.arange(devices + 1))
    rank = jnp.zeros_like(expert).at[order].set(jnp.arange(expert.size) - first[device[order]], unique_indices=True)
    sent = (device < devices) & (rank < room)
    slot = jnp.where(sent, device * room + rank, devices * room)

    # the choice at each slot; a number past the last one where there is none
    choice = jnp.full((devices * room,), expert.size, jnp.int32)
    choice = choice.at[slot].set(jnp.arange(expert.size, dtype=jnp.int32), mode="drop")

    def exchanged(values: Array) -> Array:
        return checkpoint_name(jax.lax.all_to_all(values, "expert", 0, 0, tiled=True), KEPT)

    rows = exchanged(jnp.take(x_MxD, choice // active, axis=0, mode="fill", fill_value=0))
    whose = exchanged(jnp.take(expert, choice, mode="fill", fill_value=config.experts))
    y = experts(rows, _own(whose, own)[:, None], jnp.ones_like(rows[:, :1]), *weights)
    y_MxAxD = jnp.take(exchanged(y), slot, axis=0, mode="fill", fill_value=0).reshape(m, active, -1)
    combined = jnp.einsum("mad,ma->md", y_MxAxD, gates.astype(y_MxAxD.dtype))
    return combined, jnp.sum(((device < devices) & ~sent).astype(jnp.float32))
