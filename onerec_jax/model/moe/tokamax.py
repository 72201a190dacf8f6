"""Grouped matmul of tokamax (GPU and TPU kernels), which is optional."""

from __future__ import annotations

import importlib

from jax import Array

from onerec_jax.errors import InputError


def grouped_matmul(rows: Array, weights: Array, sizes: Array) -> Array:
    """`tokamax.ragged_dot`, the implementation it finds best for the device.

    Raises:
        InputError: tokamax is not installed.
    """
    try:
        tokamax = importlib.import_module("tokamax")
        flags = importlib.import_module("absl.flags").FLAGS
        if not flags.is_parsed():  # up to 0.0.12 it would else take this program's arguments for its own
            flags.mark_as_parsed()
    except ImportError as error:
        raise InputError("model.moe.backend tokamax needs the package: pip install tokamax, or use ragged") from error
    return tokamax.ragged_dot(rows, weights, sizes)
