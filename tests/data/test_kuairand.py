"""KuaiRand in both layouts, from small files written as the publisher writes them."""

from __future__ import annotations

import datetime
from pathlib import Path

import polars as pl
import pytest

from onerec_jax.config import KuaiRandSource
from onerec_jax.data.schema import Tables
from onerec_jax.data.sources.kuairand import tables
from onerec_jax.errors import InputError


def utc8(text: str) -> int:
    return int(datetime.datetime.fromisoformat(text + "+08:00").timestamp() * 1000)


LOG = pl.DataFrame(
    {
        "user_id": [0, 0, 1],
        "video_id": [10, 11, 10],
        "date": [20220425, 20220426, 20220501],
        "hourmin": [100, 900, 0],
        "time_ms": [utc8("2022-04-25T01:02:03"), utc8("2022-04-26T09:00:00"), utc8("2022-04-30T23:30:00")],
        "is_click": [1, 0, 1],
        "is_like": [1, 0, 0],
        "is_follow": [0, 0, 1],
        "is_comment": [0, 1, 0],
        "is_forward": [0, 0, 1],
        "is_hate": [0, 1, 0],
        "long_view": [0, 0, 1],
        "play_time_ms": [950, 500, 100],
        "duration_ms": [1000, 1000, 0],
        "profile_stay_time": [0, 0, 0],
        "comment_stay_time": [0, 0, 0],
        "is_profile_enter": [0, 0, 1],
        "is_rand": [0, 0, 0],
        "tab": [1, 1, 0],
    }
)
VIDEOS = """video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,music_id,music_type,tag
10,7349781,NORMAL,2022-04-10,LongImport,0.0,87433.0,915,9.0,39
11,2103883,NORMAL,2022-04-11,Kmovie,0.0,,635,9.0,"62,4"
12,5,AD,2022-04-09,Web,0.0,5000.0,636,,
"""


def user_features() -> pl.DataFrame:
    names = ["user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author"]
    names += [f"{who}_user_num{part}" for who in ("follow", "fans", "friend") for part in ("", "_range")]
    names += ["register_days", "register_days_range", *(f"onehot_feat{n}" for n in range(18))]
    return pl.DataFrame({"user_id": ["0", "1"]} | {name: ["v", None] for name in names})


@pytest.fixture
def publisher(tmp_path: Path) -> Path:
    folder = tmp_path / "KuaiRand-Pure" / "data"
    folder.mkdir(parents=True)
    LOG.head(2).write_csv(folder / "log_standard_4_08_to_4_21_pure.csv")
    LOG.tail(1).write_csv(folder / "log_standard_4_22_to_5_08_pure.csv")
    (folder / "log_random_4_22_to_5_08_pure.csv").write_text("never read")
    (folder / "video_features_statistic_pure.csv").write_text("never read")
    (folder / "video_features_basic_pure.csv").write_text(VIDEOS)
    user_features().write_csv(folder / "user_features_pure.csv")
    return folder


@pytest.fixture
def extract(tmp_path: Path) -> Path:
    LOG.write_parquet(tmp_path / "log_standard_0425_0430.parquet")
    sequences = pl.DataFrame(
        {
            "user_id": [0, 1],
            "history_len": [4, 1],
            "last_time_ms": [utc8("2022-04-24T12:00:00"), utc8("2022-04-20T12:00:00")],
            "watch_seq": [[11, 10, 11], [10]],
            "like_seq": [[12], []],
            "long_watch_seq": [[12, 10], [10]],
        },
        schema_overrides={name: pl.List(pl.Int64) for name in ("watch_seq", "like_seq", "long_watch_seq")},
    )
    sequences.write_parquet(tmp_path / "user_sequences_upto_0424.parquet")
    (tmp_path / "video_features_basic_pure.csv").write_text(VIDEOS)
    user_features().write_csv(tmp_path / "user_features_pure.csv")
    return tmp_path


def load(folder: Path) -> Tables:
    return tables(KuaiRandSource(path=str(folder)), seed=0)


def test_the_publishers_layout_is_found_in_the_data_subfolder(publisher: Path) -> None:
    events = pl.DataFrame(load(publisher.parent).events)
    assert events["item_id"].to_list() == [10, 11, 10]
    assert events.equals(pl.DataFrame(load(publisher).events))


def test_labels_are_the_publishers_and_finish_is_95_percent_of_a_known_duration(publisher: Path) -> None:
    events = pl.DataFrame(load(publisher).events)
    assert events.select(pl.col(pl.Boolean)).to_dict(as_series=False) == {
        "click": [True, False, True],
        "long_view": [False, False, True],
        "finish": [True, False, False],
        "like": [True, False, False],
        "follow": [False, False, True],
        "comment": [False, True, False],
        "forward": [False, False, True],
        "hate": [False, True, False],
        "profile_enter": [False, False, True],
    }
    assert events["duration_ms"].to_list() == [1000, 1000, None]
    assert events["playtime_ms"].to_list() == [950, 500, 100]


