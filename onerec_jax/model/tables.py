"""Big id tables: rows touched by the batch only, row-wise Adagrad, hash buckets (DESIGN 4).

A step gathers the rows of the batch's distinct ids, differentiates with respect to those rows, updates them with one
accumulator per row and scatters them back; the cost does not depend on the number of rows, and untouched rows keep
every bit.

A table of many rows is spread: split over all devices of a mesh, each of which exchanges what it touches with the owners
(`model.table_exchange`). A smaller one is left to the compiler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh

from onerec_jax.config import ModelConfig, TablesConfig
from onerec_jax.data.schema import Batch, Vocabulary
from onerec_jax.model.batch import pathways, replace_pathways
from onerec_jax.model.table_exchange import (
    distinct_over_mesh,
    gather_over_mesh,
    lookup_in_shards,
    split_like,
    update_over_mesh,
)
from onerec_jax.model.table_rows import Now, Table, adagrad_rows, fresh_table, read_rows, update_rows
from onerec_jax.parallel.sharding import several_devices

SPREAD_ROWS = 65_536  # tables of so many rows or more are spread
STRIPES = 3_072  # 3 x 1,024: the devices of a mesh, a number that divides this, own as many rows each
_STREAM = 2**31 - 1  # of random numbers, which no step of dropout uses


def table_shapes(config: ModelConfig, vocabulary: Vocabulary) -> dict[str, tuple[int, int]]:
    """Rows and width of each id table that this model has."""
    shapes = {}
    if "author" in config.event_features:
        shapes["author"] = (config.author_rows or vocabulary.authors, config.author_dim)
    if config.item_input in ("id", "both") and config.head == "codes":  # an item head has its own, of all items
        shapes["item"] = (config.item_rows or vocabulary.items, config.d_model)
    if config.user_id:
        shapes["user"] = (config.user_rows or vocabulary.users, config.static_dim)
    return shapes


def stored_rows(rows: int) -> int:
    """Rows that a table of so many has in memory: a multiple of `STRIPES` where it is spread."""
    return -(-rows // STRIPES) * STRIPES if rows >= SPREAD_ROWS else rows


def stripe(row: Array, rows: int) -> Array:
    """Where a row of a table is stored.

    A spread table deals its rows out to `STRIPES` stripes in turn. The same on every mesh, so that a checkpoint fits all;
    and equal blocks of what is stored hold equal shares of any range of ids, such as the most popular.
    """
    if rows < SPREAD_ROWS:
        return row
    return row % STRIPES * (stored_rows(rows) // STRIPES) + row // STRIPES


def init_tables(
    shapes: dict[str, tuple[int, int]], key: Array, settings: TablesConfig | None = None
) -> dict[str, Table]:
    """rows [R,D] and accumulator [R] of every table, and what the settings add."""
    settings = settings or TablesConfig()
    return {
        name: fresh_table(stored_rows(rows), width, jax.random.fold_in(key, i), settings)
        for i, (name, (rows, width)) in enumerate(sorted(shapes.items()))
    }


def bucket_rows(ids: Array, rows: int, vocabulary_size: int) -> Array:
    """Row of each id: the id itself where there is a row for each, else a multiplicative hash."""
    if rows >= vocabulary_size:
        return ids
    mixed = ids.astype(jnp.uint32) * jnp.uint32(2654435761)
    return ((mixed ^ (mixed >> 15)) % jnp.uint32(rows)).astype(jnp.int32)


def localise(
    batch: Batch,
    shapes: dict[str, tuple[int, int]],
    vocabulary: Vocabulary,
    settings: TablesConfig | None = None,
    *,
    touched_only: bool,
) -> tuple[Batch, dict[str, Array | None]]:
    """Rewrites the batch's ids as positions in the rows that a step will gather.

    Returns the batch and, per table, the distinct rows it touches: a static number, filled up with an id past the last
    row; None where gathering them would cost more than using the whole table. Those of a table that is spread over
    several devices are [S,..], of each shard of the batch by itself. A table that no pathway reads is left out.

    Args:
        touched_only: gather no more than what is touched of small tables as well; of large ones it is never more.
    """
    settings = settings or TablesConfig()
    sizes = {"item": vocabulary.items, "author": vocabulary.authors, "user": vocabulary.users}
    events = pathways(batch)
    touched: dict[str, Array | None] = {}
    found: dict[str, dict[str, Array]] = {}
    for name, (rows, _) in shapes.items():
        if name == "user":
            ids = {"user": jnp.maximum(batch.user[:, 0], 0)}
        else:
            ids = {p: jnp.where(e.item >= 0, getattr(e, name), 0) for p, e in events.items()}
        if not ids:
            continue
        local = {p: stripe(bucket_rows(i, rows, sizes[name]), rows) for p, i in ids.items()}
        past, mesh = stored_rows(rows), _owners(rows)
        if name != "user" and (mesh is not None or settings.optional):  # padding touches no row
            local = {p: jnp.where(events[p].item >= 0, i, past) for p, i in local.items()}
        total = sum(i.size for i in local.values())
        touched[name] = None
        if mesh is not None:
            touched[name], local = distinct_over_mesh(mesh, local, past)
        elif settings.optional or (
            (touched_only or rows >= SPREAD_ROWS)
            and isinstance(total, int)  # not of a program that is exported for any number of requests, which only reads
            and total < rows
        ):
            flat = jnp.concatenate([i.reshape(-1) for i in local.values()])
            size = min(total, past + 1)
            touched[name], inverse = jnp.unique(flat, size=size, fill_value=past, return_inverse=True)
            local = split_like(inverse, local)
        found[name] = local
    changed = {}
    for pathway, e in events.items():
        fields = {name: jnp.where(e.item >= 0, ids[pathway], -1) for name, ids in found.items() if pathway in ids}
        changed[pathway] = dataclasses.replace(e, **fields)
    if "user" in found:
        changed["user"] = jnp.asarray(batch.user).at[:, 0].set(found["user"]["user"])
    return replace_pathways(batch, changed), touched


def _owners(rows: int) -> AbstractMesh | None:
    """The mesh whose devices own a spread table's rows; None on one device, and where the rows do not divide over them."""
    mesh = several_devices()
    if mesh is None or rows < SPREAD_ROWS or stored_rows(rows) % mesh.size:
        return None
    return mesh


