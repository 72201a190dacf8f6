"""A stack of blocks run by one `lax.scan`: one compiled group of blocks whatever the depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from onerec_jax.config import ModelConfig
from onerec_jax.model.layers import FeedForward, dropout, remat
from onerec_jax.model.moe import MoE
from onerec_jax.model.moe.router import Routed, nothing_routed
from onerec_jax.parallel.mesh import platform
from onerec_jax.parallel.sharding import by_batch, in_place

# A rolled scan keeps compile time flat in depth; a short one is unrolled on a CPU, which otherwise spends three times the
# matmuls' time on moving residuals in and out of the loop.
UNROLLED = 4


class FeedForwardOrMoE(nnx.Module):
    """The last sub-layer of a block: dense, or routed to experts."""

    def __init__(self, config: ModelConfig, moe: bool, rngs: nnx.Rngs, *, scale: float):
        self.dense = None if moe else FeedForward(config.d_model, config.ffn_hidden, rngs, scale=scale)
        routing = config.width_share**0.5
        self.moe = MoE(config.d_model, config.moe, rngs, scale=scale, router_scale=routing) if moe else None

    def __call__(self, x: Array, bias_E: Array, valid: Array) -> tuple[Array, Routed | None]:
        if self.moe is not None:
            return self.moe(x, bias_E, valid)
        assert self.dense is not None
        return self.dense(x), None


class Group(nnx.Module):
    """`every` consecutive blocks of which the last one may be MoE: what the scan repeats."""

    def __init__(self, make_block: Callable[[bool, nnx.Rngs], nnx.Module], every: int, moe: bool, rngs: nnx.Rngs):
        self.blocks = nnx.List([make_block(moe and i == every - 1, rngs) for i in range(every)])


class Stack(nnx.Module):
    """`layers` blocks; parameters carry a leading group axis G."""

    def __init__(
        self,
        make_block: Callable[[bool, nnx.Rngs], nnx.Module],
        config: ModelConfig,
        layers: int,
        moe: bool,
        rngs: nnx.Rngs,
    ):
        every = config.moe.every if moe else 1
        self.size = layers // every
        self.every = every
        self.policy = config.remat

        @nnx.split_rngs(splits=self.size)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs: nnx.Rngs) -> Group:
            return Group(make_block, every, moe, rngs)

        self.groups = make(rngs)

    def __call__(self, x: Array, per_block: Callable[..., Any], bias_GxE: Array, key: Array | None, xs: Any = None):
        """Runs `per_block(block, x, bias_E, key, extra) -> (x, routed or None, out)` over all blocks.

        `xs` are extra inputs with leading axes [G, every]. Returns x, what was routed, stacked [G], and the outs, stacked
        [G, every].
        """
        graph, params = nnx.split(self.groups)

        def body(x: Array, step: Any):
            params, bias, key, extra = step
            x = by_batch(x)
            keys = [None] * self.every if key is None else jax.random.split(key, self.every)
            routed, outs = nothing_routed(bias.shape[-1]), []
            for i, block in enumerate(nnx.merge(graph, in_place(params)).blocks):
                x, block_routed, out = per_block(block, x, bias, keys[i], jax.tree.map(lambda a: a[i], extra))  # noqa: B023
                routed = routed if block_routed is None else block_routed
                outs.append(out)
            return x, (routed, jax.tree.map(lambda *a: jnp.stack(a), *outs))

        keys = None if key is None else jax.random.split(key, self.size)
        unroll = self.size if self.size <= UNROLLED and platform() == "cpu" else 1
        x, (routed, outs) = jax.lax.scan(
            remat(body, self.policy), x, (params.to_pure_dict(), bias_GxE, keys, xs), unroll=unroll
        )
        return x, routed, outs


def residual(x: Array, y: Array, rate: float, key: Array | None, part: int) -> Array:
    """x + dropout(y), with a key of its own per sub-layer."""
    return by_batch(x + dropout(by_batch(y), rate, None if key is None else jax.random.fold_in(key, part)))
