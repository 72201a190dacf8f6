"""Checks of canonical tables; a problem is one sentence: the file, the column, the row, and what was expected."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl
import pyarrow as pa

from onerec_jax.data.schema import EVENT_COLUMNS, ITEM_COLUMNS, LABELS, USER_COLUMNS, Tables
from onerec_jax.errors import InputError


def _is_id(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or _is_string(kind)


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_id_list(kind: pa.DataType) -> bool:
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _is_id(kind.value_type)


def _is_vector(kind: pa.DataType) -> bool:
    return pa.types.is_fixed_size_list(kind) and pa.types.is_float32(kind.value_type)


def _is_category(kind: pa.DataType) -> bool:
    return _is_id(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind)


_TYPES: dict[str, Callable[[pa.DataType], bool]] = {
    "user_id": _is_id,
    "item_id": _is_id,
    "request_id": _is_id,
    "author_id": _is_id,
    "timestamp_ms": pa.types.is_integer,
    "playtime_ms": pa.types.is_integer,
    "duration_ms": pa.types.is_integer,
    "upload_time_ms": pa.types.is_integer,
    "tags": _is_id_list,
    "text": _is_string,
    "embedding": _is_vector,
} | dict.fromkeys(LABELS, pa.types.is_boolean)

_REQUIRED = {"user_id", "item_id", "timestamp_ms"}  # in the tables that have them
_NO_NULLS = {*_REQUIRED, "embedding", *LABELS}
_NOT_NEGATIVE = {"timestamp_ms", "playtime_ms", "duration_ms"}


def validate(tables: Tables, origin: str) -> Tables:
    """Returns `tables` when they keep the contract of `schema.py`.

    Args:
        origin: file or source that the messages name.

    Raises:
        InputError: missing column, wrong type, null, negative time or duration, duplicate item or user, an event whose
            item or user is not in its table, or no events at all; rows count from 0.
    """
    labels = dict.fromkeys(LABELS, "true or false")
    for name, table, columns in (
        ("events", tables.events, EVENT_COLUMNS | labels),
        ("items", tables.items, ITEM_COLUMNS),
        ("users", tables.users, USER_COLUMNS),
    ):
        check_columns(table, columns, f"{origin}: {name}")
    if not tables.events.num_rows:
        raise InputError(f"{origin}: events: no rows, expected at least one event")
    check_categories(tables.users, f"{origin}: users")
    for name, table, key in (("items", tables.items, "item_id"), ("users", tables.users, "user_id")):
        _check_unique(table, key, f"{origin}: {name}")
        _check_known(tables.events, table, key, f"{origin}: events", name)
    return tables


def check_columns(table: pa.Table, columns: dict[str, str], origin: str) -> None:
    """Presence, type, nulls and sign of the columns of one table; `columns` maps a name to what it should hold."""
    for name, expected in columns.items():
        if name not in table.column_names:
            if name in _REQUIRED:
                raise InputError(
                    f"{origin}: column '{name}' is missing, expected {expected}; columns there: "
                    f"{', '.join(table.column_names) or 'none'}"
                )
            continue
        column = table[name]
        if not _TYPES[name](column.type):
            found = f" (row 0 is {column[0].as_py()!r})" if len(column) else ""
            raise InputError(f"{origin}: column '{name}' is of type {column.type}{found}, expected {expected}")
        if name in _NO_NULLS and column.null_count:
            raise InputError(
                f"{origin}: column '{name}' row {np.argmax(column.is_null().to_numpy())} is null, expected {expected}"
            )
        if name in _NOT_NEGATIVE:
            _check_sign(column, name, expected, origin)
        if name == "embedding":
            _check_finite(column, origin)


def check_categories(users: pa.Table, origin: str) -> None:
    """Every column beside `user_id` is categorical: strings, numbers or booleans."""
    for name in users.column_names:
        if name != "user_id" and not _is_category(users[name].type):
            raise InputError(
                f"{origin}: column '{name}' is of type {users[name].type}, expected a string, number or boolean"
            )


def _check_sign(column: pa.ChunkedArray, name: str, expected: str, origin: str) -> None:
    negative = column.fill_null(0).to_numpy() < 0
    if negative.any():
        row = int(negative.argmax())
        raise InputError(f"{origin}: column '{name}' row {row} is {column[row]}, expected {expected}, not negative")


def _check_finite(column: pa.ChunkedArray, origin: str) -> None:
    width = column.type.list_size
    values = np.concatenate(
        [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks] or [np.empty(0)]
    )
    bad = ~np.isfinite(values)
    if bad.any():
        row, place = divmod(int(bad.argmax()), width)
        raise InputError(
            f"{origin}: column 'embedding' row {row} has {values[row * width + place]} at position {place}, "
            "expected finite numbers"
        )


def _check_unique(table: pa.Table, key: str, origin: str) -> None:
    repeated = ~_ids(table[key]).is_first_distinct()
    row = repeated.arg_max()
    if row is not None and repeated[row]:
        raise InputError(f"{origin}: column '{key}' row {row} repeats {table[key][row].as_py()!r}, expected unique ids")


def _check_known(events: pa.Table, table: pa.Table, key: str, origin: str, name: str) -> None:
    if _is_string(events[key].type) != _is_string(table[key].type):
        raise InputError(
            f"{origin}: column '{key}' is of type {events[key].type}, expected {table[key].type} as in the {name} table"
        )
    unknown = ~_ids(events[key]).is_in(_ids(table[key]).implode())
    if unknown.any():
        row = unknown.arg_max()
        assert row is not None
        raise InputError(
            f"{origin}: column '{key}' row {row} is {events[key][row].as_py()!r}, expected an id of the {name} table"
        )


def _ids(column: pa.ChunkedArray) -> pl.Series:
    """Ids in the one type of their kind, so that those of two tables compare."""
    return pl.Series(values=column).cast(pl.String if _is_string(column.type) else pl.Int64, wrap_numerical=True)
