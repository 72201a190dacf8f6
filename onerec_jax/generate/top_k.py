"""The k largest of many, exactly and in two stages: of the parts of a row only those with the largest maxima can hold them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

PART = 128  # lanes of a vector unit; the maxima of parts are one pass over memory


def top_k(x_Bxn: Array, k: int) -> tuple[Array, Array]:
    """The min(k, n) largest of each row, largest first, and where they are: what `jax.lax.top_k` returns, also among equals.

    A value among the k largest lies in one of the k parts of the largest maxima: any other part is beaten by k of them. So a
    wide row is read once for its maxima, and only k parts are searched.
    """
    rows, n = x_Bxn.shape
    k = min(k, n)
    parts = -(-n // PART)
    if parts < 4 * k:
        return jax.lax.top_k(x_Bxn, k)
    padded = jnp.pad(x_Bxn, ((0, 0), (0, parts * PART - n)), constant_values=-jnp.inf).reshape(rows, parts, PART)
    chosen = jnp.sort(jax.lax.top_k(jnp.max(padded, axis=-1), k)[1], axis=-1)  # in order, so that equals keep theirs
    held = jnp.take_along_axis(padded, chosen[..., None], axis=1).reshape(rows, k * PART)
    values, place = jax.lax.top_k(held, k)
    part = jnp.take_along_axis(chosen, place // PART, axis=-1)
    return values, jnp.minimum(part * PART + place % PART, n - 1)
