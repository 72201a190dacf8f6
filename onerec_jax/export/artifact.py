"""An export directory: what it holds, written whole and read back checked.

    config.json             what the model is, what it was trained on, how lists are made
    model*.safetensors      its weights (`train/exported.py` has their names)
    catalogue.safetensors   what is known of all items, and the trie of their semantic IDs
    tokenizer.*             what turns content into semantic IDs
    items.jsonl             the caller's id and the title of every item row
    users.jsonl             a few users to try it with
    *.stablehlo, signature.json, recommend.py     the recommend step for any program that runs StableHLO, and one that does
    pytorch_model.py        the model in plain PyTorch
    MODEL_CARD.md, hashes.json

Axis letters: I items, C codes of a semantic ID, D content dimensions.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from onerec_jax.config import ModelConfig
from onerec_jax.data.replacing import replacing
from onerec_jax.data.schema import Vocabulary
from onerec_jax.data.tensor_files import Tensors, read_tensors, seal, write_tensors
from onerec_jax.errors import InputError
from onerec_jax.export.quantize import DType, stored_as
from onerec_jax.export.stablehlo import write_functions
from onerec_jax.generate.step import Catalogue, make_catalogue
from onerec_jax.model.onerec import Model, build
from onerec_jax.storage import is_remote
from onerec_jax.tokenizer.trie import Trie
from onerec_jax.train.exported import CONFIG, WEIGHTS, as_trees, is_export, named_weights, read_config, restored

FORMAT_VERSION = 1
STANDALONE = ("recommend.py", "pytorch_model.py")  # modules of this room that a directory has a copy of


@dataclasses.dataclass(frozen=True)
class Contents:
    """All that goes into an export directory."""

    config: dict[str, Any]
    model: Model
    params: Any
    tables: Any
    bias: Any
    catalogue: Tensors
    trie: Trie
    item_ids: list[int | str]
    titles: list[str]
    users: list[dict[str, Any]]
    tokenizer: dict[str, Any]  # as JSON
    tokenizer_arrays: Tensors
    card: str  # Markdown


@dataclasses.dataclass(frozen=True)
class Artifact:
    """An export directory in memory, every file of it known to be what was written."""

    directory: Path
    config: dict[str, Any]
    model: Model
    weights: Tensors  # as stored; `parameters` has them as float32
    catalogue: Tensors
    trie: Trie
    item_ids: list[int | str]  # by item row
    titles: list[str]

    @property
    def vocabulary(self) -> Vocabulary:
        return self.model.vocabulary

    @functools.cached_property
    def parameters(self) -> tuple[Any, dict[str, dict[str, Any]], dict[str, Any]]:
        """params, tables (rows alone) and bias as float32 arrays, as a recommend step takes them."""
        return as_trees(restored(self.weights), self.model.abstract, self.model.tables)

    @functools.cached_property
    def on_device(self) -> Catalogue:
        """The catalogue as a recommend step takes it."""
        arrays = self.catalogue
        return make_catalogue(self.trie, self.model.config, arrays["author"], arrays["tag"], arrays.get("shift"))

    @property
    def users(self) -> list[dict[str, Any]]:
        """The sample users: `id`, `row`, `features` and `events`, and rows of the pathways that events do not tell."""
        return read_lines(self.directory / "users.jsonl")


def catalogue_arrays(
    trie: Trie,
    author: np.ndarray,
    tag: np.ndarray,
    duration_s: np.ndarray,
    shift: np.ndarray | None = None,
    embedding: np.ndarray | None = None,
) -> Tensors:
    """What is known of all items, by name: features [I], the trie, and how to get from a leaf of it to items and back.

    Args:
        shift: float32 [I], what is added to the item head's log P.
        embedding: float32 [I,D], content that lifelong clusters are made of.
    """
    leaf = np.empty(len(trie.items), np.int32)
    leaf[trie.items] = np.repeat(np.arange(trie.leaves, dtype=np.int32), np.diff(trie.item_start))
    arrays = {
        "codes": trie.codes,
        "author": author.astype(np.int32),
        "tag": tag.astype(np.int32),
        "duration_s": duration_s.astype(np.float32),
        "item_start": trie.item_start,
        "items": trie.items,
        "leaf": leaf,
    }
    arrays |= {f"child_start.{level}": start for level, start in enumerate(trie.child_start)}
    arrays |= {f"token.{level}": token for level, token in enumerate(trie.token)}
    optional = {"shift": shift, "embedding": embedding}
    return arrays | {name: array for name, array in optional.items() if array is not None}


def trie_of(catalogue: Tensors) -> Trie:
    """The trie in the arrays of a catalogue."""
    levels = range(catalogue["codes"].shape[1])
    return Trie(
        tuple(catalogue[f"child_start.{level}"] for level in levels),
        tuple(catalogue[f"token.{level}"] for level in levels),
        catalogue["item_start"],
        catalogue["items"],
    )


def check_replaceable(directory: Path) -> None:
    """Checks that writing there would remove nothing but an older export.

    Raises:
        InputError: there is something else at the place, or it is in a bucket.
    """
    if is_remote(directory):
        raise InputError(f"--to {directory} must be a folder of this machine; copy it to the bucket when it is whole")
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--to {directory} is a file; name a folder")
    if directory.is_dir() and any(directory.iterdir()) and not is_export(directory):
        raise InputError(f"--to {directory} holds other files than an export; name an empty or a new folder")


def write_artifact(contents: Contents, directory: Path, dtype: DType = "float32", shard_bytes: int = 5 * 10**9) -> None:
    """Writes an export directory, which appears whole or not at all.

    Raises:
        InputError: the folder cannot be written, or holds other files than an older export.
    """
    check_replaceable(directory)
    host = jax.tree.map(np.asarray, (contents.params, contents.tables, contents.bias))
    stored = stored_as(named_weights(*host), dtype)
    config = {"format_version": FORMAT_VERSION, **contents.config, "dtype": dtype}
    with replacing(directory, "the export") as partial:
        write_tensors(partial, WEIGHTS, stored, shard_bytes)
        write_tensors(partial, "catalogue", contents.catalogue)
        write_tensors(partial, "tokenizer", contents.tokenizer_arrays)
        _write_json(partial / "tokenizer.json", contents.tokenizer)
        titled = zip(contents.item_ids, contents.titles, strict=True)
        _write_lines(partial / "items.jsonl", ({"id": item, "title": title} for item, title in titled))
        _write_lines(partial / "users.jsonl", contents.users)
        _write_json(partial / CONFIG, config)
        write_functions(
            partial, contents.model, stored, contents.catalogue, contents.trie, config["lists"], config["excluded"]
        )
        for name in STANDALONE:
            shutil.copyfile(Path(__file__).with_name(name), partial / name)
        (partial / "MODEL_CARD.md").write_text(contents.card, encoding="utf-8")
        seal(partial)


def load_artifact(directory: str | Path) -> Artifact:
    """Reads an export directory.

    Raises:
        InputError: there is none, it is of another format version, or a file of it is missing, changed or added.
    """
    directory = Path(directory)
    config = read_config(directory)
    if config["format_version"] != FORMAT_VERSION:
        raise InputError(
            f"{directory} has format version {config['format_version']}, this program reads {FORMAT_VERSION}; "
            "export the run again with `onerec export RUN --to DIR`"
        )
    sizes: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in config["vocabulary"].items()}
    catalogue, items = read_tensors(directory, "catalogue"), read_lines(directory / "items.jsonl")
    return Artifact(
        directory=directory,
        config=config,
        model=build(ModelConfig.model_validate(config["model"]), Vocabulary(**sizes)),
        weights=read_tensors(directory, WEIGHTS),
        catalogue=catalogue,
        trie=trie_of(catalogue),
        item_ids=[item["id"] for item in items],
        titles=[item["title"] for item in items],
    )


def read_lines(path: Path) -> list[Any]:
    """The values of a file of JSON lines."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _write_lines(path: Path, values: Iterable[Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
