"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from onerec_jax.errors import InputError


@contextlib.contextmanager
def replacing(directory: Path, what: str) -> Iterator[Path]:
    """A new folder beside `directory` that takes its place when the block ends, and vanishes when it fails.

    `what` names the content for the error.

    Raises:
        InputError: the operating system refuses to write, for instance because the disk is full.
    """
    partial = directory.with_name(f"{directory.name}.partial-{os.getpid()}")
    replaced = directory.with_name(f"{directory.name}.replaced-{os.getpid()}")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        if directory.exists():
            directory.rename(replaced)
        try:
            partial.rename(directory)
        except OSError:
            if replaced.exists():
                replaced.rename(directory)
            raise
    except OSError as error:
        raise InputError(f"cannot write {what} to {directory}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
