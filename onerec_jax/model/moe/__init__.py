"""Mixture-of-experts feed-forward: a router, a matmul backend, a transport over the mesh, loss-free balancing (REFERENCE 1.5)."""

from __future__ import annotations

import jax
from flax import nnx
from jax import Array

from onerec_jax.config import MoEConfig
from onerec_jax.model.moe.router import Routed
from onerec_jax.model.moe.transport import on_one_device, over_mesh
from onerec_jax.parallel.sharding import several_devices


class SharedExperts(nnx.Module):
    """Experts that every row goes through, as one SwiGLU of their widths together."""

    def __init__(self, d_model: int, hidden: int, rngs: nnx.Rngs, *, scale: float):
        self.gate, self.up, self.down = _swiglu((), d_model, hidden, rngs, scale)

    def __call__(self, x: Array) -> Array:
        gate, up, down = (w[...].astype(x.dtype) for w in (self.gate, self.up, self.down))
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down


class MoE(nnx.Module):
    """MoE(x) = sum over the chosen experts of gate * SwiGLU expert(x) (TR 2.3), plus the shared experts."""

    def __init__(
        self, d_model: int, config: MoEConfig, rngs: nnx.Rngs, *, scale: float = 1.0, router_scale: float = 1.0
    ):
        self.config = config
        self.router = _matrices((), d_model, config.experts, rngs, router_scale)
        self.gate, self.up, self.down = _swiglu((config.experts,), d_model, config.hidden, rngs, scale)
        width = config.shared * config.hidden
        self.shared = SharedExperts(d_model, width, rngs, scale=scale) if config.shared else None

    @jax.named_scope("moe")
    def __call__(self, x: Array, bias_E: Array, valid: Array) -> tuple[Array, Routed]:
        """x [B,...,D] and valid [B,...] -> y [B,...,D], of routed experts zero where not valid, and what was routed.

        Under `jax.set_mesh` the rows of a batch stay on their devices and experts on theirs (`moe.transport`).
        """
        run = on_one_device if several_devices() is None else over_mesh
        weights = [w[...].astype(x.dtype) for w in (self.gate, self.up, self.down)]
        y, routed = run(self.config, x, valid, bias_E, self.router[...], *weights)
        return (y if self.shared is None else y + self.shared(x)), routed


def _matrices(batch: tuple[int, ...], d_in: int, d_out: int, rngs: nnx.Rngs, scale: float = 1.0) -> nnx.Param:
    drawn = jax.random.truncated_normal(rngs.params(), -2, 2, (*batch, d_in, d_out))
    return nnx.Param(drawn * scale * d_in**-0.5)


def _swiglu(batch: tuple[int, ...], d_model: int, hidden: int, rngs: nnx.Rngs, scale: float) -> tuple[nnx.Param, ...]:
    """gate, up and down."""
    gate, up = (_matrices(batch, d_model, hidden, rngs) for _ in range(2))
    return gate, up, _matrices(batch, hidden, d_model, rngs, scale)
