import numpy as np
import pytest
from scipy import sparse

from onerec_jax.config import Hierarchical
from onerec_jax.errors import InputError
from onerec_jax.tokenizer import hierarchical
from onerec_jax.tokenizer.grouped_kmeans import grouped_k_means, nearest_child
from onerec_jax.tokenizer.quantizer import Items
from onerec_jax.tokenizer.spectral import edges_within, spectral_embedding

VECTORS = Hierarchical()
GRAPH = Hierarchical(of="co_occurrence")


def fit(vectors, sizes=(4, 4, 4), settings=VECTORS, graph=None, **kwargs):
    items = Items(np.asarray(vectors, np.float32), sizes, **{"iterations": 8, "batch_size": 64, **kwargs})
    if graph is not None:
        items = Items(**{**vars(items), "co_occurrence": lambda: sparse.csr_matrix(graph)})
    return hierarchical.fit(items, settings)


@pytest.fixture(scope="module")
def vectors():
    return np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def fitted(vectors):
    return fit(vectors)


def walk(arrays, vector, levels):
    """One vector's codes and the node it ends in, node by node."""
    node, codes = 0, []
    for level in range(levels):
        start, stop = arrays[f"child_start_{level}"][node : node + 2]
        siblings = arrays[f"vector_{level + 1}"][start:stop].astype(np.float64)
        codes.append(int(((vector - siblings) ** 2).sum(1).argmin()))
        node = start + codes[-1]
    return codes, node


def test_encode_equals_a_walk_by_brute_force_and_the_fitted_codes(vectors, fitted):
    new = np.random.default_rng(1).normal(size=(50, 3)).astype(np.float32)
    codes = hierarchical.encode(fitted.arrays, np.concatenate([vectors, new]), 64)
    assert codes.dtype == np.int32
    for vector, code in zip(np.concatenate([vectors, new]), codes, strict=True):
        assert walk(fitted.arrays, vector, 3)[0] == code.tolist()
    np.testing.assert_array_equal(codes[:200], fitted.codes)


def test_a_prefix_decodes_to_the_vector_of_its_deepest_node(vectors, fitted):
    for levels in range(4):
        expected = [fitted.arrays[f"vector_{levels}"][walk(fitted.arrays, vector, levels)[1]] for vector in vectors]
        np.testing.assert_array_equal(hierarchical.decode(fitted.arrays, fitted.codes[:, :levels]), expected)
    np.testing.assert_allclose(fitted.arrays["vector_0"][0], vectors.mean(0), atol=1e-6)


def test_an_id_outside_the_tree_decodes_to_the_last_node_it_meets():
    tree = {
        "sizes": np.array([2, 4]),
        "vector_0": np.array([[5.0]]),
        "child_start_0": np.array([0, 2]),
        "vector_1": np.array([[0.5], [10]]),
        "child_start_1": np.array([0, 2, 3]),
        "vector_2": np.array([[0.0], [1], [10]]),
    }
    codes = np.array([[0, 0], [0, 1], [0, 3], [1, 0], [1, 1]])
    assert hierarchical.decode(tree, codes).ravel().tolist() == [0, 1, 0.5, 10, 10]
    tree["child_start_0"], tree["vector_1"] = np.array([0, 1]), np.array([[0.5]])
    assert hierarchical.decode(tree, np.array([[1, 0]])).ravel().tolist() == [5]


def test_each_level_splits_the_clusters_of_the_level_before(vectors, fitted):
    deeper = fit(vectors, (4, 4, 4, 4))
    np.testing.assert_array_equal(deeper.codes[:, :3], fitted.codes)
    errors = [
        np.mean((vectors - hierarchical.decode(deeper.arrays, deeper.codes[:, :levels])) ** 2) for levels in range(5)
    ]
    assert errors == sorted(errors, reverse=True) and errors[4] < 0.3 * errors[2]


