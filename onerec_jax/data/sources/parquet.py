"""Any log in Parquet files, its columns named by the recipe's mapping from canonical names."""

from __future__ import annotations

from glob import glob

import polars as pl

from onerec_jax.config import ParquetSource
from onerec_jax.data.schema import EVENT_COLUMNS, ITEM_COLUMNS, LABELS, USER_COLUMNS, Tables
from onerec_jax.data.sources.files import arrow, read_parquet
from onerec_jax.data.validate import check_columns, validate
from onerec_jax.errors import InputError

_LABEL_COLUMNS: dict[str, str] = dict.fromkeys(LABELS, "true or false, or 0 or 1")
_COLUMNS = {"events": EVENT_COLUMNS | _LABEL_COLUMNS, "items": ITEM_COLUMNS, "users": USER_COLUMNS}


def tables(source: ParquetSource, seed: int) -> Tables:
    """Canonical tables of the files; items and users without files of their own are those of the events.

    A canonical column is read from the column it is mapped to, else from one of its own name. All other columns of
    `users` are taken as categorical features; all other columns of events and items are left alone. Times are
    milliseconds: whole seconds cannot be told from them and are not guessed.

    Raises:
        InputError: no such file, a mapping that names no canonical column or no column of the files, a wrong type or
            value.
    """
    known = list(dict.fromkeys(name for columns in _COLUMNS.values() for name in columns))
    for name in source.columns:
        if name not in known:
            raise InputError(f"data.source.columns: no canonical column '{name}', expected any of {', '.join(known)}")
    paths = {"events": source.events, "items": source.items, "users": source.users}
    frames = {table: _read(path, f"data.source.{table}") for table, path in paths.items() if path is not None}
    for name, column in source.columns.items():
        takers = [table for table in frames if name in _COLUMNS[table]]
        if not any(column in frames[table].columns for table in takers):
            files = ", ".join(str(paths[table]) for table in takers) or "no table given"
            raise InputError(
                f"{files}: column '{column}' is missing, expected {name} there as data.source.columns says"
            )
    canonical = {table: _canonical(frame, table, source.columns, str(paths[table])) for table, frame in frames.items()}
    for table, key in (("items", "item_id"), ("users", "user_id")):
        if table not in canonical:
            canonical[table] = canonical["events"].select(key).unique(maintain_order=True)
    return validate(Tables(**{table: arrow(frame) for table, frame in canonical.items()}), source.events)


def _read(pattern: str, setting: str) -> pl.DataFrame:
    files = sorted(glob(pattern, recursive=True))
    if not files:
        raise InputError(f"{setting}: no file matches '{pattern}', expected a Parquet file or a glob of several")
    try:
        return read_parquet(files)
    except OSError as error:
        raise InputError(
            f"{pattern}: not readable as one Parquet table: {' '.join(str(error).split())[:200]}"
        ) from None


def _canonical(frame: pl.DataFrame, table: str, mapping: dict[str, str], origin: str) -> pl.DataFrame:
    columns = {}
    for name in _COLUMNS[table]:
        theirs = mapping.get(name, name)
        columns[name] = theirs if theirs in frame.columns else name
    columns = {name: frame[theirs].alias(name) for name, theirs in columns.items() if theirs in frame.columns}
    for name in LABELS:
        if name in columns:
            columns[name] = _boolean(columns[name], mapping.get(name, name), origin)
    if "embedding" in columns:
        columns["embedding"] = _vectors(columns["embedding"], origin)
    used = {mapping.get(name, name) for name in columns}
    rest = [name for name in frame.columns if name not in used] if table == "users" else []
    result = pl.DataFrame(list(columns.values())).hstack(frame.select(rest))
    check_columns(arrow(result), _COLUMNS[table], f"{origin}: {table}")
    return result


def _boolean(column: pl.Series, theirs: str, origin: str) -> pl.Series:
    """0/1 integers as booleans; other types are left for `check_columns` to refuse."""
    if not column.dtype.is_integer():
        return column
    strange = ((column != 0) & (column != 1)).fill_null(False)
    if strange.any():
        row = strange.arg_max()
        assert row is not None
        raise InputError(
            f"{origin}: column '{theirs}' row {row} is {column[row]}, expected {_LABEL_COLUMNS[column.name]}"
        )
    return column.cast(pl.Boolean)


def _vectors(column: pl.Series, origin: str) -> pl.Series:
    """Lists of floats of one length as fixed-size float32 vectors."""
    kind = column.dtype
    if isinstance(kind, pl.Array) and kind.inner.is_float():
        return column.cast(pl.Array(pl.Float32, kind.size))
    if not isinstance(kind, pl.List) or not kind.inner.is_float() or column.is_empty():  # type: ignore[union-attr]
        return column
    lengths = column.list.len()
    uneven = (lengths != lengths[0]).fill_null(True)
    if uneven.any():
        row = uneven.arg_max()
        assert row is not None
        found = "null" if column[row] is None else f"of length {lengths[row]}"
        raise InputError(f"{origin}: column 'embedding' row {row} is {found}, expected {lengths[0]} floats as in row 0")
    return column.cast(pl.List(pl.Float32)).list.to_array(int(lengths[0]))
