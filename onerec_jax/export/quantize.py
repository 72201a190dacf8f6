"""Weights in fewer bytes: bfloat16, or int8 with one float32 scale per output channel.

Weight-only and symmetric: w = q * scale, q = round(w / scale) within -127..127, scale = max |w| / 127 over what feeds one output: a
column of a matrix, a row of an embedding. Norms, biases, the router and whatever else is small or decides stay float32.
"""

from __future__ import annotations

import re
from typing import Literal

import ml_dtypes
import numpy as np

from onerec_jax.data.tensor_files import Tensors
from onerec_jax.train.exported import SCALE

DType = Literal["float32", "bfloat16", "int8"]

# what is stored in fewer bytes, by the end of its name: along which axis the largest of a channel is looked for
_ROWS = re.compile(r"\.(embedding|rows|position|queries)$")
_MATRICES = re.compile(r"\.(kernel|(moe|shared)\.(gate|up|down))$")


def reduced_axis(name: str) -> int | None:
    """-1 for embeddings, a scale a row; -2 for matrices [..., in, out], a scale a column; None for what stays float32."""
    if _ROWS.search(name):
        return -1
    return -2 if _MATRICES.search(name) else None


def quantised(name: str, array: np.ndarray) -> Tensors:
    """int8 and its scale, float32 with 1 in place of the axis it goes over; an all-zero channel has scale 1."""
    axis = reduced_axis(name)
    assert axis is not None
    values = array.astype(np.float32)
    scale = np.abs(values).max(axis=axis, keepdims=True, initial=0) / 127
    scale = np.where(scale > 0, scale, 1).astype(np.float32)
    return {name: np.rint(values / scale).clip(-127, 127).astype(np.int8), name + SCALE: scale}


def stored_as(named: Tensors, dtype: DType) -> Tensors:
    """Arrays by name as they are stored; `float32` keeps every bit."""
    found: Tensors = {}
    for name, array in named.items():
        if dtype == "float32" or reduced_axis(name) is None:
            found[name] = array
        elif dtype == "bfloat16":
            found[name] = array.astype(ml_dtypes.bfloat16)
        else:
            found |= quantised(name, array)
    return found
