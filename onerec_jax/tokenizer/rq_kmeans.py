"""Residual k-means, OneRec's quantizer (REFERENCE 1.1; TR §2.1.2): each level clusters what those before left.

    R_1 = x,   C_l = k-means(R_l, K_l),   s_l = argmin_k ||R_l - c_k||,   R_{l+1} = R_l - c_{s_l}

A quantizer is three functions: `fit` makes codebooks, `encode` turns vectors into codes, `decode` codes into vectors.
"""

from __future__ import annotations

import numpy as np

from onerec_jax.errors import InputError
from onerec_jax.tokenizer.kmeans import k_means, nearest

_LARGEST = 1e15  # beyond it squared distances leave float32


def _checked(vectors: np.ndarray) -> np.ndarray:
    if vectors.ndim != 2 or not vectors.size:
        raise InputError(f"content vectors have shape {list(vectors.shape)}; expected [items, width], neither 0")
    vectors = np.ascontiguousarray(vectors, np.float32)
    good = (np.abs(vectors) < _LARGEST).all(1)
    if not good.all():
        row = int(np.flatnonzero(~good)[0])
        raise InputError(
            f"the content vector of item row {row} has a value that is NaN, infinite or beyond {_LARGEST:g} "
            f"({int((~good).sum())} such rows); every value must be finite"
        )
    return vectors


def fit(
    vectors: np.ndarray, codebook_sizes: tuple[int, ...], iterations: int, seed: int, batch_size: int
) -> tuple[np.ndarray, ...]:
    """Codebooks of residual k-means.

    Args:
        vectors: float32 [N,D]. With fewer distinct vectors than codes the spare codes stay unused.
        codebook_sizes: K_l, codes per level.
        iterations: Lloyd iterations per level.
        seed: the result is a function of the vectors and the seed.
        batch_size: rows assigned at once; the result does not depend on it but for float32 rounding.

    Returns:
        L codebooks float32 [K_l,D].

    Raises:
        InputError: a value is NaN, infinite or beyond 1e15; names the first such row.
    """
    residual = _checked(vectors)
    codebooks = []
    for level, size in enumerate(codebook_sizes):
        codebook = k_means(residual, size, iterations, (seed, level), batch_size)
        residual = residual - codebook[nearest(residual, codebook, batch_size)[0]]
        codebooks.append(codebook)
    return tuple(codebooks)


def encode(vectors: np.ndarray, codebooks: tuple[np.ndarray, ...], batch_size: int) -> np.ndarray:
    """Codes int32 [N,L] of vectors float32 [N,D]; ties go to the lowest code.

    Raises:
        InputError: a value is not finite, or the width is not the codebooks'.
    """
    residual = _checked(vectors)
    if residual.shape[1] != codebooks[0].shape[1]:
        raise InputError(f"vectors of width {residual.shape[1]} do not fit codebooks of width {codebooks[0].shape[1]}")
    codes = np.empty((len(residual), len(codebooks)), np.int32)
    for level, codebook in enumerate(codebooks):
        codes[:, level] = nearest(residual, codebook, batch_size)[0]
        residual = residual - codebook[codes[:, level]]
    return codes


def decode(codes: np.ndarray, codebooks: tuple[np.ndarray, ...]) -> np.ndarray:
    """Vectors float32 [N,D] of codes int [N,L]: the sum of one centroid per level; fewer columns decode a prefix.

    Raises:
        InputError: a code outside its codebook.
    """
    vectors = np.zeros((len(codes), codebooks[0].shape[1]), np.float32)
    for level, (column, codebook) in enumerate(zip(codes.T, codebooks, strict=False)):
        if column.size and not (column.min() >= 0 and column.max() < len(codebook)):
            raise InputError(f"level {level} has codes outside 0 to {len(codebook) - 1}, the range of its codebook")
        vectors += codebook[column]
    return vectors
