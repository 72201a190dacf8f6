"""IDs that say nothing about content, as controls: drawn at random, or numbered in row order (P5, Hua et al. 2023).

A row of the item table is the item's place in the source's own table of items, and where the source has none, in the order
in which items were first met. P5 numbers items consecutively, so that items met together share the leading tokens of
their numbers. Plain numbers would leave the leading codes of a large ID space at 0; `sequential_codes` spreads them: an
ID is the number floor(row * K_1 .. K_L / I), so every leading code has the same run of consecutive items, up to one.

Only fitted items have such IDs. What an ID or a prefix decodes to is the mean content of the fitted items under it: an item
alone under its ID is given back without loss, which says nothing about how good the ID is.
"""

from __future__ import annotations

import math

import numpy as np

from onerec_jax.config import RandomIds, SequentialIds
from onerec_jax.errors import InputError
from onerec_jax.tokenizer.quantizer import Arrays, Fitted, Items, check_codes, checked
from onerec_jax.tokenizer.trie import Trie

_COUNTABLE = 2**62  # numbers of more IDs than that do not fit int64


def fit(data: Items, settings: RandomIds | SequentialIds) -> Fitted:
    """Codes by `settings.kind`, and the mean content of the items of every ID.

    Raises:
        InputError: a value is NaN, infinite or beyond 1e15; names the first such row.
    """
    vectors = checked(data.vectors)
    if settings.kind == "random":
        codes = random_codes(len(vectors), data.codebook_sizes, data.seed)
    else:
        codes = sequential_codes(len(vectors), data.codebook_sizes)
    order = np.lexsort(codes.T[::-1])
    ordered = codes[order]
    first = np.flatnonzero(np.append(True, (ordered[1:] != ordered[:-1]).any(1)))
    count = np.diff(first, append=len(codes))
    sums = np.add.reduceat(vectors[order], first, axis=0, dtype=np.float64)
    means = (sums / count[:, None]).astype(np.float32)
    return Fitted(
        codes, {"sizes": np.array(data.codebook_sizes), "ids": ordered[first], "means": means, "items": count}
    )


def random_codes(items: int, sizes: tuple[int, ...], seed: int) -> np.ndarray:
    """Codes int32 [I,L], uniform over all IDs: no two items alike, or independent where there are more items than IDs."""
    rng = np.random.default_rng(seed)
    capacity = math.prod(sizes)
    if capacity <= _COUNTABLE:
        numbers = rng.choice(capacity, items, replace=items > capacity)
        return np.stack(np.unravel_index(numbers, sizes), axis=1).astype(np.int32)
    codes = rng.integers(sizes, size=(items, len(sizes)))
    while True:
        _, first = np.unique(codes, axis=0, return_index=True)
        again = np.delete(np.arange(items), first)
        if not again.size:
            return codes.astype(np.int32)
        codes[again] = rng.integers(sizes, size=(len(again), len(sizes)))


def sequential_codes(items: int, sizes: tuple[int, ...]) -> np.ndarray:
    """Codes int32 [I,L]: the mixed-radix digits of floor(row * prod(sizes) / items), digit by digit."""
    rest, codes = np.arange(items, dtype=np.int64), []
    for size in sizes:
        digit, rest = np.divmod(rest * size, items)
        codes.append(digit)
    return np.stack(codes, axis=1).astype(np.int32)


def encode(arrays: Arrays, vectors: np.ndarray, batch_size: int = 65_536) -> np.ndarray:
    """There are no IDs but those of the fitted items.

    Raises:
        InputError: always.
    """
    raise InputError(
        "random and sequential IDs exist for the fitted items alone and cannot encode content vectors; "
        "use another tokenizer.quantizer.kind"
    )


def decode(arrays: Arrays, codes: np.ndarray) -> np.ndarray:
    """Vectors float32 [N,D] of codes int [N,l]: the mean of the fitted items with the longest prefix that any item has.

    Raises:
        InputError: a code outside its codebook.
    """
    check_codes(codes, tuple(arrays["sizes"].tolist()))
    means, items = arrays["means"], arrays["items"]
    trie = Trie.build(arrays["ids"], np.zeros(len(items)))
    total = np.concatenate([np.zeros((1, means.shape[1])), np.cumsum(means * items[:, None], axis=0, dtype=np.float64)])
    seen = np.append(0, np.cumsum(items))
    vectors = np.empty((len(codes), means.shape[1]), np.float32)
    for length in range(codes.shape[1] + 1):
        node = trie.find(codes[:, :length])
        known = node >= 0
        bounds = trie.leaf_starts(length)
        low, high = bounds[node[known]], bounds[node[known] + 1]
        vectors[known] = (total[high] - total[low]) / (seen[high] - seen[low])[:, None]
    return vectors
