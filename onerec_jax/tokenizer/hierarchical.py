"""Hierarchical clustering: every level splits each cluster of the level before (P5-CID, Hua et al. 2023).

The tree is kept as flat arrays. The children of node n of depth l are the nodes child_start_l[n] to
child_start_l[n+1]-1 of depth l+1; a node's code is its number among its siblings; its content vector is in
vector_{l+1}, that of the root in vector_0. A cluster with no more members than codes gives every member a code of its own.

Of vectors, equal vectors are one member and a node's vector is its centroid. Of the co-occurrence graph the members are
items and a node's vector is their mean content; what belongs together was read from the graph, so `encode`, which walks to the
nearest vector, is a guess from content for items the graph does not know, and gives other codes for some that it knows.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

from onerec_jax.config import Hierarchical
from onerec_jax.errors import InputError
from onerec_jax.tokenizer.grouped_kmeans import Children, grouped_k_means, nearest_child
from onerec_jax.tokenizer.kmeans import k_means, nearest
from onerec_jax.tokenizer.quantizer import Arrays, Fitted, Items, check_codes, checked
from onerec_jax.tokenizer.spectral import edges_within, spectral_embedding


def fit(data: Items, settings: Hierarchical = Hierarchical()) -> Fitted:  # noqa: B008
    """The tree, L levels deep.

    Raises:
        InputError: a value is NaN, infinite or beyond 1e15; or the graph is asked for and there is none.
    """
    vectors = checked(data.vectors)
    arrays = {"sizes": np.array(data.codebook_sizes), "vector_0": vectors.mean(0, dtype=np.float64, keepdims=True)}
    arrays["vector_0"] = arrays["vector_0"].astype(np.float32)
    if settings.of == "co_occurrence":
        if data.co_occurrence is None:
            raise InputError("tokenizer.quantizer.of is co_occurrence, but the items come without co-occurrence counts")
        return Fitted(_split_graph(data, vectors, data.co_occurrence(), arrays), arrays)
    _split_vectors(data, vectors, arrays)
    return Fitted(encode(arrays, vectors, data.batch_size), arrays)


def _add_level(arrays: Arrays, level: int, children: Children) -> None:
    arrays[f"child_start_{level}"] = children.child_start
    arrays[f"vector_{level + 1}"] = children.centroids


def _distinct(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first row of each distinct vector of [I,D], ascending, and how many rows are equal to it."""
    # As raw bytes, -0 made 0: an order of its own, but sorted 50x faster than rows of numbers.
    rows = (vectors + np.float32(0)).view(np.dtype((np.void, vectors.itemsize * vectors.shape[1]))).ravel()
    _, first, count = np.unique(rows, return_index=True, return_counts=True)
    order = np.argsort(first)
    return first[order], count[order].astype(np.float64)


def _split_vectors(data: Items, vectors: np.ndarray, arrays: Arrays) -> None:
    """Grows the tree by k-means of the distinct vectors of every node."""
    rows, weights = _distinct(vectors)
    points, node = vectors[rows], np.zeros(len(rows), np.int64)
    for level, size in enumerate(data.codebook_sizes):
        seed = (data.seed, level)
        if level == 0 and len(points) > size:
            children = _only_used(
                points, k_means(vectors, size, data.iterations, seed, data.batch_size), data.batch_size
            )
        else:
            children = grouped_k_means(points, weights, node, size, data.iterations, seed, data.batch_size)
        _add_level(arrays, level, children)
        node = children.child_start[node] + children.codes


def _only_used(points: np.ndarray, centroids: np.ndarray, batch_size: int) -> Children:
    """A split of one group by centroids [K,D], those without a point left out."""
    used, codes = np.unique(nearest(points, centroids, batch_size)[0], return_inverse=True)
    return Children(codes.ravel().astype(np.int32), centroids[used], np.array([0, len(used)]))


