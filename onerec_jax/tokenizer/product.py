"""Product quantization: every level quantizes a part of the vector of its own (VQ-Rec, RPG's long IDs).

    y = (x - mean) R,   y = [y_1 .. y_L],   s_l = argmin_k ||y_l - c_lk||

R is the identity, or with `rotate` one learnt by OPQ (Ge et al. 2013), which alternates between one Lloyd iteration in
every part and the orthogonal Procrustes solution. It starts once from the identity and once from the eigenvectors of the
covariance, spread over the parts so that the product of the eigenvalues is about the same in each; the better one stays.
The latter is the best start for Gaussian vectors; on vectors in clusters, with few codes, the former can be.
"""

from __future__ import annotations

import numpy as np
from scipy import linalg

from onerec_jax.config import ProductQuantizer
from onerec_jax.errors import InputError
from onerec_jax.tokenizer.kmeans import k_means, lloyd, nearest, plus_plus
from onerec_jax.tokenizer.quantizer import Arrays, Fitted, Items, check_codes, checked, codebooks, with_codebooks

_SMALLEST = 1e-10  # eigenvalue, as a share of the largest, below which it counts as that


def fit(data: Items, settings: ProductQuantizer = ProductQuantizer()) -> Fitted:  # noqa: B008
    """One codebook float32 [K_l,D_l] per level; the D_l add up to D and differ by at most one.

    Raises:
        InputError: more levels than values per vector; or a value is NaN, infinite or beyond 1e15.
    """
    vectors = checked(data.vectors)
    levels = len(data.codebook_sizes)
    if levels > vectors.shape[1]:
        raise InputError(
            f"tokenizer.codebook_sizes has {levels} levels but content vectors have {vectors.shape[1]} values; "
            f"product quantization needs at least one value per level"
        )
    mean = vectors.mean(0, dtype=np.float64).astype(np.float32)
    centred = vectors - mean
    if settings.rotate:
        rotation, books = _optimised(data, centred)
        arrays = {"mean": mean, "rotation": rotation, **with_codebooks(books)}
    else:
        books = [
            k_means(part, size, data.iterations, (data.seed, level), data.batch_size)
            for level, (part, size) in enumerate(zip(_parts(centred, levels), data.codebook_sizes, strict=True))
        ]
        arrays = {"mean": mean, **with_codebooks(books)}
    return Fitted(encode(arrays, vectors, data.batch_size), arrays)


def _parts(vectors: np.ndarray, levels: int) -> list[np.ndarray]:
    """Contiguous parts [N,D_l] of vectors [N,D], the first D mod L of them one value wider."""
    return [np.ascontiguousarray(part) for part in np.array_split(vectors, levels, axis=1)]


def balanced_eigenvectors(covariance: np.ndarray, levels: int) -> np.ndarray:
    """Eigenvectors [D,D] of a covariance, as columns by part (OPQ's eigenvalue allocation).

    From the largest eigenvalue on, each goes to the part that has room and the smallest product so far.
    """
    values, vectors = linalg.eigh(covariance)
    logs = np.log(np.maximum(values, max(values[-1] * _SMALLEST, np.finfo(float).tiny)))
    logs -= logs.min()  # so that every one adds to its part
    widths = [len(part) for part in np.array_split(values, levels)]
    parts: list[list[int]] = [[] for _ in widths]
    for column in np.argsort(-values, kind="stable"):
        open_parts = [level for level, part in enumerate(parts) if len(part) < widths[level]]
        parts[min(open_parts, key=lambda level: logs[parts[level]].sum())].append(int(column))
    return vectors[:, [column for part in parts for column in part]]


def _optimised(data: Items, centred: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """OPQ's rotation float32 [D,D] and its codebooks, from the better of two starts."""
    covariance = np.asarray(centred.T @ centred, np.float64)
    starts = (np.eye(len(covariance)), balanced_eigenvectors(covariance, len(data.codebook_sizes)))
    results = [_alternate(data, centred, start.astype(np.float32)) for start in starts]
    return min(results, key=lambda result: result[0])[1:]


def _alternate(data: Items, centred: np.ndarray, rotation: np.ndarray) -> tuple[float, np.ndarray, list[np.ndarray]]:
    """Sum of squared errors, rotation and codebooks that OPQ reaches from a rotation float32 [D,D]."""
    parts = _parts(centred @ rotation, len(data.codebook_sizes))
    books = [
        plus_plus(part, size, (data.seed, level))
        for level, (part, size) in enumerate(zip(parts, data.codebook_sizes, strict=True))
    ]
    for _ in range(data.iterations):
        books = [lloyd(part, book, 1, data.batch_size) for part, book in zip(parts, books, strict=True)]
        decoded = [book[nearest(part, book, data.batch_size)[0]] for part, book in zip(parts, books, strict=True)]
        # argmin_R ||X R - Y|| over rotations is U V' of the SVD U S V' of X'Y.
        left, _, right = linalg.svd(np.asarray(centred.T @ np.concatenate(decoded, axis=1), np.float64))
        rotation = (left @ right).astype(np.float32)
        parts = _parts(centred @ rotation, len(books))
    books = [lloyd(part, book, data.iterations, data.batch_size) for part, book in zip(parts, books, strict=True)]
    distances = [nearest(part, book, data.batch_size)[1] for part, book in zip(parts, books, strict=True)]
    return float(np.sum(distances, dtype=np.float64)), rotation, books


def encode(arrays: Arrays, vectors: np.ndarray, batch_size: int = 65_536) -> np.ndarray:
    """Codes int32 [N,L] of vectors float32 [N,D]; ties go to the lowest code.

    Raises:
        InputError: a value is not finite, or the width is not the codebooks'.
    """
    vectors, books, mean = checked(vectors), codebooks(arrays), arrays["mean"]
    if vectors.shape[1] != len(mean):
        raise InputError(f"vectors of width {vectors.shape[1]} do not fit codebooks of width {len(mean)} in all")
    centred = vectors - mean
    rotated = centred @ arrays["rotation"] if "rotation" in arrays else centred
    codes = [nearest(part, book, batch_size)[0] for part, book in zip(_parts(rotated, len(books)), books, strict=True)]
    return np.stack(codes, axis=1)


def decode(arrays: Arrays, codes: np.ndarray) -> np.ndarray:
    """Vectors float32 [N,D] of codes int [N,l]; the parts of levels that a prefix leaves out are the mean's.

    Raises:
        InputError: a code outside its codebook.
    """
    books, mean = codebooks(arrays), arrays["mean"]
    check_codes(codes, tuple(map(len, books)))
    parts = [np.zeros((len(codes), book.shape[1]), np.float32) for book in books]
    for level, column in enumerate(codes.T):
        parts[level] = books[level][column]
    rotated = np.concatenate(parts, axis=1)
    return mean + (rotated @ arrays["rotation"].T if "rotation" in arrays else rotated)
