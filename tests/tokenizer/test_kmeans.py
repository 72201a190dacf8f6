import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from onerec_jax.tokenizer.kmeans import k_means, lloyd, nearest, plus_plus


def squared_distances(vectors, centroids):
    difference = vectors.astype(np.float64)[:, None] - centroids.astype(np.float64)[None]
    return (difference**2).sum(2)


def inertia(vectors, centroids):
    return squared_distances(vectors, centroids).min(1).sum()


def numpy_lloyd(vectors, centroids, iterations):
    centroids = centroids.astype(np.float64)
    for _ in range(iterations):
        codes = squared_distances(vectors, centroids).argmin(1)
        centroids = np.stack([vectors[codes == code].mean(0, dtype=np.float64) for code in range(len(centroids))])
    return centroids


def planted(rng, clusters=12, per_cluster=30, width=8):
    centres = 10 * rng.normal(size=(clusters, width))
    label = np.repeat(np.arange(clusters), per_cluster)
    return (centres[label] + 0.1 * rng.normal(size=(len(label), width))).astype(np.float32), label


def test_lloyd_equals_a_numpy_restatement_from_the_same_start():
    vectors = np.random.default_rng(0).normal(size=(360, 8)).astype(np.float32)
    start = vectors[:12]
    found = lloyd(vectors, start, 5, 100, relocating=0)
    np.testing.assert_allclose(found, numpy_lloyd(vectors, start, 5), atol=1e-5)


def test_lloyd_leaves_the_start_it_was_given_untouched():
    vectors = np.random.default_rng(0).normal(size=(360, 8)).astype(np.float32)
    start = vectors[:12].copy()
    lloyd(vectors, start, 3, 100)
    np.testing.assert_array_equal(start, vectors[:12])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.sampled_from([1, 32, 70]))
def test_nearest_equals_brute_force(seed, size):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(40, 5)).astype(np.float32)
    centroids = rng.normal(size=(size, 5)).astype(np.float32)
    codes, distances = nearest(vectors, centroids, 16)
    expected = squared_distances(vectors, centroids)
    np.testing.assert_allclose(distances, expected.min(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(expected[np.arange(40), codes], expected.min(1), rtol=1e-4, atol=1e-5)


def test_ties_go_to_the_lowest_code():
    centroids = np.tile(np.array([[1, 0], [0, 1]], np.float32), (40, 1))
    codes, _ = nearest(np.array([[1, 0], [0, 1], [0, 0]], np.float32), centroids, 3)
    assert codes.tolist() == [0, 1, 0]


def test_a_far_offset_does_not_change_the_assignment():
    rng = np.random.default_rng(1)
    vectors, centroids = rng.integers(-50, 50, (200, 4)), rng.integers(-50, 50, (20, 4))
    expected = squared_distances(vectors, centroids).min(1)
    far_vectors, far_centroids = (vectors + 2**17).astype(np.float32), (centroids + 2**17).astype(np.float32)
    np.testing.assert_array_equal(nearest(far_vectors, far_centroids, 200)[1], expected)


def test_batch_size_does_not_change_the_clusters():
    vectors, _ = planted(np.random.default_rng(2))
    whole = k_means(vectors, 12, 5, seed=3, batch_size=10_000)
    for batch_size in (50, 100):
        np.testing.assert_allclose(k_means(vectors, 12, 5, seed=3, batch_size=batch_size), whole, atol=1e-4)


def test_planted_clusters_are_recovered():
    vectors, label = planted(np.random.default_rng(4))
    codes, _ = nearest(vectors, k_means(vectors, 12, 10, seed=0, batch_size=100), 100)
    assert len(set(zip(codes.tolist(), label.tolist(), strict=True))) == 12


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_start():
    vectors = np.random.default_rng(5).normal(size=(360, 8)).astype(np.float32)
    np.testing.assert_array_equal(k_means(vectors, 12, 4, 1, 100), k_means(vectors, 12, 4, 1, 100))
    assert not np.array_equal(plus_plus(vectors, 12, 1), plus_plus(vectors, 12, 2))


def test_plus_plus_draws_by_squared_distance():
    """Two tight pairs 10 apart: a second centre in the first one's pair has probability 1e-4."""
    vectors = np.array([[0, 0], [0, 0.1], [10, 0], [10, 0.1]], np.float32)
    for seed in range(30):
        assert abs(np.diff(plus_plus(vectors, 2, seed)[:, 0])) == 10


def test_plus_plus_starts_from_every_row_alike():
    vectors = np.arange(10, dtype=np.float32).reshape(5, 2)
    first = [int(plus_plus(vectors, 2, seed)[0, 0]) // 2 for seed in range(200)]
    assert np.bincount(first, minlength=5).min() > 200 / 5 / 2


def test_plus_plus_draws_distinct_vectors_while_there_are_any():
    vectors = np.repeat(100 + np.outer(np.arange(12), np.ones(8)).astype(np.float32), 30, axis=0)
    assert len(np.unique(plus_plus(vectors, 12, 0), axis=0)) == 12


def test_plus_plus_beats_a_random_start():
    rng = np.random.default_rng(6)
    vectors, _ = planted(rng)
    random = np.mean([inertia(vectors, vectors[rng.choice(len(vectors), 12, replace=False)]) for _ in range(10)])
    assert inertia(vectors, plus_plus(vectors, 12, 0)) < random / 10


def test_dead_codes_are_reseeded_to_distinct_far_points():
    """All codes start on one cluster; without re-seeding the ones far away would never gain a member."""
    vectors, _ = planted(np.random.default_rng(7))
    start = np.concatenate([vectors[:1], np.full((11, 8), 1e3, np.float32)])
    codes, _ = nearest(vectors, lloyd(vectors, start, 15, 100), 100)
    assert len(np.unique(codes)) == 12


def test_duplicates_of_one_far_point_revive_one_code_only():
    vectors = np.concatenate([np.zeros((5, 2)), np.full((5, 2), 9.0), [[3.0, 3.0]]]).astype(np.float32)
    start = np.array([[0, 0], [1e3, 0], [0, 1e3]], np.float32)
    assert lloyd(vectors, start, 1, 100)[1:].tolist() == [[9, 9], [3, 3]]


def test_fewer_vectors_than_codes_are_each_met_exactly():
    vectors = np.random.default_rng(8).normal(size=(3, 8)).astype(np.float32)
    centroids = k_means(vectors, 12, 5, seed=0, batch_size=64)
    codes, distances = nearest(vectors, centroids, 64)
    assert np.isfinite(centroids).all() and len(set(codes.tolist())) == 3
    np.testing.assert_allclose(distances, 0, atol=1e-10)


def test_inertia_is_near_scikit_learns():
    vectors = np.random.default_rng(9).normal(size=(360, 8)).astype(np.float32)
    theirs = [KMeans(12, n_init="auto", random_state=seed, tol=0).fit(vectors).cluster_centers_ for seed in range(4)]
    ours = [k_means(vectors, 12, 40, seed, batch_size=100) for seed in range(4)]
    assert np.mean([inertia(vectors, c) for c in ours]) < 1.02 * np.mean([inertia(vectors, c) for c in theirs])
