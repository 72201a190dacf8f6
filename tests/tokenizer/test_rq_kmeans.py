import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_jax.config import ResidualKMeans
from onerec_jax.errors import InputError
from onerec_jax.tokenizer import rq_kmeans
from onerec_jax.tokenizer.quantizer import Items, codebooks, with_codebooks


@pytest.fixture(scope="module")
def vectors():
    return np.random.default_rng(0).normal(size=(400, 6)).astype(np.float32)


def fit(vectors, sizes=(8, 8, 8), iterations=8, batch_size=128):
    return rq_kmeans.fit(Items(vectors, sizes, seed=0, iterations=iterations, batch_size=batch_size))


@pytest.fixture(scope="module")
def fitted(vectors):
    return fit(vectors)


@pytest.fixture(scope="module")
def books(fitted):
    return codebooks(fitted.arrays)


def numpy_encode(vectors, codebooks):
    residual, codes = vectors.astype(np.float64), []
    for book in codebooks:
        codes.append(((residual[:, None] - book[None]) ** 2).sum(2).argmin(1))
        residual = residual - book[codes[-1]]
    return np.stack(codes, 1), residual


def test_codebooks_have_the_sizes_asked_for(books):
    assert [book.shape for book in books] == [(8, 6), (8, 6), (8, 6)]
    assert all(book.dtype == np.float32 for book in books)


def test_encode_equals_a_numpy_restatement_and_the_fitted_codes(vectors, fitted, books):
    codes = rq_kmeans.encode(fitted.arrays, vectors, 128)
    assert codes.dtype == np.int32
    np.testing.assert_array_equal(codes, numpy_encode(vectors, books)[0])
    np.testing.assert_array_equal(codes, fitted.codes)


def test_a_vector_is_its_centroids_plus_the_last_residual(vectors, fitted, books):
    codes, residual = numpy_encode(vectors, books)
    np.testing.assert_allclose(rq_kmeans.decode(fitted.arrays, codes) + residual, vectors, atol=1e-5)


def test_error_falls_with_every_level(vectors, fitted):
    decoded = [rq_kmeans.decode(fitted.arrays, fitted.codes[:, :levels]) for levels in range(4)]
    errors = [np.mean((vectors - decoded[levels]) ** 2) for levels in range(4)]
    assert errors == sorted(errors, reverse=True) and errors[3] < 0.5 * errors[1]


def test_each_level_clusters_what_the_level_before_left(vectors, books):
    deeper = codebooks(fit(vectors, (8, 8, 8, 8)).arrays)
    for book, same in zip(books, deeper, strict=False):
        np.testing.assert_array_equal(book, same)


def test_same_seed_same_codebooks(vectors, books):
    for book, again in zip(books, codebooks(fit(vectors).arrays), strict=True):
        np.testing.assert_array_equal(book, again)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_decode_sums_one_centroid_per_level(data):
    books = tuple(np.random.default_rng(level).normal(size=(5, 3)).astype(np.float32) for level in range(3))
    code = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    expected = sum(book[index] for book, index in zip(books, code, strict=False))
    np.testing.assert_allclose(rq_kmeans.decode(with_codebooks(books), np.array([code]))[0], expected, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_a_vector_that_is_not_finite_is_named_by_its_row(vectors, fitted, bad):
    broken = vectors.copy()
    broken[[17, 40], 2] = bad
    with pytest.raises(InputError, match=r"item row 17 .*\(2 such rows\)"):
        fit(broken, (4,), 2)
    with pytest.raises(InputError, match="item row 17"):
        rq_kmeans.encode(fitted.arrays, broken, 128)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3,)])
def test_vectors_of_no_use_are_refused(shape):
    with pytest.raises(InputError, match="content vectors have shape"):
        fit(np.zeros(shape, np.float32), (4,), 2)


