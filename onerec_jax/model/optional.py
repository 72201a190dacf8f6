"""Packages that the model can do without."""

from __future__ import annotations

import importlib
from typing import Any

from onerec_jax.errors import InputError


def tokamax(setting: str, instead: str) -> Any:
    """The package tokamax: kernels for GPU and TPU.

    Raises:
        InputError: it is not installed; `setting` is what asked for it, `instead` what does without.
    """
    try:
        package = importlib.import_module("tokamax")
        flags = importlib.import_module("absl.flags").FLAGS
    except ImportError as error:
        raise InputError(f"{setting} needs the package: pip install tokamax, or use {instead}") from error
    if not flags.is_parsed():  # up to 0.0.12 it would else take this program's arguments for its own
        flags.mark_as_parsed()
    return package
