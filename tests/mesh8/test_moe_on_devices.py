"""Experts on a mesh are the experts of one device: every backend, transport and mesh against the oracle."""

from __future__ import annotations

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from onerec_jax.config import MeshConfig, MoEConfig
from onerec_jax.model.layers import remat
from onerec_jax.model.moe import MoE
from onerec_jax.parallel.mesh import make_mesh, on_mesh
from onerec_jax.parallel.sharding import LAYOUT, partition_spec

B, N, D, F, E, A = 8, 7, 8, 12, 8, 2  # 7 tokens a request: no device's rows are a multiple of the tile
MESHES = {
    "1": MeshConfig(data=1),
    "2 x 4": MeshConfig(data=2, expert=4),
    "4 x 2": MeshConfig(data=4, expert=2),
    "8": MeshConfig(data=1, expert=8),
    "fsdp 2 x expert 2 x tensor 2": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
}
BACKENDS = ["reference", "tiles", "ragged", "tokamax"]
TRANSPORTS = ["local", "allgather", "all_to_all"]


def _config(experts: int = E, hidden: int = F, **settings) -> MoEConfig:
    return MoEConfig(experts=experts, active=A, hidden=hidden, tile=4, **settings)


@functools.cache
def _values(config: MoEConfig):
    """Graph, parameters, x and the direction in which the output is weighed."""
    graph, params = nnx.split(MoE(D, config, nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    x, direction = (rng.normal(size=(B, N, D)).astype(np.float32) for _ in range(2))
    return graph, params.to_pure_dict(), x, direction


def _loads() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Biases that steer the router, and valid rows."""
    everyone, nothing = np.ones((B, N), bool), np.zeros(E, np.float32)
    one, empty = nothing.copy(), nothing.copy()
    one[5], one[6] = 200, 100
    empty[[0, 3, 4]] = -100
    padded = np.random.default_rng(1).random((B, N)) < 0.5
    padded[2] = False
    return {
        "random": (nothing, everyone),
        "all tokens to one pair of experts": (one, everyone),
        "empty experts": (empty, everyone),
        "padding": (nothing, padded),
        "one pair of experts and padding": (one, padded),
        "nothing but padding": (nothing, ~everyone),
    }


@functools.cache
def _compiled(config: MoEConfig, mesh_name: str):
    """(params, x, bias, valid) -> (weighed output + z, (y, routed)) and gradients, on a mesh."""
    graph, params, _, direction = _values(config)
    settings = MESHES[mesh_name]
    count = settings.data * settings.fsdp * settings.expert * settings.tensor
    mesh = make_mesh(settings, jax.devices()[:count])

    def value(params, x, bias, valid):
        y, routed = nnx.merge(graph, params)(x, bias[: config.experts], valid)
        return jnp.sum(jnp.sin(y) * direction) + routed.z, (y, routed)

    rows, whole = NamedSharding(mesh, PartitionSpec(LAYOUT["batch"])), NamedSharding(mesh, PartitionSpec())
    places = {name: NamedSharding(mesh, partition_spec(f"moe/{name}", v.shape, mesh)) for name, v in params.items()}
    step = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True), in_shardings=(places, rows, whole, rows))
    return on_mesh(mesh, step)


@functools.cache
def _expected(experts: int, hidden: int, router: str, load: str):
    """The oracle: `reference` on one device."""
    config = _config(experts, hidden, backend="reference", router=router)
    _, params, x, _ = _values(config)
    return jax.tree.map(np.asarray, _compiled(config, "1")(params, x, *_loads()[load]))


def _check(config: MoEConfig, mesh: str, load: str) -> None:
    _, params, x, _ = _values(config)
    found = jax.tree.map(np.asarray, _compiled(config, mesh)(params, x, *_loads()[load]))
    expected = _expected(config.experts, config.hidden, config.router, load)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


@pytest.mark.parametrize("load", _loads())
@pytest.mark.parametrize(
    ("transport", "mesh"), [("auto", "1"), *((t, m) for t in TRANSPORTS for m in MESHES if m != "1")]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_transport_and_mesh_equals_the_reference(backend: str, transport: str, mesh: str, load: str):
    _check(_config(backend=backend, transport=transport), mesh, load)


@pytest.mark.parametrize(
    ("experts", "hidden", "transport", "mesh"),
    [
        (6, 12, "allgather", "2 x 4"),
        (6, 9, "all_to_all", "fsdp 2 x expert 2 x tensor 2"),
        (5, 7, "all_to_all", "fsdp 2 x expert 2 x tensor 2"),
        (8, 9, "local", "fsdp 2 x expert 2 x tensor 2"),
    ],
)
def test_sizes_that_do_not_divide_over_the_mesh(experts: int, hidden: int, transport: str, mesh: str):
    _check(_config(experts, hidden, backend="tiles", transport=transport, router="sigmoid"), mesh, "padding")


def test_tokamax_is_there_to_be_tested():
    assert importlib.util.find_spec("tokamax") is not None


@pytest.mark.parametrize("mesh", ["2 x 4", "8"])
def test_what_a_limited_capacity_drops_is_counted_and_adds_nothing(mesh: str):
    bias, valid = _loads()["one pair of experts and padding"]
    config = _config(backend="tiles", transport="all_to_all", capacity=0.5)
    _, params, x, _ = _values(config)
    (_, (y, routed)), _ = _compiled(config, mesh)(params, x, bias, valid)
    devices = MESHES[mesh].expert
    per_device = B * N // 8
    room = max(1, -(-per_device * A // (2 * devices)))  # capacity .5 of an even share
    kept = valid.copy()
    dropped = 0
    target = [5 // (E // devices), 6 // (E // devices)]  # the devices of both experts
    whole = np.asarray(_expected(E, F, "softmax", "one pair of experts and padding")[0][1][0])
    for device in range(8):
        mine = np.flatnonzero(valid.reshape(8, per_device)[device])
        choices = [(row, t) for row in mine for t in range(A)]
        for d in set(target):
            asked = [(row, t) for row, t in choices if target[t] == d]
            dropped += max(0, len(asked) - room)
        full = {row for row, t in choices if [c for c in choices if target[c[1]] == target[t]].index((row, t)) >= room}
        kept.reshape(8, per_device)[device, list(full)] = False
    assert float(routed.dropped) == dropped > 0
    np.testing.assert_allclose(np.asarray(y)[kept], whole[kept], rtol=1e-5, atol=1e-5)
    assert not np.asarray(y)[~valid].any()


@pytest.mark.parametrize("transport", ["allgather", "all_to_all"])
def test_rematerialisation_repeats_no_collective(transport: str):
    config = _config(backend="reference", transport=transport)
    graph, params, x, direction = _values(config)
    mesh = make_mesh(MESHES["2 x 4"])
    rows = NamedSharding(mesh, PartitionSpec(LAYOUT["batch"]))

    def collectives(policy: str) -> list[str]:
        def body(x, params):
            return x + nnx.merge(graph, params)(x, jnp.zeros(E), jnp.ones((B, N), bool))[0], None

        def value(stacked, x):
            return jnp.sum(jax.lax.scan(remat(body, policy), x, stacked)[0] * direction)

        stacked = jax.tree.map(lambda v: jnp.stack([v, v]), params)
        lowered = on_mesh(mesh, jax.jit(jax.grad(value, argnums=(0, 1)), in_shardings=(None, rows)).lower)(stacked, x)
        return sorted(re.findall(r" (all-gather|all-to-all|reduce-scatter|all-reduce)\(", lowered.compile().as_text()))

    kept = collectives("none")
    assert kept and collectives("dots") == kept and collectives("block") == kept
