"""Attention as a GPU runs it, as far as a machine without one can say, and of a query over a few keys of its own."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from onerec_jax.errors import InputError
from onerec_jax.model.attention import attend, attend_over_levels, attention_name

B, Q, N, H, K = 2, 33, 40, 4, 16


def _platform(monkeypatch: pytest.MonkeyPatch, name: str, installed: bool) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: name)
    monkeypatch.setattr("importlib.util.find_spec", lambda package: object() if installed else None)


@pytest.mark.parametrize(
    ("platform", "installed", "expected"),
    [
        ("cpu", True, "heads"),
        ("gpu", True, "tokamax"),
        ("gpu", False, "fused"),
        ("tpu", True, "fused"),
    ],
)
def test_auto(monkeypatch: pytest.MonkeyPatch, platform: str, installed: bool, expected: str):
    _platform(monkeypatch, platform, installed)
    assert attention_name("auto") == expected
    assert attention_name("xla") == "xla"


def test_without_tokamax_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str):
        raise ImportError(name)

    x = jnp.zeros((1, 2, 1, 4))
    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(InputError, match=r"pip install tokamax, or use fused"):
        attend(x, x, x, None, "tokamax")


@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_over_levels_it_is_attention_of_one_query_over_keys_of_its_own(levels: int, dtype: str):
    q, *rest = (jax.random.normal(jax.random.key(i), (B * Q, H, K), dtype) for i in range(1 + 2 * levels))
    pairs = tuple(zip(rest[::2], rest[1::2], strict=True))
    keys, values = (jnp.stack(found, axis=1) for found in zip(*pairs, strict=True))
    expected = attend(q[:, None], keys, values, None, "xla")[:, 0]
    found = attend_over_levels(q, pairs)
    assert found.dtype == q.dtype
    close = 1e-6 if dtype == "float32" else 0.03
    assert jnp.max(jnp.abs(found.astype(jnp.float32) - expected.astype(jnp.float32))) < close


@pytest.mark.parametrize("masked", [False, True])
def test_lowered_for_cuda_it_is_a_kernel_forward_and_one_backward_and_no_scores(
    monkeypatch: pytest.MonkeyPatch, masked: bool
):
    """The Triton kernels lower on any machine once they are told that there is a GPU; XLA would write [B,H,Q,N] out."""
    kernels = pytest.importorskip("tokamax._src.ops.attention.pallas_triton")
    backward = pytest.importorskip("tokamax._src.ops.attention.pallas_triton_vjp")
    for kernel in (kernels.PallasTritonFlashAttention, backward.PallasTritonFlashAttentionVjp):
        monkeypatch.setattr(kernel, "supported_on", lambda self, device: True)

    def loss(q, k, v, mask):
        return jnp.sum(attend(q, k, v, mask if masked else None, "tokamax").astype(jnp.float32))

    x = [jax.ShapeDtypeStruct((B, n, H, K), jnp.bfloat16) for n in (Q, N, N)]
    mask = jax.ShapeDtypeStruct((B, 1, N), bool)
    gpu = AbstractMesh(
        (1,), ("x",), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    )
    with use_abstract_mesh(gpu):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*x, mask)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"custom_call @__gpu\$xla\.gpu\.triton", program)) == 2
    assert f"tensor<{B}x{H}x{Q}x{N}x" not in program
