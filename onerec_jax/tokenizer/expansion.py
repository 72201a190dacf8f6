"""Keeping semantic IDs alive while items come: encode them as they are, or grow the codebooks, without moving any ID.

An expanded codebook has its former rows first, unchanged, then new centroids: k-means of what the earlier levels left of the
new items. At a grown level a new item takes the code k of the least

    ||r - c_k||^2 / u  +  penalty * log(1 + n_k / mean(n))

r its residual, u the mean of that squared distance over new items and codes, n_k the items that already have the code under
the item's prefix, which is where items collide; at the first level that is all of them.

Axis letters: I former items, N new items, D width, L levels of the quantizer, C of the IDs, K codes of a level, G prefixes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from onerec_jax.config import TokenizerConfig
from onerec_jax.errors import InputError
from onerec_jax.tokenizer import alignment, quality
from onerec_jax.tokenizer.content import content_vectors
from onerec_jax.tokenizer.kmeans import k_means, nearest
from onerec_jax.tokenizer.quantizer import Arrays, checked, codebooks, quantizer, with_codebooks
from onerec_jax.tokenizer.runs import place_in_run
from onerec_jax.tokenizer.semantic_ids import SemanticIds, resolve_priority
from onerec_jax.tokenizer.trie import Trie

if TYPE_CHECKING:
    from onerec_jax.data.store import Dataset

_BATCH = 65_536
_ROUNDS = 256  # times at which the counts of one prefix are brought up to date
_COUNTS = 2**22  # counts [G,K] held at once
_PER_ITEM = ("embedding", "sentence")  # content that does not depend on the other items of the dataset


@dataclasses.dataclass(frozen=True)
class Expansion:
    """How codebooks grow.

    Attributes:
        levels: which of them do.
        codes: new codes per grown level; by default as many as keep the number of items per code.
        penalty: weight of using a code again, in units of the mean squared distance to a code.
        iterations: of k-means.
    """

    levels: Literal["last", "all"] = "last"
    codes: int | None = None
    penalty: float = 0.5
    iterations: int = 25

    def __post_init__(self) -> None:
        if self.levels not in ("last", "all"):
            raise InputError(f"levels of an expansion is {self.levels!r}; expected 'last' or 'all'")
        for name, value, least in (("codes", self.codes or 0, 0), ("penalty", self.penalty, 0)):
            if not value >= least:
                raise InputError(f"{name} of an expansion is {value}; expected at least {least}")
        if self.iterations < 1:
            raise InputError(f"iterations of an expansion is {self.iterations}; expected at least 1")


def _continued(former: np.ndarray, quantized: np.ndarray) -> np.ndarray:
    """The extra level int32 [N] of new codes [N,L] after former IDs [I,L+1]: it goes on counting under each one."""
    both = np.concatenate([former[:, :-1], quantized])
    groups, group = np.unique(both, axis=0, return_inverse=True)
    group = group.ravel()
    following = np.zeros(len(groups), np.int64)
    np.maximum.at(following, group[: len(former)], former[:, -1] + 1)
    new = group[len(former) :]
    return (following[new] + _place_within(new)).astype(np.int32)


def _place_within(group: np.ndarray) -> np.ndarray:
    """0, 1, 2, … for the elements of each group of int [N], in their order."""
    order = np.argsort(group, kind="stable")
    place = np.empty(len(group), np.int64)
    place[order] = place_in_run(group[order])
    return place


def encode_new(ids: SemanticIds, vectors: np.ndarray) -> np.ndarray:
    """Semantic IDs int32 [N,C] of new content float32 [N,D] under a frozen tokenizer; the extra level goes on counting.

    Raises:
        InputError: a value is not finite, the width is another, or the construction knows its own items only.
    """
    codes = ids.encode(vectors)
    if ids.codes.shape[1] == ids.levels:
        return codes
    return np.column_stack([codes, _continued(ids.codes, codes)])


def _spread_codes(
    residual: np.ndarray,
    book: np.ndarray,
    group: np.ndarray,
    former: np.ndarray,
    former_code: np.ndarray,
    penalty: float,
) -> np.ndarray:
    """Codes int32 [N] of residuals [N,D] by distance and use.

    Items of one prefix choose one after the other, in at most 256 rounds.

    Args:
        residual: float32 [N,D].
        book: float32 [K,D].
        group: the prefix int [N] of each new item.
        former: the prefix int [I] of each former item.
        former_code: int [I].
        penalty: as in `Expansion`.
    """
    rows, book64 = residual.astype(np.float64), book.astype(np.float64)
    norm = (book64**2).sum(1)
    unit = (rows**2).sum(1).mean() - 2 * rows.mean(0) @ book64.mean(0) + norm.mean()
    unit = unit if unit > 0 else 1.0
    place, members = _place_within(group), np.bincount(group)
    turn = place * _ROUNDS // np.maximum(members[group], _ROUNDS)
    groups = np.unique(group)
    codes = np.empty(len(rows), np.int32)
    block = max(1, _COUNTS // len(book))
    for start in range(0, len(groups), block):
        some = groups[start : start + block]
        counts = np.zeros((len(some), len(book)))
        known = np.isin(former, some)
        np.add.at(counts, (np.searchsorted(some, former[known]), former_code[known]), 1)
        inside = np.flatnonzero((group >= some[0]) & (group <= some[-1]))
        inside = inside[np.argsort(turn[inside], kind="stable")]
        for chosen in np.split(inside, np.flatnonzero(np.diff(turn[inside])) + 1):
            at = np.searchsorted(some, group[chosen])
            distance = (norm - 2 * rows[chosen] @ book64.T) / unit
            mean = np.maximum(counts[at].mean(1, keepdims=True), 1e-12)
            codes[chosen] = (distance + penalty * np.log1p(counts[at] / mean)).argmin(1)
            np.add.at(counts, (at, codes[chosen]), 1)
    return codes


def _expanded(
    former: np.ndarray, levels: int, arrays: Arrays, vectors: np.ndarray, expansion: Expansion, seed: int
) -> tuple[Arrays, np.ndarray]:
    """The grown arrays, and IDs int32 [N,C] of new content vectors [N,D] beside former IDs int32 [I,C]."""
    residual, books = vectors, list(codebooks(arrays))
    if residual.shape[1] != books[0].shape[1]:
        raise InputError(f"vectors of width {residual.shape[1]} do not fit codebooks of width {books[0].shape[1]}")
    count, codes = len(former), np.empty((len(vectors), levels), np.int32)
    group = np.zeros(count + len(vectors), np.int64)
    for level, book in enumerate(books):
        if expansion.levels == "all" or level == levels - 1:
            more = expansion.codes
            if more is None:
                more = -(-len(book) * len(vectors) // max(count, 1))
            more = min(more, len(vectors))
            if more:
                grown = k_means(residual, more, expansion.iterations, (seed, level, len(book)), _BATCH)
                book = books[level] = np.concatenate([book, np.asarray(grown, np.float32)])
            codes[:, level] = _spread_codes(
                residual, book, group[count:], group[:count], former[:, level], expansion.penalty
            )
        else:
            codes[:, level] = nearest(residual, book, _BATCH)[0]
        residual = residual - book[codes[:, level]]
        _, group = np.unique(group * len(book) + np.append(former[:, level], codes[:, level]), return_inverse=True)
    if former.shape[1] > levels:
        codes = np.column_stack([codes, _continued(former, codes)])
    return arrays | with_codebooks(books), codes


def _check_kind(ids: SemanticIds) -> None:
    if ids.kind != "residual_kmeans":
        raise InputError(
            f"semantic IDs of tokenizer.quantizer.kind '{ids.kind}' cannot be expanded; "
            f"encode the new items as they are, or use 'residual_kmeans'"
        )


def _sizes(arrays: Arrays, codes: np.ndarray) -> tuple[int, ...]:
    books = tuple(map(len, codebooks(arrays)))
    return books + tuple(int(column.max()) + 1 for column in codes.T[len(books) :])


def expand(ids: SemanticIds, vectors: np.ndarray, expansion: Expansion = Expansion(), seed: int = 0) -> SemanticIds:
    """Semantic IDs of the former items, rows 0 to I-1, bit for bit as they were, and of new content [N,D] after them.

    In the trie the new items of an ID come after the former ones. The report's reconstruction is that of all items.

    Raises:
        InputError: IDs of another construction than residual k-means, or vectors that are not finite or of another width.
    """
    _check_kind(ids)
    if not len(vectors):
        return ids
    vectors = checked(alignment.project(ids.arrays, vectors))
    arrays, new = _expanded(ids.codes, ids.levels, ids.arrays, vectors, expansion, seed)
    codes = np.concatenate([ids.codes, new])
    sizes = _sizes(arrays, codes)
    rank = np.empty(len(codes), np.int64)
    rank[ids.trie.items] = np.arange(len(ids.codes))
    rank[len(ids.codes) :] = np.arange(len(ids.codes), len(codes))
    errors = quality.reconstruction(vectors, quantizer(ids.kind).decode(arrays, new[:, : ids.levels]))
    share = len(new) / len(codes)
    report = {
        "items": len(codes),
        **{name: (1 - share) * ids.quality[name] + share * error for name, error in errors.items()},
        "levels": [quality.level_usage(column, size) for column, size in zip(codes.T, sizes, strict=True)],
        **quality.collisions(codes),
        "quantized_collision_rate": quality.collisions(codes[:, : ids.levels])["collision_rate"],
    }
    origin = _origin(ids, expansion, seed, len(new), ids.origin.get("dataset"))
    return SemanticIds(codes, ids.kind, arrays, ids.levels, sizes, Trie.build(codes, -rank), report, origin)


def _origin(ids: SemanticIds, expansion: Expansion, seed: int, new: int, dataset: str | None) -> dict[str, Any]:
    step = {**dataclasses.asdict(expansion), "seed": seed, "new_items": new}
    return {**ids.origin, "dataset": dataset, "expansions": [*ids.origin.get("expansions", []), step]}


def _content(dataset: Dataset, former: Dataset, config: TokenizerConfig, seed: int, rows: np.ndarray) -> np.ndarray:
    """Content of every item of a grown dataset, in the space of the former one's.

    Vectors that are computed from all items at once (text, behaviour) have another basis in every dataset; the linear map
    that takes those of the items that both have to the former ones, by least squares, takes all there.

    Args:
        rows: int [2,n], the items of both by their rows in `dataset` and in `former`.
    """
    vectors = content_vectors(dataset, config, seed)
    if set(config.content) <= set(_PER_ITEM):
        return vectors
    before = content_vectors(former, config, seed)
    return (vectors @ np.linalg.lstsq(vectors[rows[0]], before[rows[1]], rcond=1e-6)[0]).astype(np.float32)


def expand_semantic_ids(
    dataset: Dataset,
    former: Dataset,
    ids: SemanticIds,
    config: TokenizerConfig,
    seed: int,
    expansion: Expansion = Expansion(),
) -> SemanticIds:
    """Semantic IDs of a dataset that has grown: items known by the caller's ids keep theirs, the others get new ones.

    Args:
        dataset: the grown one; its rows may be in another order, and items may have gone.
        former: the one that `ids` were made of.
        ids: residual k-means, with any `dedup`.
        config: the settings that `ids` were made with.
        seed: the seed that `ids` were made with.
        expansion: how the codebooks grow.

    Raises:
        InputError: `ids` are not of `former`, were made with other content or another construction than residual k-means,
            or the datasets have no item in common.
    """
    _check_kind(ids)
    if (ids.origin.get("dataset"), len(ids.codes)) != (former.card.get("content_hash"), former.num_items):
        raise InputError("the semantic IDs were not made of the former dataset; name the one that they were made of")
    made_with = ids.origin.get("tokenizer", {}).get("content")
    if made_with is not None and list(made_with) != list(config.content):
        raise InputError(f"tokenizer.content is {list(config.content)}, but the semantic IDs were made of {made_with}")
    _, *both = np.intersect1d(dataset.item_ids, former.item_ids, return_indices=True)
    rows = np.stack(both)
    if not rows.size:
        raise InputError(
            "the datasets have no item in common; make the semantic IDs anew with `onerec tokenize RECIPE`"
        )
    added = np.setdiff1d(np.arange(dataset.num_items), rows[0])
    vectors = checked(alignment.project(ids.arrays, _content(dataset, former, config, seed, rows)))

    arrays, codes = ids.arrays, np.empty((dataset.num_items, ids.codes.shape[1]), np.int32)
    codes[rows[0]] = ids.codes[rows[1]]
    if len(added):
        arrays, codes[added] = _expanded(ids.codes[rows[1]], ids.levels, arrays, vectors[added], expansion, seed)
    sizes = _sizes(arrays, codes)
    decode = functools.partial(quantizer(ids.kind).decode, arrays)
    report = quality.quality(vectors, decode, codes, sizes, ids.levels, config.batch_size)
    trie = Trie.build(codes, resolve_priority(dataset, config.resolve, seed))
    origin = _origin(ids, expansion, seed, len(added), dataset.card.get("content_hash"))
    return SemanticIds(codes, ids.kind, arrays, ids.levels, sizes, trie, report, origin)
