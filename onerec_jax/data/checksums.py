"""What a folder's files were when they were written, kept in its card: what is damaged or mixed up later is named.

The digest of the card goes over the card itself. Cards made before there were checksums hold none, and are read as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_SEAL = "card_sha256"


def checksums(directory: Path) -> tuple[dict[str, dict[str, Any]], str]:
    """Size in bytes and SHA-256 of every file of a folder by its path there, and one SHA-256 over all names and bytes."""
    files, together = {}, hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name, size, own = path.relative_to(directory).as_posix(), path.stat().st_size, hashlib.sha256()
        together.update(f"{name}\0{size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                own.update(block)
                together.update(block)
        files[name] = {"bytes": size, "sha256": own.hexdigest()}
    return files, together.hexdigest()


def sealed(card: dict[str, Any]) -> dict[str, Any]:
    """The card with its own digest, as JSON values."""
    plain = json.loads(json.dumps({name: value for name, value in card.items() if name != _SEAL}))
    return {**plain, _SEAL: _digest(plain)}


def read_card(path: Path) -> dict[str, Any]:
    """The card at a path.

    Raises:
        OSError: there is no such file.
        ValueError: it is no JSON object, or not what `sealed` gave.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is missing")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        rest = {name: value for name, value in card.items() if name != _SEAL}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path.name} is no card: {error}") from None
    if _SEAL in card and card[_SEAL] != _digest(rest):
        raise ValueError(f"{path.name} is not what was written")
    return card


def check_files(
    directory: Path, files: dict[str, dict[str, Any]], by_size: Iterable[str] = (), card: str = "card.json"
) -> None:
    """Checks every file of the `checksums` in a `card`; those named in `by_size` are not read.

    Raises:
        OSError: a file is missing.
        ValueError: a file is not what was written.
    """
    unread = set(by_size)
    for name, written in files.items():
        path = directory / name
        if not path.is_file():
            raise FileNotFoundError(f"{name} is missing")
        size = path.stat().st_size
        if size != written["bytes"]:
            raise ValueError(f"{name} has {size} bytes, {card} says {written['bytes']}")
        if name in unread:
            continue
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != written["sha256"]:
                raise ValueError(f"{name} is not the file that {card} tells of")


def _digest(card: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()
