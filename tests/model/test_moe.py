from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from onerec_jax.config import MoEConfig
from onerec_jax.errors import InputError
from onerec_jax.model.moe import MoE
from onerec_jax.model.moe.backends import backend_name, experts_of
from onerec_jax.model.moe.reference import reference_experts
from onerec_jax.model.moe.router import loads, rebalance, route
from onerec_jax.model.moe.tiles import CHUNKS, layout, padded_rows

ROWS, D, F, E, A = 37, 8, 12, 5, 2
BACKENDS = {
    "tiles of 1": {"backend": "tiles", "tile": 1},
    "tiles of 4": {"backend": "tiles", "tile": 4},
    "tiles of 64": {"backend": "tiles", "tile": 64},
    "ragged": {"backend": "ragged"},
}


def _inputs(seed: int = 0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))  # noqa: E731
    gates = jnp.asarray(rng.random((ROWS, A)).astype(np.float32))
    return draw(ROWS, D), gates, draw(E, D, F) / 3, draw(E, D, F) / 3, draw(E, F, D) / 3


def _choices() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    random = np.stack([rng.choice(E, A, replace=False) for _ in range(ROWS)])
    return {
        "random": random,
        "all to two experts": np.tile([3, 1], (ROWS, 1)),
        "an empty expert": np.stack([rng.choice([0, 1, 2, 4], A, replace=False) for _ in range(ROWS)]),
        "one row apart": np.concatenate([np.tile([0, 1], (ROWS - 1, 1)), [[4, 2]]]),
        "some nobody's": np.where(rng.random((ROWS, A)) < 0.4, rng.choice([-7, -1, E, E + 3], (ROWS, A)), random),
        "all nobody's": np.full((ROWS, A), E),
    }


@functools.cache
def _value_and_gradients(backend: str):
    experts = reference_experts if backend == "reference" else experts_of(MoEConfig(experts=E, **BACKENDS[backend]))

    def value(chosen, x, gates, gate, up, down):
        return jnp.sum(jnp.sin(experts(x, chosen, gates, gate, up, down)))

    return jax.jit(jax.value_and_grad(value, argnums=range(1, 6)))


@pytest.mark.parametrize("load", list(_choices()))
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_equals_the_reference_in_value_and_gradient_under_any_load(load: str, backend: str):
    chosen = jnp.asarray(_choices()[load].astype(np.int32))
    one, other = (_value_and_gradients(name)(chosen, *_inputs()) for name in ("reference", backend))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), one, other)