def _split_graph(data: Items, vectors: np.ndarray, graph: sparse.csr_matrix, arrays: Arrays) -> np.ndarray:
    """Grows the tree by spectral clustering of the graph inside every node; codes int32 [I,L]."""
    node, codes = np.zeros(len(vectors), np.int64), []
    for level, size in enumerate(data.codebook_sizes):
        codes.append(_clusters_of_graph(data, vectors, graph, node, size, (data.seed, level)))
        used, child = np.unique(node * size + codes[-1], return_inverse=True)
        child_start = np.searchsorted(used, np.arange(node.max() + 2) * size)
        node = child.ravel()
        codes[-1] = (node - child_start[used[node] // size]).astype(np.int32)
        _add_level(arrays, level, Children(codes[-1], _means(vectors, node), child_start))
    return np.stack(codes, axis=1)


def _means(vectors: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Mean float32 [G,D] of the vectors of each group, 0 to G-1."""
    count = np.bincount(group)
    sums = sparse.csr_array((np.ones(len(group)), (group, np.arange(len(group)))), shape=(len(count), len(group)))
    return ((sums @ vectors.astype(np.float64)) / np.maximum(count, 1)[:, None]).astype(np.float32)


def _clusters_of_graph(
    data: Items, vectors: np.ndarray, graph: sparse.csr_matrix, node: np.ndarray, size: int, seed: tuple[int, int]
) -> np.ndarray:
    """Codes [I] inside each item's node [I]: spectral clusters of the items that have an edge inside their node.

    The others go to the cluster with the nearest mean content; where a node has no edges, content is clustered.
    """
    large = (np.bincount(node) > size)[node]
    within = edges_within(graph, node)
    linked = (np.asarray(within.sum(1)).ravel() > 0) & large
    with_edges = np.bincount(node, linked) > 0
    codes = np.empty(len(node), np.int64)
    by_graph = np.flatnonzero(linked)
    by_content = np.flatnonzero(~with_edges[node])
    if by_graph.size:
        inner, group = np.unique(node[by_graph], return_inverse=True)
        embedding = spectral_embedding(within[by_graph][:, by_graph], group.ravel(), size, seed)
        split = _k_means(data, embedding, group.ravel(), size, seed)
        codes[by_graph] = split.codes
        means = _means(vectors[by_graph], split.child_start[group.ravel()] + split.codes)
        rest = np.flatnonzero(with_edges[node] & ~linked)
        group_of_rest = np.searchsorted(inner, node[rest])
        codes[rest] = nearest_child(vectors[rest], group_of_rest, means, split.child_start, data.batch_size)
    if by_content.size:
        _, group = np.unique(node[by_content], return_inverse=True)
        codes[by_content] = _k_means(data, vectors[by_content], group.ravel(), size, seed).codes
    return codes


def _k_means(data: Items, points: np.ndarray, group: np.ndarray, size: int, seed: tuple[int, int]) -> Children:
    if len(points) > size and not group.any():
        return _only_used(points, k_means(points, size, data.iterations, seed, data.batch_size), data.batch_size)
    return grouped_k_means(points, np.ones(len(points)), group, size, data.iterations, seed, data.batch_size)


def encode(arrays: Arrays, vectors: np.ndarray, batch_size: int = 65_536) -> np.ndarray:
    """Codes int32 [N,L] of vectors float32 [N,D]: at every node on to the child with the nearest vector.

    Raises:
        InputError: a value is not finite, or the width is not the tree's.
    """
    vectors, width = checked(vectors), arrays["vector_0"].shape[1]
    if vectors.shape[1] != width:
        raise InputError(f"vectors of width {vectors.shape[1]} do not fit a tree of vectors of width {width}")
    levels = len(arrays["sizes"])
    codes, node = np.empty((len(vectors), levels), np.int32), np.zeros(len(vectors), np.int64)
    for level in range(levels):
        book, child_start = arrays[f"vector_{level + 1}"], arrays[f"child_start_{level}"]
        if level == 0:
            codes[:, 0] = nearest(vectors, book, batch_size)[0]
        else:
            codes[:, level] = nearest_child(vectors, node, book, child_start, batch_size)
        node = child_start[node] + codes[:, level]
    return codes


def decode(arrays: Arrays, codes: np.ndarray) -> np.ndarray:
    """Vectors float32 [N,D] of codes int [N,l]: that of the deepest node on the way; an ID may leave the tree.

    Raises:
        InputError: a code outside its codebook.
    """
    check_codes(codes, tuple(arrays["sizes"].tolist()))
    node = np.zeros(len(codes), np.int64)
    inside = np.ones(len(codes), bool)
    vectors = np.repeat(arrays["vector_0"], len(codes), axis=0)
    for level, column in enumerate(codes.T):
        child_start = arrays[f"child_start_{level}"]
        child = child_start[node] + column
        inside &= child < child_start[node + 1]
        node = np.where(inside, child, 0)
        vectors[inside] = arrays[f"vector_{level + 1}"][node[inside]]
    return vectors
