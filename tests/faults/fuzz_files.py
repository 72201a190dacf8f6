"""Mutated files of a prepared dataset, with its semantic IDs, and of the raw logs that datasets are made from.

A dataset is read as training reads it. What comes out must be bit for bit what came out of the undamaged one. A mutated raw log
may be another valid log: then a second reader must find the same events in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_configs import pick
from fuzz_logs import log_events, second_reading, write_logs, wrong_events
from tiny import tiny_values

from onerec_jax.config import Recipe
from onerec_jax.data.pipeline import Pipeline
from onerec_jax.data.prepare import prepare
from onerec_jax.data.split import SPLITS
from onerec_jax.data.store import Dataset
from onerec_jax.recipe import make_recipe
from onerec_jax.tokenizer.semantic_ids import SemanticIds, fit_semantic_ids

LONGEST = 600  # characters of a message, which holds long paths
LOGS = 4
_HISTORY = "histories-"
_OF_A_LOG = ("events:", "items:", "users:", "expected")


@dataclasses.dataclass(frozen=True)
class Case:
    """One or two files and what stands there instead; None is a file that is gone."""

    kind: str
    target: str
    must_refuse: bool
    content: dict[Path, bytes | Path | None]  # a path stands for itself: a folder, a pipe or a link made there

    @property
    def names(self) -> tuple[str, ...]:
        """What a message may call the damage: the file; of a log, whose files are checked together, its folder and a table."""
        files = [f"{path.parent.name}/{path.name}" if len(path.name) == 1 else path.name for path in self.content]
        return (*files, *(f"{path.parent.name}: {what}" for path in self.content for what in _OF_A_LOG))


@dataclasses.dataclass(frozen=True)
class Place:
    """A folder to mutate, and how it is read."""

    name: str
    folder: Path
    check: Callable[[], str | None]
    mutations: dict[str, tuple[bool, Callable[..., Any]]]
    other: Path | None = None  # a folder of the same layout with other content


# ------------------------------------------------------------------------------------------------------ a dataset


def fuzz_recipe(folder: Path, seed: int = 0) -> Recipe:
    """A tiny dataset of two shards with semantic IDs, written into `folder`."""
    values = tiny_values(folder)
    values["data"] |= {"shards": 2, "directory": str(folder)}
    values["data"]["source"] |= {"users": 30, "items": 80}
    values["train"]["batch_size"] = 64
    recipe = make_recipe({**values, "seed": seed})
    prepare(recipe)
    fit_semantic_ids(Dataset(folder), recipe.tokenizer, seed).save(recipe.tokenizer_directory)
    return recipe


def fingerprint(recipe: Recipe) -> str:
    """SHA-256 of all that training reads: the card, items, semantic IDs, histories, and an epoch of batches."""
    dataset, digest = Dataset(recipe.dataset_directory), hashlib.sha256()
    dataset.check_settings(recipe.data, recipe.name)
    ids = SemanticIds.load(recipe.tokenizer_directory, dataset)
    items = dataset.items
    plain = (dataset.vocabulary(ids.codebook_sizes), dataset.train_end_ms, dataset.frozen, dataset.lifelong_refresh)
    digest.update(
        repr((plain, ids.kind, ids.levels, items.text, dataset.card["counts"], dataset.card["labels"])).encode()
    )
    for array in (
        dataset.item_ids, dataset.user_ids, dataset.user_features, dataset.train_stops, ids.codes, *ids.arrays.values(),
        ids.trie.codes, ids.trie.items, items.author, items.tag, items.duration_s, items.upload_ms, items.train_count,
        items.embedding, *(dataset.examples(split) for split in SPLITS),
    ):  # fmt: skip
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    for history in dataset.histories(np.arange(dataset.num_users)):
        digest.update(history.rows.tobytes() + history.clusters.tobytes() + history.snapshot_start.tobytes())
    pipeline = Pipeline(dataset, ids.codes, recipe)
    for step in range(-(-len(dataset.examples("train")) // recipe.train.batch_size)):
        batch = pipeline.batch_at(step)
        digest.update(batch.user.tobytes() + batch.targets.tobytes() + batch.target_weight.tobytes())
        for events in (batch.short, batch.positive, batch.lifelong):
            digest.update(b"".join(np.asarray(column).tobytes() for column in vars(events).values()))
    return digest.hexdigest()


def flip(rng: np.random.Generator, content: bytes) -> bytes:
    """One to three bits, anywhere."""
    changed = np.frombuffer(content, np.uint8).copy()
    for at in rng.integers(max(1, len(changed)), size=rng.integers(1, 4)) if len(changed) else ():
        changed[at] ^= 1 << rng.integers(8)
    return changed.tobytes()


def block(rng: np.random.Generator, content: bytes, fill: Callable[[int], bytes]) -> bytes:
    size = int(rng.integers(1, 1 + min(4096, len(content))))
    at = int(rng.integers(1 + len(content) - size))
    return content[:at] + fill(size) + content[at + size :]


def header(rng: np.random.Generator, content: bytes) -> bytes:
    """Another dtype, order or shape in the header of an npy file or the metadata of a zarr array."""
    changes = [
        (rb"'<i4'|'<i8'|'<f4'", b"'<u2'"),
        (rb"<i4", b"<f4"),
        (rb"<i8", b"<f8"),
        (rb"<f4", b"<i4"),
        (rb"\d+", b"3"),
    ]
    changes += [
        (rb"False", b"True "),
        (rb"\(", b"(9"),
        (rb"'descr'", b"'descs'"),
        (rb"NUMPY", b"NUMPI"),
        (rb"<", b"|O"),
    ]
    head = content[:400]
    changed = [re.sub(old, new, head, count=1) for old, new in changes if re.search(old, head)]
    return pick(rng, changed or [b"?" + head[1:]]) + content[400:]


def _nodes(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value of a JSON tree."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    return [node for key in keys for node in [(tree, key), *_nodes(tree[key])]]


def json_change(rng: np.random.Generator, content: bytes) -> bytes:
    """One value changed or taken out, or one key renamed."""
    tree = json.loads(content)
    inside, key = pick(rng, _nodes(tree))
    value, what = inside[key], pick(rng, ["value", "value", "out", "rename"])
    if what == "value":
        inside[key] = value + 1 if isinstance(value, int | float) else pick(rng, [None, 3, "other", [], {}, [[1]]])
    elif what == "out" or isinstance(inside, list):
        del inside[key]
    else:
        inside[f"{key}_"] = inside.pop(key)
    return json.dumps(tree, indent=1).encode()


def version(rng: np.random.Generator, content: bytes) -> bytes:
    tree = json.loads(content)
    name = next(name for name in ("schema_version", "format_version", "zarr_format") if name in tree)
    return json.dumps(tree | {name: pick(rng, [0, 99, -1, "1", None, [], 10**30])}).encode()


def spaced(rng: np.random.Generator, content: bytes) -> bytes:
    """The same JSON with other white space."""
    return json.dumps(json.loads(content), indent=int(rng.integers(1, 9))).encode() + b"\n" * int(rng.integers(9))


MADE: dict[str, Callable[[Path], Any]] = {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a dead link": lambda path: path.symlink_to("nowhere"),
}
# Kind -> (must be refused, content -> content). Bits that nothing reads, such as padding, may change.
BYTES: dict[str, tuple[bool, Callable[..., Any]]] = {
    "bits flipped": (False, flip),
    "cut short": (False, lambda rng, content: content[: rng.integers(max(1, len(content)))]),
    "longer": (False, lambda rng, content: content + rng.bytes(int(rng.integers(1, 5000)))),
    "empty": (True, lambda rng, content: b""),
    "random bytes of its size": (True, lambda rng, content: rng.bytes(len(content))),
    "a block of zeros": (False, lambda rng, content: block(rng, content, bytes)),
    "a block of random bytes": (False, lambda rng, content: block(rng, content, rng.bytes)),
    "a folder, a pipe, a dead link": (True, lambda rng, content: pick(rng, MADE)),
    "gone": (False, lambda rng, content: None),
}
JSON: dict[str, tuple[bool, Callable[..., Any]]] = {
    "JSON: a value or key": (False, json_change),
    "JSON: version": (True, version),
    "JSON: nesting without end": (True, lambda rng, content: b'{"schema_version": ' + b"[" * 100_000),
    "JSON: white space": (False, spaced),
}
DATASET = {
    **BYTES,
    **JSON,
    "header: dtype, order, shape": (False, header),
    "swapped with another file": (False, None),
    "the file of another dataset": (False, None),
}


# ------------------------------------------------------------------------------------------------------- raw logs


def cell(value: bytes) -> Callable[..., bytes]:
    """Replaces one number of a text, below its first line, by something that is none."""

    def change(rng: np.random.Generator, content: bytes) -> bytes:
        first = content.find(b"\n") + 1
        places = [
            found.span() for found in re.finditer(rb"(?<![\w.\"-])\d+(?![\w.\"-])", content) if found.start() >= first
        ]
        if not places:
            return b""
        start, stop = pick(rng, places)
        return content[:start] + value + content[stop:]

    return change


RAW = {
    **BYTES,
    "a word for a number": (False, cell(b"many")),
    "a negative number": (False, cell(b"-5")),
    "a huge number": (False, cell(b"9" * 40)),
    "a line twice": (False, lambda rng, content: content + content.splitlines(keepends=True)[-1]),
    "a line with more cells": (False, lambda rng, content: content + content.splitlines()[-1] + b",1,2,3\n"),
    "nesting without end": (True, lambda rng, content: b"[" * 20_000 + b"\n" + content),
    "another head line": (False, lambda rng, content: re.sub(rb"\A[a-z_]+", b"qqq", content)),
}


# ------------------------------------------------------------------------------------------------------ both


def make_places(folder: Path) -> list[Place]:
    """Writes a dataset and the raw logs; the places in which files are mutated."""
    recipe = fuzz_recipe(folder / "dataset")
    fuzz_recipe(folder / "other", seed=1)
    whole = fingerprint(recipe)

    def dataset() -> str | None:
        return None if fingerprint(recipe) == whole else "something else was read than what was written"

    places = [Place("dataset", folder / "dataset", dataset, DATASET, folder / "other")]
    for name, values in write_logs(folder / "raw").items():
        source = make_recipe({"name": "raw", "data": {"source": values}}).data.source
        at = folder / "raw" / name
        events = log_events(at, source)
        assert second_reading(at) == events
        places.append(
            Place(f"log, {name}", at, lambda at=at, source=source, events=events: wrong_events(at, source, events), RAW)
        )
    return places


def turn(number: int) -> int:
    """Which of the places a case is of: two of three cases are of the dataset."""
    return 1 + number // 3 % LOGS if number % 3 == 2 else 0


def make_case(number: int, seed: int, place: Place) -> Case:
    """The case of a number; kinds of mutation take turns, files are drawn."""
    rng = np.random.default_rng((seed, number))
    kinds = list(place.mutations)
    kind = kinds[(number // 3 // LOGS if place.other is None else number - number // 3) % len(kinds)]
    must, change = place.mutations[kind]
    files = sorted(path for path in place.folder.rglob("*") if path.is_file())
    if kind.startswith("JSON"):
        wanted = {"card.json", *([".zarray"] if "nesting" not in kind else [])}
        files = [path for path in files if path.name in wanted]
    elif kind.startswith("header"):
        files = [path for path in files if path.suffix == ".npy" or path.name == ".zarray"]
    # Every other case is of a shard or a card, of which there are few among the many arrays.
    few = [path for path in files if path.name.startswith(_HISTORY) or path.name == "card.json"]
    target = pick(rng, few if few and rng.random() < 0.4 else files)
    name = str(target.relative_to(place.folder))
    if kind.startswith("the file of another"):
        assert place.other is not None
        return Case(
            kind, name, must, {target: (place.other / name).read_bytes() if (place.other / name).exists() else None}
        )
    if kind.startswith("swapped"):
        alike = [path for path in files if path.suffix == target.suffix and path != target]
        other = pick(rng, alike or files)
        return Case(kind, f"{name} and {other.name}", must, {target: other.read_bytes(), other: target.read_bytes()})
    content = target.read_bytes()
    must = must and not (kind.startswith(("empty", "random")) and len(content) < 2)
    return Case(kind, name, must, {target: change(rng, content)})


@contextlib.contextmanager
def mutated(case: Case) -> Iterator[None]:
    """Puts the content of a case in place, and what was there back in the end."""
    before = {path: path.read_bytes() for path in case.content}
    try:
        for path, content in case.content.items():
            path.unlink()
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif content is not None:
                MADE[content](path)
        yield
    finally:
        for path, content in before.items():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            path.write_bytes(content)
