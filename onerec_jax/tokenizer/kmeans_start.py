"""The start of k-means: k-means++ (Arthur & Vassilvitskii 2007), whose draws come in growing rounds when codes are many."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from onerec_jax.tokenizer.kmeans import Rows

_SINGLE = 16  # draws made one at a time before rounds start to grow
_ROUND = 64  # most draws of one round


def _rounds(size: int) -> list[int]:
    """Draws per round: single ones, then a sixteenth of those drawn so far, at most `_ROUND`."""
    rounds, drawn = [], 0
    while drawn < size:
        rounds.append(min(max(1, drawn // _SINGLE), _ROUND, size - drawn))
        drawn += rounds[-1]
    return rounds


@jax.jit
def _draw(rows_SxD: jax.Array, count: jax.Array, rounds_R: jax.Array, key: jax.Array) -> jax.Array:
    """Rows drawn in each round, int32 [R,`_ROUND`]; of round r the first `rounds_R[r]` count."""
    norm = jnp.sum(rows_SxD**2, 1)

    def one_round(weights: jax.Array, round_and_key: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        number, key = round_and_key
        # Gumbel-top-k: the `number` largest are a draw without replacement by weight.
        gumbel = jax.random.gumbel(key, weights.shape)
        _, picked = jax.lax.top_k(jnp.where(weights > 0, jnp.log(weights) + gumbel, -jnp.inf), _ROUND)
        chosen = rows_SxD[picked]
        # By the expansion, a matrix product; its rounding is cut off, so that a row equal to a centre is never drawn.
        scale = norm[:, None] + norm[picked]
        distances = scale - 2 * jnp.dot(rows_SxD, chosen.T, precision=jax.lax.Precision.HIGHEST)
        distances = jnp.where(distances > 1e-6 * scale, distances, 0)
        closest = jnp.where(jnp.arange(_ROUND) < number, distances, jnp.inf).min(1)
        return jnp.minimum(weights, closest), picked.astype(jnp.int32)

    # An infinite weight would outweigh any other; before the first draw all rows have the same finite one.
    huge = jnp.finfo(jnp.float32).max
    uniform = jnp.where(jnp.arange(len(rows_SxD)) < count, huge, 0.0)
    return jax.lax.scan(one_round, uniform, (rounds_R, jax.random.split(key, len(rounds_R))))[1]


def plus_plus(vectors: Rows, size: int, seed: int | tuple[int, ...]) -> np.ndarray:
    """Start centroids float32 [K,D]: rows drawn by squared distance to those drawn before.

    Draws from a seeded sample of max(8192, 2 K) rows where there are more. The first 16 draws are k-means++; later ones
    come in rounds of a sixteenth of those drawn so far, without replacement, which is one matrix product a round and
    costs nothing measurable after a few Lloyd iterations. With fewer distinct vectors than codes some centroids coincide.
    """
    rng = np.random.default_rng(seed)
    total, most = int(vectors.shape[0]), max(8192, 2 * size)
    sample = np.sort(rng.choice(total, most, replace=False)) if total > most else slice(0, total)
    rows = np.asarray(vectors[sample], np.float32)
    rounds = _rounds(size)
    padded = np.pad(rows - rows.mean(0), ((0, max(0, _ROUND - len(rows))), (0, 0)))
    key = jax.random.key(int(rng.integers(2**32)), impl="threefry2x32")
    picked = np.asarray(_draw(jnp.asarray(padded), len(rows), jnp.asarray(rounds), key))
    order = np.concatenate([row[:number] for row, number in zip(picked, rounds, strict=True)])
    return rows[order % len(rows)]
