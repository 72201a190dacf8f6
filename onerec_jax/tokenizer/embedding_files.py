"""Item embeddings from a file of the caller's: npy or zarr by item row, or Parquet by item id.

npy and zarr are read a slice at a time; Parquet is held whole, since its rows are found by id.

Axis letters: I items, M tokens of an item, D width.
"""

# pyarrow.compute makes its functions when it is imported.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tensorstore as ts

from onerec_jax.errors import InputError

_ZARR = {".zarray": "zarr", "zarr.json": "zarr3"}  # a file of the folder that tells the format, and its driver
_VALUES_AT_ONCE = 1 << 24


@dataclasses.dataclass(frozen=True)
class EmbeddingRows:
    """Embeddings [I,D], or tokens [I,M,D], of a file: a slice or rows int [N] of them, float32, read when indexed.

    Attributes:
        path: of the file.
        values: what it holds, in its own type: an array, a TensorStore or an `_Npy`.

    Raises:
        InputError: by indexing, where the file cannot be read or a value is not finite in float32; names the item row.
    """

    path: Path
    values: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        if isinstance(index, slice):
            return self._converted(index)
        # All pages and chunks that one read touches are in memory together, so rows far apart are read in turn.
        span = index // self._rows_at_once
        result = np.empty((len(index), *self.shape[1:]), np.float32)
        for number in np.unique(span):
            result[span == number] = self._converted(index[span == number])
        return result

    @property
    def _rows_at_once(self) -> int:
        return max(1, _VALUES_AT_ONCE // math.prod(self.shape[1:]))

    def _converted(self, index: Any) -> np.ndarray:
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(self.raw(index), np.float32)
        good = np.isfinite(values).all(tuple(range(1, values.ndim)))
        if not good.all():
            at = int(np.argmin(good))
            row = range(self.shape[0])[index][at] if isinstance(index, slice) else int(index[at])
            raise InputError(
                f"the embedding of item row {row} in {self.path} has a value that is not finite in float32"
            )
        return values

    def raw(self, index: Any) -> np.ndarray:
        """What the file has there, neither converted nor checked."""
        try:
            return np.asarray(self.values[index])
        except (OSError, EOFError, ValueError) as error:
            raise _unreadable(self.path, error) from None

    def whole(self) -> np.ndarray:
        """All of them, float32, converted and checked some rows at a time."""
        result = np.empty(self.shape, np.float32)
        for first in range(0, len(result), self._rows_at_once):
            part = slice(first, min(first + self._rows_at_once, len(result)))
            result[part] = self[part]
        return result


def open_embeddings(path: str | Path, item_ids: np.ndarray) -> EmbeddingRows:
    """Embeddings [I,D], or tokens [I,M,D] (npy and zarr), of the items with the caller's ids [I]; read when indexed.

    `NAME.npy` and a zarr folder (read with TensorStore) have one row per item row; `NAME.parquet` has the columns
    `item_id` and `embedding` (a list of numbers), in any order and with any items besides.

    Raises:
        InputError: the file cannot be read, is of another format, shape or type, or lacks an item.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        values = _read_parquet(path, item_ids)
    elif path.suffix == ".npy":
        values = _open_npy(path)
    elif path.is_dir():
        values = _open_zarr(path)
    else:
        raise InputError(
            f"tokenizer.embedding_path {path} is {'of an unknown format' if path.exists() else 'missing'}; "
            "expected a .npy file, a .parquet file or a zarr folder"
        )
    return _checked(EmbeddingRows(path, values), len(item_ids))


@dataclasses.dataclass(frozen=True)
class _Npy:
    """Mapped anew for every read: the pages of a mapping count as this process's memory for as long as it lives."""

    path: Path
    shape: tuple[int, ...]

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.load(self.path, mmap_mode="r", allow_pickle=False)[index]


def _open_npy(path: Path) -> _Npy:
    try:
        return _Npy(path, np.load(path, mmap_mode="r", allow_pickle=False).shape)
    except (OSError, EOFError, ValueError) as error:
        raise _unreadable(path, error) from None


def _open_zarr(path: Path) -> ts.TensorStore:
    driver = next((driver for file, driver in _ZARR.items() if (path / file).is_file()), None)
    if driver is None:
        raise InputError(
            f"tokenizer.embedding_path {path} is a folder without {' or '.join(_ZARR)}; expected a zarr array"
        )
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": str(path.absolute())}}
    try:
        return ts.open(spec, open=True, read=True).result()
    except ValueError as error:
        raise _unreadable(path, error) from None


def _read_parquet(path: Path, item_ids: np.ndarray) -> np.ndarray:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from None
    for name in ("item_id", "embedding"):
        if name not in table.column_names:
            raise InputError(
                f"tokenizer.embedding_path {path} has no column '{name}', only {', '.join(table.column_names)}"
            )
    column = table["embedding"].combine_chunks()
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(is_kind(column.type) for is_kind in lists):
        raise InputError(f"column 'embedding' of {path} is of type {column.type}; expected lists of floats")
    found = column.take(_rows_of(path, table["item_id"].combine_chunks(), item_ids))
    lengths = pc.list_value_length(found).to_numpy(zero_copy_only=False)  # NaN where there is no list
    odd = np.flatnonzero(lengths != lengths[:1])
    if odd.size or not lengths[0] > 0:
        row = int(odd[0]) if odd.size else 0
        what = "no values" if not lengths[row] > 0 else f"{int(lengths[row])} values"
        raise InputError(
            f"the embedding of item {item_ids[row]} in {path} has {what}; every item needs the same number of values"
        )
    return pc.list_flatten(found).to_numpy(zero_copy_only=False).reshape(len(item_ids), -1)


def _rows_of(path: Path, ids: pa.Array, item_ids: np.ndarray) -> pa.Array:
    """Where in `ids` each item is; both are compared as text where one of them is."""
    wanted = pa.array(item_ids)
    if ids.type != wanted.type:
        common = pa.int64() if pa.types.is_integer(ids.type) and pa.types.is_integer(wanted.type) else pa.string()
        try:
            ids, wanted = ids.cast(common), wanted.cast(common)
        except pa.ArrowException as error:
            raise _unreadable(path, error) from None
    counts = pc.value_counts(ids)
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        raise InputError(f"item {twice[0]['values']} is {twice[0]['counts']} times in {path}; expected once")
    rows = pc.index_in(wanted, value_set=ids)
    if rows.null_count:
        example = item_ids[int(np.argmax(rows.is_null().to_numpy(zero_copy_only=False)))]
        raise InputError(
            f"tokenizer.embedding_path {path} lacks {rows.null_count} of the dataset's {len(item_ids)} items, "
            f"the first is {example}; every item needs an embedding"
        )
    return rows


def _checked(rows: EmbeddingRows, num_items: int) -> EmbeddingRows:
    path, shape = rows.path, rows.shape
    if len(shape) not in (2, 3) or shape[0] != num_items or not math.prod(shape):
        raise InputError(
            f"tokenizer.embedding_path {path} has shape {list(shape)}; expected [{num_items}, width] or "
            f"[{num_items}, tokens, width], a row for every item of the dataset"
        )
    first = rows.raw(slice(0, 1))
    if not (np.issubdtype(first.dtype, np.number) and np.isrealobj(first)) and first.dtype.name != "bfloat16":
        raise InputError(f"tokenizer.embedding_path {path} has values of type {first.dtype}; expected floats")
    return rows


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = "the file is missing" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
    return InputError(f"tokenizer.embedding_path {path} cannot be read: {reason}")
