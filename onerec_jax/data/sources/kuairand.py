"""KuaiRand: short-video logs of Kuaishou under the standard policy.

Source: Gao et al., CIKM 2022, DOI 10.1145/3511808.3557624. Two layouts are read. The publisher's: `log_standard_*.csv`,
`user_features_*.csv`, `video_features_basic_*.csv`, in the folder or its subfolder `data`. An extract:
`log_standard_*.parquet` for 25 Apr - 8 May 2022, the same feature files, and `user_sequences_upto_0424.parquet` for the
time before. Logs under random exposure are another policy's and are not read, nor are the statistic features: they were
counted over the test days too.

Times: the publisher cuts days by `date`, and about 1 % of rows carry a `time_ms` up to 131 minutes before it; those are
moved to the first moment of their date (UTC+8), so that a split by time is the publisher's split by date.

Sequences of the extract have no times: events are put one minute apart, the last one at the user's `last_time_ms`. They
are `watch_seq` (the last 50 exposures at most) preceded by what only `like_seq` or `long_watch_seq` hold. `like` and
`long_view` say whether the item is in those two lists; every other label is false there, and play times are unknown.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from onerec_jax.config import KuaiRandSource
from onerec_jax.data.schema import Tables
from onerec_jax.data.sources.files import (
    INTEGER,
    NUMBER,
    TEXT,
    arrow,
    existing_folder,
    find,
    only,
    read_columns,
    read_parquet,
    shown,
)
from onerec_jax.data.validate import validate
from onerec_jax.errors import InputError

_LABELS = {
    "is_click": "click",
    "long_view": "long_view",
    "finish": "finish",
    "is_like": "like",
    "is_follow": "follow",
    "is_comment": "comment",
    "is_forward": "forward",
    "is_hate": "hate",
    "is_profile_enter": "profile_enter",
}
_FINISHED = 0.95  # share of the duration from which a video counts as finished
_UTC_PLUS_8_MS = 8 * 3_600_000
_LOG_START_MS = 1_650_816_000_000  # 25 Apr 2022 00:00 in UTC+8, where the extract's sequences end
_SEQUENCES = "user_sequences_upto_0424.parquet"
_USER_CATEGORIES = (
    "user_active_degree",
    "is_live_streamer",
    "is_video_author",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
    *(f"onehot_feat{n}" for n in range(18)),
)


def tables(source: KuaiRandSource, seed: int) -> Tables:
    """Canonical tables of a KuaiRand folder; labels are KuaiRand's and `finish`, watched to 95 % of its length.

    Raises:
        InputError: a file or column is missing, or holds something else than the publisher's.
    """
    folder = existing_folder(source.path)
    extract = find(folder, "log_standard_*.parquet")
    logs = extract or find(folder, "log_standard_*.csv")
    if not logs:
        raise InputError(f"{folder}: expected log_standard_*.csv or log_standard_*.parquet, there is none")
    events = [_log(path) for path in logs]
    if extract:
        events.insert(0, _sequences(only(folder, _SEQUENCES)))
    items = _items(only(folder, "video_features_basic_*.csv"))
    users = _users(only(folder, "user_features_*.csv"))
    return validate(Tables(arrow(pl.concat(events)), arrow(items), arrow(users)), str(folder))


def _log(path: Path) -> pl.DataFrame:
    raw_labels = [name for name in _LABELS if name != "finish"]
    needed = ["user_id", "video_id", "date", "time_ms", "play_time_ms", "duration_ms", *raw_labels]
    log = read_columns(path, dict.fromkeys(needed, INTEGER), not_negative=["time_ms", "play_time_ms", "duration_ms"])
    day = pl.col("date").cast(pl.String).str.to_date("%Y%m%d", strict=False)
    log = log.with_columns(day_ms=day.cast(pl.Datetime("ms")).cast(pl.Int64) - _UTC_PLUS_8_MS)
    if log["day_ms"].null_count():
        row = log["day_ms"].is_null().arg_max()
        assert row is not None
        raise InputError(
            f"{path}: column 'date' row {row} is {shown(log['date'][row])}, expected a date such as 20220425"
        )
    duration = pl.when(pl.col("duration_ms") > 0).then("duration_ms")
    finish = (pl.col("play_time_ms") / duration >= _FINISHED).fill_null(False)
    return log.select(
        "user_id",
        pl.col("video_id").alias("item_id"),
        pl.max_horizontal("time_ms", "day_ms").alias("timestamp_ms"),
        pl.col("play_time_ms").alias("playtime_ms"),
        duration.alias("duration_ms"),
        *((finish if raw == "finish" else pl.col(raw) == 1).alias(label) for raw, label in _LABELS.items()),
    )


def _sequences(path: Path) -> pl.DataFrame:
    """Events before the extract's logs, oldest first per user."""
    users = read_columns(path, {"user_id": INTEGER, "last_time_ms": INTEGER}, not_negative=["last_time_ms"])
    late = users.filter(pl.col("last_time_ms") >= _LOG_START_MS)
    if late.height:
        user, moment = late.row(0)
        raise InputError(f"{path}: column 'last_time_ms' of user {user} is {moment}, expected before {_LOG_START_MS}")
    watched, liked, viewed = (_exploded(path, name) for name in ("watch_seq", "like_seq", "long_watch_seq"))
    pair = ["user_id", "item_id"]
    older = pl.concat([liked, viewed]).join(watched, on=pair, how="anti", maintain_order="left")
    events = pl.concat([older.unique(pair, keep="first", maintain_order=True), watched])
    for label, members in (("like", liked), ("long_view", viewed)):
        members = members.unique().with_columns(pl.lit(True).alias(label))
        events = events.join(members, on=pair, how="left", maintain_order="left")
    events = events.join(users, on="user_id", how="left", maintain_order="left")
    after = pl.len().over("user_id") - pl.int_range(1, pl.len() + 1).over("user_id")
    unknown = {label: pl.lit(False) for label in _LABELS.values()}
    known = {label: pl.col(label).fill_null(False) for label in ("like", "long_view")}
    return events.select(
        "user_id",
        "item_id",
        timestamp_ms=pl.col("last_time_ms") - 60_000 * after.cast(pl.Int64),
        playtime_ms=pl.lit(None, pl.Int64),
        duration_ms=pl.lit(None, pl.Int64),
        **(unknown | known),
    )


