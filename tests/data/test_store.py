"""Reading a dataset directory: what went in comes out, and what is damaged is named."""

import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from onerec_jax.data.store import Dataset
from onerec_jax.errors import DamagedError, InputError


@pytest.fixture
def dataset(noise_tables, write):
    return write(noise_tables())


def test_item_arrays_hold_what_the_items_table_says(noise_tables, write):
    tables = noise_tables()
    dataset = write(tables)
    rows = tables.items.to_pylist()
    assert dataset.item_ids.tolist() == [row["item_id"] for row in rows]
    assert dataset.items.text == [row["text"] for row in rows]
    seconds = [-1 if row["duration_ms"] is None else row["duration_ms"] / 1000 for row in rows]
    assert dataset.items.duration_s.tolist() == pytest.approx(seconds)
    assert dataset.items.upload_ms.tolist() == [
        -1 if row["upload_time_ms"] is None else row["upload_time_ms"] for row in rows
    ]
    assert np.array_equal(dataset.items.embedding, np.array([row["embedding"] for row in rows], np.float32))
    for column, codes in (("author_id", dataset.items.author), ("tags", dataset.items.tag)):
        values = [row[column][:1] if column == "tags" else row[column] for row in rows]
        for one, code in zip(values, codes, strict=True):
            same = [other == one for other in values]
            assert (codes == code).tolist() == same
            assert (code == 0) == (one in (None, []))


def test_user_features_are_codes_with_zero_for_unknown(dataset):
    assert dataset.user_ids.tolist() == [f"u{row}" for row in range(6)]
    assert dataset.user_features.tolist() == [[0, 1], [1, 2], [2, 1], [3, 2], [1, 1], [2, 2]]
    assert dataset.user_feature_sizes == (4, 3)


def test_tables_without_optional_columns_have_one_row_for_the_unknown(noise_tables, write):
    tables = noise_tables(embedding=0)
    bare = type(tables)(
        tables.events.select(["user_id", "item_id", "timestamp_ms"]),
        tables.items.select(["item_id"]),
        tables.users.select(["user_id"]),
    )
    dataset = write(bare)
    assert (dataset.num_authors, dataset.num_tags, dataset.labels) == (1, 1, ())
    assert dataset.items.author.tolist() == dataset.items.tag.tolist() == [0] * 9
    assert dataset.items.embedding is None
    assert dataset.items.text == [""] * 9
    assert dataset.user_features.shape == (6, 0)
    history = dataset.history(0)
    assert history.feedback.shape == (len(history.item), 0)
    assert history.positive.all()
    assert set(history.playtime_s) == set(history.duration_s) == {-1}


def test_the_vocabulary_tells_every_size(dataset):
    vocabulary = dataset.vocabulary((8, 4))
    assert (vocabulary.users, vocabulary.items, vocabulary.authors, vocabulary.tags) == (6, 9, 5, 4)
    assert vocabulary.user_features == (4, 3)
    assert vocabulary.labels == ("click", "long_view", "like")
    assert vocabulary.levels == 2


def test_several_histories_come_in_the_order_asked(dataset):
    for history, row in zip(dataset.histories(np.array([4, 0, 4])), [4, 0, 4], strict=True):
        assert np.array_equal(history.rows, dataset.history(row).rows)


def test_threads_may_share_a_dataset(dataset):
    expected = [dataset.history(row).rows.tobytes() for row in range(6)]
    rows = np.random.default_rng(0).integers(0, 6, 2_000).tolist()
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda row: dataset.history(row).rows.tobytes(), rows))
    assert read == [expected[row] for row in rows]


def test_a_loader_process_opens_the_same_dataset(dataset):
    again = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(again.history(2).rows, dataset.history(2).rows)


def test_a_folder_without_dataset_says_which_command_makes_it(tmp_path):
    with pytest.raises(InputError, match=r"holds no dataset.*onerec data RECIPE"):
        Dataset(tmp_path / "nowhere")


def test_a_dataset_that_does_not_say_when_train_ends_says_how_to_get_it(noise_tables, write):
    dataset = write(noise_tables())
    del dataset.card["train_end_ms"]
    with pytest.raises(InputError, match=r"does not say when train ends; make it anew with `onerec data RECIPE`"):
        dataset.train_end_ms  # noqa: B018


def damage_card(directory):
    (directory / "card.json").write_text("{")


def older_schema(directory):
    card = json.loads((directory / "card.json").read_text())
    (directory / "card.json").write_text(json.dumps(card | {"schema_version": 0}))


def lose_labels(directory):
    card = json.loads((directory / "card.json").read_text())
    del card["labels"]
    (directory / "card.json").write_text(json.dumps(card))


def lose_examples(directory):
    (directory / "examples-test.npy").unlink()


def lose_items(directory):
    (directory / "items" / "author" / ".zarray").unlink()


def cut_histories(directory):
    path = next(directory.glob("histories-*"))
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("harm", [damage_card, older_schema, lose_labels, lose_examples, lose_items, cut_histories])
def test_a_damaged_dataset_is_one_sentence(dataset, harm):
    harm(dataset.directory)
    with pytest.raises(InputError, match="onerec data RECIPE") as caught:
        Dataset(dataset.directory).history(0)
    assert "\n" not in str(caught.value)


def other_split(directory):
    card = json.loads((directory / "card.json").read_text())
    card["settings"]["lifelong_refresh"] += 1
    (directory / "card.json").write_text(json.dumps(card))


def flip_a_bit(name):
    def harm(directory):
        content = bytearray((directory / name).read_bytes())
        content[-1] ^= 1
        (directory / name).write_bytes(content)

    return harm


def lose_a_chunk(directory):  # TensorStore reads zeros where a chunk is missing
    (directory / "items" / "author" / "0").unlink()


SILENT = [
    (other_split, "card.json"),
    *(
        (flip_a_bit(name), name)
        for name in ("examples-train.npy", "train_stops.npy", "items/duration_s/0", "users.parquet")
    ),
    (lose_a_chunk, "items/author/0 is missing"),
]


@pytest.mark.parametrize(("harm", "named"), SILENT)
def test_a_change_that_leaves_a_file_readable_is_named(dataset, harm, named):
    harm(dataset.directory)
    with pytest.raises(InputError, match=rf"{named}.*onerec data RECIPE"):
        Dataset(dataset.directory)


def test_a_shard_in_the_place_of_another_of_its_size_is_named(noise_tables, write):
    directory = write(noise_tables(), shards=3).directory
    shards = sorted(directory.glob("histories-*"))
    contents = [shard.read_bytes() for shard in shards]
    assert len(contents[0]) == len(contents[1])
    shards[0].write_bytes(contents[1])
    dataset = Dataset(directory)
    with pytest.raises(DamagedError, match=rf"{shards[0].name} is damaged .it is not the file that card.json tells of"):
        dataset.history(0)
    dataset.history(2)


def test_a_dataset_from_before_checksums_is_read_as_it_is(dataset):
    card = json.loads((dataset.directory / "card.json").read_text())
    del card["files"], card["card_sha256"]
    (dataset.directory / "card.json").write_text(json.dumps(card))
    older = Dataset(dataset.directory)
    assert older.history(1).rows.tobytes() == dataset.history(1).rows.tobytes()


def test_reading_data_does_not_import_jax():
    rooms = "prepare, store, pipeline, lifelong, batch, records, items, split, histories"
    program = f"import sys\nfrom onerec_jax.data import {rooms}\nassert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
