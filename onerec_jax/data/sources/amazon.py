"""Amazon reviews (McAuley lab, 2014 release) as sequences of bought items; there are no feedback labels.

Two layouts are read. The publisher's: `reviews_*_5.json[.gz]`, one JSON object a line, with `meta_*.json[.gz]` beside
it when at hand (Python literals in the 2014 release, JSON in later ones). Benchmark files: one `*.txt` whose lines are
`user item item ...` in time order, and `items.jsonl`; these have no times, so an event's time is its place in the
line, in seconds.

Review times have the granularity of a day. Reviews of one user and moment keep the order of the file, one millisecond
apart.
"""

from __future__ import annotations

import ast
import gzip
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from onerec_jax.config import AmazonSource
from onerec_jax.data.schema import Tables
from onerec_jax.data.sources.files import arrow, existing_folder, find, only
from onerec_jax.data.validate import validate
from onerec_jax.errors import InputError

_REVIEWS = ("reviews_*_5.json", "reviews_*_5.json.gz")
_METADATA = ("meta_*.json", "meta_*.json.gz")
_ASIN = re.compile(r"""['"]asin['"]:\s*['"](\w+)['"]""")
_LAST_SECOND = 1 << 43  # thousands of it fit into 63 bits
_ITEM_SCHEMA = {"author_id": pl.String, "tags": pl.List(pl.String), "text": pl.String}


def tables(source: AmazonSource, seed: int) -> Tables:
    """Canonical tables of either layout; brands are the authors, categories (narrowest first) the tags.

    Raises:
        InputError: a file is missing, the metadata is of other items, a line is not what the layout says, or an item or
            user comes twice.
    """
    folder = existing_folder(source.path)
    if find(folder, *_REVIEWS):
        events, items = _reviews(folder)
    elif find(folder, "items.jsonl"):
        events, items = _sequences(folder)
    else:
        raise InputError(f"{folder}: expected reviews_*_5.json[.gz], or *.txt with items.jsonl, there is neither")
    users = events.select("user_id").unique(maintain_order=True)
    return validate(Tables(arrow(events), arrow(items), arrow(users)), str(folder))


def _reviews(folder: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    path = only(folder, *_REVIEWS)
    rows: list[tuple[str, str, int]] = []
    for place, record in _records(path):
        user, item, second = (_field(record, name, place) for name in ("reviewerID", "asin", "unixReviewTime"))
        if type(second) is not int or not 0 <= second < _LAST_SECOND:
            raise InputError(f"{place}: 'unixReviewTime' is {second!r}, expected whole seconds, not negative")
        rows.append((str(user), str(item), second))
    log = pl.DataFrame(rows, schema={"user_id": pl.String, "item_id": pl.String, "second": pl.Int64}, orient="row")
    log = log.sort("second", maintain_order=True)
    tie = pl.int_range(pl.len()).over("user_id", "second")
    events = log.select("user_id", "item_id", timestamp_ms=pl.col("second") * 1000 + tie)
    metadata = find(folder, *_METADATA)
    described = _described(only(folder, *_METADATA), set(log["item_id"])) if metadata else {}
    items = log.select("item_id").unique(maintain_order=True)
    content = pl.DataFrame(list(described.values()), schema=_ITEM_SCHEMA).with_columns(
        item_id=pl.Series(list(described), dtype=pl.String)
    )
    items = items.join(content, on="item_id", how="left", maintain_order="left")
    return events, items.with_columns(pl.col("tags").fill_null([]), pl.col("text").fill_null(""))


def _described(path: Path, wanted: set[str]) -> dict[str, dict[str, Any]]:
    """Content of the wanted items by asin."""
    described: dict[str, dict[str, Any]] = {}
    for place, record in _records(path, wanted):
        asin = str(_field(record, "asin", place))
        if asin not in wanted:
            continue
        if asin in described:
            raise InputError(f"{place}: 'asin' repeats {asin!r}, expected every item once")
        described[asin] = _content(record, place)
    if wanted and not described:
        raise InputError(f"{path}: describes none of the {len(wanted)} items of the reviews")
    return described


def _sequences(folder: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    path = only(folder, "*.txt")
    users: dict[int, list[int]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as UTF-8 text: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            user, *items = map(_id, line.split())
        except ValueError:
            raise InputError(f"{path} line {number}: {line[:60]!r}, expected integers: user item item ...") from None
        if user in users:
            raise InputError(f"{path} line {number}: user {user} repeats, expected one line a user")
        users[user] = items
    nested = pl.DataFrame(
        {"user_id": list(users), "item_id": list(users.values())},
        schema={"user_id": pl.Int64, "item_id": pl.List(pl.Int64)},
    )
    place = pl.int_ranges(pl.col("item_id").list.len()).cast(pl.List(pl.Int64)) * 1000
    events = nested.with_columns(timestamp_ms=place).explode("item_id", "timestamp_ms").drop_nulls("item_id")
    ids: list[int] = []
    content: list[dict[str, Any]] = []
    for where, record in _records(only(folder, "items.jsonl")):
        item = _field(record, "item_id", where)
        if type(item) is not int or item.bit_length() > 63:
            raise InputError(f"{where}: 'item_id' is {item!r}, expected an integer of at most 64 bits")
        ids.append(item)
        content.append(_content(record, where))
    items = pl.DataFrame(content, schema=_ITEM_SCHEMA).with_columns(item_id=pl.Series(ids, dtype=pl.Int64))
    return events, items


def _id(word: str) -> int:
    if (value := int(word)).bit_length() > 63:
        raise ValueError(f"{word} has more than 64 bits")
    return value


def _records(path: Path, wanted: set[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """("FILE line N", record) of every line: JSON, or the Python literal of a dict.

    Lines that plainly name an `asin` that is not wanted are passed over: reading literals is slow, and the publisher's
    metadata describes some twenty items for each one that is kept.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                named = _ASIN.search(line) if wanted is not None else None
                if named is None or named[1] in (wanted or ()):
                    place = f"{path} line {number}"
                    yield place, _record(line, place)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as UTF-8 text after line {number}: {error}") from None


def _record(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        try:
            record = ast.literal_eval(line.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            record = None
    if not isinstance(record, dict):
        raise InputError(f"{place}: {line.strip()[:60]!r}, expected one JSON object a line")
    return record


def _field(record: dict[str, Any], name: str, place: str) -> Any:
    if record.get(name) is None:
        raise InputError(f"{place}: '{name}' is missing, expected it in every line; there are {', '.join(record)}")
    return record[name]


def _content(record: dict[str, Any], place: str) -> dict[str, Any]:
    paths = record.get("categories") or []
    if not all(isinstance(path, list) for path in paths):
        raise InputError(f"{place}: 'categories' is {paths!r}, expected lists of category names")
    tags = list(dict.fromkeys(str(name) for path in paths for name in reversed(path)))
    brand = record.get("brand") or None
    words = [str(record.get("title") or ""), str(brand or ""), " ".join(tags)]
    return {
        "author_id": None if brand is None else str(brand),
        "tags": tags,
        "text": html.unescape(" ".join(word for word in words if word)),
    }
