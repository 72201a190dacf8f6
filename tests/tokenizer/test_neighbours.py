"""Neighbours kept, against loops over items and pairs."""

import numpy as np
import pytest
from scipy import sparse

from onerec_jax.tokenizer import neighbours
from onerec_jax.tokenizer.neighbours import neighbour_recall


def random_set(items=40, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 3, (items, 3)).astype(np.int32)
    content = rng.normal(size=(items, 5)).astype(np.float32)
    counts = np.triu(rng.integers(0, 9, (items, items)) * (rng.random((items, items)) < 0.2), 1)
    return codes, content, sparse.csr_matrix((counts + counts.T).astype(np.float64))


def share(codes, query, near, length):
    return np.mean([(codes[query, :length] == codes[other, :length]).all() for other in near])


def brute_content(content, query, n):
    cosine = content @ content[query] / np.linalg.norm(content, axis=1) / np.linalg.norm(content[query])
    return [row for row in np.argsort(-cosine) if row != query][:n]


def brute_co_clicked(counts, query, n):
    row = counts.toarray()[query]
    return [item for item in sorted(range(len(row)), key=lambda item: (-row[item], item)) if row[item] > 0][:n]


def test_content_recall_equals_brute_force():
    codes, content, counts = random_set()
    result = neighbour_recall(codes, content, counts, n=4)
    expected = [
        np.mean([share(codes, query, brute_content(content, query, 4), length) for query in range(40)])
        for length in (1, 2, 3)
    ]
    np.testing.assert_allclose(result["content"], expected, atol=1e-12)
    assert result["content_queries"] == 40 and result["neighbours"] == 4


def test_co_clicked_recall_equals_brute_force_over_items_that_were_met_with_others():
    codes, content, counts = random_set()
    counts = counts.tolil()
    counts[7, :] = counts[:, 7] = 0
    counts = sparse.csr_matrix(counts)
    result = neighbour_recall(codes, content, counts, n=8)
    met = [(query, near) for query in range(40) if (near := brute_co_clicked(counts, query, 8))]
    assert {len(near) for _, near in met} != {8}
    assert result["co_clicked_queries"] == len(met) == 39
    expected = [np.mean([share(codes, query, near, length) for query, near in met]) for length in (1, 2, 3)]
    np.testing.assert_allclose(result["co_clicked"], expected, atol=1e-12)


def test_chance_is_the_share_of_pairs_with_one_prefix():
    codes, content, counts = random_set()
    pairs = [(one, other) for one in range(40) for other in range(40) if one != other]
    expected = [
        np.mean([(codes[one, :length] == codes[other, :length]).all() for one, other in pairs]) for length in (1, 2, 3)
    ]
    np.testing.assert_allclose(neighbour_recall(codes, content, counts)["chance"], expected, atol=1e-12)


def test_codes_that_follow_the_content_keep_neighbours_and_shuffled_ones_are_at_chance():
    rng = np.random.default_rng(1)
    cluster = np.repeat(np.arange(10), 30)
    content = rng.normal(size=(10, 8))[cluster] + 0.01 * rng.normal(size=(300, 8))
    kept = neighbour_recall(cluster[:, None], content.astype(np.float32), None)
    lost = neighbour_recall(rng.permutation(cluster)[:, None], content.astype(np.float32), None)
    assert kept["content"] == [1.0] and lost["content"][0] == pytest.approx(lost["chance"][0], abs=0.02)
    assert kept["chance"] == [pytest.approx(29 / 299)]


def test_recall_falls_with_the_length_of_the_prefix():
    result = neighbour_recall(*random_set())
    for name in ("chance", "content", "co_clicked"):
        assert result[name] == sorted(result[name], reverse=True)


def test_batches_do_not_change_the_result(monkeypatch):
    expected = neighbour_recall(*random_set())
    monkeypatch.setattr(neighbours, "_SCORES_AT_ONCE", 130)
    for batch_size in (1, 7, 40, 99):
        assert neighbour_recall(*random_set(), batch_size=batch_size) == expected


def test_a_sample_of_queries_is_seeded_and_looks_for_neighbours_among_all_items():
    codes, content, counts = random_set()
    first, again, other = (neighbour_recall(codes, content, counts, 4, seed, sample=10) for seed in (3, 3, 4))
    assert first == again != other and first["content_queries"] == 10
    queries = np.sort(np.random.default_rng(3).choice(40, 10, replace=False))
    expected = [
        np.mean([share(codes, q, brute_content(content, q, 4), length) for q in queries]) for length in (1, 2, 3)
    ]
    np.testing.assert_allclose(first["content"], expected, atol=1e-12)


def test_an_item_without_content_neither_asks_nor_answers():
    codes, content, counts = random_set()
    content[5] = 0
    result = neighbour_recall(codes, content, counts, n=39)
    assert result["content_queries"] == 39
    found = neighbours.content_neighbours(content, np.arange(40), 39)
    assert (found[5] == -1).all() and 5 not in found


def test_without_behaviour_only_content_is_answered():
    codes, content, _ = random_set()
    result = neighbour_recall(codes, content, None)
    assert result["co_clicked"] is None and result["co_clicked_queries"] == 0
    assert neighbour_recall(codes, content, sparse.csr_matrix((40, 40)))["co_clicked"] is None


def test_more_neighbours_than_items_are_all_the_others():
    codes, content, counts = random_set(items=4)
    result = neighbour_recall(codes, content, counts, n=10)
    assert result["content"] == pytest.approx(result["chance"])


def test_one_item_has_no_neighbours():
    result = neighbour_recall(np.zeros((1, 2), np.int32), np.ones((1, 3), np.float32), None)
    assert result["content"] is None and result["chance"] == [0.0, 0.0]
