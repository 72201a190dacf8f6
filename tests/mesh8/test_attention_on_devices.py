"""Attention by a kernel on a mesh: the same as without, and nothing is moved for it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from onerec_jax.config import MeshConfig
from onerec_jax.model.attention import attend
from onerec_jax.parallel.mesh import make_mesh, use_mesh
from onerec_jax.plan.collectives import collectives
from onerec_jax.plan.program import read

MESHES = {
    "8": MeshConfig(data=8),
    "2x2x2 with heads split": MeshConfig(data=2, fsdp=2, tensor=2),
    "3 requests on 2 x 4": MeshConfig(data=1, fsdp=1, expert=2, tensor=4),
}


def _inputs(requests: int, one_mask: bool) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(requests, n, 4, 8)).astype(np.float32) for n in (5, 7, 7))
    mask = rng.random((1 if one_mask else requests, 1 if not one_mask else 5, 7)) < 0.6
    mask[..., 0] = True
    return q, k, v, mask


def _loss(implementation: str):
    def loss(q, k, v, mask):
        y = attend(q, k, v, mask, implementation)
        return jnp.sum(jnp.sin(y) * jnp.arange(8)), y

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)


@pytest.mark.parametrize("one_mask", [False, True], ids=["mask of each request", "one mask"])
@pytest.mark.parametrize("name", MESHES)
def test_tokamax_on_a_mesh_equals_the_plain_einsums_and_moves_nothing(name: str, one_mask: bool):
    mesh = make_mesh(MESHES[name])
    requests = 3 if name.startswith("3") else 8
    given = _inputs(requests, one_mask)
    over = None if requests == 3 else ("data", "fsdp", "expert")
    place = NamedSharding(mesh, PartitionSpec(over, None, "tensor", None))
    places = (place, place, place, NamedSharding(mesh, PartitionSpec(None if one_mask else over)))
    with use_mesh(mesh):
        compiled = jax.jit(_loss("tokamax"), in_shardings=places).lower(*given).compile()
        found = compiled(*(jax.device_put(x, p) for x, p in zip(given, places, strict=True)))
    expected = _loss("xla")(*given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), expected, found)
    if over is not None:  # requests that do not divide are everybody's, and so are their gradients
        moved = [
            c for c in collectives(read(compiled.as_text()), mesh) if c.total_bytes > 4
        ]  # but for the loss, one number
        assert not moved
