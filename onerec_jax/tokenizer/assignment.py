"""The nearest of a few thousand centroids, exactly, at the speed of bfloat16.

Scores of all codes are taken in bfloat16, which matrix units compute many times faster than float32. The best few codes are
compared again in float32. With precision "float32" a bound on the error of the scores proves for nearly every row that no
other code can be nearer; the rows it does not prove are scored again in float32. So the code is the one that float32 finds.

Axis letters: B rows of a batch, T rows of a tile, D width, K codes, C columns of G consecutive codes, M candidates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

Precision = Literal["float32", "bfloat16"]

_COLUMNS = 64  # at least, if there are as many codes
_MOST_MEMBERS = 64  # of a column; the number of a code in its column takes the 6 lowest bits of its score
_CANDIDATES = 3  # codes compared again in float32
_AGAIN = 64  # rows scored again at once
_FEW_CODES = 1024  # below, float32 scores cost no more than the comparisons
_TINY = 2.0**-63  # its square is the least normal float32
_HIGHEST = jax.lax.Precision.HIGHEST


class _Book(NamedTuple):
    """Centroids near the origin, by code and by member: row g C + c of the latter is code c G + g."""

    origin_D: jax.Array
    codes_KxD: jax.Array
    half_norm_K: jax.Array  # infinite for the codes that pad the last column
    by_member_KxD: jax.Array
    low_by_member_KxD: jax.Array  # bfloat16
    half_norm_by_member_GxC: jax.Array
    greatest: jax.Array  # norm of a code
    greatest_rounding: jax.Array  # norm of what bfloat16 leaves of a code

    @property
    def members(self) -> int:
        return self.half_norm_by_member_GxC.shape[0]

    @property
    def columns(self) -> int:
        return self.half_norm_by_member_GxC.shape[1]


def _norm(values: jax.Array) -> jax.Array:
    """Euclidean norm of the last axis, rounded up where squares would underflow."""
    return jnp.sqrt(jnp.sum(values**2, -1)) + _TINY * values.shape[-1]


def _rounding(values: jax.Array) -> jax.Array:
    """What bfloat16 leaves of values."""
    return values - jax.lax.reduce_precision(values, 8, 7)


def _book(centroids_KxD: jax.Array) -> _Book:
    size, width = centroids_KxD.shape
    origin = centroids_KxD.mean(0)  # distances do not depend on it, and near it the expansion loses no digits
    members = min(_MOST_MEMBERS, 1 << max(0, (size // _COLUMNS).bit_length() - 1))  # a power of two
    codes = jnp.pad(centroids_KxD - origin, ((0, -size % members), (0, 0)))
    half_norm = jnp.where(jnp.arange(len(codes)) < size, 0.5 * jnp.sum(codes**2, 1), jnp.inf)
    by_member = codes.reshape(-1, members, width).transpose(1, 0, 2).reshape(-1, width)
    return _Book(
        origin,
        codes,
        half_norm,
        by_member,
        by_member.astype(jnp.bfloat16),
        half_norm.reshape(-1, members).T,
        _norm(codes).max(),
        _norm(_rounding(codes)).max(),
    )


def _scores(rows_TxD: jax.Array, book: _Book, precision: Precision) -> list[jax.Array]:
    """||c||^2 / 2 - x.c, which orders codes as the distance does: of every member g of the columns, [T,C].

    Members are slices, not an axis: XLA turns what follows into one pass of vector instructions over them.
    """
    if precision == "bfloat16":
        low = (rows_TxD.astype(jnp.bfloat16), book.low_by_member_KxD)
        dots = jnp.einsum("td,kd->tk", *low, preferred_element_type=jnp.float32)
    else:
        dots = jnp.einsum("td,kd->tk", rows_TxD, book.by_member_KxD, precision=_HIGHEST)
    return [
        book.half_norm_by_member_GxC[g] - dots[:, g * book.columns : (g + 1) * book.columns]
        for g in range(book.members)
    ]


def _fold(merge: Callable, values: list):
    """merge over values by halves."""
    while len(values) > 1:
        paired = [merge(*values[at : at + 2]) for at in range(0, len(values) - 1, 2)]
        values = paired + values[len(values) - len(values) % 2 :]
    return values[0]


def _exact(rows_TxD: jax.Array, book: _Book) -> jax.Array:
    """The nearest code int32 [T] by float32 scores, ties to the lowest."""
    scores = _scores(rows_TxD, book, "float32")
    # Inside the loops of an argmin, which are scalar, the minima would be too.
    column = jnp.argmin(jax.lax.optimization_barrier(_fold(jnp.minimum, scores)), axis=1)
    inside = jnp.stack([jnp.take_along_axis(score, column[:, None], axis=1)[:, 0] for score in scores], axis=1)
    return (column * book.members + jnp.argmin(inside, axis=1)).astype(jnp.int32)


def _ordered(values: jax.Array) -> jax.Array:
    """Integers int32 in the order of float32 values."""
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _value(ordered: jax.Array) -> jax.Array:
    """The float32 values of `_ordered` integers."""
    return jax.lax.bitcast_convert_type(ordered ^ ((ordered >> 31) & 0x7FFFFFFF), jnp.float32)


def _error(rows_TxD: jax.Array, book: _Book) -> jax.Array:
    """A bound [T] on the error of every bfloat16 score of a row, by Cauchy-Schwarz.

    x.c - x'.c' = (x - x').c + x'.(c - c'), then the rounding of float32 sums and of the bits that give way.
    """
    row = _norm(rows_TxD)
    digits = (rows_TxD.shape[1] + 2 * _MOST_MEMBERS) * 2.0**-23
    of_factors = _norm(_rounding(rows_TxD)) * book.greatest + 1.01 * row * book.greatest_rounding
    return of_factors + digits * (row + book.greatest) * book.greatest


def _pairs(values: list) -> list[tuple[jax.Array, jax.Array]]:
    if len(values) == 1:
        return [(values[0], jnp.full_like(values[0], jnp.iinfo(jnp.int32).max))]
    return [(jnp.minimum(*pair), jnp.maximum(*pair)) for pair in zip(values[::2], values[1::2], strict=True)]


def _two_least(one: tuple, other: tuple) -> tuple[jax.Array, jax.Array]:
    """Least and second of what two pairs of least and second hold."""
    second = jnp.minimum(jnp.maximum(one[0], other[0]), jnp.minimum(one[1], other[1]))
    return jnp.minimum(one[0], other[0]), second


def _screened(rows_TxD: jax.Array, book: _Book, prove: bool) -> tuple[jax.Array, jax.Array]:
    """The nearest code int32 [T] by bfloat16 scores and a float32 comparison; whether it is proved [T]."""
    ordered = [_ordered(score) for score in _scores(rows_TxD, book, "bfloat16")]
    least = _fold(jnp.minimum, [(score & -book.members) | g for g, score in enumerate(ordered)])
    second = _fold(_two_least, _pairs(ordered))[1] if prove else None
    least, second = jax.lax.optimization_barrier((least, second))
    first, columns, found = least, jnp.arange(book.columns), []
    for _ in range(min(_CANDIDATES, book.columns)):
        column = jnp.argmin(least, axis=1)
        member = jnp.take_along_axis(least, column[:, None], axis=1)[:, 0] & (book.members - 1)
        found.append((column * book.members + member).astype(jnp.int32))
        least = jnp.where(columns == column[:, None], jnp.iinfo(jnp.int32).max, least)
    candidates = jnp.stack(found, axis=1)
    dots = jnp.einsum("td,tmd->tm", rows_TxD, book.codes_KxD[candidates], precision=_HIGHEST)
    scores = book.half_norm_K[candidates] - dots
    codes = jnp.where(scores == scores.min(1, keepdims=True), candidates, len(book.codes_KxD)).min(1)
    if second is None:
        return codes, jnp.ones(len(codes), bool)
    others = jnp.minimum(least.min(1), second.min(1))
    return codes, others > _ordered(_value(first.min(1)) + 2 * _error(rows_TxD, book))


def _tiled(function: Callable, rows_BxD: jax.Array, tile: int):
    size = min(tile, len(rows_BxD))
    if len(rows_BxD) % size or len(rows_BxD) == size:
        return function(rows_BxD)
    found = jax.lax.map(function, rows_BxD.reshape(-1, size, rows_BxD.shape[1]))
    return jax.tree.map(lambda array: array.reshape(-1), found)


def assign(rows_BxD: jax.Array, centroids_KxD: jax.Array, precision: Precision, tile: int) -> jax.Array:
    """The nearest centroid int32 [B] of each row.

    Args:
        rows_BxD: float32.
        centroids_KxD: float32.
        precision: "float32" gives the code that float32 scores give, ties to the lowest; "bfloat16" leaves out the proof, so
            that of codes which bfloat16 cannot tell apart another may be given where two share a column or there are more
            than three.
        tile: rows scored at once, if it divides B.
    """
    book = _book(centroids_KxD)
    rows = rows_BxD - book.origin_D
    if precision == "float32" and len(centroids_KxD) < _FEW_CODES:
        return _tiled(functools.partial(_exact, book=book), rows, tile)
    codes, proved = _tiled(functools.partial(_screened, book=book, prove=precision == "float32"), rows, tile)
    if precision == "bfloat16":
        return codes
    size = min(_AGAIN, len(rows))
    doubtful = jnp.nonzero(~proved, size=len(rows) + size, fill_value=0)[0]

    def again(number: jax.Array, codes: jax.Array) -> jax.Array:
        some = jax.lax.dynamic_slice(doubtful, (number * size,), (size,))
        return codes.at[some].set(_exact(rows[some], book))

    return jax.lax.fori_loop(0, (jnp.sum(~proved) + size - 1) // size, again, codes)
