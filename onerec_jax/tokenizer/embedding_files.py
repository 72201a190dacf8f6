"""Item embeddings from a file of the caller's: npy or zarr by item row, or Parquet by item id.

Axis letters: I items, M tokens of an item, D width.
"""

# pyarrow.compute makes its functions when it is imported.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tensorstore as ts

from onerec_jax.errors import InputError

_ZARR = {".zarray": "zarr", "zarr.json": "zarr3"}  # a file of the folder that tells the format, and its driver
_VALUES_AT_ONCE = 1 << 24


def read_embeddings(path: str | Path, item_ids: np.ndarray) -> np.ndarray:
    """Embeddings float32 [I,D], or tokens [I,M,D] (npy and zarr), of the items with the caller's ids [I].

    `NAME.npy` and a zarr folder (read with TensorStore) have one row per item row; `NAME.parquet` has the columns
    `item_id` and `embedding` (a list of numbers), in any order and with any items besides.

    Raises:
        InputError: the file cannot be read, is of another format, shape or type, lacks an item, or has a value that is
            not finite in float32.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        values = _read_parquet(path, item_ids)
    elif path.suffix == ".npy":
        values = _read_npy(path)
    elif path.is_dir():
        values = _read_zarr(path)
    else:
        raise InputError(
            f"tokenizer.embedding_path {path} is {'of an unknown format' if path.exists() else 'missing'}; "
            "expected a .npy file, a .parquet file or a zarr folder"
        )
    return _checked(path, values, len(item_ids))


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise _unreadable(path, error) from None


def _read_zarr(path: Path) -> np.ndarray:
    driver = next((driver for file, driver in _ZARR.items() if (path / file).is_file()), None)
    if driver is None:
        raise InputError(
            f"tokenizer.embedding_path {path} is a folder without {' or '.join(_ZARR)}; expected a zarr array"
        )
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": str(path.absolute())}}
    try:
        return np.asarray(ts.open(spec, open=True, read=True).result().read().result())
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


def _checked(path: Path, values: np.ndarray, num_items: int) -> np.ndarray:
    """Values as float32, converted and checked some rows at a time."""
    if values.ndim not in (2, 3) or len(values) != num_items or not values.size:
        raise InputError(
            f"tokenizer.embedding_path {path} has shape {list(values.shape)}; expected [{num_items}, width] or "
            f"[{num_items}, tokens, width], a row for every item of the dataset"
        )
    if not (np.issubdtype(values.dtype, np.number) and np.isrealobj(values)) and values.dtype.name != "bfloat16":
        raise InputError(f"tokenizer.embedding_path {path} has values of type {values.dtype}; expected floats")
    result = np.empty(values.shape, np.float32)
    step = max(1, _VALUES_AT_ONCE // values[0].size)
    for first in range(0, num_items, step):
        with np.errstate(over="ignore"):
            result[first : first + step] = values[first : first + step]
        good = np.isfinite(result[first : first + step]).reshape(-1, values[0].size).all(1)
        if not good.all():
            row = first + int(np.argmin(good))
            raise InputError(f"the embedding of item row {row} in {path} has a value that is not finite in float32")
    return result


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = "the file is missing" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
    return InputError(f"tokenizer.embedding_path {path} cannot be read: {reason}")
