"""Item arrays: dense, one row per item, from the canonical table to TensorStore (zarr) and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import tensorstore as ts

from onerec_jax.data.histories import category_codes, seconds

_CHUNK_BYTES = 1 << 24
_ARRAYS = ("author", "tag", "duration_s", "upload_ms", "train_count", "embedding")


@dataclasses.dataclass(frozen=True)
class ItemArrays:
    """What is known of each item; I items, D embedding dimensions. Author and tag 0 mean unknown."""

    author: np.ndarray  # int32 [I]
    tag: np.ndarray  # int32 [I], the first tag
    duration_s: np.ndarray  # float32 [I], -1 = unknown
    upload_ms: np.ndarray  # int64 [I], -1 = unknown
    train_count: np.ndarray  # int64 [I], events in the train split
    embedding: np.ndarray | None  # float32 [I,D]
    text: list[str]


def item_arrays(items: pa.Table) -> tuple[ItemArrays, int, int]:
    """Item arrays of a canonical table, with `train_count` still zero, and the numbers of author and tag rows."""
    size = items.num_rows
    columns = items.column_names
    author, authors = category_codes(items["author_id"]) if "author_id" in columns else (np.zeros(size, np.int32), 1)
    tag, tags = (
        category_codes(pl.Series(items["tags"]).list.first().to_arrow())
        if "tags" in columns
        else (np.zeros(size, np.int32), 1)
    )
    duration_s = seconds(items["duration_ms"]) if "duration_ms" in columns else np.full(size, -1, np.float32)
    upload_ms = np.full(size, -1, np.int64)
    if "upload_time_ms" in columns:
        upload_ms = items["upload_time_ms"].cast(pa.int64()).fill_null(-1).to_numpy()
    text = items["text"].fill_null("").to_pylist() if "text" in columns else [""] * size
    embedding = _embedding(items["embedding"]) if "embedding" in columns else None
    arrays = ItemArrays(author, tag, duration_s, upload_ms, np.zeros(size, np.int64), embedding, text)
    return arrays, authors, tags


def _embedding(embedding: pa.ChunkedArray) -> np.ndarray:
    """Null embeddings become zeros."""
    width = embedding.type.list_size
    column = embedding.combine_chunks()
    values = np.zeros((len(column), width), np.float32)
    known = column.is_valid().to_numpy(zero_copy_only=False)
    values[known] = column.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    return values


def write_items(folder: Path, arrays: ItemArrays, items: pa.Table) -> None:
    """Writes one zarr array per field and `items.parquet` with the caller's ids and the text.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    folder.mkdir()
    for name in _ARRAYS:
        values = getattr(arrays, name)
        if values is not None:
            _write_array(folder / name, values)
    names = pa.table({"item_id": items["item_id"], "text": pa.array(arrays.text, pa.string())})
    pq.write_table(names, folder / "items.parquet")


def _write_array(path: Path, values: np.ndarray) -> None:
    rows = max(1, min(len(values), _CHUNK_BYTES // max(1, values[:1].nbytes)))
    try:
        store = ts.open(
            _spec(path),
            create=True,
            dtype=values.dtype,
            shape=values.shape,
            chunk_layout=ts.ChunkLayout(chunk_shape=[rows, *values.shape[1:]]),
        ).result()
        store[...] = values
    except ValueError as error:  # tensorstore reports a failed write as text only
        raise OSError(f"{error}") from error


def _spec(path: Path) -> dict[str, Any]:
    return {"driver": "zarr", "kvstore": {"driver": "file", "path": str(path.absolute())}}


def read_items(folder: Path) -> tuple[ItemArrays, np.ndarray]:
    """The item arrays of a folder and the caller's ids, integers or strings [I].

    Raises:
        OSError: a file is missing or damaged.
    """
    try:
        arrays: dict[str, Any] = {
            name: ts.open(_spec(folder / name), open=True).result().read().result()
            for name in _ARRAYS
            if name != "embedding" or (folder / name).exists()
        }
        table = pq.read_table(folder / "items.parquet")
    except (ValueError, pa.ArrowException) as error:
        raise OSError(f"{error}") from error
    arrays.setdefault("embedding", None)
    return ItemArrays(**arrays, text=table["text"].to_pylist()), table["item_id"].to_numpy()
