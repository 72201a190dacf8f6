"""Residual k-means, OneRec's quantizer (REFERENCE 1.1; TR §2.1.2): each level clusters what those before left.

    R_1 = x,   C_l = k-means(R_l, K_l),   s_l = argmin_k ||R_l - c_k||,   R_{l+1} = R_l - c_{s_l}

Vectors may be an array or a store that is read in slices (a TensorStore): residuals of a store are computed as they are
read, so memory holds its codes and one batch. A fit that is killed goes on after the last level it finished.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from onerec_jax.config import ResidualKMeans
from onerec_jax.errors import InputError
from onerec_jax.tokenizer.kmeans import Residuals, Rows, k_means, nearest
from onerec_jax.tokenizer.quantizer import Arrays, Fitted, Items, check_codes, checked, codebooks, with_codebooks

_SAMPLED = 4096  # rows of a store that tell it from another


def fit(data: Items, settings: ResidualKMeans = ResidualKMeans()) -> Fitted:  # noqa: B008
    """One codebook float32 [K_l,D] per level. With fewer distinct vectors than codes the spare codes stay unused.

    Raises:
        InputError: a value is NaN, infinite or beyond 1e15; names the first such row.
    """
    vectors = _checked_rows(data.vectors, data.batch_size)
    books: list[np.ndarray] = []
    codes = np.zeros((int(vectors.shape[0]), 0), np.int32)
    progress = _Progress(data.progress, vectors, data, settings)
    for level, size in enumerate(data.codebook_sizes):
        residual = Residuals(vectors, tuple(books), codes)
        rows = residual[:] if isinstance(vectors, np.ndarray) else residual
        book = progress.load(level)
        if book is None:
            book = _one_level(rows, size, level, data, settings)
            progress.save(level, book)
        column = nearest(rows, book, data.batch_size, settings.assignment)[0]
        books, codes = [*books, book], np.column_stack([codes, column])
    return Fitted(codes, with_codebooks(books))


def _one_level(rows: Rows, size: int, level: int, data: Items, settings: ResidualKMeans) -> np.ndarray:
    if level + 1 in settings.balanced_levels:
        from onerec_jax.tokenizer.balanced_kmeans import balanced_k_means

        return balanced_k_means(np.asarray(rows[:]), size, data.iterations, (data.seed, level), data.batch_size)
    return k_means(rows, size, data.iterations, (data.seed, level), data.batch_size, settings.assignment)


def _checked_rows(vectors: Rows, batch_size: int) -> Rows:
    if isinstance(vectors, np.ndarray):
        return checked(vectors)
    total = int(vectors.shape[0])
    for start in range(0, total, batch_size):
        checked(np.asarray(vectors[start : min(start + batch_size, total)]), first_row=start)
    return vectors


class _Progress:
    """Codebooks of finished levels in a folder, under a digest of all that they depend on."""

    def __init__(self, folder: Path | None, vectors: Rows, data: Items, settings: ResidualKMeans):
        self.folder = folder
        if folder is None:
            return
        total = int(vectors.shape[0])
        sample = np.unique(np.linspace(0, total - 1, min(total, _SAMPLED)).astype(np.int64))
        made_from = (tuple(map(int, vectors.shape)), data.seed, data.iterations, settings.model_dump_json())
        self._key = hashlib.sha256(np.asarray(vectors[sample], np.float32).tobytes())
        self._key.update(json.dumps(made_from).encode())
        self._sizes = data.codebook_sizes

    def _file(self, level: int) -> Path:
        assert self.folder is not None
        key = self._key.copy()
        key.update(json.dumps(self._sizes[: level + 1]).encode())
        return self.folder / f"level_{level}_{key.hexdigest()[:16]}.npy"

    def load(self, level: int) -> np.ndarray | None:
        if self.folder is None or not self._file(level).is_file():
            return None
        return np.load(self._file(level), allow_pickle=False)

    def save(self, level: int, book: np.ndarray) -> None:
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self._file(level).with_suffix(".partial")
            with partial.open("wb") as file:
                np.save(file, book, allow_pickle=False)
            partial.rename(self._file(level))
        except OSError as error:
            raise InputError(f"cannot write finished levels to {self.folder}: {error.strerror or error}") from None


def encode(arrays: Arrays, vectors: Rows, batch_size: int = 65_536) -> np.ndarray:
    """Codes int32 [N,L] of vectors float32 [N,D]; ties go to the lowest code.

    Raises:
        InputError: a value is not finite, or the width is not the codebooks'.
    """
    rows, books = _checked_rows(vectors, batch_size), codebooks(arrays)
    if rows.shape[1] != books[0].shape[1]:
        raise InputError(f"vectors of width {rows.shape[1]} do not fit codebooks of width {books[0].shape[1]}")
    codes = np.empty((int(rows.shape[0]), len(books)), np.int32)
    for level, book in enumerate(books):
        codes[:, level] = nearest(Residuals(rows, books[:level], codes[:, :level]), book, batch_size)[0]
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