def _exploded(path: Path, name: str) -> pl.DataFrame:
    """(user_id, item_id) of one list column, in order."""
    frame = read_parquet(path)
    if name not in frame.columns or frame[name].dtype != pl.List(pl.Int64):
        found = f"of type {frame[name].dtype}" if name in frame.columns else "missing"
        raise InputError(f"{path}: column '{name}' is {found}, expected lists of integers")
    pairs = frame.select("user_id", pl.col(name).alias("item_id")).explode("item_id")
    return pairs.drop_nulls("item_id")


def _items(path: Path) -> pl.DataFrame:
    words = ("author_id", "music_id", "video_type", "upload_type", "tag", "upload_dt")
    frame = read_columns(
        path, {"video_id": INTEGER, "video_duration": NUMBER} | dict.fromkeys(words, TEXT), ["video_duration"]
    )
    uploaded = pl.col("upload_dt").str.to_datetime("%Y-%m-%d", strict=False, time_unit="ms").cast(pl.Int64)
    tags = pl.col("tag").fill_null("").str.extract_all(r"[^,\s]+")
    tokens = [
        tags.list.eval(pl.lit("tag_") + pl.element()).list.join(" "),
        pl.lit("author_") + pl.col("author_id"),
        pl.lit("music_") + pl.col("music_id"),
        pl.col("video_type"),
        pl.col("upload_type"),
    ]
    return frame.select(
        pl.col("video_id").alias("item_id"),
        "author_id",
        tags.alias("tags"),
        pl.col("video_duration").round().cast(pl.Int64).alias("duration_ms"),
        (uploaded - _UTC_PLUS_8_MS).alias("upload_time_ms"),
        pl.concat_str(tokens, separator=" ", ignore_nulls=True).str.strip_chars().alias("text"),
    )


def _users(path: Path) -> pl.DataFrame:
    columns = {"user_id": INTEGER} | dict.fromkeys(_USER_CATEGORIES, TEXT)
    return read_columns(path, columns).with_columns(pl.col(_USER_CATEGORIES).fill_null("unknown"))
