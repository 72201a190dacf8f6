"""Named arrays in safetensors files, laid out as Hugging Face does, and folders that know what was written into them.

One file `STEM.safetensors`, or `STEM-00001-of-0000N.safetensors` with `STEM.safetensors.index.json` where they are too many bytes
for one. A sealed folder holds `hashes.json`: the SHA-256 of every other file. Nothing here is ever executed on reading.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from onerec_jax.data.checksums import check_files, checksums, read_card, sealed

HASHES = "hashes.json"
Tensors = dict[str, np.ndarray]


def shards_of(tensors: Tensors, most_bytes: int) -> list[list[str]]:
    """The names of each file: in the given order, as many as fit; an array is never cut."""
    shards: list[list[str]] = [[]]
    room = most_bytes
    for name, array in tensors.items():
        if shards[-1] and array.nbytes > room:
            shards.append([])
            room = most_bytes
        shards[-1].append(name)
        room -= array.nbytes
    return shards


def write_tensors(directory: Path, stem: str, tensors: Tensors, most_bytes: int = 5 * 10**9) -> None:
    """Writes arrays of any type that JAX has; a file holds at most `most_bytes`, or a single array that is larger.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    shards = shards_of(tensors, most_bytes)
    one = len(shards) == 1
    names = [
        f"{stem}.safetensors" if one else f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        for i in range(1, 1 + len(shards))
    ]
    try:
        for name, shard in zip(names, shards, strict=True):
            save_file({key: np.asarray(tensors[key], order="C") for key in shard}, directory / name, {"format": "np"})
            (directory / name).chmod(0o644)  # it is written for its owner alone
    except SafetensorError as error:
        raise OSError(f"{error}") from error
    if len(shards) == 1:
        return
    where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    total = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def read_tensors(directory: Path, stem: str) -> Tensors:
    """What `write_tensors` wrote.

    Raises:
        OSError: a file is missing.
        ValueError: a file is no such file, or the index names what is not there.
    """
    index = directory / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return _read(directory / f"{stem}.safetensors")
    where = json.loads(index.read_text())["weight_map"]
    found: Tensors = {}
    for name in sorted(set(where.values())):
        found |= _read(directory / name)
    if found.keys() != where.keys():
        raise ValueError(f"{index.name} does not name the arrays that are there")
    return found


def _read(path: Path) -> Tensors:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path.name} is no safetensors file: {error}") from error


def seal(directory: Path) -> None:
    """Writes `hashes.json` of all files that are in the folder now, with its own digest."""
    (directory / HASHES).unlink(missing_ok=True)
    (directory / HASHES).write_text(json.dumps(sealed({"files": checksums(directory)[0]}), indent=1) + "\n")


def check_seal(directory: Path) -> None:
    """Checks that a sealed folder holds the files that were written, and no others but what Python compiled.

    Raises:
        OSError: there is no `hashes.json`, or a file is missing.
        ValueError: a file is not what was written, or was added.
    """
    files = read_card(directory / HASHES)["files"]
    check_files(directory, files, card=HASHES)
    there = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    for path in sorted(path for path in there if "__pycache__" not in path.parts):
        if path.as_posix() not in (HASHES, *files):
            raise ValueError(f"{path.as_posix()} is not among the files that {HASHES} tells of")
