import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorstore as ts

from onerec_jax.config import TokenizerConfig
from onerec_jax.errors import InputError
from onerec_jax.tokenizer import embedding_files
from onerec_jax.tokenizer.content import content_vectors
from onerec_jax.tokenizer.embedding_files import open_embeddings

VALUES = np.arange(12, dtype=np.float32).reshape(4, 3)
IDS = np.array([7, 3, 9, 1])


def read_embeddings(path, item_ids):
    return open_embeddings(path, item_ids).whole()


def parquet(path, ids, embeddings, kind=None):
    pq.write_table(pa.table({"item_id": ids, "embedding": pa.array(embeddings, kind)}), path)
    return path


def npy(path, values):
    np.save(path, values)
    return path


def zarr(path, values, driver="zarr"):
    path = path.with_suffix(".zarr")
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": str(path)}}
    ts.open(spec, create=True, dtype=values.dtype, shape=values.shape).result()[...] = values
    return path


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8])
def test_npy_and_zarr_have_a_row_per_item_row(tmp_path, dtype):
    values = VALUES.astype(dtype)
    places = [
        npy(tmp_path / "a.npy", values),
        zarr(tmp_path / "two", values),
        zarr(tmp_path / "three", values, "zarr3"),
    ]
    for path in places:
        read = read_embeddings(path, IDS)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, VALUES)


@pytest.mark.parametrize("write", [npy, zarr])
def test_slices_and_rows_in_any_order_are_read_as_float32(tmp_path, write):
    rows = open_embeddings(write(tmp_path / "a.npy", np.asfortranarray(VALUES, np.float16)), IDS)
    assert rows.shape == (4, 3)
    for index in (slice(1, 3), slice(None), np.array([3, 0, 3]), np.array([], np.int64)):
        assert rows[index].dtype == np.float32 and rows[index].flags.c_contiguous
        np.testing.assert_array_equal(rows[index], VALUES[index])


@pytest.mark.parametrize("write", [npy, zarr])
def test_rows_far_apart_are_read_in_turn(tmp_path, write, monkeypatch):
    monkeypatch.setattr(embedding_files, "_VALUES_AT_ONCE", 30)  # ten rows
    values = np.random.default_rng(0).normal(size=(95, 3)).astype(np.float32)
    rows, reads = open_embeddings(write(tmp_path / "a.npy", values), np.arange(95)), []
    read = embedding_files.EmbeddingRows.raw
    monkeypatch.setattr(embedding_files.EmbeddingRows, "raw", lambda rows, at: [reads.append(at), read(rows, at)][1])
    index = np.random.default_rng(1).permutation(95)[:40]
    np.testing.assert_array_equal(rows[index], values[index])
    assert all(np.ptp(at) < 10 for at in reads) and sorted(np.concatenate(reads)) == sorted(index)


@pytest.mark.parametrize("write", [npy, zarr])
def test_a_value_that_is_not_finite_is_named_by_its_item_row_however_it_is_read(tmp_path, write):
    rows = open_embeddings(write(tmp_path / "a.npy", np.where(VALUES == 7, np.inf, VALUES)), IDS)
    np.testing.assert_array_equal(rows[:2], VALUES[:2])
    for index in (slice(1, 4), slice(None), np.array([3, 2, 0])):
        with pytest.raises(InputError, match=r"item row 2 in .* not finite in float32"):
            rows[index]


def test_a_file_that_is_damaged_while_it_is_read_is_refused(tmp_path):
    cut, broken = npy(tmp_path / "cut.npy", VALUES), zarr(tmp_path / "broken", VALUES)
    for path, damaged in ((cut, cut), (broken, broken / "0.0")):
        rows = open_embeddings(path, IDS)
        damaged.write_bytes(damaged.read_bytes()[:-5])
        with pytest.raises(InputError, match=f"{path.name} cannot be read: "):
            rows[:2]
        damaged.unlink()
    with pytest.raises(InputError, match=r"cut\.npy cannot be read: the file is missing"):
        open_embeddings(cut, IDS)


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float32(), 3)])
def test_parquet_rows_are_found_by_id_in_any_order_and_others_are_passed_over(tmp_path, kind):
    path = parquet(tmp_path / "a.parquet", [1, 5, 9, 3, 7], [*VALUES[[3, 0, 2, 1]].tolist(), [0, 1, 2]], kind)
    rows = {1: VALUES[3], 9: VALUES[2], 3: VALUES[1], 7: [0, 1, 2]}
    np.testing.assert_array_equal(read_embeddings(path, IDS), [rows[item] for item in IDS])


def test_ids_are_compared_as_text_where_one_side_is_text(tmp_path):
    numbers = parquet(tmp_path / "n.parquet", pa.array([1, 3, 7, 9], pa.int32()), VALUES.tolist())
    words = parquet(tmp_path / "w.parquet", ["1", "3", "7", "9"], VALUES.tolist())
    for path in (numbers, words):
        for ids in (IDS, IDS.astype(object).astype(str).astype(object)):
            np.testing.assert_array_equal(read_embeddings(path, ids), VALUES[[2, 1, 3, 0]])


