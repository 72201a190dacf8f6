"""From canonical tables to a dataset directory, on one machine.

The directory holds `card.json`, `histories-*.array_record` (one record per user, see `records`), `examples-SPLIT.npy`
(see `split`), `train_stops.npy`, `items/`, `users.parquet` and `user_features.npy`. It is written beside its place and
moved there at the end.

All that depends on the events of a run of users alone is made by pure functions, `prepare_partition` and
`history_records`. A shard of the dataset is one such partition, so that a cluster can run them after a shuffle by user.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from onerec_jax.config import DataConfig, Recipe
from onerec_jax.data.checksums import checksums, sealed
from onerec_jax.data.histories import (
    Histories,
    dense_events,
    labels_of,
    positive_labels,
    user_feature_codes,
    user_histories,
)
from onerec_jax.data.items import ItemArrays, item_arrays, write_items
from onerec_jax.data.lifelong import compress, hashed_content
from onerec_jax.data.records import cluster_rows, encode, ends, event_rows, open_records, write_records
from onerec_jax.data.replacing import replacing
from onerec_jax.data.schema import SCHEMA_VERSION, Tables
from onerec_jax.data.split import (
    SPLITS,
    Moments,
    check_not_empty,
    distinct_targets,
    examples,
    split_moments,
    split_stops,
)
from onerec_jax.errors import InputError

CARD = "card.json"


@dataclasses.dataclass(frozen=True)
class Partition:
    """All that a run of users adds to a dataset; U users, I items."""

    histories: Histories
    examples: dict[str, np.ndarray]  # by split, int64 [N,4]
    train_stops: np.ndarray  # int64 [U]
    train_count: np.ndarray  # int64 [I], events per item in train
    dropped: int  # events beyond max_history
    train_end_ms: int  # time of the latest event in train


def prepare(recipe: Recipe) -> Path:
    """Loads the recipe's log and writes its dataset directory.

    Raises:
        InputError: bad input, an empty split, or a folder that cannot be written.
    """
    from onerec_jax.data.sources import load_tables

    tables = load_tables(recipe.data.source, recipe.seed)
    source = recipe.data.source.model_dump(mode="json")
    return write_dataset(tables, recipe.data, recipe.dataset_directory, recipe.seed, source)


def settings_of(data: DataConfig) -> dict[str, Any]:
    """The settings that decide what is in a dataset, as its card records them."""
    return data.model_dump(mode="json", exclude={"source", "directory"})


def write_dataset(tables: Tables, data: DataConfig, directory: Path, seed: int, source: dict[str, Any]) -> Path:
    """Writes validated tables as a dataset directory; an older dataset there is replaced at the very end.

    Args:
        tables: canonical tables, valid.
        data: what to make of them; `source` and `directory` in it are not read.
        directory: where the dataset goes.
        seed: seed of the hashed content vectors, recorded in the card.
        source: description of the log, recorded in the card.

    Raises:
        InputError: an empty split, no positive label, or a folder that cannot be written (nothing is left there).
    """
    directory = Path(directory)
    check_replaceable(directory)
    present = labels_of(tables.events)
    arrays, authors, tags = item_arrays(tables.items)
    events = dense_events(tables, arrays.duration_s, positive_labels(data.positive_labels, present))
    moments = split_moments(data.split, events["timestamp_ms"].to_numpy())
    user_features, feature_sizes = user_feature_codes(tables.users)
    bounds = np.linspace(0, tables.users.num_rows, data.shards + 1).astype(np.int64)
    partitions = [
        prepare_partition(
            events.filter(pl.col("user").is_between(first, stop - 1)) if data.shards > 1 else events,
            range(first, stop),
            tables.items.num_rows,
            data,
            moments,
        )
        for first, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
    ]
    index = {name: np.concatenate([partition.examples[name] for partition in partitions]) for name in SPLITS}
    check_not_empty({name: len(rows) for name, rows in index.items()}, data)
    arrays = dataclasses.replace(arrays, train_count=sum(partition.train_count for partition in partitions))
    content = lifelong_content(partitions, arrays, tables.items, data, seed)
    card: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "source": source,
        "settings": settings_of(data),
        "seed": seed,
        "counts": {
            "users": tables.users.num_rows,
            "items": tables.items.num_rows,
            "events": sum(len(partition.histories.item) for partition in partitions),
            "positive_events": sum(int(partition.histories.positive.sum()) for partition in partitions),
            "events_beyond_max_history": sum(partition.dropped for partition in partitions),
            "train_events": sum(int(partition.train_stops.sum()) for partition in partitions),
            "train_targets": distinct_targets(index["train"]),
            "examples": {name: len(rows) for name, rows in index.items()},
            "skipped": tables.skipped,
        },
        "labels": list(present),
        "vocabulary": {"authors": authors, "tags": tags, "user_features": feature_sizes},
        "split_moments_ms": None if moments is None else moments._asdict(),
        "train_end_ms": max(partition.train_end_ms for partition in partitions),
        "shard_bounds": bounds.tolist(),
    }
    with replacing(directory, "the dataset") as partial:
        for shard, partition in enumerate(partitions):
            records = history_records(partition.histories, content, data)
            write_records(partial / shard_name(shard, data.shards), records)
        for name, rows in index.items():
            np.save(partial / f"examples-{name}.npy", rows)
        np.save(partial / "train_stops.npy", np.concatenate([partition.train_stops for partition in partitions]))
        np.save(partial / "user_features.npy", user_features)
        pq.write_table(tables.users, partial / "users.parquet")
        write_items(partial / "items", arrays, tables.items)
        card["files"], card["content_hash"] = checksums(partial)
        for shard, name in enumerate(shard_name(shard, data.shards) for shard in range(data.shards)):
            users = int(bounds[shard + 1] - bounds[shard])
            card["files"][name]["ends"] = ends(open_records(partial / name), users)
        (partial / CARD).write_text(json.dumps(sealed(card), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return directory


def prepare_partition(
    events: pl.DataFrame, users: range, items: int, data: DataConfig, moments: Moments | None
) -> Partition:
    """Histories and examples of a run of users; a pure function of their events.

    Args:
        events: all events of these users as `dense_events` makes them, in any order across users.
        users: consecutive user rows.
        items: I, the number of items.
        data: settings of histories, requests and splits.
        moments: of the time split over the whole log, None for leave_one_out.
    """
    histories = user_histories(events, users, data.max_history)
    train_stops = split_stops(histories, moments)[0]
    position = np.arange(len(histories.item)) - histories.offsets[histories.user]
    in_train = position < train_stops[histories.user]
    return Partition(
        histories,
        examples(histories, data, moments),
        train_stops.astype(np.int64),
        np.bincount(histories.item[in_train], minlength=items),
        events.height - len(histories.item),
        int(histories.timestamp_ms[in_train].max(initial=0)),
    )


def lifelong_content(
    partitions: list[Partition], arrays: ItemArrays, items: pa.Table, data: DataConfig, seed: int
) -> np.ndarray | None:
    """Content vectors float32 [I,D] for lifelong clusters, or None where no history is long enough to have any."""
    longest = max(partition.histories.lengths.max(initial=0) for partition in partitions)
    if longest < data.lifelong_refresh:
        return None
    return hashed_content(items, seed) if arrays.embedding is None else arrays.embedding


def history_records(histories: Histories, content: np.ndarray | None, data: DataConfig) -> Iterator[bytes]:
    """One record per user, with lifelong clusters of the first R, 2R, ... events (R = `lifelong_refresh`)."""
    rows = event_rows(
        histories.item,
        histories.timestamp_ms,
        histories.playtime_s,
        histories.duration_s,
        histories.feedback,
        histories.positive,
    )
    for start, stop in zip(histories.offsets[:-1].tolist(), histories.offsets[1:].tolist(), strict=True):
        events = rows[start:stop]
        lengths = range(data.lifelong_refresh, stop - start + 1, data.lifelong_refresh)
        snapshots = []
        if content is not None and lengths:
            vectors = content[events["item"]]
            snapshots = [lifelong_rows(events[:n], vectors[:n], data.lifelong_cluster_size) for n in lengths]
        yield encode(events, snapshots, histories.feedback.shape[1])


def lifelong_rows(events: np.ndarray, vectors: np.ndarray, max_size: int) -> np.ndarray:
    """The clusters of some events, rows of `EVENT` by mean time."""
    clusters = compress(vectors, events["timestamp_ms"], events["playtime_s"], events["duration_s"], max_size)
    return cluster_rows(events, clusters)


def shard_name(shard: int, shards: int) -> str:
    return f"histories-{shard:05d}-of-{shards:05d}.array_record"


def check_replaceable(directory: Path) -> None:
    """Checks that writing there would remove nothing but an older dataset.

    Raises:
        InputError: there is something else at the place.
    """
    if directory.is_dir() and any(directory.iterdir()) and not (directory / CARD).is_file():
        raise InputError(f"data.directory {directory} holds other files than a dataset; name an empty or a new folder")
    if directory.exists() and not directory.is_dir():
        raise InputError(f"data.directory {directory} is a file; name a folder")
