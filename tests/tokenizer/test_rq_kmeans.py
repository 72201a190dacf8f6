import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_jax.errors import InputError
from onerec_jax.tokenizer import rq_kmeans


@pytest.fixture(scope="module")
def vectors():
    return np.random.default_rng(0).normal(size=(400, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def codebooks(vectors):
    return rq_kmeans.fit(vectors, (8, 8, 8), 8, seed=0, batch_size=128)


def numpy_encode(vectors, codebooks):
    residual, codes = vectors.astype(np.float64), []
    for book in codebooks:
        codes.append(((residual[:, None] - book[None]) ** 2).sum(2).argmin(1))
        residual = residual - book[codes[-1]]
    return np.stack(codes, 1), residual


def test_codebooks_have_the_sizes_asked_for(codebooks):
    assert [book.shape for book in codebooks] == [(8, 6), (8, 6), (8, 6)]
    assert all(book.dtype == np.float32 for book in codebooks)


def test_encode_equals_a_numpy_restatement(vectors, codebooks):
    codes = rq_kmeans.encode(vectors, codebooks, 128)
    assert codes.dtype == np.int32
    np.testing.assert_array_equal(codes, numpy_encode(vectors, codebooks)[0])


def test_a_vector_is_its_centroids_plus_the_last_residual(vectors, codebooks):
    codes, residual = numpy_encode(vectors, codebooks)
    np.testing.assert_allclose(rq_kmeans.decode(codes, codebooks) + residual, vectors, atol=1e-5)


def test_error_falls_with_every_level(vectors, codebooks):
    codes = rq_kmeans.encode(vectors, codebooks, 128)
    errors = [np.mean((vectors - rq_kmeans.decode(codes[:, :levels], codebooks)) ** 2) for levels in range(4)]
    assert errors == sorted(errors, reverse=True) and errors[3] < 0.5 * errors[1]


def test_each_level_clusters_what_the_level_before_left(vectors, codebooks):
    deeper = rq_kmeans.fit(vectors, (8, 8, 8, 8), 8, seed=0, batch_size=128)
    for book, same in zip(codebooks, deeper, strict=False):
        np.testing.assert_array_equal(book, same)


def test_same_seed_same_codebooks(vectors, codebooks):
    for book, again in zip(codebooks, rq_kmeans.fit(vectors, (8, 8, 8), 8, seed=0, batch_size=128), strict=True):
        np.testing.assert_array_equal(book, again)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_decode_sums_one_centroid_per_level(data):
    books = tuple(np.random.default_rng(level).normal(size=(5, 3)).astype(np.float32) for level in range(3))
    code = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    expected = sum(book[index] for book, index in zip(books, code, strict=False))
    np.testing.assert_allclose(rq_kmeans.decode(np.array([code]), books)[0], expected, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_a_vector_that_is_not_finite_is_named_by_its_row(vectors, codebooks, bad):
    broken = vectors.copy()
    broken[[17, 40], 2] = bad
    with pytest.raises(InputError, match=r"item row 17 .*\(2 such rows\)"):
        rq_kmeans.fit(broken, (4,), 2, seed=0, batch_size=128)
    with pytest.raises(InputError, match="item row 17"):
        rq_kmeans.encode(broken, codebooks, 128)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3,)])
def test_vectors_of_no_use_are_refused(shape):
    with pytest.raises(InputError, match="content vectors have shape"):
        rq_kmeans.fit(np.zeros(shape, np.float32), (4,), 2, seed=0, batch_size=128)


def test_vectors_and_codes_that_do_not_fit_the_codebooks_are_refused(codebooks):
    with pytest.raises(InputError, match="width 5 do not fit codebooks of width 6"):
        rq_kmeans.encode(np.zeros((2, 5), np.float32), codebooks, 8)
    for code in (-1, 8):
        with pytest.raises(InputError, match="level 1 has codes outside 0 to 7"):
            rq_kmeans.decode(np.array([[0, code, 0]]), codebooks)


@pytest.mark.parametrize("items", [1, 8])
def test_constant_vectors_share_one_id_without_loss(items):
    constant = np.full((items, 2), 0.7, np.float32)
    books = rq_kmeans.fit(constant, (8, 8), 3, seed=0, batch_size=8)
    codes = rq_kmeans.encode(constant, books, 8)
    assert len(np.unique(codes, axis=0)) == 1
    np.testing.assert_allclose(rq_kmeans.decode(codes, books), constant, atol=1e-6)


def test_zero_vectors_and_duplicates_are_ordinary_input():
    vectors = np.repeat(np.array([[0, 0], [1, 0], [0, 2]], np.float32), 7, axis=0)
    books = rq_kmeans.fit(vectors, (8, 8), 4, seed=0, batch_size=8)
    codes = rq_kmeans.encode(vectors, books, 8)
    assert len(np.unique(codes, axis=0)) == 3
    np.testing.assert_allclose(rq_kmeans.decode(codes, books), vectors, atol=1e-6)
