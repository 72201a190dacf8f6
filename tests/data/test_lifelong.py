"""Hierarchical k-means of one user's events."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_jax.data.lifelong import cluster_events, compress, hashed_content


def events(seed, n, distinct):
    rng = np.random.default_rng(seed)
    contents = rng.standard_normal((distinct, 4)).astype(np.float32)
    known = [np.where(rng.random(n) < 0.6, rng.random(n) * 50, -1).astype(np.float32) for _ in range(2)]
    return contents[rng.integers(0, distinct, n)], np.sort(rng.integers(0, 10**12, n)), *known


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 200),
    distinct=st.sampled_from([1, 2, 7, 500]),
    max_size=st.integers(1, 30),
)
def test_every_event_is_in_one_cluster_of_at_most_m_and_the_features_are_its_members(seed, n, distinct, max_size):
    vectors, time, playtime, duration = events(seed, n, distinct)
    cluster = cluster_events(vectors, max_size)
    assert cluster.shape == (n,)
    assert np.bincount(cluster).min() >= 1
    assert np.bincount(cluster).max() <= max_size
    clusters = compress(vectors, time, playtime, duration, max_size)
    assert clusters.count.sum() == n
    assert (np.diff(clusters.timestamp_ms) >= 0).all()
    seen = []
    for s, representative in enumerate(clusters.representative):
        members = np.flatnonzero(cluster == cluster[representative])
        seen += members.tolist()
        assert clusters.count[s] == len(members)
        distance = np.linalg.norm(vectors[members] - vectors[members].mean(axis=0), axis=1)
        assert distance[members == representative] == pytest.approx(distance.min(), abs=1e-5)
        assert clusters.timestamp_ms[s] == pytest.approx(time[members].mean(), abs=1)
        for mean, values in ((clusters.playtime_s[s], playtime), (clusters.duration_s[s], duration)):
            known = values[members][values[members] >= 0]
            assert mean == pytest.approx(known.mean() if len(known) else -1, rel=1e-5)
    assert sorted(seen) == list(range(n))


def test_planted_groups_are_found():
    rng = np.random.default_rng(0)
    group = rng.integers(0, 4, 64)
    vectors = (np.eye(4, 8)[group] * 100 + rng.standard_normal((64, 8))).astype(np.float32)
    cluster = cluster_events(vectors, max_size=int(np.bincount(group).max()))
    assert len(np.unique(cluster)) == 4
    assert len(np.unique(np.stack([cluster, group]), axis=1).T) == 4


def test_the_first_division_is_into_the_cube_root_of_the_events():
    rng = np.random.default_rng(0)
    group = np.arange(125) % 5
    vectors = (np.eye(5)[group] * 100 + rng.standard_normal((125, 5))).astype(np.float32)
    assert len(np.unique(cluster_events(vectors, max_size=25))) == 5


def test_identical_vectors_are_divided_by_order():
    cluster = cluster_events(np.ones((100, 3), np.float32), max_size=20)
    assert np.bincount(cluster).max() <= 20
    assert (np.diff(cluster) >= 0).all()


def test_clusters_are_the_same_every_time():
    arguments = events(3, 500, 300)
    for first, second in zip(compress(*arguments, 20), compress(*arguments, 20), strict=True):
        assert np.array_equal(first, second)


def test_hashed_content_puts_items_with_shared_features_close_together():
    items = pa.table(
        {
            "item_id": [1, 2, 3, 4],
            "author_id": ["ann", "ann", "bob", None],
            "tags": [["cats", "cute"], ["cats"], ["cars"], []],
            "text": ["A small cat", "a cat", "Fast engines", None],
        }
    )
    vectors = hashed_content(items, seed=0)
    assert vectors[0] @ vectors[1] > 0.5 > abs(vectors[0] @ vectors[2])
    assert np.linalg.norm(vectors[:3], axis=1) == pytest.approx(1)
    assert not vectors[3].any()
    assert np.array_equal(vectors, hashed_content(items, seed=0))
    assert not np.array_equal(vectors, hashed_content(items, seed=1))
