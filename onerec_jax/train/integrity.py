"""Whether a checkpoint still is what was written: sizes and checksums of its files, kept beside it."""

from __future__ import annotations

import concurrent.futures
import json
import zlib
from pathlib import Path
from typing import Any

from onerec_jax.storage import is_remote, listing, write_text

_BLOCK = 1 << 22
_THREADS = 8


def record(checkpoint: Path) -> None:
    """Keeps size and checksum of every file of a finished checkpoint, beside the folder of checkpoints.

    On a disk the checksum is a CRC-32, a number; a bucket has its own, a text, which it lists. Of a run that was copied from
    the one to the other only the sizes are compared.
    """
    path = _record_of(checkpoint)
    if is_remote(checkpoint):
        write_text(path, json.dumps(listing(checkpoint)))
        return
    path.parent.mkdir(exist_ok=True)
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file())
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        sums = list(pool.map(_checksum, files))
    found = {
        str(file.relative_to(checkpoint)): [file.stat().st_size, crc] for file, crc in zip(files, sums, strict=True)
    }
    write_text(path, json.dumps(found))


def damage(checkpoint: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a checkpoint, naming a file; None if nothing is, or if it has no record.

    Args:
        share: (index, count) of a process that reads every count-th file; all look at the sizes of all.
    """
    path = _record_of(checkpoint)
    if not path.is_file():
        return None
    written = json.loads(path.read_text())
    if is_remote(checkpoint):
        return _difference(checkpoint, written, listing(checkpoint))
    for name, (size, _) in written.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size:,} of {size:,} bytes"
    mine = sorted(written)[share[0] :: share[1]]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for name, crc in zip(mine, pool.map(lambda name: _checksum(checkpoint / name), mine), strict=True):
            if crc != written[name][1] and isinstance(written[name][1], int):
                return f"{checkpoint / name} does not hold what was written"
    return None


def _difference(checkpoint: Path, written: dict[str, Any], found: dict[str, tuple[int, str]]) -> str | None:
    for name, (size, checksum) in written.items():
        if name not in found:
            return f"{checkpoint / name} is missing"
        if found[name][0] != size:
            return f"{checkpoint / name} has {found[name][0]:,} of {size:,} bytes"
        if found[name][1] != checksum and isinstance(checksum, str):
            return f"{checkpoint / name} does not hold what was written"
    return None


def forget(checkpoint: Path) -> None:
    """Drops the record of a checkpoint that is to be written anew."""
    _record_of(checkpoint).unlink(missing_ok=True)


def forget_deleted(checkpoints: Path) -> None:
    """Drops the records of checkpoints that are no more."""
    for path in _records(checkpoints).glob("*.json"):
        if not (checkpoints / path.stem).is_dir():
            path.unlink(missing_ok=True)


def _records(checkpoints: Path) -> Path:
    return checkpoints.with_name(checkpoints.name + "_written")


def _record_of(checkpoint: Path) -> Path:
    return _records(checkpoint.parent) / f"{checkpoint.name}.json"


def _checksum(file: Path) -> int:
    crc = 0
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return crc