def test_the_reference_is_the_sum_over_the_chosen_experts_of_a_swiglu():
    x, gates, gate, up, down = (np.asarray(v, np.float64) for v in _inputs())
    chosen = _choices()["some nobody's"]
    expected = np.zeros((ROWS, D))
    for m in range(ROWS):
        for a in range(A):
            if 0 <= (e := chosen[m, a]) < E:
                g = x[m] @ gate[e]
                expected[m] += gates[m, a] * ((g / (1 + np.exp(-g)) * (x[m] @ up[e])) @ down[e])
    found = reference_experts(jnp.asarray(x), jnp.asarray(chosen), *map(jnp.asarray, (gates, gate, up, down)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("load", list(_choices()))
@pytest.mark.parametrize("tile", [1, 4, 64])
def test_chunks_cover_every_tile_that_has_rows_once_and_with_its_expert(load: str, tile: int):
    chosen = _choices()[load].astype(np.int32)
    where = jax.tree.map(np.asarray, layout(jnp.asarray(chosen), E, tile))
    somebody = (chosen.reshape(-1) >= 0) & (chosen.reshape(-1) < E)
    slot = where.slot[somebody]
    assert len(set(slot.tolist())) == slot.size
    assert (where.slot[~somebody] >= padded_rows(chosen.size, E, tile)).all()
    rows = [np.arange(where.start[i], where.start[i] + CHUNKS[where.size[i]] * tile) for i in range(int(where.used))]
    owner_of_row = {int(row): where.owner[i] for i, chunk in enumerate(rows) for row in chunk}
    covered = np.concatenate([*rows, []])
    counts = np.bincount(chosen.reshape(-1)[somebody], minlength=E)
    np.testing.assert_array_equal(covered, np.arange(tile * sum(-(-counts // tile))))
    for row, expert in zip(slot, chosen.reshape(-1)[somebody], strict=True):
        assert owner_of_row[int(row)] == expert


def test_the_bias_steers_the_choice_but_neither_the_gates_nor_a_gradient():
    x, *_ = _inputs()
    kernel = jnp.asarray(np.random.default_rng(2).normal(size=(D, E)).astype(np.float32))
    for router in ("softmax", "sigmoid"):
        config = MoEConfig(experts=E, active=A, hidden=F, router=router)
        bias = jnp.asarray([0.0, 0.0, 0.0, 0.0, 100.0])
        chosen, gates, z = route(x, kernel, bias, config)
        assert (np.asarray(chosen) == 4).any(axis=1).all()
        logits = np.asarray(x @ kernel, np.float64)
        np.testing.assert_allclose(z, np.log(np.exp(logits).sum(1)) ** 2, rtol=1e-4)
        scores = np.exp(logits) if router == "softmax" else 1 / (1 + np.exp(-logits))
        expected = np.take_along_axis(scores, np.asarray(chosen), axis=1)
        np.testing.assert_allclose(gates, expected / expected.sum(1, keepdims=True), rtol=1e-5)
        gradient = jax.grad(lambda b: jnp.sum(route(x, kernel, b, config)[1] ** 2))(bias)  # noqa: B023
        assert not np.asarray(gradient).any()


def test_loads_count_experts_and_nobody_else():
    chosen = _choices()["some nobody's"]
    expected = [(chosen == e).sum() for e in range(E)]
    np.testing.assert_array_equal(loads(jnp.where(jnp.asarray(chosen) < 0, E, jnp.asarray(chosen)), E), expected)


def test_rebalancing_lowers_the_bias_of_overloaded_experts_by_the_rate():
    load = jnp.asarray([[8.0, 2.0, 5.0, 5.0]])
    np.testing.assert_allclose(rebalance(jnp.zeros((1, 4)), load, 0.01), [[-0.01, 0.01, 0.0, 0.0]])


def test_shared_experts_see_every_row_and_routed_ones_the_valid():
    config = MoEConfig(experts=E, active=A, hidden=F, shared=2, backend="reference")
    module = MoE(D, config, nnx.Rngs(0))
    x = _inputs()[0].reshape(1, ROWS, D)
    valid = jnp.arange(ROWS)[None] % 3 > 0
    y, routed = module(x, jnp.zeros(E), valid)
    assert module.shared is not None and module.shared.gate.shape == (D, 2 * F)
    np.testing.assert_allclose(np.asarray(y)[~np.asarray(valid)], np.asarray(module.shared(x))[~np.asarray(valid)])
    assert float(jnp.sum(routed.load)) == A * int(valid.sum())
    assert float(routed.dropped) == 0
    z = route(x[0], module.router[...], jnp.zeros(E), config)[2]
    np.testing.assert_allclose(routed.z, np.asarray(z)[np.asarray(valid)[0]].mean(), rtol=1e-5)


def test_auto_is_tiles_on_a_cpu_and_tokamax_asked_for_without_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    assert backend_name(MoEConfig()) == "tiles"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert backend_name(MoEConfig()) == "ragged"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert backend_name(MoEConfig()) == "tokamax"

    def missing(name: str):
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(InputError, match="pip install tokamax"):
        experts_of(MoEConfig(experts=E, backend="tokamax"))(
            *_inputs()[:1], jnp.zeros((ROWS, A), jnp.int32), *_inputs()[1:]
        )
