"""Semantic IDs of a dataset's items: fitted, saved, loaded, and turned back into items."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onerec_jax.config import TokenizerConfig
from onerec_jax.data.checksums import check_files, checksums, read_card, sealed
from onerec_jax.data.replacing import replacing
from onerec_jax.errors import InputError
from onerec_jax.tokenizer import alignment, quality
from onerec_jax.tokenizer.collisions import extra_level, reassign
from onerec_jax.tokenizer.content import behaviour_vectors, content_rows, train_co_occurrence
from onerec_jax.tokenizer.kmeans import Rows
from onerec_jax.tokenizer.pairs import mine_pairs
from onerec_jax.tokenizer.quantizer import Arrays, Items, quantizer
from onerec_jax.tokenizer.trie import Trie

if TYPE_CHECKING:
    from onerec_jax.data.store import Dataset

FORMAT_VERSION = 2
_BATCH = 65_536


@dataclasses.dataclass(frozen=True)
class SemanticIds:
    """The codes of every item, what made them, and the way back.

    Attributes:
        codes: int32 [I,C], by item row.
        kind: the construction, as in `tokenizer.quantizer.kind`.
        arrays: what the construction's `encode` and `decode` read.
        levels: L, the construction's levels; C is L, or L + 1 with `dedup: extra_level`.
        codebook_sizes: C sizes; that of the extra level is the largest number of items of one quantized ID.
        trie: the IDs that exist, with each one's items in resolve order.
        quality: the report of `quality.quality`.
        origin: the tokenizer's settings, the seed and the dataset's content hash.
    """

    codes: np.ndarray
    kind: str
    arrays: Arrays
    levels: int
    codebook_sizes: tuple[int, ...]
    trie: Trie
    quality: dict[str, Any]
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Quantizer codes int32 [N,L] of content float32 [N,D] (tokens [N,M,D] where the IDs were fitted on tokens).

        The extra level numbers known items only, and a re-assigned last code (`dedup`) is not what its content encodes to.
        """
        return quantizer(self.kind).encode(self.arrays, alignment.project(self.arrays, vectors), _BATCH)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Content vectors float32 [N,D] of codes int [N,C] or of prefixes; the extra level carries no content.

        Where alignment is on they are the aligned ones.
        """
        return quantizer(self.kind).decode(self.arrays, codes[:, : self.levels])

    def items_of(self, code: np.ndarray | tuple[int, ...]) -> np.ndarray:
        """Item rows int32 of one semantic ID [C], in resolve order; empty where no item has it.

        Raises:
            InputError: the ID has another number of codes.
        """
        path = np.asarray(code).reshape(1, -1)
        if path.shape[1] != self.trie.levels:
            raise InputError(f"semantic ID {path[0].tolist()} has {path.shape[1]} codes; expected {self.trie.levels}")
        leaf = int(self.trie.find(path)[0])
        return self.trie.leaf_items(leaf) if leaf >= 0 else np.zeros(0, np.int32)

    def save(self, directory: str | Path) -> None:
        """Writes npy and JSON files into `directory`, replacing it only when all of them are there.

        Raises:
            InputError: the folder cannot be written, or holds other files.
        """
        directory = Path(directory)
        _check_replaceable(directory)
        card = {
            "format_version": FORMAT_VERSION,
            "codebook_sizes": self.codebook_sizes,
            "kind": self.kind,
            "levels": self.levels,
            "arrays": sorted(self.arrays),
            **self.origin,
        }
        with replacing(directory, "semantic IDs") as partial:
            for name, array in _arrays(self).items():
                np.save(partial / f"{name}.npy", array, allow_pickle=False)
            card |= {"quality": self.quality, "files": checksums(partial)[0]}
            (partial / "card.json").write_text(json.dumps(sealed(card), indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | Path, dataset: Dataset | None = None) -> SemanticIds:
        """Reads what `save` wrote; with `dataset`, checks that these are the IDs of its items.

        Raises:
            InputError: missing or damaged files, or IDs of another dataset.
        """
        directory = Path(directory)
        try:
            card = read_card(directory / "card.json")
            check_files(directory, card.get("files", {}))
            loaded = _read(directory, card)
        except FileNotFoundError as error:
            raise InputError(f"no semantic IDs in {directory}: {_name(error)} is missing; {_REMEDY}") from None
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"semantic IDs in {directory} are damaged ({' '.join(str(error).split())}); {_REMEDY}"
            ) from None
        if dataset is not None:
            made_from = (loaded.origin["dataset"], len(loaded.codes))
            if made_from != (dataset.card.get("content_hash"), dataset.num_items):
                raise InputError(f"semantic IDs in {directory} were made from another state of the dataset; {_REMEDY}")
        return loaded


_REMEDY = "make them with `onerec tokenize RECIPE`"


def _name(error: FileNotFoundError) -> str:
    return Path(error.filename).name if error.filename else str(error).removesuffix(" is missing")


def _arrays(ids: SemanticIds) -> dict[str, np.ndarray]:
    arrays = {"codes": ids.codes, "item_start": ids.trie.item_start, "items": ids.trie.items}
    arrays |= {f"quantizer_{name}": array for name, array in ids.arrays.items()}
    for level in range(ids.trie.levels):
        arrays |= {f"child_start_{level}": ids.trie.child_start[level], f"token_{level}": ids.trie.token[level]}
    return arrays


def _check_replaceable(directory: Path) -> None:
    if directory.is_dir() and any(directory.iterdir()) and not (directory / "codes.npy").is_file():
        raise InputError(f"tokenizer.directory {directory} holds other files than semantic IDs; name a new folder")


def _read(directory: Path, card: dict[str, Any]) -> SemanticIds:
    if card["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format version {card['format_version']}, this is {FORMAT_VERSION}")

    def array(name: str) -> np.ndarray:
        return np.load(directory / f"{name}.npy", allow_pickle=False)

    sizes = tuple(int(size) for size in card["codebook_sizes"])
    codes = array("codes")
    arrays = {str(name): array(f"quantizer_{name}") for name in card["arrays"]}
    trie = Trie(
        tuple(array(f"child_start_{level}") for level in range(len(sizes))),
        tuple(array(f"token_{level}") for level in range(len(sizes))),
        array("item_start"),
        array("items"),
    )
    if codes.shape != (len(trie.items), len(sizes)) or not 0 < int(card["levels"]) <= len(sizes):
        raise ValueError("codes.npy does not fit the trie or the codebook sizes")
    if len(codes) and not ((codes >= 0).all() and (codes < sizes).all()):
        raise ValueError("codes.npy has codes outside their codebooks")
    origin = {key: card[key] for key in ("tokenizer", "seed", "dataset", "expansions") if key in card}
    return SemanticIds(codes, card["kind"], arrays, int(card["levels"]), sizes, trie, card["quality"], origin)


def resolve_priority(dataset: Dataset, resolve: str, seed: int) -> np.ndarray:
    """A number per item [I]; of the items of one ID the one with the largest is served first, ties by row.

    popularity: events in train; recency: upload time, unknown last; uniform: a seeded random order.
    """
    if resolve == "popularity":
        return dataset.items.train_count
    if resolve == "recency":
        return dataset.items.upload_ms
    return np.random.default_rng(seed).permutation(dataset.num_items)


def fit_semantic_ids(
    dataset: Dataset,
    config: TokenizerConfig,
    seed: int,
    content: Rows | None = None,
    progress: Path | None = None,
) -> SemanticIds:
    """Semantic IDs of all items of a dataset: content vectors, quantizer, optional extra level, trie, report.

    Content that is rows of a store is read in slices of `config.batch_size`, or in samples. `dedup` by `sinkhorn` and
    `nearest_free` reads the vectors of colliding items, some prefixes at a time; alignment, balanced levels and every
    construction but residual k-means load all vectors.

    `content` is what `content_rows` gives for these arguments, if it is there already; `progress` a folder in which
    residual k-means keeps its finished levels.

    Raises:
        InputError: the dataset lacks the content the config names, or a content vector is not finite.
    """
    content, projection = content_rows(dataset, config, seed) if content is None else content, {}
    if config.alignment.steps:
        pairs = mine_pairs(dataset, config.alignment)
        projection = alignment.fit(np.asarray(content[:]), pairs, config.alignment, seed).arrays
    vectors = alignment.project(projection, content)
    items = Items(
        vectors,
        config.codebook_sizes,
        seed,
        config.iterations,
        config.batch_size,
        co_occurrence=lambda: train_co_occurrence(dataset),
        behaviour=lambda: behaviour_vectors(dataset, config.dimensions, seed),
        progress=progress,
    )
    kind = config.quantizer.kind
    fitted = quantizer(kind).fit(items, config.quantizer)
    codes, sizes = fitted.codes, config.codebook_sizes
    priority = resolve_priority(dataset, config.resolve, seed)
    if config.dedup == "extra_level":
        codes = np.column_stack([codes, extra_level(codes, priority)])
        sizes = (*sizes, int(codes[:, -1].max()) + 1)
    elif config.dedup != "none":
        codes = reassign(config.dedup, kind, fitted.arrays, vectors, codes, sizes[-1], priority)
    origin = {
        "tokenizer": config.model_dump(mode="json", exclude={"directory"}),
        "seed": seed,
        "dataset": dataset.card.get("content_hash"),
    }
    levels = fitted.codes.shape[1]
    decode = functools.partial(quantizer(kind).decode, fitted.arrays)
    report = quality.quality(vectors, decode, codes, sizes, levels, config.batch_size)
    report["quantized_collision_rate"] = quality.collisions(fitted.codes)["collision_rate"]
    trie = Trie.build(codes, priority)
    return SemanticIds(codes, kind, fitted.arrays | projection, levels, sizes, trie, report, origin)


def fit_and_save(
    dataset: Dataset, config: TokenizerConfig, seed: int, directory: Path, content: Rows | None = None
) -> SemanticIds:
    """`fit_semantic_ids`, saved in `directory`. A call after one that was killed goes on after its last finished level.

    Raises:
        InputError: as `fit_semantic_ids` and `SemanticIds.save`; nothing is left behind then.
    """
    progress = directory.with_name(f"{directory.name}.levels")
    try:
        ids = fit_semantic_ids(dataset, config, seed, content, progress)
        ids.save(directory)
    except InputError:
        shutil.rmtree(progress, ignore_errors=True)
        raise
    shutil.rmtree(progress, ignore_errors=True)
    return ids