def test_missing_items_are_counted_and_one_is_named(tmp_path):
    path = parquet(tmp_path / "a.parquet", [3, 1], VALUES[:2].tolist())
    with pytest.raises(InputError, match=r"a\.parquet lacks 2 of the dataset's 4 items, the first is 7;"):
        read_embeddings(path, IDS)


def test_an_item_twice_is_refused(tmp_path):
    path = parquet(tmp_path / "a.parquet", [7, 3, 9, 1, 3], [[1.0]] * 5)
    with pytest.raises(InputError, match="item 3 is 2 times in"):
        read_embeddings(path, IDS)


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        ([[1.0], [1.0, 2.0], [1.0], [1.0]], "item 3 in .* has 2 values"),
        ([[1.0], None, [1.0], [1.0]], "item 3 in .* has no values"),
        ([None, [1.0], [1.0], [1.0]], "item 7 in .* has no values"),
        ([[], [], [], []], "item 7 in .* has no values"),
        ([[1.0], [None], [1.0], [1.0]], "item row 1 in .* not finite"),
        ([1.0, 2.0, 3.0, 4.0], "of type double; expected lists of floats"),
        ([["a"], ["b"], ["c"], ["d"]], "values of type object; expected floats"),
    ],
)
def test_parquet_lists_that_are_no_vectors_are_refused(tmp_path, embeddings, message):
    with pytest.raises(InputError, match=message):
        read_embeddings(parquet(tmp_path / "a.parquet", IDS, embeddings), IDS)


def test_a_parquet_file_without_the_columns_is_refused(tmp_path):
    pq.write_table(pa.table({"item_id": IDS, "vector": VALUES.tolist()}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="no column 'embedding', only item_id, vector"):
        read_embeddings(tmp_path / "a.parquet", IDS)


@pytest.mark.parametrize("write", [npy, zarr])
def test_another_shape_or_type_or_a_value_that_is_not_finite_is_refused(tmp_path, write, monkeypatch):
    monkeypatch.setattr(embedding_files, "_VALUES_AT_ONCE", 6)  # two rows at once
    bad = VALUES.astype(np.float64)
    bad[3, 1] = 1e300
    for number, (values, message) in enumerate(
        [
            (VALUES[:3], r"shape \[3, 3\]; expected \[4, width\] or \[4, tokens, width\]"),
            (VALUES[:, 0], r"shape \[4\]"),
            (VALUES.astype(bool), "values of type bool; expected floats"),
            (VALUES.astype(complex), "values of type complex128; expected floats"),
            (bad, "item row 3 in .* not finite in float32"),
            (np.where(VALUES == 4, np.nan, VALUES), "item row 1 in .* not finite"),
        ]
    ):
        with pytest.raises(InputError, match=message):
            read_embeddings(write(tmp_path / f"{number}.npy", values), IDS)


def test_files_that_are_not_there_or_something_else_are_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("a.npy", "a.parquet", "a.zarr"):
        with pytest.raises(InputError, match=f"{name} .*missing"):
            read_embeddings(tmp_path / name, IDS)
    for name in ("b.npy", "b.parquet"):
        (tmp_path / name).write_bytes(b"neither")
        with pytest.raises(InputError, match=f"{name} cannot be read: "):
            read_embeddings(tmp_path / name, IDS)
    (tmp_path / "b.csv").write_bytes(b"1,2")
    with pytest.raises(InputError, match=r"b\.csv is of an unknown format; expected a \.npy file"):
        read_embeddings(tmp_path / "b.csv", IDS)
    with pytest.raises(InputError, match=r"folder is a folder without \.zarray or zarr\.json"):
        read_embeddings(tmp_path / "folder", IDS)
    (tmp_path / "folder" / ".zarray").write_text("{")
    with pytest.raises(InputError, match="folder cannot be read: "):
        read_embeddings(tmp_path / "folder", IDS)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"objects\.npy cannot be read: "):
        read_embeddings(tmp_path / "objects.npy", IDS)


def test_the_file_wins_over_the_embeddings_of_the_dataset(tmp_path, make_dataset):
    dataset = make_dataset(4, embedding=np.ones((4, 2)))
    dataset.item_ids = IDS
    settings = TokenizerConfig(embedding_path=str(npy(tmp_path / "a.npy", VALUES)))
    vectors = content_vectors(dataset, settings, 0)
    np.testing.assert_allclose(vectors, VALUES / np.linalg.norm(VALUES, axis=1, keepdims=True), rtol=1e-6)


def test_token_vectors_need_alignment_and_no_other_content(tmp_path, make_dataset):
    tokens = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
    settings = {"embedding_path": str(npy(tmp_path / "a.npy", tokens))}
    dataset = make_dataset(4, histories=[[0, 1, 2, 3]], text=["a", "b", "c", "d"])
    for more in ({}, {"alignment": {"steps": 1}, "content": ("embedding", "text")}):
        with pytest.raises(InputError, match=r"holds tokens of shape \[4, 5, 3\], which need tokenizer\.alignment"):
            content_vectors(dataset, TokenizerConfig.model_validate(settings | more), 0)
    given = content_vectors(dataset, TokenizerConfig.model_validate(settings | {"alignment": {"steps": 1}}), 0)
    assert given.shape == (4, 5, 3)
    np.testing.assert_allclose(np.linalg.norm(given, axis=2), 1, rtol=1e-6)
