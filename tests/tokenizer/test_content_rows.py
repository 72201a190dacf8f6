"""Given embeddings that stay in their file: the IDs of the same vectors in memory, read a batch at a time."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorstore as ts

from onerec_jax.config import TokenizerConfig
from onerec_jax.errors import InputError
from onerec_jax.tokenizer import report
from onerec_jax.tokenizer.content import UnitRows, content_rows, content_vectors
from onerec_jax.tokenizer.embedding_files import EmbeddingRows
from onerec_jax.tokenizer.report import contents
from onerec_jax.tokenizer.semantic_ids import fit_semantic_ids

ITEMS = 300


def npy(folder, values):
    np.save(folder / "given.npy", values)
    return folder / "given.npy"


def zarr(folder, values):
    """Chunks that batches do not line up with."""
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder / "given.zarr")}}
    spec["metadata"] = {"chunks": [37, 3]}
    ts.open(spec, create=True, dtype=values.dtype, shape=values.shape).result()[...] = values
    return folder / "given.zarr"


def config(path, **settings):
    return TokenizerConfig.model_validate(
        {"embedding_path": str(path), "codebook_sizes": (8, 8), "iterations": 4, "batch_size": 64, **settings}
    )


def embeddings(items=ITEMS, dtype=np.float16):
    """Of which some are equal and one is zero."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2 * items // 3, 6))[rng.integers(0, 2 * items // 3, items)]
    values[3] = 0
    return values.astype(dtype)


def normalised(values):
    values = values.astype(np.float32)
    return np.stack([row / np.linalg.norm(row) if row.any() else row for row in values])


@pytest.fixture
def dataset(make_dataset):
    counts = np.random.default_rng(1).integers(0, 9, ITEMS)
    return make_dataset(ITEMS, histories=[[0, 1, 2, 3], [2, 3, 4]], train_count=counts)


def rounded(values):
    """Nested plain values with floats to six digits."""
    if isinstance(values, dict):
        return {name: rounded(value) for name, value in values.items()}
    if isinstance(values, list):
        return [rounded(value) for value in values]
    return float(f"{values:.5e}") if isinstance(values, float) else values


@pytest.mark.parametrize("write", [npy, zarr])
@pytest.mark.parametrize(
    "settings",
    [
        {"dedup": "none"},
        {"dedup": "extra_level"},
        {"dedup": "nearest_free"},
        {"dedup": "sinkhorn"},
        {"quantizer": {"kind": "residual_kmeans", "balanced_levels": [2]}},
    ],
    ids=lambda settings: next(iter(settings.values())),
)
def test_a_file_gives_the_ids_and_the_report_of_the_same_vectors_in_memory(
    tmp_path, dataset, write, settings, monkeypatch
):
    monkeypatch.setattr(report, "_MAP_ITEMS", 40)  # few enough for the axes, which take no time
    values = embeddings()
    given = config(write(tmp_path, values), **settings)
    vectors, rows = content_vectors(dataset, given, 0), content_rows(dataset, given, 0)
    assert isinstance(rows, UnitRows)
    np.testing.assert_allclose(vectors, normalised(values), rtol=1e-6)
    in_memory, streamed = fit_semantic_ids(dataset, given, 0, vectors), fit_semantic_ids(dataset, given, 0)
    np.testing.assert_array_equal(streamed.codes, in_memory.codes)
    pages = contents(streamed, dataset, rows), contents(in_memory, dataset, vectors)
    assert rounded(pages[0]) == rounded(pages[1])


@pytest.mark.parametrize("write", [npy, zarr])
def test_a_value_that_is_not_finite_gives_the_error_of_reading_all(tmp_path, dataset, write):
    values = embeddings()
    values[[150, 200], 2] = np.nan, np.inf
    given = config(write(tmp_path, values))
    messages = []
    for make in (content_vectors, fit_semantic_ids):
        with pytest.raises(InputError, match=r"item row 150 in .*given.* not finite in float32") as raised:
            make(dataset, given, 0)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


class Spy:
    """Remembers the largest slice and the most rows by index that were read from files."""

    def __init__(self, monkeypatch):
        self.slice = self.index = 0
        read = EmbeddingRows.raw

        def raw(rows, index):
            values = read(rows, index)
            if isinstance(index, slice):
                self.slice = max(self.slice, len(values))
            else:
                self.index = max(self.index, len(values))
            return values

        monkeypatch.setattr(EmbeddingRows, "raw", raw)


@pytest.mark.parametrize("dedup", ["extra_level", "nearest_free"])
def test_no_slice_is_larger_than_a_batch_and_other_reads_are_samples(tmp_path, make_dataset, monkeypatch, dedup):
    items = 20_000  # more than the start of k-means samples
    given = config(
        npy(tmp_path, embeddings(items)), batch_size=1024, iterations=2, dedup=dedup, codebook_sizes=(64, 64)
    )
    for name, value in (("_DECODED_ITEMS", 5000), ("_SIMILARITIES", 10**7), ("_MAP_ITEMS", 40)):
        monkeypatch.setattr(report, name, value)
    dataset, spy = make_dataset(items), Spy(monkeypatch)
    ids = fit_semantic_ids(dataset, given, 0)
    assert 0 < spy.slice <= 1024
    assert dedup == "nearest_free" or spy.index == 8192
    spy.slice = spy.index = 0
    contents(ids, dataset, content_rows(dataset, given, 0))
    assert 0 < spy.slice <= 1024 and spy.index == 5000


@pytest.mark.parametrize(
    "settings",
    [
        {"content": ("embedding", "behaviour")},
        {"quantizer": {"kind": "product"}},
        {"alignment": {"steps": 1}},
        {"embedding_path": "given.parquet"},
        {"embedding_path": None},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_needs_all_vectors_gets_them_as_one_array(tmp_path, make_dataset, monkeypatch, settings):
    monkeypatch.chdir(tmp_path)
    values = embeddings(8)
    pq.write_table(pa.table({"item_id": range(8), "embedding": values.astype(np.float32).tolist()}), "given.parquet")
    dataset = make_dataset(8, histories=[range(8)], embedding=values)
    given = config(npy(tmp_path, values), **settings)
    rows = content_rows(dataset, given, 0)
    assert isinstance(rows, np.ndarray)
    np.testing.assert_array_equal(rows, content_vectors(dataset, given, 0))


def test_tokens_that_nothing_aligns_are_refused_before_they_are_read(tmp_path, make_dataset):
    given = config(npy(tmp_path, np.zeros((4, 2, 3), np.float32)))
    with pytest.raises(InputError, match=r"holds tokens of shape \[4, 2, 3\]"):
        content_rows(make_dataset(4), given, 0)
