"""What happens to the rows of an id table that a step touches, where they are stored.

Row-wise Adagrad, and what `model.tables` adds: bfloat16 rows with stochastic rounding, rows that start anew when they have
not been touched for long, and rows that wait until their id has been in several steps. Nothing here knows of other
devices; `model.table_exchange` brings ids and gradients to the device that owns a row.

Extra axis letters: R rows of a table, U distinct rows that are touched.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from onerec_jax.config import TablesConfig

ADAGRAD_EPSILON = 1e-8
SCALE = 0.02  # standard deviation of a fresh row
NEVER = -1  # `last_step` of a row that no step has touched

Table = dict[str, Array]  # rows [R,D], accumulator [R] and, where they are asked for, last_step [R], appearances [R]


class Now(NamedTuple):
    """The step that is being taken, and the key of the table's random numbers, which is the same in every step."""

    key: Array
    step: Array


class Counts(NamedTuple):
    """Of the rows that a step touched, float32 []: how many, those that began anew, and those that wait for admission."""

    touched: Array
    evicted: Array
    waiting: Array


def fresh_table(rows: int, width: int, key: Array, settings: TablesConfig) -> Table:
    """A table before its first step."""
    table = {
        "rows": (jax.random.normal(key, (rows, width)) * SCALE).astype(settings.dtype),
        "accumulator": jnp.zeros(rows),
    }
    if settings.evict_after:
        table["last_step"] = jnp.full(rows, NEVER, jnp.int32)
    if settings.admit_after:
        table["appearances"] = jnp.zeros(rows, jnp.uint8)
    return table


def from_step_zero(tables: dict[str, Table]) -> dict[str, Table]:
    """Tables of another run, whose rows count as touched just now by a run that begins at step 0."""
    return {
        name: table | {"last_step": jnp.minimum(table["last_step"], 0)} if "last_step" in table else table
        for name, table in tables.items()
    }


def read_rows(table: Table, ids_U: Array, number_U: Array, settings: TablesConfig, now: Now | None) -> Array:
    """The rows [U,D] that a step reads, in the table's type; zeros for an id past the last row.

    Args:
        number_U: the numbers of the same rows in the whole table, which random numbers depend on.
        now: None outside of training, where a row is read as it was left.
    """
    found, _ = _begun_anew(table, ids_U, number_U, settings, now)
    if "appearances" not in found:
        return found["rows"]
    return jnp.where((found["appearances"] < settings.admit_after)[:, None], 0, found["rows"])


def update_rows(
    table: Table,
    ids_U: Array,
    number_U: Array,
    gradient_UxD: Array,
    rate: float,
    settings: TablesConfig,
    now: Now | None,
) -> tuple[Table, Counts]:
    """The table after a step with these total gradients; ids are distinct and grow, those past the last row are nobody's."""
    touched = ids_U < len(table["accumulator"])
    nothing = jnp.zeros(())
    if not settings.optional:
        return adagrad_rows(table, ids_U, gradient_UxD, rate), Counts(nothing, nothing, nothing)
    if now is None:
        raise ValueError("the options of model.tables need the step that is being taken")
    found, evicted = _begun_anew(table, ids_U, number_U, settings, now)
    waiting = jnp.zeros_like(touched)
    if "appearances" in found:
        waiting = touched & (found["appearances"] < settings.admit_after)
        found["appearances"] = jnp.minimum(found["appearances"] + 1, settings.admit_after).astype(jnp.uint8)
        gradient_UxD = jnp.where(waiting[:, None], 0, gradient_UxD)
    found["accumulator"], change = _adagrad(found["accumulator"], gradient_UxD, rate)
    found["rows"] = found["rows"].astype(jnp.float32) + change
    if table["rows"].dtype == jnp.bfloat16:
        key = jax.random.fold_in(jax.random.fold_in(now.key, 1), now.step)
        found["rows"] = round_stochastically(found["rows"], _bits(key, number_U, found["rows"].shape[1]))
    if "last_step" in found:
        found["last_step"] = jnp.broadcast_to(now.step, ids_U.shape).astype(jnp.int32)
    new = {
        name: leaf.at[ids_U].set(found[name], mode="drop", unique_indices=True, indices_are_sorted=True)
        for name, leaf in table.items()
    }
    return new, Counts(*(jnp.sum(flags, dtype=jnp.float32) for flags in (touched, evicted, waiting)))


def adagrad_rows(table: Table, ids_U: Array | None, gradient: Array, rate: float) -> Table:
    """Row-wise Adagrad: a_r <- a_r + mean(g_r^2); row_r <- row_r - rate * g_r / sqrt(a_r). Rows with g = 0 do not change.

    Of all rows, where `ids_U` is None.
    """
    if ids_U is None:
        accumulator, change = _adagrad(table["accumulator"], gradient, rate)
        return {"rows": table["rows"] + change, "accumulator": accumulator}
    before = jnp.take(table["accumulator"], ids_U, mode="fill", fill_value=0)
    accumulator, change = _adagrad(before, gradient, rate)
    return {
        "rows": table["rows"].at[ids_U].add(change, mode="drop", unique_indices=True, indices_are_sorted=True),
        "accumulator": table["accumulator"].at[ids_U].set(accumulator, mode="drop", unique_indices=True),
    }


def round_stochastically(x: Array, bits: Array) -> Array:
    """bfloat16 neighbours of float32 x, the farther one with the probability that makes the mean x; `bits` are uint16."""
    raw = jax.lax.bitcast_convert_type(x, jnp.uint32) + bits.astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((raw >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def _adagrad(accumulator: Array, gradient: Array, rate: float) -> tuple[Array, Array]:
    """The new accumulators, and what is added to the rows."""
    accumulator = accumulator + jnp.mean(jnp.square(gradient), axis=-1)
    return accumulator, -rate * gradient / (jnp.sqrt(accumulator)[:, None] + ADAGRAD_EPSILON)


def _begun_anew(
    table: Table, ids_U: Array, number_U: Array, settings: TablesConfig, now: Now | None
) -> tuple[Table, Array]:
    """The leaves of these rows as a step finds them, and which of them it finds unseen for too long, hence fresh."""
    found = {
        name: jnp.take(leaf, ids_U, axis=0, mode="fill", fill_value=NEVER if name == "last_step" else 0)
        for name, leaf in table.items()
    }
    if "last_step" not in found or now is None:
        return found, jnp.zeros(ids_U.shape, bool)
    evicted = (found["last_step"] != NEVER) & (now.step - found["last_step"] > settings.evict_after)
    key = jax.random.fold_in(now.key, 0)
    width = found["rows"].shape[1]
    drawn = jax.vmap(lambda number: jax.random.normal(jax.random.fold_in(key, number), (width,)) * SCALE)(number_U)
    fresh = {"rows": drawn.astype(found["rows"].dtype)}
    for name in ("rows", "accumulator", "appearances"):
        if name in found:
            there = evicted.reshape(evicted.shape + (1,) * (found[name].ndim - 1))
            found[name] = jnp.where(there, fresh.get(name, 0), found[name]).astype(found[name].dtype)
    return found, evicted


def _bits(key: Array, number_U: Array, width: int) -> Array:
    """uint16 [U,D] that depend on the key and the number of the row alone."""
    draw = jax.vmap(lambda number: jax.random.bits(jax.random.fold_in(key, number), (width,), jnp.uint16))
    return draw(number_U)
