"""Big id tables: rows touched by the batch only, row-wise Adagrad, hash buckets (DESIGN 4).

A step gathers the rows of the batch's distinct ids, differentiates with respect to those rows, updates them with one
accumulator per row and scatters them back; the cost does not depend on the number of rows, and untouched rows keep
every bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from onerec_jax.config import ModelConfig
from onerec_jax.data.schema import Batch, Vocabulary
from onerec_jax.model.batch import pathways, replace_pathways

ADAGRAD_EPSILON = 1e-8


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


def init_tables(shapes: dict[str, tuple[int, int]], key: Array) -> dict[str, dict[str, Array]]:
    """rows [R,D] and accumulator [R] of every table, float32."""
    return {
        name: {
            "rows": jax.random.normal(jax.random.fold_in(key, i), shape) * 0.02,
            "accumulator": jnp.zeros(shape[:1]),
        }
        for i, (name, shape) in enumerate(sorted(shapes.items()))
    }


def bucket_rows(ids: Array, rows: int, vocabulary_size: int) -> Array:
    """Row of each id: the id itself where there is a row for each, else a multiplicative hash."""
    if rows >= vocabulary_size:
        return ids
    mixed = ids.astype(jnp.uint32) * jnp.uint32(2654435761)
    return ((mixed ^ (mixed >> 15)) % jnp.uint32(rows)).astype(jnp.int32)


def localise(
    batch: Batch, shapes: dict[str, tuple[int, int]], vocabulary: Vocabulary, *, touched_only: bool
) -> tuple[Batch, dict[str, Array | None]]:
    """Rewrites the batch's ids as positions in the rows that a step will gather.

    Returns the batch and, per table, the distinct rows it touches: a static number, filled up with an id past the last
    row; None where gathering them would cost more than using the whole table.
    """
    sizes = {"item": vocabulary.items, "author": vocabulary.authors, "user": vocabulary.users}
    events = pathways(batch)
    touched: dict[str, Array | None] = {}
    found: dict[str, dict[str, Array]] = {}
    for name, (rows, _) in shapes.items():
        if name == "user":
            ids = {"user": jnp.maximum(batch.user[:, 0], 0)}
        else:
            ids = {p: jnp.where(e.item >= 0, getattr(e, name), 0) for p, e in events.items()}
        local = {p: bucket_rows(i, rows, sizes[name]) for p, i in ids.items()}
        total = sum(i.size for i in local.values())
        touched[name] = None
        if touched_only and total < rows:
            flat = jnp.concatenate([i.reshape(-1) for i in local.values()])
            touched[name], inverse = jnp.unique(flat, size=total, fill_value=rows, return_inverse=True)
            bounds = [0]
            for i in local.values():
                bounds.append(bounds[-1] + i.size)
            local = {
                p: inverse[a:b].reshape(i.shape)
                for (p, i), a, b in zip(local.items(), bounds[:-1], bounds[1:], strict=True)
            }
        found[name] = local
    changed = {}
    for pathway, e in events.items():
        fields = {name: jnp.where(e.item >= 0, ids[pathway], -1) for name, ids in found.items() if pathway in ids}
        changed[pathway] = dataclasses.replace(e, **fields)
    if "user" in found:
        changed["user"] = jnp.asarray(batch.user).at[:, 0].set(found["user"]["user"])
    return replace_pathways(batch, changed), touched


def gather(tables: dict[str, dict[str, Array]], touched: dict[str, Array | None]) -> dict[str, Array]:
    """The rows a step reads: those touched, or the whole table where `touched` is None."""

    def rows(name: str, ids: Array | None) -> Array:
        table = tables[name]["rows"]
        return table if ids is None else jnp.take(table, ids, axis=0, mode="fill", fill_value=0)

    return {name: rows(name, ids) for name, ids in touched.items()}


def adagrad_rows(table: dict[str, Array], ids: Array | None, gradient: Array, rate: float) -> dict[str, Array]:
    """Row-wise Adagrad: a_r <- a_r + mean(g_r^2); row_r <- row_r - rate * g_r / sqrt(a_r). Rows with g = 0 do not change."""
    squared = jnp.mean(jnp.square(gradient), axis=-1)

    def step(accumulator: Array) -> Array:
        return -rate * gradient / (jnp.sqrt(accumulator)[:, None] + ADAGRAD_EPSILON)

    if ids is None:
        accumulator = table["accumulator"] + squared
        return {"rows": table["rows"] + step(accumulator), "accumulator": accumulator}
    accumulator = jnp.take(table["accumulator"], ids, mode="fill", fill_value=0) + squared
    return {
        "rows": table["rows"].at[ids].add(step(accumulator), mode="drop", unique_indices=True, indices_are_sorted=True),
        "accumulator": table["accumulator"].at[ids].set(accumulator, mode="drop", unique_indices=True),
    }


def update_tables(
    tables: dict[str, dict[str, Array]],
    touched: dict[str, Array | None],
    gradients: dict[str, Array],
    rate: float | Callable[[str], float],
) -> dict[str, dict[str, Array]]:
    """All tables after one step."""
    return {
        name: adagrad_rows(table, touched[name], gradients[name], rate(name) if callable(rate) else rate)
        for name, table in tables.items()
    }
