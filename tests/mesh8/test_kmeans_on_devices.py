"""K-means splits its rows over all devices and gives what one device gives."""

from __future__ import annotations

import jax
import numpy as np

from onerec_jax.tokenizer import kmeans


def test_rows_are_split_over_the_eight_devices():
    batch = next(kmeans._batches(np.zeros((100, 4), np.float32), 1000))
    assert batch.count == 100
    assert {shard.device for shard in batch.rows.addressable_shards} == set(jax.devices())
    assert len({shard.data.shape for shard in batch.rows.addressable_shards}) == 1


def test_lloyd_on_eight_devices_equals_a_numpy_restatement():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(500, 6)).astype(np.float32)
    centroids = vectors[:10].astype(np.float64)
    for _ in range(4):
        codes = ((vectors[:, None] - centroids) ** 2).sum(2).argmin(1)
        centroids = np.stack([vectors[codes == code].mean(0, dtype=np.float64) for code in range(10)])
    found = kmeans.lloyd(vectors, vectors[:10], 4, 200, relocating=0)
    np.testing.assert_allclose(found, centroids, atol=1e-5)
    codes, distances = kmeans.nearest(vectors, found, 200)
    expected = ((vectors[:, None] - found) ** 2).sum(2)
    np.testing.assert_array_equal(codes, expected.argmin(1))
    np.testing.assert_allclose(distances, expected.min(1), rtol=1e-4)
