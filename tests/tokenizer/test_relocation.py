import numpy as np

from onerec_jax.tokenizer.kmeans import lloyd, nearest
from onerec_jax.tokenizer.relocation import relocate


def assigned(vectors, centroids):
    return nearest(vectors, centroids, len(vectors))


def entropy(codes):
    share = np.bincount(codes)[np.unique(codes)] / len(codes)
    return -(share * np.log(share)).sum()


def noise_around_a_code_at_its_mean():
    """The code at the mean is nearer to nearly every vector than codes that are vectors themselves."""
    vectors = np.random.default_rng(0).normal(size=(2000, 64)).astype(np.float32)
    return vectors, np.concatenate([np.zeros((1, 64), np.float32), vectors[:31]])


def test_a_code_that_keeps_most_vectors_shares_them():
    vectors, start = noise_around_a_code_at_its_mean()
    codes, distances = assigned(vectors, lloyd(vectors, start, 10, 2000, relocating=0))
    shared, shared_distances = assigned(vectors, lloyd(vectors, start, 10, 2000))
    assert entropy(codes) < 2 and entropy(shared) > 0.95 * np.log(32)
    assert shared_distances.sum() < 0.99 * distances.sum()


def test_codes_that_serve_alike_stay():
    centres = 10 * np.random.default_rng(1).normal(size=(12, 8)).astype(np.float32)
    vectors = np.repeat(centres, 30, axis=0) + np.tile(np.random.default_rng(2).normal(size=(30, 8)), (12, 1))
    after = centres.copy()
    assert relocate(after, vectors.astype(np.float32), *assigned(vectors, centres)) == 0
    np.testing.assert_array_equal(after, centres)


def test_the_codes_with_least_distortion_move_next_to_members_of_the_cluster_with_most():
    vectors, start = noise_around_a_code_at_its_mean()
    codes, distances = assigned(vectors, start)
    after = start.copy()
    moved = relocate(after, vectors, codes, distances)
    changed = np.flatnonzero((after != start).any(1))
    assert len(changed) == moved >= 20 and 0 not in changed
    near_one = [np.isclose(after[code], 0.05 * vectors[codes == 0], atol=1e-6).all(1).sum() for code in changed]
    assert near_one == [1] * moved


def test_copies_of_one_vector_take_no_code():
    """A large cluster without distortion is no cluster to split."""
    vectors = np.concatenate([np.zeros((500, 4)), np.random.default_rng(3).normal(size=(40, 4)) + 5]).astype(np.float32)
    start = vectors[[0, 500, 510, 520, 530]]
    codes, distances = assigned(vectors, lloyd(vectors, start, 8, 540))
    assert (codes[:500] == codes[0]).all() and not distances[:500].any() and len(np.unique(codes)) == 5


def test_small_clusters_far_from_others_keep_their_codes():
    rng = np.random.default_rng(4)
    far = 30 * rng.normal(size=(10, 16))
    tight = np.repeat(far, 30, axis=0) + 0.01 * rng.normal(size=(300, 16))
    vectors = np.concatenate([rng.normal(size=(2500, 16)), tight]).astype(np.float32)
    start = np.concatenate([far, vectors[:22]]).astype(np.float32)
    kept = assigned(vectors, lloyd(vectors, start, 10, 2800, relocating=0))[1].sum()
    assert assigned(vectors, lloyd(vectors, start, 10, 2800))[1].sum() < 1.01 * kept


def test_a_code_never_moves_into_its_own_cluster():
    """Three vectors on the first code are few of many codes, and hold all the distortion."""
    vectors = np.array([[0.0], [1.0], [2.0]], np.float32)
    centroids = np.array([[1], [100], [200], [300]], np.float32)
    after = centroids.copy()
    relocate(after, vectors, *assigned(vectors, centroids))
    assert after[0] == 1
