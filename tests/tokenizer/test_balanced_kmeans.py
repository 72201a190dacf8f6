import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_jax.config import ResidualKMeans
from onerec_jax.tokenizer import rq_kmeans
from onerec_jax.tokenizer.balanced_kmeans import balanced_assignment, balanced_k_means
from onerec_jax.tokenizer.kmeans import plus_plus
from onerec_jax.tokenizer.quantizer import Items, codebooks


def normal(rows, width=3, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def literal_pass(vectors, centroids):
    """One pass over k of OneRec v1's Algorithm 1, as printed, in float64."""
    remaining, codes = list(range(len(vectors))), np.empty(len(vectors), int)
    centroids = centroids.astype(np.float64).copy()
    for code in range(len(centroids)):
        share = len(vectors) // len(centroids) + (code < len(vectors) % len(centroids))
        remaining.sort(key=lambda row: (((vectors[row].astype(np.float64) - centroids[code]) ** 2).sum(), row))
        cluster, remaining = remaining[:share], remaining[share:]
        codes[cluster] = code
        if cluster:
            centroids[code] = vectors[cluster].mean(0, dtype=np.float64)
    return codes, centroids


@pytest.mark.parametrize("rows", [60, 65, 71])
def test_centroids_equal_a_literal_algorithm_1(rows):
    vectors = normal(rows)
    centroids, before = plus_plus(vectors, 12, 3), None
    for _ in range(5):
        codes, centroids = literal_pass(vectors, centroids)
        if before is not None and (codes == before).all():
            break
        before = codes
    np.testing.assert_allclose(balanced_k_means(vectors, 12, 5, 3, 64), centroids, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 50), size=st.integers(1, 20), batch_size=st.sampled_from([1, 64]))
def test_one_pass_equals_the_literal_one_and_sizes_differ_by_at_most_one(rows, size, batch_size):
    vectors, centroids = normal(rows, seed=rows), normal(size, seed=size + 100)
    codes = balanced_assignment(vectors, centroids, batch_size)
    np.testing.assert_array_equal(codes, literal_pass(vectors, centroids)[0])
    sizes = np.bincount(codes, minlength=size)
    assert codes.dtype == np.int32 and sizes.max() - sizes.min() <= 1


def test_ties_go_to_the_lowest_row():
    assert balanced_assignment(np.ones((7, 2), np.float32), np.ones((3, 2), np.float32)).tolist() == [
        0,
        0,
        0,
        1,
        1,
        2,
        2,
    ]


def test_the_pass_ends_early_when_no_vector_changes_its_cluster():
    vectors = np.repeat(100 * normal(6), 5, axis=0) + normal(30, seed=1) / 100
    np.testing.assert_array_equal(balanced_k_means(vectors, 6, 50, 0, 64), balanced_k_means(vectors, 6, 10**9, 0, 64))


@pytest.mark.parametrize("vectors", [np.ones((1, 2)), np.ones((9, 2)), np.repeat(np.eye(2), 8, axis=0)])
def test_fewer_distinct_vectors_than_codes_are_all_centroids(vectors):
    book = balanced_k_means(vectors.astype(np.float32), 4, 10, 0, 64)
    assert book.shape == (4, vectors.shape[1]) and book.dtype == np.float32
    for vector in vectors:
        assert np.abs(book - vector).sum(1).min() < 1e-6


def test_levels_named_balanced_are_balanced_and_the_others_are_not():
    items = Items(np.concatenate([normal(150) / 10, normal(50) * 5]), (10, 10), iterations=8)
    plain = codebooks(rq_kmeans.fit(items).arrays)
    first = codebooks(rq_kmeans.fit(items, ResidualKMeans(balanced_levels=(1,))).arrays)
    second = codebooks(rq_kmeans.fit(items, ResidualKMeans(balanced_levels=(2,))).arrays)
    np.testing.assert_array_equal(first[0], balanced_k_means(items.vectors, 10, 8, (0, 0), items.batch_size))
    np.testing.assert_array_equal(second[0], plain[0])
    assert not np.array_equal(second[1], plain[1]) and not np.array_equal(first[0], plain[0])
