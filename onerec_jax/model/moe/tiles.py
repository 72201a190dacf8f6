"""Experts by tiles: rows sorted by expert, each expert's rows padded to whole tiles, dense matmuls of up to eight tiles.

Static shapes, no dropped row, no padding beyond one tile an expert, and a loop only as long as the rows that are somebody's;
fast wherever a dense matmul is (CPU above all, where `lax.ragged_dot` is 30-50 times slower).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

CHUNKS = (8, 4, 2, 1)  # tiles of one matmul; a weight is read once for all of them


class Layout(NamedTuple):
    """Where choices go in the padded array, and what is to be multiplied with whose weights."""

    slot: Array  # [M*A], padded row of each choice; past the last row where the choice is nobody's
    start: Array  # [tiles], first padded row of each chunk
    owner: Array  # [tiles], its expert
    size: Array  # [tiles], its index in CHUNKS
    used: Array  # [], chunks that there are


def padded_rows(choices: int, experts: int, tile: int) -> int:
    """Rows of the padded array, with room for the longest chunk at every row that one can begin at."""
    return (-(-choices // tile) + experts + CHUNKS[0] - 1) * tile


def layout(chosen_MxA: Array, experts: int, tile: int) -> Layout:
    """The layout of choices [M,A]; those outside 0..experts-1 are nobody's."""
    expert = chosen_MxA.reshape(-1)
    expert = jnp.where((expert >= 0) & (expert < experts), expert, experts)
    counts = jnp.zeros((experts,), jnp.int32).at[expert].add(1, mode="drop")
    tiles = -(-counts // tile)
    first = jnp.cumsum(tiles) - tiles
    order = jnp.argsort(expert, stable=True)
    rank = jnp.zeros_like(expert).at[order].set(jnp.arange(expert.size, dtype=expert.dtype))
    start = jnp.append(first * tile - (jnp.cumsum(counts) - counts), 2**30)
    slot = start[expert] + rank

    tile_ = jnp.arange(-(-expert.size // tile) + experts)  # every tile that there may be
    owner = jnp.minimum(jnp.searchsorted(first + tiles, tile_, side="right"), experts - 1)
    index, count = tile_ - first[owner], tiles[owner]
    size = jnp.full(tile_.shape, -1)
    most = CHUNKS[0]
    for i, chunk in enumerate(CHUNKS):  # as the binary digits of the count: 13 tiles = 8 + 4 + 1
        begins = index % most == 0 if chunk == most else index == (count & ~(2 * chunk - 1))
        fits = index + chunk <= count if chunk == most else (count & chunk) > 0
        size = jnp.where((size < 0) & begins & fits, i, size)
    begin = (index < count) & (size >= 0)
    chunks = jnp.argsort(~begin, stable=True)
    return Layout(slot, chunks * tile, owner[chunks], size[chunks], jnp.sum(begin))


def _by_chunk(size: Array, tile: int, body: Callable[[int], Any]) -> Any:
    """body(rows) for the rows of a chunk."""
    return jax.lax.switch(size, [functools.partial(body, chunk * tile) for chunk in CHUNKS])


def _padded(value: Array, rows: int) -> Array:
    return jnp.pad(value, ((0, rows - value.shape[0]), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def swiglu_tiles(
    x_RxD: Array, gate_ExDxF: Array, up_ExDxF: Array, down_ExFxD: Array, where: Layout, tile: int
) -> Array:
    """SwiGLU of every chunk's rows with its owner's weights; [R,D], undefined in rows that are nobody's."""
    return _forward(x_RxD, gate_ExDxF, up_ExDxF, down_ExFxD, where, tile)[0]


def _forward(x: Array, gate: Array, up: Array, down: Array, where: Layout, tile: int):
    longest = CHUNKS[0] * tile
    zeros = functools.partial(_zeros, where, x.dtype)

    def step(i: Array, written: tuple[Array, ...]) -> tuple[Array, ...]:
        start, owner = where.start[i], where.owner[i]

        def body(rows: int) -> tuple[Array, ...]:
            x_t = jax.lax.dynamic_slice_in_dim(x, start, rows)
            g, u = x_t @ gate[owner], x_t @ up[owner]
            return tuple(_padded(v, longest) for v in (g, u, (jax.nn.silu(g) * u) @ down[owner]))

        # what a chunk pads, the chunks after it write over
        found = _by_chunk(where.size[i], tile, body)
        return tuple(jax.lax.dynamic_update_slice_in_dim(w, f, start, 0) for w, f in zip(written, found, strict=True))

    rows, hidden = x.shape[0], gate.shape[-1]
    g, u, y = jax.lax.fori_loop(0, where.used, step, (zeros(rows, hidden), zeros(rows, hidden), zeros(*x.shape)))
    return y, (x, gate, up, down, where, g, u)


def _backward(tile: int, saved: Any, dy: Array):
    x, gate, up, down, where, g, u = saved
    longest = CHUNKS[0] * tile

    def step(i: Array, written: tuple[Array, ...]) -> tuple[Array, ...]:
        start, owner = where.start[i], where.owner[i]

        def body(rows: int) -> tuple[Array, ...]:
            x_t, g_t, u_t, dy_t = (jax.lax.dynamic_slice_in_dim(v, start, rows) for v in (x, g, u, dy))
            (hidden, back) = jax.vjp(lambda g, u: jax.nn.silu(g) * u, g_t, u_t)
            dg_t, du_t = back(dy_t @ down[owner].T)
            dx_t = dg_t @ gate[owner].T + du_t @ up[owner].T
            return _padded(dx_t, longest), x_t.T @ dg_t, x_t.T @ du_t, hidden.T @ dy_t

        dx_t, *dw_t = _by_chunk(where.size[i], tile, body)
        dx, *dw = written
        dx = jax.lax.dynamic_update_slice_in_dim(dx, dx_t, start, 0)
        return (dx, *(w.at[owner].add(d) for w, d in zip(dw, dw_t, strict=True)))

    zeros = [_zeros(where, x.dtype, *v.shape) for v in (x, gate, up, down)]
    return (*jax.lax.fori_loop(0, where.used, step, tuple(zeros)), None)


def _zeros(where: Layout, dtype: jnp.dtype, *shape: int) -> Array:
    """Zeros that vary over the mesh axes that the layout varies over, as the carry of a loop within `shard_map` must."""
    return jnp.zeros(shape, dtype) + (0 * where.used).astype(dtype)


swiglu_tiles.defvjp(_forward, _backward)


def tiled_experts(
    x_MxD: Array,
    chosen_MxA: Array,
    gates_MxA: Array,
    gate_ExDxF: Array,
    up_ExDxF: Array,
    down_ExFxD: Array,
    *,
    tile: int,
) -> Array:
    """The same sum as `reference_experts`, computing only the chosen experts."""
    rows, active = x_MxD.shape[0], chosen_MxA.shape[-1]
    where = layout(chosen_MxA, gate_ExDxF.shape[0], tile)
    source = jnp.full((padded_rows(chosen_MxA.size, gate_ExDxF.shape[0], tile),), rows)
    source = source.at[where.slot].set(jnp.arange(where.slot.size) // active, mode="drop")
    x_RxD = jnp.take(x_MxD, source, axis=0, mode="fill", fill_value=0)
    y_RxD: Any = swiglu_tiles(x_RxD, gate_ExDxF, up_ExDxF, down_ExFxD, where, tile)
    chosen_y = jnp.take(y_RxD, where.slot, axis=0, mode="fill", fill_value=0).reshape(*chosen_MxA.shape, -1)
    return jnp.einsum("mad,ma->md", chosen_y, gates_MxA.astype(chosen_y.dtype))
