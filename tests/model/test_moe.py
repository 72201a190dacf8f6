from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.config import MoEConfig
from onerec_jax.model.moe import rebalance, route
from onerec_jax.model.moe.reference import reference_experts
from onerec_jax.model.moe.tiles import layout, tiled_experts

ROWS, D, F, E, A = 37, 8, 12, 5, 2


def _inputs(seed: int = 0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))  # noqa: E731
    return (
        draw(ROWS, D),
        draw(E, D, F) / 3,
        draw(E, D, F) / 3,
        draw(E, F, D) / 3,
        jnp.asarray(rng.random((ROWS, A)).astype(np.float32)),
    )


def _loads() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "random": np.stack([rng.choice(E, A, replace=False) for _ in range(ROWS)]),
        "all to two experts": np.tile([3, 1], (ROWS, 1)),
        "an empty expert": np.stack([rng.choice([0, 1, 2, 4], A, replace=False) for _ in range(ROWS)]),
        "one row apart": np.concatenate([np.tile([0, 1], (ROWS - 1, 1)), [[4, 2]]]),
    }


@pytest.mark.parametrize("load", list(_loads()))
@pytest.mark.parametrize("tile", [4, 16, 64])
def test_tiles_equal_the_reference_in_value_and_gradient_under_any_load(load: str, tile: int):
    x, gate, up, down, gates = _inputs()
    chosen = jnp.asarray(_loads()[load].astype(np.int32))

    def value(backend, *inputs):
        x, gate, up, down, gates = inputs
        return jnp.sum(jnp.sin(backend(x, chosen, gates, gate, up, down)))

    def tiles(*arguments):
        return tiled_experts(*arguments, tile=tile)

    inputs = (x, gate, up, down, gates)
    one = jax.value_and_grad(lambda *i: value(reference_experts, *i), argnums=range(5))(*inputs)
    other = jax.value_and_grad(lambda *i: value(tiles, *i), argnums=range(5))(*inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), one, other)


def test_every_choice_gets_its_own_slot_in_a_tile_of_its_expert():
    chosen = jnp.asarray(_loads()["random"].astype(np.int32))
    slot, owner, rows = layout(chosen, E, 4)
    slot, owner = np.asarray(slot), np.asarray(owner)
    assert len(set(slot.tolist())) == slot.size
    assert slot.max() < rows
    assert (owner[slot // 4] == np.asarray(chosen).reshape(-1)).all()


def test_the_bias_steers_the_choice_but_neither_the_gates_nor_a_gradient():
    x, *_ = _inputs()
    kernel = jnp.asarray(np.random.default_rng(2).normal(size=(D, E)).astype(np.float32))
    for router in ("softmax", "sigmoid"):
        config = MoEConfig(experts=E, active=A, hidden=F, router=router)
        bias = jnp.asarray([0.0, 0.0, 0.0, 0.0, 100.0])
        chosen, gates = route(x, kernel, bias, config)
        assert (np.asarray(chosen) == 4).any(axis=1).all()
        logits = np.asarray(x @ kernel, np.float64)
        scores = np.exp(logits) if router == "softmax" else 1 / (1 + np.exp(-logits))
        expected = np.take_along_axis(scores, np.asarray(chosen), axis=1)
        np.testing.assert_allclose(gates, expected / expected.sum(1, keepdims=True), rtol=1e-5)
        gradient = jax.grad(lambda b: jnp.sum(route(x, kernel, b, config)[1] ** 2))(bias)  # noqa: B023
        assert not np.asarray(gradient).any()


def test_rebalancing_lowers_the_bias_of_overloaded_experts_by_the_rate():
    load = jnp.asarray([[8.0, 2.0, 5.0, 5.0]])
    np.testing.assert_allclose(rebalance(jnp.zeros((1, 4)), load, 0.01), [[-0.01, 0.01, 0.0, 0.0]])