def test_a_cluster_with_no_more_distinct_vectors_than_codes_gives_each_its_own(vectors):
    distinct = np.repeat(vectors[:20], 10, axis=0)
    distinct[0] = -0.0
    distinct[1] = 0.0
    fitted = fit(distinct)
    assert len(np.unique(fitted.codes, axis=0)) == len(np.unique(distinct, axis=0))
    np.testing.assert_array_equal(hierarchical.decode(fitted.arrays, fitted.codes), distinct)


@pytest.mark.parametrize("settings", [VECTORS, GRAPH])
@pytest.mark.parametrize("items", [1, 9])
def test_constant_vectors_and_a_graph_without_edges_are_ordinary_input(settings, items):
    constant = np.ones((items, 2), np.float32)
    fitted = fit(constant, (4, 4), settings, np.zeros((items, items)))
    np.testing.assert_allclose(hierarchical.decode(fitted.arrays, fitted.codes), constant)
    assert (hierarchical.encode(fitted.arrays, constant, 8) == 0).all()


def test_same_seed_same_tree(vectors, fitted):
    np.testing.assert_array_equal(fit(vectors).codes, fitted.codes)
    assert (fit(vectors, seed=1).codes != fitted.codes).any()


def test_input_of_no_use_is_refused(vectors, fitted):
    broken = vectors.copy()
    broken[5, 0] = np.inf
    with pytest.raises(InputError, match="item row 5"):
        fit(broken)
    with pytest.raises(InputError, match="width 2 do not fit a tree of vectors of width 3"):
        hierarchical.encode(fitted.arrays, vectors[:, :2], 8)
    with pytest.raises(InputError, match="level 0 has codes outside 0 to 3"):
        hierarchical.decode(fitted.arrays, np.array([[4]]))
    with pytest.raises(InputError, match="co_occurrence, but the items come without"):
        fit(vectors, settings=GRAPH)


# ------------------------------------------------------------------------------------------------------------ the graph


def planted_graph(blocks=4, inner=3, members=8, seed=0):
    """Items in blocks of `inner` sub-blocks: many edges in a sub-block, some in a block, few outside; and labels."""
    rng = np.random.default_rng(seed)
    sub_block = rng.permutation(np.repeat(np.arange(blocks * inner), members))
    block = sub_block // inner
    chance = 0.02 + 0.13 * (block[:, None] == block) + 0.8 * (sub_block[:, None] == sub_block)
    upper = np.triu(rng.random(chance.shape) < chance, 1)
    return (upper + upper.T).astype(float), block, sub_block


def same_partition(first, second):
    return len(set(zip(first, second, strict=True))) == len(set(first)) == len(set(second))


def test_a_planted_partition_is_found_level_by_level():
    graph, block, sub_block = planted_graph()
    fitted = fit(np.random.default_rng(1).normal(size=(96, 2)), (4, 3, 8), GRAPH, graph, iterations=20)
    assert same_partition(fitted.codes[:, 0].tolist(), block.tolist())
    assert same_partition((fitted.codes[:, 0] * 3 + fitted.codes[:, 1]).tolist(), sub_block.tolist())
    assert len(np.unique(fitted.codes, axis=0)) == 96


def test_an_item_without_edges_joins_the_cluster_of_the_nearest_content():
    graph, block, _ = planted_graph()
    content = np.eye(4)[block] + np.random.default_rng(1).normal(size=(96, 4)) / 10
    graph[:5], graph[:, :5] = 0, 0
    fitted = fit(content, (4, 8), GRAPH, graph, iterations=20)
    assert same_partition(fitted.codes[:, 0].tolist(), block.tolist())


def test_nodes_of_the_graph_hold_the_mean_content_of_their_items():
    graph, _, _ = planted_graph()
    content = np.random.default_rng(1).normal(size=(96, 2)).astype(np.float32)
    fitted = fit(content, (4, 8), GRAPH, graph)
    for levels in range(3):
        decoded = hierarchical.decode(fitted.arrays, fitted.codes[:, :levels])
        expected = [content[(fitted.codes[:, :levels] == code[:levels]).all(1)].mean(0) for code in fitted.codes]
        np.testing.assert_allclose(decoded, expected, atol=1e-5)
    codes = hierarchical.encode(fitted.arrays, content, 64)
    assert [walk(fitted.arrays, vector, 2)[0] for vector in content] == codes.tolist()