def test_vectors_and_codes_that_do_not_fit_the_codebooks_are_refused(fitted):
    with pytest.raises(InputError, match="width 5 do not fit codebooks of width 6"):
        rq_kmeans.encode(fitted.arrays, np.zeros((2, 5), np.float32), 8)
    for code in (-1, 8):
        with pytest.raises(InputError, match="level 1 has codes outside 0 to 7"):
            rq_kmeans.decode(fitted.arrays, np.array([[0, code, 0]]))


@pytest.mark.parametrize("items", [1, 8])
def test_constant_vectors_share_one_id_without_loss(items):
    constant = np.full((items, 2), 0.7, np.float32)
    fitted = fit(constant, (8, 8), 3, batch_size=8)
    assert len(np.unique(fitted.codes, axis=0)) == 1
    np.testing.assert_allclose(rq_kmeans.decode(fitted.arrays, fitted.codes), constant, atol=1e-6)


def test_zero_vectors_and_duplicates_are_ordinary_input():
    vectors = np.repeat(np.array([[0, 0], [1, 0], [0, 2]], np.float32), 7, axis=0)
    fitted = fit(vectors, (8, 8), 4, batch_size=8)
    assert len(np.unique(fitted.codes, axis=0)) == 3
    np.testing.assert_allclose(rq_kmeans.decode(fitted.arrays, fitted.codes), vectors, atol=1e-6)


class Store:
    """Rows that can only be read in slices or by index, as from a disk; remembers the largest read."""

    def __init__(self, rows):
        self.rows, self.shape, self.largest = rows, rows.shape, 0

    def __getitem__(self, index):
        assert not isinstance(index, slice) or index.stop <= len(self.rows), "a TensorStore refuses to be cut short"
        part = self.rows[index]
        self.largest = max(self.largest, len(part))
        return part


def test_rows_of_a_store_give_the_codes_of_the_same_rows_in_memory(vectors, fitted):
    store = Store(vectors)
    streamed = rq_kmeans.fit(Items(store, (8, 8, 8), seed=0, iterations=8, batch_size=128))
    np.testing.assert_array_equal(streamed.codes, fitted.codes)
    np.testing.assert_array_equal(rq_kmeans.encode(streamed.arrays, store, 128), fitted.codes)


def test_a_store_is_read_in_batches(vectors):
    store = Store(np.tile(vectors, (60, 1)))  # more rows than the start samples
    rq_kmeans.fit(Items(store, (4,), seed=0, iterations=1, batch_size=1024))
    assert store.largest <= 16_384 < len(store.rows)


def test_a_fit_that_was_killed_goes_on_after_its_last_finished_level(vectors, fitted, tmp_path, monkeypatch):
    made = []
    one_level = rq_kmeans._one_level

    def killed_at_level(number):
        def run(rows, size, level, *rest):
            if level == number:
                raise KeyboardInterrupt
            made.append(level)
            return one_level(rows, size, level, *rest)

        return run

    items = Items(vectors, (8, 8, 8), seed=0, iterations=8, batch_size=128, progress=tmp_path / "levels")
    monkeypatch.setattr(rq_kmeans, "_one_level", killed_at_level(2))
    with pytest.raises(KeyboardInterrupt):
        rq_kmeans.fit(items)
    monkeypatch.setattr(rq_kmeans, "_one_level", killed_at_level(None))
    again = rq_kmeans.fit(items)
    assert made == [0, 1, 2]
    np.testing.assert_array_equal(again.codes, fitted.codes)
    rq_kmeans.fit(dataclasses.replace(items, seed=1))
    assert made == [0, 1, 2, 0, 1, 2]


def test_bfloat16_scores_refined_in_float32_find_the_same_codes(vectors):
    settings = ResidualKMeans(assignment="bfloat16")
    wide = np.random.default_rng(3).normal(size=(3000, 24)).astype(np.float32)
    items = Items(wide, (256, 256), seed=0, iterations=2, batch_size=1024)
    low = rq_kmeans.fit(items, settings)
    assert (rq_kmeans.encode(low.arrays, wide, 1024) == low.codes).all(1).mean() > 0.999
