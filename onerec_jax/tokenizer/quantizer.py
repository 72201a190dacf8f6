"""The one interface of all constructions of semantic IDs, and the registry of those there are.

A construction is a module with three functions of plain arrays:

    fit(data: Items, settings) -> Fitted            codes of the fitted items, and what encode and decode need
    encode(arrays, vectors, batch_size) -> codes    int32 [N,L] of content vectors float32 [N,D]
    decode(arrays, codes) -> vectors                float32 [N,D] of codes int [N,l] or of their prefixes, l <= L

`arrays` is a flat dict of NumPy arrays, saved as npy files; `encode` of the fitted vectors gives the fitted codes. A
construction that knows its own items only (random, sequential, a graph's clusters) says so in the error of `encode`.

Axis letters: I items, N vectors, D their width, L levels, K_l codes of level l.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

import numpy as np
from scipy import sparse

from onerec_jax.config import Section
from onerec_jax.errors import InputError
from onerec_jax.tokenizer.kmeans import Rows

Arrays = dict[str, np.ndarray]

MODULES = {
    "residual_kmeans": "rq_kmeans",
    "rq_vae": "rq_vae",
    "product": "product",
    "fsq": "fsq",
    "hierarchical": "hierarchical",
    "random": "random_ids",
    "sequential": "random_ids",
}

_LARGEST = 1e15  # beyond it squared distances leave float32


@dataclasses.dataclass(frozen=True)
class Items:
    """What a construction is fitted on.

    Attributes:
        vectors: content, float32 [I,D], an array or a store that is read in slices; residual k-means alone, but for its
            balanced levels, does not load it whole.
        codebook_sizes: K_l.
        seed: the result is a function of the items and the seed.
        iterations: of every k-means.
        batch_size: rows assigned at once; bounds memory, not the result.
        co_occurrence: counts of train co-occurrence [I,I], made when first asked for.
        behaviour: behaviour vectors float32 [I,d], made when first asked for.
        progress: folder of what is finished, for a construction that can go on after a kill.
    """

    vectors: Rows
    codebook_sizes: tuple[int, ...]
    seed: int = 0
    iterations: int = 25
    batch_size: int = 65_536
    co_occurrence: Callable[[], sparse.csr_matrix] | None = None
    behaviour: Callable[[], np.ndarray] | None = None
    progress: Path | None = None


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Codes int32 [I,L] of the items, and the arrays that `encode` and `decode` read."""

    codes: np.ndarray
    arrays: Arrays


class Quantizer(Protocol):
    """The three functions of a construction's module."""

    def fit(self, data: Items, settings: Section) -> Fitted: ...

    def encode(self, arrays: Arrays, vectors: np.ndarray, batch_size: int) -> np.ndarray: ...

    def decode(self, arrays: Arrays, codes: np.ndarray) -> np.ndarray: ...


def quantizer(kind: str) -> Quantizer:
    """The construction of a `tokenizer.quantizer.kind`."""
    module: ModuleType = importlib.import_module(f"onerec_jax.tokenizer.{MODULES[kind]}")
    return cast(Quantizer, module)


def codebooks(arrays: Arrays) -> tuple[np.ndarray, ...]:
    """`codebook_0`, `codebook_1`, ... of a construction that has one codebook per level."""
    return tuple(arrays[f"codebook_{level}"] for level in range(sum(name.startswith("codebook_") for name in arrays)))


def with_codebooks(books: tuple[np.ndarray, ...] | list[np.ndarray]) -> Arrays:
    """The arrays that `codebooks` reads back."""
    return {f"codebook_{level}": book for level, book in enumerate(books)}


def checked(vectors: Rows, first_row: int = 0) -> np.ndarray:
    """Content vectors as contiguous float32 [N,D]; `first_row` is the number of the first one, for the error.

    Raises:
        InputError: another shape, none at all, or a value that is NaN, infinite or beyond 1e15; names the first such row.
    """
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or not vectors.size:
        raise InputError(f"content vectors have shape {list(vectors.shape)}; expected [items, width], neither 0")
    vectors = np.ascontiguousarray(vectors, np.float32)
    good = (np.abs(vectors) < _LARGEST).all(1)
    if not good.all():
        row = first_row + int(np.flatnonzero(~good)[0])
        raise InputError(
            f"the content vector of item row {row} has a value that is NaN, infinite or beyond {_LARGEST:g} "
            f"({int((~good).sum())} such rows); every value must be finite"
        )
    return vectors


def check_codes(codes: np.ndarray, sizes: tuple[int, ...]) -> None:
    """Checks codes int [N,l] of the first l levels.

    Raises:
        InputError: a code outside its codebook.
    """
    for level, (column, size) in enumerate(zip(codes.T, sizes, strict=False)):
        if column.size and not (column.min() >= 0 and column.max() < size):
            raise InputError(f"level {level} has codes outside 0 to {size - 1}, the range of its codebook")
