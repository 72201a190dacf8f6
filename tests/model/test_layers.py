"""The small layers: what rematerialisation makes of their products."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from onerec_jax.model.layers import matmul, remat


def test_a_policy_that_keeps_products_keeps_those_of_matmul():
    """Forward, and backward for x and w: a fourth product would be the first one again."""
    forward = remat(lambda x, w: jnp.sum(jnp.sin(matmul(x, w))), "dots")
    x, w = jnp.ones((4, 8)), jnp.ones((8, 16))
    assert str(jax.make_jaxpr(jax.grad(forward, argnums=(0, 1)))(x, w)).count("dot_general[") == 3
