"""Spectral embedding of a graph, inside every group of its nodes (Ng, Jordan & Weiss 2001; von Luxburg 2007)."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import linalg, sparse
from sklearn.utils.extmath import randomized_svd

_DENSE = 1024  # nodes up to which all eigenvectors are computed
_POWER_ITERATIONS = 12
MOST_DIMENSIONS = 256


def edges_within(graph: sparse.csr_matrix, group: np.ndarray) -> sparse.csr_matrix:
    """The graph [I,I] with only the edges between nodes of one group int [I]."""
    edges = sparse.coo_matrix(graph)
    kept = (group[edges.row] == group[edges.col]) & (edges.row != edges.col) & (edges.data > 0)
    return sparse.csr_matrix((edges.data[kept], (edges.row[kept], edges.col[kept])), shape=graph.shape)


def _leading_eigenvectors(affinity: sparse.csr_matrix, dimensions: int, seed: int | tuple[int, ...]) -> np.ndarray:
    """Eigenvectors [M,d] of the largest eigenvalues of D^-1/2 A D^-1/2, those of the smallest of the Laplacian."""
    count = len(affinity.indptr) - 1
    scale = sparse.diags(1 / np.sqrt(np.asarray(affinity.sum(1)).ravel()))
    # Shifted to eigenvalues in [0, 1], so that the largest are also the largest in magnitude.
    shifted = sparse.csr_matrix(0.5 * (sparse.identity(count) + scale @ affinity @ scale))
    if count <= max(_DENSE, 2 * dimensions):
        return linalg.eigh(shifted.toarray(), subset_by_index=(count - dimensions, count - 1))[1][:, ::-1]
    state = np.random.RandomState(np.random.default_rng(seed).integers(2**32))
    power: Any = _POWER_ITERATIONS
    return randomized_svd(shifted, dimensions, n_iter=power, random_state=state)[0]


def spectral_embedding(
    within: sparse.csr_matrix, group: np.ndarray, dimensions: int, seed: int | tuple[int, ...]
) -> np.ndarray:
    """Rows float32 [M,d] of unit length: the leading eigenvectors of the graph of each group, at most 256.

    Args:
        within: symmetric float64 [M,M], without edges between groups, every node with an edge.
        group: int [M], 0 to G-1.
        dimensions: eigenvectors wanted; a group of fewer nodes has zeros for the rest.
        seed: of the randomised eigenvectors of groups of more than 1024 nodes.
    """
    counts = np.bincount(group)
    order = np.argsort(group, kind="stable")
    dimensions = min(dimensions, MOST_DIMENSIONS, counts.max(initial=0))
    embedding = np.zeros((len(group), dimensions), np.float32)
    for rows in np.split(order, np.cumsum(counts)[:-1]):
        vectors = _leading_eigenvectors(within[rows][:, rows], min(dimensions, len(rows)), seed)
        embedding[rows, : vectors.shape[1]] = vectors
    norm = np.linalg.norm(embedding, axis=1, keepdims=True)
    return embedding / np.where(norm > 0, norm, 1)
