"""Amazon reviews in both layouts, from small files written as the publishers write them."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import polars as pl
import pytest

from onerec_jax.config import AmazonSource
from onerec_jax.data.schema import Tables
from onerec_jax.data.sources.amazon import tables
from onerec_jax.errors import InputError

REVIEWS = [
    {"reviewerID": "A1", "asin": "B1", "overall": 5.0, "unixReviewTime": 200},
    {"reviewerID": "A1", "asin": "B2", "overall": 4.0, "unixReviewTime": 100},
    {"reviewerID": "A2", "asin": "B2", "overall": 1.0, "unixReviewTime": 100},
    {"reviewerID": "A1", "asin": "B3", "overall": 3.0, "unixReviewTime": 100},
]
METADATA = [
    {
        "asin": "B1",
        "title": "Kid&#39;s Shampoo",
        "categories": [["Beauty", "Hair Care"]],
        "brand": "Foam",
        "price": 3.5,
    },
    {"asin": "B9", "title": "never reviewed", "categories": [["Beauty"]]},
    {"asin": "B2", "categories": [["Beauty", "Skin"], ["Gifts"]]},
]


def write(folder: Path, reviews: list[dict], metadata: list[str]) -> Path:
    lines = "".join(json.dumps(review) + "\n" for review in reviews)
    with gzip.open(folder / "reviews_Beauty_5.json.gz", "wt") as file:
        file.write(lines)
    if metadata:
        (folder / "meta_Beauty.json").write_text("\n".join(metadata) + "\n")
    return folder


def load(folder: Path) -> Tables:
    return tables(AmazonSource(path=str(folder)), seed=0)


def test_reviews_are_sorted_by_time_and_ties_keep_the_files_order_a_millisecond_apart(tmp_path: Path) -> None:
    events = pl.DataFrame(load(write(tmp_path, REVIEWS, [])).events)
    assert events.rows() == [("A1", "B2", 100_000), ("A2", "B2", 100_000), ("A1", "B3", 100_001), ("A1", "B1", 200_000)]


@pytest.mark.parametrize("style", [repr, json.dumps])
def test_metadata_is_read_as_python_literals_and_as_json(tmp_path: Path, style) -> None:
    items = pl.DataFrame(load(write(tmp_path, REVIEWS, [style(record) for record in METADATA])).items)
    by_id = {row["item_id"]: row for row in items.to_dicts()}
    assert set(by_id) == {"B1", "B2", "B3"}
    assert by_id["B1"]["author_id"] == "Foam"
    assert by_id["B1"]["tags"] == ["Hair Care", "Beauty"]
    assert by_id["B1"]["text"] == "Kid's Shampoo Foam Hair Care Beauty"
    assert by_id["B2"]["tags"] == ["Skin", "Beauty", "Gifts"] and by_id["B2"]["author_id"] is None
    assert by_id["B3"]["tags"] == [] and by_id["B3"]["text"] == ""


def test_an_expression_in_the_metadata_is_not_evaluated(tmp_path: Path) -> None:
    write(tmp_path, REVIEWS, ["dict(asin='B1')"])
    with pytest.raises(InputError, match=r"meta_Beauty\.json line 1: .*expected one JSON object a line"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"unixReviewTime": "soon"}, "line 2: 'unixReviewTime' is 'soon', expected whole seconds"),
        ({"unixReviewTime": -5}, "line 2: 'unixReviewTime' is -5, expected whole seconds, not negative"),
        ({"asin": None}, "line 2: 'asin' is missing"),
    ],
)
def test_a_bad_review_is_named_by_file_and_line(tmp_path: Path, change: dict, sentence: str) -> None:
    write(tmp_path, [REVIEWS[0], REVIEWS[1] | change], [])
    with pytest.raises(InputError, match=r"reviews_Beauty_5\.json\.gz " + sentence):
        load(tmp_path)


def test_an_item_described_twice_is_refused(tmp_path: Path) -> None:
    write(tmp_path, REVIEWS, [json.dumps(METADATA[0])] * 2)
    with pytest.raises(InputError, match=r"meta_Beauty\.json line 2: 'asin' repeats 'B1'"):
        load(tmp_path)


def test_a_folder_without_files_and_no_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected reviews_\*_5\.json\[\.gz\], or \*\.txt with items\.jsonl"):
        load(tmp_path)
    with pytest.raises(InputError, match="no folder"):
        load(tmp_path / "nowhere")


def test_a_file_that_is_not_gzip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "reviews_Beauty_5.json.gz").write_text("plain text")
    with pytest.raises(InputError, match=r"reviews_Beauty_5\.json\.gz: not readable as UTF-8 text after line 0"):
        load(tmp_path)


def test_two_categories_in_one_folder_are_refused(tmp_path: Path) -> None:
    write(tmp_path, REVIEWS, [])
    (tmp_path / "reviews_Toys_5.json").write_text("")
    with pytest.raises(
        InputError, match=r"expected one file .* there are reviews_Beauty_5\.json\.gz, reviews_Toys_5\.json"
    ):
        load(tmp_path)


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    (tmp_path / "Beauty.txt").write_text("1 2 1 3\n2 3 3\n")
    records = [{"item_id": n, "title": f"title {n}", "categories": None, "brand": None} for n in (1, 2, 3)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, records)))
    return tmp_path


def test_sequences_are_timed_by_their_place_in_seconds(benchmark: Path) -> None:
    made = load(benchmark)
    assert pl.DataFrame(made.events).rows() == [(1, 2, 0), (1, 1, 1000), (1, 3, 2000), (2, 3, 0), (2, 3, 1000)]
    assert made.items["text"].to_pylist() == ["title 1", "title 2", "title 3"]
    assert made.users["user_id"].to_pylist() == [1, 2]


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("Beauty.txt", "1 2 1\n2 three\n", r"Beauty\.txt line 2: '2 three', expected integers"),
        ("Beauty.txt", "1 2 1\n1 3\n", r"Beauty\.txt line 2: user 1 repeats"),
        ("Beauty.txt", "1 2 9\n", "column 'item_id' row 1 is 9, expected an id of the items table"),
        ("items.jsonl", '{"item_id": 1}\n{"item_id": 1}\n', "items: column 'item_id' row 1 repeats 1"),
        ("items.jsonl", '{"item_id": "x"}\n', r"items\.jsonl line 1: 'item_id' is 'x', expected an integer"),
        ("items.jsonl", '{"asin": "x"}\n', r"items\.jsonl line 1: 'item_id' is missing"),
        ("Beauty.txt", f"1 {9**30}\n", r"Beauty\.txt line 1: '1 \d+', expected integers"),
        ("items.jsonl", f'{{"item_id": {9**30}}}\n', r"items\.jsonl line 1: 'item_id' is \d+, expected an integer of"),
        ("items.jsonl", "[" * 100_000, r"items\.jsonl line 1: .*, expected one JSON object a line"),
        ("items.jsonl", "nonsense\n", r"items\.jsonl line 1: 'nonsense', expected one JSON object a line"),
    ],
)
def test_bad_benchmark_files_are_refused(benchmark: Path, file: str, text: str, sentence: str) -> None:
    (benchmark / file).write_text(text)
    with pytest.raises(InputError, match=sentence):
        load(benchmark)


def test_sequences_without_their_file_are_refused(benchmark: Path) -> None:
    (benchmark / "Beauty.txt").unlink()
    with pytest.raises(InputError, match=r"expected one file \*\.txt, there is none"):
        load(benchmark)


def test_sequences_that_are_no_text_are_refused(benchmark: Path) -> None:
    (benchmark / "Beauty.txt").write_bytes(b"1 2\n\xff")
    with pytest.raises(InputError, match=r"Beauty\.txt: not readable as UTF-8 text"):
        load(benchmark)


def test_a_folder_or_a_pipe_in_the_place_of_a_file_is_refused(benchmark: Path) -> None:
    path = benchmark / "Beauty.txt"
    for make, remove in ((os.mkfifo, Path.unlink), (Path.mkdir, Path.rmdir)):
        path.unlink(missing_ok=True)
        make(path)
        with pytest.raises(InputError, match=r"Beauty\.txt: is no file, expected one that matches \*\.txt"):
            load(benchmark)
        remove(path)


def test_metadata_of_other_items_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"meta_Beauty\.json: describes none of the 3 items of the reviews"):
        load(write(tmp_path, REVIEWS, [json.dumps(METADATA[1])]))
