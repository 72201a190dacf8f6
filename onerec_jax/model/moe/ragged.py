"""Grouped matmul over rows sorted by expert: `lax.ragged_dot` (TPU), or any other of its signature."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


@jax.custom_vjp
def spread(x_MxD: Array, order: Array, inverse: Array) -> Array:
    """x of every choice, in sorted order: x[order // A]. Its transpose is a gather too, not a scatter."""
    return x_MxD[order // (order.size // x_MxD.shape[0])]


def _spread(x: Array, order: Array, inverse: Array):
    return spread(x, order, inverse), (x.shape, inverse)


def _spread_transposed(saved: tuple[tuple[int, ...], Array], dy: Array):
    (rows, width), inverse = saved
    return jnp.sum(dy[inverse].reshape(rows, -1, width), axis=1), None, None


spread.defvjp(_spread, _spread_transposed)


@jax.custom_vjp
def unsorted(y: Array, order: Array, inverse: Array) -> Array:
    """Sorted rows back in the order of the choices: y[inverse]."""
    return y[inverse]


unsorted.defvjp(lambda y, order, inverse: (y[inverse], order), lambda order, dy: (dy[order], None, None))


def ragged_experts(
    grouped_matmul: Callable[[Array, Array, Array], Array],
    x_MxD: Array,
    chosen_MxA: Array,
    gates_MxA: Array,
    gate_ExDxF: Array,
    up_ExDxF: Array,
    down_ExFxD: Array,
) -> Array:
    """The same sum as `reference_experts`; `grouped_matmul(rows, weights, rows of each expert)` does the matmuls.

    Rows past the last group, which such a matmul may leave undefined, are zero in value and gradient.
    """
    experts = gate_ExDxF.shape[0]
    expert = chosen_MxA.reshape(-1)
    expert = jnp.where((expert >= 0) & (expert < experts), expert, experts)
    order = jnp.argsort(expert, stable=True).astype(jnp.int32)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32), unique_indices=True)
    sizes = jnp.zeros((experts,), jnp.int32).at[expert].add(1, mode="drop")
    real = (jnp.arange(order.size) < jnp.sum(sizes))[:, None]
    x_RxD = jnp.where(real, spread(x_MxD, order, inverse), 0)
    hidden_RxF = jax.nn.silu(grouped_matmul(x_RxD, gate_ExDxF, sizes)) * grouped_matmul(x_RxD, up_ExDxF, sizes)
    y_RxD = grouped_matmul(jnp.where(real, hidden_RxF, 0), down_ExFxD, sizes)
    y_MxAxD = unsorted(jnp.where(real, y_RxD, 0), order, inverse).reshape(*chosen_MxA.shape, -1)
    return jnp.einsum("mad,ma->md", y_MxAxD, gates_MxA.astype(y_MxAxD.dtype))
