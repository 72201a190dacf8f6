"""Any Parquet log through a column mapping."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from onerec_jax.config import ParquetSource
from onerec_jax.data.schema import Tables
from onerec_jax.data.sources.parquet import tables
from onerec_jax.errors import InputError

EVENTS = {
    "uid": ["a", "b", "a"],
    "video": [7, 8, 8],
    "timestamp_ms": [30, 10, 40],
    "is_like": [1, 0, 0],
    "click": [True, True, False],
    "ignored": [0.5, 0.5, 0.5],
}
MAPPING = {"user_id": "uid", "item_id": "video", "like": "is_like"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pl.DataFrame(EVENTS).write_parquet(tmp_path / "events.parquet")
    pl.DataFrame(
        {"video": [7, 8, 9], "text": ["x", None, "z"], "tags": [["t"], [], None], "embedding": [[1.0, 2.0]] * 3}
    ).write_parquet(tmp_path / "items.parquet")
    pl.DataFrame({"uid": ["a", "b"], "age": [3, 4]}).write_parquet(tmp_path / "users.parquet")
    return tmp_path


def load(
    folder: Path, events: str = "events.parquet", columns: dict[str, str] | None = None, **tables_of: str
) -> Tables:
    paths = {name: str(folder / file) for name, file in tables_of.items()}
    source = ParquetSource(events=str(folder / events), columns=MAPPING if columns is None else columns, **paths)  # type: ignore[arg-type]
    return tables(source, seed=0)


def rewrite(folder: Path, file: str, **columns: list) -> None:
    frame = pl.read_parquet(folder / file)
    frame.with_columns(pl.Series(name, values) for name, values in columns.items()).write_parquet(folder / file)


def test_columns_are_mapped_and_those_of_canonical_name_need_no_mapping(folder: Path) -> None:
    events = pl.DataFrame(load(folder).events)
    assert events.to_dict(as_series=False) == {
        "user_id": ["a", "b", "a"],
        "item_id": [7, 8, 8],
        "timestamp_ms": [30, 10, 40],
        "click": [True, True, False],
        "like": [True, False, False],
    }


def test_items_and_users_are_those_of_the_events_when_not_given(folder: Path) -> None:
    made = load(folder)
    assert made.items.to_pydict() == {"item_id": [7, 8]}
    assert made.users.to_pydict() == {"user_id": ["a", "b"]}


def test_given_items_and_users_are_read_with_their_content_and_features(folder: Path) -> None:
    made = load(folder, items="items.parquet", users="users.parquet")
    items = pl.DataFrame(made.items)
    assert items["item_id"].to_list() == [7, 8, 9] and items["tags"].to_list() == [["t"], [], None]
    assert items["embedding"].dtype == pl.Array(pl.Float32, 2)
    assert made.users.to_pydict() == {"user_id": ["a", "b"], "age": [3, 4]}


def test_a_glob_reads_its_files_in_order_of_their_names(folder: Path) -> None:
    pl.DataFrame(EVENTS | {"timestamp_ms": [1, 2, 3]}).write_parquet(folder / "events2.parquet")
    assert load(folder, "events*.parquet").events["timestamp_ms"].to_pylist() == [30, 10, 40, 1, 2, 3]


@pytest.mark.parametrize(
    ("column", "values", "sentence"),
    [
        ("timestamp_ms", ["x", "y", "z"], "column 'timestamp_ms' is of type .*string.* expected integer, milliseconds"),
        ("timestamp_ms", [1.5, 2.0, 3.0], "column 'timestamp_ms' is of type double .*expected integer, milliseconds"),
        ("timestamp_ms", [1, -2, 3], "events: column 'timestamp_ms' row 1 is -2, expected integer"),
        ("is_like", [0, 1, 2], "column 'is_like' row 2 is 2, expected true or false, or 0 or 1"),
        ("is_like", ["y", "n", "y"], "column 'like' is of type .*string.* expected true or false"),
        ("video", [1.0, 2.0, 3.0], "column 'item_id' is of type double .*expected integer or string"),
        ("uid", ["a", None, "b"], "column 'user_id' row 1 is null"),
    ],
)
def test_a_bad_event_column_is_named_with_what_was_expected(
    folder: Path, column: str, values: list, sentence: str
) -> None:
    rewrite(folder, "events.parquet", **{column: values})
    with pytest.raises(InputError, match=sentence):
        load(folder)


def test_a_repeated_item_and_an_unknown_item_are_refused(folder: Path) -> None:
    rewrite(folder, "items.parquet", video=[7, 8, 7])
    with pytest.raises(InputError, match="items: column 'item_id' row 2 repeats 7"):
        load(folder, items="items.parquet")
    rewrite(folder, "items.parquet", video=[7, 1, 2])
    with pytest.raises(InputError, match="events: column 'item_id' row 1 is 8, expected an id of the items table"):
        load(folder, items="items.parquet")


def test_embeddings_of_two_lengths_are_refused(folder: Path) -> None:
    rewrite(folder, "items.parquet", embedding=[[1.0, 2.0], [1.0], [3.0, 4.0]])
    with pytest.raises(InputError, match="column 'embedding' row 1 is of length 1, expected 2 floats as in row 0"):
        load(folder, items="items.parquet")


def test_a_missing_column_is_named(folder: Path) -> None:
    frame = pl.read_parquet(folder / "events.parquet").drop("timestamp_ms")
    frame.write_parquet(folder / "events.parquet")
    with pytest.raises(InputError, match=r"events\.parquet: events: column 'timestamp_ms' is missing"):
        load(folder)


def test_a_mapping_to_a_column_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"events\.parquet: column 'liked' is missing, expected like there"):
        load(folder, columns=MAPPING | {"like": "liked"})


def test_a_mapping_of_an_unknown_name_is_refused(folder: Path) -> None:
    with pytest.raises(
        InputError, match=r"data\.source\.columns: no canonical column 'likes', expected any of user_id"
    ):
        load(folder, columns=MAPPING | {"likes": "is_like"})


def test_a_missing_file_is_named_with_its_setting(folder: Path) -> None:
    with pytest.raises(InputError, match=r"data\.source\.events: no file matches '.*nothing\.parquet'"):
        load(folder, "nothing.parquet")
    with pytest.raises(InputError, match=r"data\.source\.items: no file matches"):
        load(folder, items="nothing.parquet")


def test_a_file_that_is_not_parquet_is_refused(folder: Path) -> None:
    (folder / "events.parquet").write_text("uid,video\n")
    with pytest.raises(InputError, match=r"events\.parquet: not readable as one Parquet table"):
        load(folder)


def test_a_flipped_bit_of_a_file_with_checksums_is_refused(folder: Path) -> None:
    path, frame = folder / "events.parquet", pl.read_parquet(folder / "events.parquet")
    plain = {"write_page_checksum": True, "compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(frame.to_arrow(), path, **plain)
    load(folder)
    content = bytearray(path.read_bytes())
    content[content.index(int(frame["timestamp_ms"][0]).to_bytes(8, "little"))] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"events\.parquet: not readable as one Parquet table"):
        load(folder)
