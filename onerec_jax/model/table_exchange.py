"""Id tables whose rows are split over all devices of a mesh: each step exchanges ids, rows and gradients with their owners.

Every device sorts its own ids only and sends each distinct one once to the device that owns its row (`all_to_all`); rows
come back, and gradients go the same way, to be summed by the owner. What two devices send each other has a static size.
Ids that find no room go in another round: a round is of a range of rows, the same on every device and within the share
of every owner, which is as long as everyone has room for. So no id is dropped, however uneven the load, an id is
complete within one round, and one round is enough for ids that are spread evenly.

Extra axis letters: R rows of a table, S shards of the batch, U ids of one device, O owners, Q room for ids between two devices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, PartitionSpec

from onerec_jax.config import TablesConfig
from onerec_jax.model.table_rows import Counts, Now, Table, read_rows, update_rows
from onerec_jax.parallel.sharding import LAYOUT

DEVICES = LAYOUT["rows"]  # the order in which devices own rows
SHARDS = LAYOUT["batch"]
OWNED, OF_SHARD, OF_DEVICE = PartitionSpec(DEVICES), PartitionSpec(SHARDS), PartitionSpec(SHARDS, "tensor")
WHOLE = PartitionSpec()


def room(ids: int, owners: int) -> int:
    """Q, ids for which there is room between two devices: an even share, six standard deviations of a random one, and 8."""
    share = ids / owners
    return min(ids, math.ceil(share + 6 * math.sqrt(share)) + 8)


def split_like(flat: Array, shapes: dict[str, Array]) -> dict[str, Array]:
    """`flat` cut into arrays of these names and shapes, one after the other."""
    ends = itertools.accumulate(like.size for like in shapes.values())
    pairs = zip(shapes.items(), ends, strict=True)
    return {name: flat[end - like.size : end].reshape(like.shape) for (name, like), end in pairs}


def distinct_over_mesh(mesh: AbstractMesh, positions: dict[str, Array], rows: int) -> tuple[Array, dict[str, Array]]:
    """The distinct rows that each device asks for, and where in those of its shard of the batch each position is.

    Devices that differ along `tensor` alone have the same shard and each take a share of its ids.

    Args:
        positions: int32 [B,...] of several names, `rows` where there is none.

    Returns:
        int32 [S,U * tensor], growing within a device and filled up with `rows`; and places in it, shaped as `positions`.
    """
    ways = mesh.shape["tensor"]

    def on_a_device(positions: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        flat = jnp.concatenate([p.reshape(-1) for p in positions.values()])
        share = -(-flat.size // ways)
        first = jax.lax.axis_index("tensor") * share
        padded = jnp.pad(flat, (0, share * ways - flat.size), constant_values=rows)
        own = jax.lax.dynamic_slice(padded, (first,), (share,))
        distinct_U, place = jnp.unique(own, size=share, fill_value=rows, return_inverse=True)
        place = (first + place).astype(jnp.int32)
        places = jax.lax.all_gather(place, "tensor", tiled=True) if ways > 1 else place
        return distinct_U[None], split_like(places, positions)

    return _on_devices(mesh, on_a_device, (OF_SHARD,), (OF_DEVICE, OF_SHARD))(positions)


def gather_over_mesh(
    mesh: AbstractMesh, table: Table, touched: Array, settings: TablesConfig, now: Now | None
) -> Array:
    """float32 [S,U * tensor,D]: the rows of `distinct_over_mesh`, each shard of the batch its own."""

    def on_a_device(table: Table, touched: Array, now: Now | None) -> Array:
        distinct_U, shape = touched[0], table["rows"].shape
        rounds = _Rounds(distinct_U, shape[0], mesh.size)

        def take(state: tuple[Array, Array]) -> tuple[Array, Array]:
            start, rows_UxD = state
            stop, _, asked_OxQ = rounds.next(start)
            asked = asked_OxQ.reshape(-1)
            answers = read_rows(table, asked, rounds.number(asked), settings, now)
            came = _swap(answers.reshape(*asked_OxQ.shape, shape[1])).reshape(-1, shape[1])
            here_U, slot_U = rounds.slots(start, stop)
            return stop, jnp.where(here_U[:, None], jnp.take(came, slot_U, axis=0, mode="clip"), rows_UxD)

        nothing = jnp.zeros((len(distinct_U), shape[1]), table["rows"].dtype)
        _, rows_UxD = jax.lax.while_loop(rounds.left, take, (jnp.int32(0), nothing))
        if mesh.shape["tensor"] > 1:
            rows_UxD = jax.lax.all_gather(rows_UxD, "tensor", tiled=True)
        return rows_UxD.astype(jnp.float32)[None]

    return _on_devices(mesh, on_a_device, (OWNED, OF_DEVICE, WHOLE), OF_SHARD)(table, touched, now)


def update_over_mesh(
    mesh: AbstractMesh,
    table: Table,
    touched: Array,
    gradient: Array,
    rate: float,
    settings: TablesConfig,
    now: Now | None,
) -> tuple[Table, Counts]:
    """The table after a step, updated in place by the owners of its rows, and counts over all devices.

    Args:
        gradient: float32 [S,U * tensor,D] with respect to the rows of `gather_over_mesh`; equal ids of several devices add up.
    """

    def on_a_device(table: Table, touched: Array, gradient: Array, now: Now | None) -> tuple[Table, Counts]:
        distinct_U, gradient_UxD, block = touched[0], gradient[0], len(table["rows"])
        rounds = _Rounds(distinct_U, block, mesh.size)

        def put(state: tuple[Array, Table, Counts]) -> tuple[Array, Table, Counts]:
            start, table, counts = state
            stop, index_OxQ, asked_OxQ = rounds.next(start)
            given = _swap(jnp.take(gradient_UxD, index_OxQ, axis=0, mode="fill", fill_value=0))
            most = min(asked_OxQ.size, block + 1)
            ids, place = jnp.unique(asked_OxQ.reshape(-1), size=most, fill_value=block, return_inverse=True)
            total = jax.ops.segment_sum(given.reshape(-1, given.shape[-1]), place, num_segments=most)
            table, more = update_rows(table, ids, rounds.number(ids), total, rate, settings, now)
            return stop, table, jax.tree.map(jnp.add, counts, more)

        none = Counts(*(jnp.zeros(()) for _ in Counts._fields))
        _, table, counts = jax.lax.while_loop(rounds.left, put, (jnp.int32(0), table, none))
        return table, jax.lax.psum(counts, DEVICES)

    places = (OWNED, OF_DEVICE, OF_DEVICE, WHOLE)
    return _on_devices(mesh, on_a_device, places, (OWNED, WHOLE))(table, touched, gradient, now)


class _Rounds:
    """The rounds in which one device exchanges its distinct ids, which grow, with the owners of `block` rows each."""

    def __init__(self, distinct_U: Array, block: int, owners: int):
        self.distinct_U, self.block, self.room = distinct_U, block, room(len(distinct_U), owners)
        self.first_O = jnp.arange(owners, dtype=jnp.int32) * block
        self.end_O = jnp.searchsorted(distinct_U, self.first_O + block)

    def left(self, state: tuple[Any, ...]) -> Array:
        return state[0] < self.block

    def next(self, start: Array) -> tuple[Array, Array, Array]:
        """A round from the row `start` of every owner's share.

        Returns:
            the row before which it ends; int32 [O,Q], which ids of this device go to each owner, U where none does; and,
            of this owner's rows, int32 [O,Q] those that each device asks for, `block` where none.
        """
        distinct_U, count = self.distinct_U, len(self.distinct_U)
        begin_O = jnp.searchsorted(distinct_U, self.first_O + start)
        beyond_O = begin_O + self.room  # the first that finds no room
        full_O = jnp.take(distinct_U, beyond_O, mode="clip") - self.first_O
        stop = jax.lax.pmin(jnp.min(jnp.where(beyond_O < self.end_O, full_O, self.block)), DEVICES)
        stop_O = jnp.searchsorted(distinct_U, self.first_O + stop)
        index_OxQ = begin_O[:, None] + jnp.arange(self.room, dtype=jnp.int32)
        index_OxQ = jnp.where(index_OxQ < stop_O[:, None], index_OxQ, count)
        asked = jnp.take(distinct_U, index_OxQ, mode="clip") - self.first_O[:, None]
        return stop, index_OxQ, _swap(jnp.where(index_OxQ < count, asked, self.block))

    def slots(self, start: Array, stop: Array) -> tuple[Array, Array]:
        """Which ids of this device the round from `start` to `stop` is of, and where in [O * Q] each of them is."""
        owner_U = self.distinct_U // self.block
        row_U = self.distinct_U - owner_U * self.block
        here_U = (owner_U < len(self.first_O)) & (row_U >= start) & (row_U < stop)
        begin_O = jnp.searchsorted(self.distinct_U, self.first_O + start)
        within_U = jnp.arange(len(owner_U), dtype=jnp.int32) - jnp.take(begin_O, owner_U, mode="clip")
        return here_U, owner_U * self.room + within_U

    def number(self, ids: Array) -> Array:
        """Rows of this owner's share as rows of the table."""
        return jax.lax.axis_index(DEVICES) * self.block + ids


def lookup_in_shards(rows: Array, ids: Array, dtype: jnp.dtype) -> Array:
    """rows [S,U,D] at ids [B,...] of the same shard of the batch."""

    def on_a_device(rows: Array, ids: Array) -> Array:
        return jnp.take(rows[0].astype(dtype), ids, axis=0)

    return jax.shard_map(on_a_device, in_specs=(OF_SHARD, OF_SHARD), out_specs=OF_SHARD)(rows, ids)


def _swap(values: Array) -> Array:
    """values [O,...]: what each device holds for each other one goes there."""
    return jax.lax.all_to_all(values, DEVICES, 0, 0, tiled=True)


def _on_devices(mesh: AbstractMesh, function: Callable[..., Any], given: Any, out: Any) -> Callable[..., Any]:
    return jax.shard_map(function, mesh=mesh, in_specs=given, out_specs=out, check_vma=False)
