"""The oracle: every expert on every row, weighted by its gate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def reference_experts(
    x_MxD: Array, chosen_MxA: Array, gates_MxA: Array, gate_ExDxF: Array, up_ExDxF: Array, down_ExFxD: Array
) -> Array:
    """sum_a gates[m,a] * SwiGLU_{chosen[m,a]}(x[m]); E / active times the needed work, and nothing to get wrong."""
    one_hot = jax.nn.one_hot(chosen_MxA, gate_ExDxF.shape[0], dtype=gates_MxA.dtype)
    weight_MxE = jnp.einsum("ma,mae->me", gates_MxA, one_hot)

    def add(total: Array, expert: tuple[Array, Array, Array, Array]) -> tuple[Array, None]:
        gate, up, down, weight_M = expert
        y = (jax.nn.silu(x_MxD @ gate) * (x_MxD @ up)) @ down
        return total + y * weight_M[:, None].astype(y.dtype), None

    total, _ = jax.lax.scan(add, jnp.zeros_like(x_MxD), (gate_ExDxF, up_ExDxF, down_ExFxD, weight_MxE.T))
    return total
