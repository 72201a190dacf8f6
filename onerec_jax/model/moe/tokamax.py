"""Grouped matmul of tokamax (GPU and TPU kernels), which is optional."""

from __future__ import annotations

from jax import Array

from onerec_jax.model.optional import tokamax


def grouped_matmul(rows: Array, weights: Array, sizes: Array) -> Array:
    """`tokamax.ragged_dot`, the implementation it finds best for the device.

    Raises:
        InputError: tokamax is not installed.
    """
    return tokamax("model.moe.backend tokamax", "ragged").ragged_dot(rows, weights, sizes)
