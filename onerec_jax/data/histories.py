"""From canonical tables to dense integer rows and time-ordered histories, one run of users at a time."""

from __future__ import annotations

import dataclasses

import numpy as np
import polars as pl
import pyarrow as pa

from onerec_jax.data.schema import LABELS, Tables
from onerec_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Histories:
    """Events of consecutive users, flat: those of user `first_user + u` are `offsets[u]:offsets[u + 1]`, oldest first.

    N events, U users, Y labels.
    """

    first_user: int
    offsets: np.ndarray  # int64 [U+1]
    item: np.ndarray  # int32 [N]
    timestamp_ms: np.ndarray  # int64 [N]
    playtime_s: np.ndarray  # float32 [N], -1 = unknown
    duration_s: np.ndarray  # float32 [N], -1 = unknown
    feedback: np.ndarray  # uint8 [N,Y]
    positive: np.ndarray  # bool [N]
    request: np.ndarray  # int32 [N], equal within one request of the source; all 0 when it names none

    @property
    def lengths(self) -> np.ndarray:
        """Events per user, int64 [U]."""
        return np.diff(self.offsets)

    @property
    def user(self) -> np.ndarray:
        """Each event's user, counted from `first_user`, int64 [N]."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)


def labels_of(events: pa.Table) -> tuple[str, ...]:
    """The feedback labels that a table of events provides, in the schema's order."""
    return tuple(label for label in LABELS if label in events.column_names)


def positive_labels(wanted: tuple[str, ...], present: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `data.positive_labels` that the source provides; empty means that every event is positive.

    Raises:
        InputError: a label that does not exist, or none of them in a source that has other labels.
    """
    unknown = [label for label in wanted if label not in LABELS]
    if unknown:
        raise InputError(f"data.positive_labels: unknown label '{unknown[0]}', known are {', '.join(LABELS)}")
    chosen = tuple(label for label in wanted if label in present)
    if wanted and present and not chosen:
        raise InputError(
            f"data.positive_labels: the source provides none of {', '.join(wanted)}, only {', '.join(present)}; "
            "name some of those, or leave it empty to count every event"
        )
    return chosen


def id_rows(ids: pa.ChunkedArray, known: pa.ChunkedArray, table: str, column: str) -> np.ndarray:
    """The row of each id among `known` ones, int32 [N].

    Raises:
        InputError: an id that is not among them.
    """
    kind = pl.Int64 if pa.types.is_integer(known.type) else pl.String
    row_of_id = pl.DataFrame({"id": pl.Series(known).cast(kind)}).with_row_index("row")
    wanted = pl.DataFrame({"id": pl.Series(ids).cast(kind)})
    rows = wanted.join(row_of_id, on="id", how="left", maintain_order="left")["row"]
    if rows.null_count():
        lost = wanted["id"].filter(rows.is_null())[0]
        raise InputError(f"events: {column} {lost!r} is not in the {table} table, which has to list it")
    return rows.cast(pl.Int32).to_numpy()


def category_codes(values: pa.ChunkedArray | pa.Array) -> tuple[np.ndarray, int]:
    """Codes int32 [N] in order of first appearance, 0 = null, and the number of classes, that of null included."""
    encoded = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    if not isinstance(encoded, pa.DictionaryArray):
        encoded = encoded.dictionary_encode()
    codes = encoded.indices.cast(pa.int32()).fill_null(-1).to_numpy(zero_copy_only=False) + 1
    return codes, len(encoded.dictionary) + 1


def user_feature_codes(users: pa.Table) -> tuple[np.ndarray, dict[str, int]]:
    """Every column beside `user_id` as codes int32 [U,F], and the classes of each; code 0 = unknown."""
    names = [name for name in users.column_names if name != "user_id"]
    codes = np.zeros((users.num_rows, len(names)), np.int32)
    sizes: dict[str, int] = {}
    for f, name in enumerate(names):
        codes[:, f], sizes[name] = category_codes(users[name])
    return codes, sizes


def seconds(milliseconds: pa.ChunkedArray) -> np.ndarray:
    """Milliseconds, null = unknown, as seconds float32 [N], -1 = unknown."""
    return (pl.Series(milliseconds).cast(pl.Float64) / 1000).fill_null(-1).cast(pl.Float32).to_numpy()


def dense_events(tables: Tables, item_duration_s: np.ndarray, positive: tuple[str, ...]) -> pl.DataFrame:
    """Events in table order with integer rows for ids.

    An event's duration is its own, else its item's. `positive` are the labels any of which makes an event positive;
    empty = every event.

    Args:
        tables: validated tables.
        item_duration_s: float32 [I], -1 = unknown.
        positive: a subset of the labels present.

    Returns:
        A frame of `user`, `item` (Int32), `timestamp_ms` (Int64), `playtime_s`, `duration_s` (Float32, -1 = unknown),
        `request` (Int32), `positive` (Boolean) and one Boolean column per label.
    """
    events = tables.events
    unknown = np.full(events.num_rows, -1, np.float32)
    columns: dict[str, np.ndarray | pl.Series] = {
        "user": id_rows(events["user_id"], tables.users["user_id"], "users", "user_id"),
        "item": id_rows(events["item_id"], tables.items["item_id"], "items", "item_id"),
        "timestamp_ms": events["timestamp_ms"].cast(pa.int64()).to_numpy(),
        "playtime_s": seconds(events["playtime_ms"]) if "playtime_ms" in events.column_names else unknown,
        "request": category_codes(events["request_id"])[0]
        if "request_id" in events.column_names
        else np.zeros(events.num_rows, np.int32),
    }
    own_duration = seconds(events["duration_ms"]) if "duration_ms" in events.column_names else unknown
    columns["duration_s"] = np.where(own_duration < 0, item_duration_s[columns["item"]], own_duration)
    for label in labels_of(events):
        columns[label] = pl.Series(label, events[label]).fill_null(False)
    frame = pl.DataFrame(columns)
    return frame.with_columns((pl.any_horizontal(positive) if positive else pl.lit(True)).alias("positive"))


def user_histories(events: pl.DataFrame, users: range, max_history: int) -> Histories:
    """Histories of a run of users from all of their events; a pure function of them, whatever else the log holds.

    Equal timestamps of one user keep the order of the table. Of longer histories the most recent `max_history` stay.

    Args:
        events: a frame as `dense_events` makes, with events of these users only.
        users: consecutive user rows; those without events get empty histories.
        max_history: most events per user.
    """
    events = events.sort("user", "timestamp_ms", maintain_order=True)
    user = events["user"].to_numpy() - users.start
    counts = np.bincount(user, minlength=len(users))
    from_end = np.cumsum(counts)[user] - np.arange(len(user))
    kept = events.filter(pl.Series(from_end <= max_history))
    names = [label for label in LABELS if label in events.columns]
    feedback = np.empty((kept.height, len(names)), np.uint8)
    for y, name in enumerate(names):
        feedback[:, y] = kept[name].to_numpy()
    return Histories(
        first_user=users.start,
        offsets=np.concatenate(([0], np.cumsum(np.minimum(counts, max_history)))).astype(np.int64),
        item=kept["item"].to_numpy(),
        timestamp_ms=kept["timestamp_ms"].to_numpy(),
        playtime_s=kept["playtime_s"].to_numpy(),
        duration_s=kept["duration_s"].to_numpy(),
        feedback=feedback,
        positive=kept["positive"].to_numpy(),
        request=kept["request"].to_numpy(),
    )