def test_a_time_before_its_date_is_moved_to_the_first_moment_of_the_date(publisher: Path) -> None:
    times = pl.DataFrame(load(publisher).events)["timestamp_ms"].to_list()
    assert times == [LOG["time_ms"][0], LOG["time_ms"][1], utc8("2022-05-01T00:00:00")]


def test_items_carry_author_tags_duration_upload_time_and_tokens(publisher: Path) -> None:
    items = pl.DataFrame(load(publisher).items)
    assert items.row(1, named=True) == {
        "item_id": 11,
        "author_id": "2103883",
        "tags": ["62", "4"],
        "duration_ms": None,
        "upload_time_ms": utc8("2022-04-11T00:00:00"),
        "text": "tag_62 tag_4 author_2103883 music_635 NORMAL Kmovie",
    }
    assert items["tags"].to_list()[2] == []
    assert items["text"][2] == "author_5 music_636 AD Web"


def test_users_have_categories_only_and_no_raw_counts(publisher: Path) -> None:
    users = load(publisher).users
    assert "fans_user_num_range" in users.column_names and "fans_user_num" not in users.column_names
    assert len(users.column_names) == 1 + 7 + 18
    assert users["onehot_feat4"].to_pylist() == ["v", "unknown"]


def test_sequences_of_the_extract_become_events_a_minute_apart(extract: Path) -> None:
    events = pl.DataFrame(load(extract).events)
    first = events.filter((pl.col("user_id") == 0) & (pl.col("timestamp_ms") < utc8("2022-04-25T00:00:00")))
    last = utc8("2022-04-24T12:00:00")
    assert first["item_id"].to_list() == [12, 11, 10, 11]
    assert first["timestamp_ms"].to_list() == [last - 180_000, last - 120_000, last - 60_000, last]
    assert first["like"].to_list() == [True, False, False, False]
    assert first["long_view"].to_list() == [True, False, True, False]
    assert not first["click"].any() and not first["finish"].any()
    assert first["playtime_ms"].null_count() == 4
    assert events.height == 4 + 1 + LOG.height


@pytest.mark.parametrize(
    ("file", "column", "values", "sentence"),
    [
        (
            "log_standard_4_08_to_4_21_pure.csv",
            "time_ms",
            ["1", "soon"],
            "column 'time_ms' row 1 is 'soon', expected an",
        ),
        ("log_standard_4_08_to_4_21_pure.csv", "time_ms", [5, -1], "column 'time_ms' row 1 is -1, expected it not"),
        ("log_standard_4_08_to_4_21_pure.csv", "date", [20220425, 7], "column 'date' row 1 is 7, expected a date"),
        ("log_standard_4_08_to_4_21_pure.csv", "video_id", [10, 99], "column 'item_id' row 1 is 99, expected an id"),
        ("user_features_pure.csv", "user_id", [0, 0], "column 'user_id' row 1 repeats 0, expected unique ids"),
    ],
)
def test_a_bad_value_is_named_with_its_place(
    publisher: Path, file: str, column: str, values: list, sentence: str
) -> None:
    frame = pl.read_csv(publisher / file, infer_schema=False)
    frame.with_columns(pl.Series(column, values, strict=False)).write_csv(publisher / file)
    with pytest.raises(InputError, match=sentence):
        load(publisher)


def test_a_missing_column_is_named_with_its_file(publisher: Path) -> None:
    path = publisher / "log_standard_4_22_to_5_08_pure.csv"
    pl.read_csv(path).drop("is_like").write_csv(path)
    with pytest.raises(InputError, match=r"log_standard_4_22.*\.csv: column 'is_like' is missing, expected an integer"):
        load(publisher)


def test_a_repeated_video_is_refused(publisher: Path) -> None:
    path = publisher / "video_features_basic_pure.csv"
    path.write_text(VIDEOS + VIDEOS.splitlines()[1] + "\n")
    with pytest.raises(InputError, match="items: column 'item_id' row 3 repeats 10"):
        load(publisher)


@pytest.mark.parametrize("file", ["video_features_basic_pure.csv", "user_sequences_upto_0424.parquet"])
def test_a_missing_file_is_named(extract: Path, file: str) -> None:
    (extract / file).unlink()
    with pytest.raises(InputError, match=f"expected one file {file.split('_pure')[0]}.*there is none"):
        load(extract)


def test_a_folder_that_is_not_there_or_has_no_logs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.source\.path: no folder '.*nowhere'"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"expected log_standard_\*\.csv or log_standard_\*\.parquet, there is none"):
        load(tmp_path)


def test_a_file_that_is_not_parquet_is_refused(extract: Path) -> None:
    (extract / "log_standard_0425_0430.parquet").write_text("user_id,video_id\n")
    with pytest.raises(InputError, match=r"log_standard_0425_0430\.parquet: not a readable Parquet file"):
        load(extract)


def test_a_sequence_that_ends_after_the_logs_begin_is_refused(extract: Path) -> None:
    path = extract / "user_sequences_upto_0424.parquet"
    pl.read_parquet(path).with_columns(last_time_ms=pl.lit(utc8("2022-04-25T00:00:00"))).write_parquet(path)
    with pytest.raises(InputError, match="column 'last_time_ms' of user 0 is 1650816000000, expected before"):
        load(extract)