def this_step(seed: int, step: Array) -> Now:
    """What random numbers and ages of rows depend on."""
    return Now(jax.random.fold_in(jax.random.key(seed), _STREAM), step)


def _of_table(now: Now | None, tables: dict[str, Table], name: str) -> Now | None:
    return now and now._replace(key=jax.random.fold_in(now.key, sorted(tables).index(name)))


@jax.named_scope("tables")
def gather(
    tables: dict[str, Table],
    touched: dict[str, Array | None],
    settings: TablesConfig | None = None,
    now: Now | None = None,
) -> dict[str, Array]:
    """The rows a step reads, for `lookup`: those touched, or the whole table where `touched` is None.

    Args:
        now: the step that is being taken; None outside of training, where no row starts anew.
    """
    settings = settings or TablesConfig()

    def rows(name: str, ids: Array | None) -> Array:
        if ids is None:
            return tables[name]["rows"]
        own = _of_table(now, tables, name)
        if ids.ndim == 1:
            return read_rows(tables[name], ids, ids, settings, own).astype(jnp.float32)
        mesh = several_devices()
        assert mesh is not None
        return gather_over_mesh(mesh, tables[name], ids, settings, own)

    return {name: rows(name, ids) for name, ids in touched.items()}


def lookup(rows: Array, ids: Array, dtype: jnp.dtype) -> Array:
    """Vectors [B,...,D] of ids [B,...] that `localise` has rewritten, from rows [U,D], or [S,U,D] by shard of the batch."""
    return jnp.take(rows.astype(dtype), ids, axis=0) if rows.ndim == 2 else lookup_in_shards(rows, ids, dtype)


@jax.named_scope("tables")
def update_tables(
    tables: dict[str, Table],
    touched: dict[str, Array | None],
    gradients: dict[str, Array],
    rate: float | Callable[[str], float],
    settings: TablesConfig | None = None,
    now: Now | None = None,
) -> tuple[dict[str, Table], dict[str, tuple[Array, Array]]]:
    """All tables after one step, and metrics as sums and weights.

    With eviction, `tables/NAME_evicted`: rows of a step that started anew. With admission, `tables/NAME_waiting`: the share
    of the touched rows that are not admitted yet.
    """
    settings = settings or TablesConfig()
    new, metrics = {}, {}
    for name, table in tables.items():
        if name not in touched:
            new[name] = table
            continue
        ids, own = touched[name], _of_table(now, tables, name)
        gradient, own_rate = gradients[name], rate(name) if callable(rate) else rate
        if ids is None:
            new[name] = adagrad_rows(table, None, gradient, own_rate)
            continue
        if ids.ndim == 1:
            new[name], counts = update_rows(table, ids, ids, gradient, own_rate, settings, own)
        else:
            mesh = several_devices()
            assert mesh is not None
            new[name], counts = update_over_mesh(mesh, table, ids, gradient, own_rate, settings, own)
        if settings.evict_after:
            metrics[f"tables/{name}_evicted"] = (counts.evicted, jnp.ones(()))
        if settings.admit_after:
            metrics[f"tables/{name}_waiting"] = (counts.waiting, counts.touched)
    return new, metrics
