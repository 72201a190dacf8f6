"""Reading the columns a source needs from CSV and Parquet files; errors name the file, the column and the row."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import polars as pl
import pyarrow as pa

from onerec_jax.errors import InputError

INTEGER, NUMBER, TEXT = pl.Int64(), pl.Float64(), pl.String()
_EXPECTED = {INTEGER: "an integer", NUMBER: "a number", TEXT: "text"}


def find(folder: Path, *patterns: str) -> list[Path]:
    """Files of `folder`, or else of its subfolder `data`, that match any of the patterns; sorted, maybe none.

    Raises:
        InputError: what matches is no file.
    """
    for place in (folder, folder / "data"):
        found = sorted({path for pattern in patterns for path in place.glob(pattern)})
        if others := [path for path in found if not path.is_file()]:
            raise InputError(f"{others[0]}: is no file, expected one that matches {' or '.join(patterns)}")
        if found:
            return found
    return []


def existing_folder(path: str) -> Path:
    """The folder at `path`, or an `InputError`."""
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"data.source.path: no folder '{path}', expected one with the files of the log")
    return folder


def only(folder: Path, *patterns: str) -> Path:
    """The one file that matches; none or several is an `InputError`."""
    found = find(folder, *patterns)
    if len(found) != 1:
        there = f"there are {', '.join(path.name for path in found)}" if found else "there is none"
        raise InputError(f"{folder}: expected one file {' or '.join(patterns)}, {there}")
    return found[0]


def read_columns(path: Path, columns: Mapping[str, pl.DataType], not_negative: Iterable[str] = ()) -> pl.DataFrame:
    """The named columns of a CSV or Parquet file as int64, float64 or string; empty CSV cells are null.

    Raises:
        InputError: no such file, a file of another format, a missing column, a value of another type, or a negative
            value in a `not_negative` column; rows count from 0 and leave out the head line.
    """
    frame = _open(path)
    for name, kind in columns.items():
        if name not in frame.columns:
            there = ", ".join(name[:40] for name in frame.columns[:12]) + (", ..." if len(frame.columns) > 12 else "")
            raise InputError(f"{path}: column '{name}' is missing, expected {_EXPECTED[kind]}; columns there: {there}")
    frame = frame.select(list(columns))
    converted = frame.with_columns(_convert(frame[name], kind, path) for name, kind in columns.items())
    for name in not_negative:
        row = (converted[name] < 0).fill_null(False).arg_max()
        if row is not None and (converted[name][row] or 0) < 0:
            raise InputError(f"{path}: column '{name}' row {row} is {converted[name][row]}, expected it not negative")
    return converted


def _open(path: Path) -> pl.DataFrame:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        if path.suffix == ".parquet":
            return read_parquet(path)
        return pl.read_csv(path, infer_schema=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        what = "Parquet" if path.suffix == ".parquet" else "CSV"
        raise InputError(f"{path}: not a readable {what} file: {' '.join(str(error).split())[:200]}") from None


def read_parquet(files: Path | list[str]) -> pl.DataFrame:
    """One or several Parquet files as one table; checksums of pages are verified where the writer left any.

    Polars' own reader looks at no checksums, and reads on where pages are malformed.

    Raises:
        OSError: a file is damaged or is no Parquet, or they do not fit each other.
    """
    try:
        return pl.read_parquet(files, use_pyarrow=True, pyarrow_options={"page_checksum_verification": True})
    except (pl.exceptions.PolarsError, pa.ArrowException) as error:
        raise OSError(str(error)) from error


def _convert(column: pl.Series, kind: pl.DataType, path: Path) -> pl.Series:
    if kind == TEXT:
        return column.cast(pl.String)
    numeric = column.dtype.is_integer() or (kind == NUMBER and column.dtype.is_float())
    if not numeric and column.dtype != pl.String:
        raise InputError(f"{path}: column '{column.name}' is of type {column.dtype}, expected {_EXPECTED[kind]}")
    result = column.cast(kind, strict=False)
    lost = result.is_null() & column.is_not_null()
    if lost.any():
        row = lost.arg_max()
        assert row is not None
        raise InputError(
            f"{path}: column '{column.name}' row {row} is {shown(column[row])}, expected {_EXPECTED[kind]}"
        )
    return result


def shown(value: object) -> str:
    """A value as a message shows it: of a long one, where it begins and ends."""
    return reprlib.repr(value)


def arrow(frame: pl.DataFrame) -> pa.Table:
    """An Arrow table of the plain types that every Arrow kernel knows (no string views)."""
    return frame.to_arrow(compat_level=pl.CompatLevel.oldest())
