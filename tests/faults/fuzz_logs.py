"""A small log in each layout that a source reads, and a second reading of it by other means."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from onerec_jax.config import Source
from onerec_jax.data.sources import load_tables


def write_logs(folder: Path) -> dict[str, Any]:
    """One log of 300 events in each layout that a source reads; settings of the sources by name."""
    rng = np.random.default_rng(0)
    events, users, items = 300, 20, 40
    user, item = rng.integers(0, users, events), rng.integers(0, items, events)
    time_ms = 1_651_000_000_000 + np.sort(rng.integers(0, 10**8, events))
    for name in ("parquet", "kuairand", "reviews", "sequences"):
        (folder / name).mkdir(parents=True)
    log = pl.DataFrame(
        {"user_id": user, "item_id": item, "timestamp_ms": time_ms, "playtime_ms": rng.integers(0, 9999, events)}
    )
    log.with_columns(like=pl.Series(rng.random(events) < 0.1)).write_parquet(
        folder / "parquet" / "events.parquet", use_pyarrow=True, pyarrow_options={"write_page_checksum": True}
    )
    labels = [
        "is_click",
        "long_view",
        "is_like",
        "is_follow",
        "is_comment",
        "is_forward",
        "is_hate",
        "is_profile_enter",
    ]
    pl.DataFrame(
        {"user_id": user, "video_id": item, "date": ["20220427"] * events, "time_ms": time_ms}
        | {"play_time_ms": rng.integers(0, 9999, events), "duration_ms": rng.integers(0, 9999, events)}
        | {name: rng.integers(0, 2, events) for name in labels}
    ).write_csv(folder / "kuairand" / "log_standard_4_22_to_5_08_pure.csv")
    head = "video_id,author_id,video_type,upload_dt,upload_type,video_duration,music_id,tag\n"
    rows = "".join(f"{i},{i % 7},NORMAL,2022-04-10,Web,{1000 + i}.0,{i % 3},{i % 5}\n" for i in range(items))
    (folder / "kuairand" / "video_features_basic_pure.csv").write_text(head + rows)
    features = [
        "user_active_degree",
        "is_live_streamer",
        "is_video_author",
        "follow_user_num_range",
        "fans_user_num_range",
    ]
    features += ["friend_user_num_range", "register_days_range", *(f"onehot_feat{n}" for n in range(18))]
    frame = pl.DataFrame({"user_id": np.arange(users)} | {name: rng.integers(0, 3, users) for name in features})
    frame.write_csv(folder / "kuairand" / "user_features_pure.csv")
    reviews = [
        {"reviewerID": f"A{u}", "asin": f"B{i}", "unixReviewTime": int(t) // 1000}
        for u, i, t in zip(user, item, time_ms, strict=True)
    ]
    (folder / "reviews" / "reviews_Beauty_5.json").write_text("".join(json.dumps(one) + "\n" for one in reviews))
    about = [
        {"asin": f"B{i}", "title": f"item {i}", "categories": [["All", f"c{i % 4}"]], "brand": f"b{i % 9}"}
        for i in range(items)
    ]
    (folder / "reviews" / "meta_Beauty.json").write_text("".join(json.dumps(one) + "\n" for one in about))
    lines = "".join(f"{u} {' '.join(map(str, item[user == u]))}\n" for u in range(users))
    (folder / "sequences" / "Beauty.txt").write_text(lines)
    known = "".join(json.dumps({"item_id": i, **one}) + "\n" for i, one in enumerate(about))
    (folder / "sequences" / "items.jsonl").write_text(known)
    return {
        "parquet": {"kind": "parquet", "events": str(folder / "parquet" / "events.parquet")},
        "kuairand": {"kind": "kuairand", "path": str(folder / "kuairand")},
        "reviews": {"kind": "amazon", "path": str(folder / "reviews")},
        "sequences": {"kind": "amazon", "path": str(folder / "sequences")},
    }


Rows = list[tuple[str, str, int]]
ANOTHER_DAY = -1


def second_reading(folder: Path) -> Rows:
    """Sorted (user, item, time in ms) of a log's events, by readers that the project does not use for it."""
    if (path := folder / "events.parquet").exists():
        rows = pq.ParquetFile(path).read(columns=["user_id", "item_id", "timestamp_ms"]).to_pylist()
        return sorted((str(row["user_id"]), str(row["item_id"]), row["timestamp_ms"]) for row in rows)
    if path := next(folder.glob("log_*.csv"), None):
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        day_ms = 1_651_017_600_000 - 8 * 3_600_000  # 27 April 2022 in UTC+8, before which no event of that day is put
        days = [row["date"] == "20220427" for row in rows]
        times = [max(int(row["time_ms"]), day_ms) if day else ANOTHER_DAY for row, day in zip(rows, days, strict=True)]
        return sorted(
            (str(int(row["user_id"])), str(int(row["video_id"])), t) for row, t in zip(rows, times, strict=True)
        )
    if path := next(folder.glob("reviews_*.json"), None):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        return sorted((str(row["reviewerID"]), str(row["asin"]), 0) for row in rows)
    lines = [line.split() for line in (folder / "Beauty.txt").read_text(encoding="utf-8").splitlines() if line.strip()]
    return sorted((str(int(u)), str(int(i)), 1000 * place) for u, *items in lines for place, i in enumerate(items))


def log_events(folder: Path, source: Source) -> Rows:
    """The same of the canonical tables that the project makes of a log."""
    events = load_tables(source, 0).events
    found = zip(*(events[name].to_pylist() for name in ("user_id", "item_id", "timestamp_ms")), strict=True)
    return sorted((str(user), str(item), 0 if _timeless(folder) else time) for user, item, time in found)


def wrong_events(folder: Path, source: Source, whole: Rows) -> str | None:
    """Reads a log, whose undamaged events are `whole`; returns what is wrong with its events."""
    made = log_events(folder, source)
    if made == whole:
        return None
    expected = second_reading(folder)
    if any(row[-1] == ANOTHER_DAY for row in expected):
        made, expected = ([(user, item, 0) for user, item, _ in rows] for rows in (made, expected))
    return None if made == expected else "the events are not those that a second reader finds"


def _timeless(folder: Path) -> bool:
    """Reviews of one second are moved apart by a millisecond each: their times are not compared."""
    return any(folder.glob("reviews_*.json"))
