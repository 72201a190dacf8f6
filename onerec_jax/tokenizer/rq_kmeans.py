"""Residual k-means, OneRec's quantizer (REFERENCE 1.1; TR §2.1.2): each level clusters what those before left.

    R_1 = x,   C_l = k-means(R_l, K_l),   s_l = argmin_k ||R_l - c_k||,   R_{l+1} = R_l - c_{s_l}
"""

from __future__ import annotations

import numpy as np

from onerec_jax.config import ResidualKMeans
from onerec_jax.errors import InputError
from onerec_jax.tokenizer.kmeans import k_means, nearest
from onerec_jax.tokenizer.quantizer import Arrays, Fitted, Items, check_codes, checked, codebooks, with_codebooks


def fit(data: Items, settings: ResidualKMeans = ResidualKMeans()) -> Fitted:  # noqa: B008
    """One codebook float32 [K_l,D] per level. With fewer distinct vectors than codes the spare codes stay unused.

    Raises:
        InputError: a value is NaN, infinite or beyond 1e15; names the first such row.
    """
    residual, books, codes = checked(data.vectors), [], []
    for level, size in enumerate(data.codebook_sizes):
        seed = (data.seed, level)
        if level + 1 in settings.balanced_levels:
            from onerec_jax.tokenizer.balanced_kmeans import balanced_k_means

            book = balanced_k_means(residual, size, data.iterations, seed, data.batch_size)
        else:
            book = k_means(residual, size, data.iterations, seed, data.batch_size)
        books.append(book)
        codes.append(nearest(residual, book, data.batch_size)[0])
        residual = residual - book[codes[-1]]
    return Fitted(np.stack(codes, axis=1), with_codebooks(books))


def encode(arrays: Arrays, vectors: np.ndarray, batch_size: int = 65_536) -> np.ndarray:
    """Codes int32 [N,L] of vectors float32 [N,D]; ties go to the lowest code.

    Raises:
        InputError: a value is not finite, or the width is not the codebooks'.
    """
    residual, books = checked(vectors), codebooks(arrays)
    if residual.shape[1] != books[0].shape[1]:
        raise InputError(f"vectors of width {residual.shape[1]} do not fit codebooks of width {books[0].shape[1]}")
    codes = np.empty((len(residual), len(books)), np.int32)
    for level, book in enumerate(books):
        codes[:, level] = nearest(residual, book, batch_size)[0]
        residual = residual - book[codes[:, level]]
    return codes


def decode(arrays: Arrays, codes: np.ndarray) -> np.ndarray:
    """Vectors float32 [N,D] of codes int [N,L]: the sum of one centroid per level; fewer columns decode a prefix.

    Raises:
        InputError: a code outside its codebook.
    """
    books = codebooks(arrays)
    check_codes(codes, tuple(map(len, books)))
    vectors = np.zeros((len(codes), books[0].shape[1]), np.float32)
    for column, book in zip(codes.T, books, strict=False):
        vectors += book[column]
    return vectors