def test_edges_within_groups_leave_out_those_between_groups_and_to_the_item_itself():
    kept = edges_within(sparse.csr_matrix(np.full((3, 3), 2.0)), np.array([0, 1, 0]))
    assert kept.toarray().tolist() == [[0, 0, 2], [0, 0, 0], [2, 0, 0]]


@pytest.mark.parametrize("size", [30, 1302])
def test_components_of_a_graph_have_one_point_each_in_the_spectral_embedding(size):
    """Small graphs are solved in full, larger ones by random projection."""
    component = np.arange(size) % 3
    rows = np.arange(size)
    left, right = np.concatenate([np.stack([rows, (rows + step) % size]) for step in 3 * 2 ** np.arange(8)], axis=1)
    graph = sparse.csr_matrix((np.ones(len(left)), (left, right)), shape=(size, size))
    embedding = spectral_embedding(sparse.csr_matrix(graph + graph.T), np.zeros(size, int), 3, 0)
    gram = embedding @ embedding.T
    np.testing.assert_allclose(gram, component[:, None] == component, atol=0.1)


# ---------------------------------------------------------------------------------------------------- k-means in groups


def test_the_nearest_child_is_that_of_brute_force():
    rng = np.random.default_rng(0)
    child_start = np.array([0, 5, 5, 6, 43])
    group = rng.integers(0, 4, 300)
    points = (100 + rng.normal(size=(300, 4))).astype(np.float32)
    centroids = (100 + rng.normal(size=(43, 4))).astype(np.float32)
    expected = []
    for point, node in zip(points, group, strict=True):
        siblings = centroids[child_start[node] : child_start[node + 1]].astype(np.float64)
        expected.append(int(((point - siblings) ** 2).sum(1).argmin()) if len(siblings) else -1)
    for batch_size in (1, 10_000):
        assert nearest_child(points, group, centroids, child_start, batch_size).tolist() == expected


def test_ties_go_to_the_lowest_child():
    centroids = np.tile(np.array([[1], [0], [1]], np.float32), (2, 1))
    assert nearest_child(
        np.array([[1], [0]], np.float32), np.array([1, 0]), centroids, np.array([0, 3, 6]), 8
    ).tolist() == [0, 1]


def test_planted_clusters_of_every_group_are_found():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 30, 900)
    points = (20 * rng.normal(size=(30, 6))[label] + rng.normal(size=(900, 6)) / 10).astype(np.float32)
    split = grouped_k_means(points, np.ones(900), label // 6, 6, 10, 0, 64)
    assert np.diff(split.child_start).tolist() == [6] * 5
    child = split.child_start[label // 6] + split.codes
    assert same_partition(child.tolist(), label.tolist())
    expected = [points[child == number].mean(0) for number in range(30)]
    np.testing.assert_allclose(split.centroids, expected, atol=1e-4)


def test_a_weight_counts_as_so_many_equal_points():
    points = np.array([[4.0], [5], [10], [11]], np.float32)
    split = grouped_k_means(points, np.array([3.0, 1, 1, 1]), np.zeros(4, int), 2, 10, 0, 8)
    np.testing.assert_allclose(np.sort(split.centroids.ravel()), [4.25, 10.5])


def test_every_group_keeps_all_codes_in_use_where_it_has_the_points():
    points = np.random.default_rng(0).normal(size=(100 * 14, 2)).astype(np.float32) ** 5
    split = grouped_k_means(points, np.ones(1400), np.arange(1400) % 100, 12, 10, 0, 4096)
    assert np.diff(split.child_start).tolist() == [12] * 100
