"""Multi-head attention with one mask rule: a key is seen where the mask is true; softmax in float32."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec

from onerec_jax.config import ModelConfig
from onerec_jax.model.layers import Linear, RMSNorm, product
from onerec_jax.model.optional import tokamax
from onerec_jax.parallel.mesh import platform
from onerec_jax.parallel.sharding import LAYOUT, several_devices


def attention_name(implementation: str) -> str:
    """`auto` resolved: head by head on a CPU; on a GPU tokamax where it is installed; else fused."""
    if implementation != "auto":
        return implementation
    if platform() == "cpu":
        return "heads"
    return "tokamax" if platform() == "gpu" and importlib.util.find_spec("tokamax") else "fused"


def attend(q_BxQxHxK: Array, k_BxNxHxK: Array, v_BxNxHxK: Array, mask: Array | None, implementation: str) -> Array:
    """softmax(q k^T / sqrt(K)) v over the keys that `mask` [B or 1, Q or 1, N] shows; returns [B,Q,H,K].

    Every query must see at least one key: the static token and the first position always are visible.

    Raises:
        InputError: `implementation` is tokamax, which is not installed.
    """
    implementation = attention_name(implementation)
    if implementation == "heads":
        visible = jnp.ones((1, 1, k_BxNxHxK.shape[1]), bool) if mask is None else mask
        return attend_by_head(q_BxQxHxK, k_BxNxHxK, v_BxNxHxK, visible)
    if implementation == "tokamax":
        return attend_by_kernel(q_BxQxHxK, k_BxNxHxK, v_BxNxHxK, mask)
    if implementation == "fused":
        return jax.nn.dot_product_attention(
            q_BxQxHxK, k_BxNxHxK, v_BxNxHxK, mask=None if mask is None else mask[:, None, :, :]
        )
    scores = jnp.einsum("bqhk,bnhk->bhqn", q_BxQxHxK * q_BxQxHxK.shape[-1] ** -0.5, k_BxNxHxK)
    scores = scores.astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask[:, None, :, :], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BxNxHxK.dtype)
    return jnp.einsum("bhqn,bnhk->bqhk", weights, v_BxNxHxK)


def attend_by_kernel(q_BxQxHxK: Array, k_BxNxHxK: Array, v_BxNxHxK: Array, mask: Array | None) -> Array:
    """`attend` by tokamax: a flash kernel on a GPU, which never writes the scores [B,H,Q,N] out; plain XLA elsewhere.

    A kernel is one device's: on a mesh each device runs it on its own requests and heads, so that nothing is gathered for it.
    """
    kernel = tokamax("model.attention tokamax", "fused").dot_product_attention
    mesh = several_devices()
    shown = jnp.ones((1, 1, k_BxNxHxK.shape[1]), bool) if mask is None else mask

    def on_a_device(q: Array, k: Array, v: Array, shown: Array) -> Array:
        return kernel(q, k, v, mask=None if mask is None else shown[:, None])

    if mesh is None:
        return on_a_device(q_BxQxHxK, k_BxNxHxK, v_BxNxHxK, shown)

    def split(size: int, axis: str) -> tuple[str, ...] | None:
        over = tuple(name for name in LAYOUT[axis] if mesh.shape[name] > 1)
        return None if size % math.prod(mesh.shape[name] for name in over) else over

    requests, heads = split(q_BxQxHxK.shape[0], "batch"), split(q_BxQxHxK.shape[2], "heads")
    of_head = PartitionSpec(requests, None, heads, None)
    of_mask = PartitionSpec(requests if shown.shape[0] > 1 else None)
    # the kernels do not say over which axes their results vary
    run = jax.shard_map(
        on_a_device, mesh=mesh, in_specs=(of_head, of_head, of_head, of_mask), out_specs=of_head, check_vma=False
    )
    return run(q_BxQxHxK, k_BxNxHxK, v_BxNxHxK, shown)


def _weights(q_BxQxK: Array, k_BxNxK: Array, mask: Array) -> Array:
    """One head's softmax [B,Q,N], float32."""
    q_BxQxK = q_BxQxK * q_BxQxK.shape[-1] ** -0.5
    scores = jnp.einsum("bqk,bnk->bqn", q_BxQxK, k_BxNxK, preferred_element_type=jnp.float32)
    return jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1)


@jax.custom_vjp
def attend_by_head(q_BxQxHxK: Array, k_BxNxHxK: Array, v_BxNxHxK: Array, mask: Array) -> Array:
    """`attend`, one head after the other, with its own derivative.

    All matrices of a head lie in memory as a CPU's matmuls want them; heads in one product are transposed before and after
    its six matmuls, which takes as long as the matmuls themselves.
    """
    return _attend_by_head(q_BxQxHxK, k_BxNxHxK, v_BxNxHxK, mask)[0]


def _attend_by_head(q: Array, k: Array, v: Array, mask: Array):
    weights = [_weights(q[:, :, h], k[:, :, h], mask) for h in range(q.shape[2])]
    y = [product("bqn,bnk->bqk", w.astype(v.dtype), v[:, :, h]) for h, w in enumerate(weights)]
    return jnp.stack(y, axis=2), (q, k, v, weights)


def _attend_by_head_backward(saved: Any, dy: Array):
    q, k, v, weights = saved
    heads = []
    for h, w in enumerate(weights):
        q_h, k_h, v_h, dy_h, w_h = q[:, :, h], k[:, :, h], v[:, :, h], dy[:, :, h], w.astype(v.dtype)
        dw = jnp.einsum("bqk,bnk->bqn", dy_h, v_h, preferred_element_type=jnp.float32)
        scale = q.shape[-1] ** -0.5
        dscores = (w * (dw - jnp.sum(w * dw, axis=-1, keepdims=True)) * scale).astype(q.dtype)
        dq, dk = product("bqn,bnk->bqk", dscores, k_h), product("bqn,bqk->bnk", dscores, q_h)
        heads.append((dq, dk, product("bqn,bqk->bnk", w_h, dy_h)))
    return (*(jnp.stack(found, axis=2) for found in zip(*heads, strict=True)), None)


attend_by_head.defvjp(_attend_by_head, _attend_by_head_backward)


def attend_over_levels(q_xHxK: Array, levels: tuple[tuple[Array, Array], ...]) -> Array:
    """`attend` of queries that each have a few keys and values of their own, pairs [...,H,K], and see all of them.

    Products and sums of the queries' own shape, which fuse: a product of matrices for every query and head is thousands of
    products of a vector with a handful.
    """
    q = q_xHxK.astype(jnp.float32) * q_xHxK.shape[-1] ** -0.5
    scores = jnp.stack([jnp.sum(q * keys.astype(jnp.float32), axis=-1, keepdims=True) for keys, _ in levels])
    weights = jax.nn.softmax(scores, axis=0)
    y = sum(w * values.astype(jnp.float32) for w, (_, values) in zip(weights, levels, strict=True))
    return jnp.asarray(y, q_xHxK.dtype)


class Attention(nnx.Module):
    """Projections around `attend`; self-attention when queries and keys come from the same array."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, scale: float = 1.0):
        d, width = config.d_model, config.heads * config.width_of_head
        self.heads = config.heads
        self.implementation = config.attention
        self.query = Linear(d, width, rngs)
        self.key = Linear(d, width, rngs)
        self.value = Linear(d, width, rngs)
        self.out = Linear(width, d, rngs, scale=scale)
        self.query_norm = RMSNorm(config.width_of_head) if config.qk_norm else None
        self.key_norm = RMSNorm(config.width_of_head) if config.qk_norm else None

    def _split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.heads, -1)

    def keys_values(self, x_BxNxD: Array) -> tuple[Array, Array]:
        """Keys and values [B,N,H,K] of a context, computed once however many queries follow."""
        k = self._split(self.key(x_BxNxD))
        return (k if self.key_norm is None else self.key_norm(k)), self._split(self.value(x_BxNxD))

    def _queries(self, x: Array) -> Array:
        q = self._split(self.query(x))
        return q if self.query_norm is None else self.query_norm(q)

    @jax.named_scope("attention")
    def __call__(self, x_BxQxD: Array, keys: Array, values: Array, mask: Array | None) -> Array:
        y = attend(self._queries(x_BxQxD), keys, values, mask, self.implementation)
        return self.out(y.reshape(*x_BxQxD.shape[:-1], -1))

    @jax.named_scope("attention")
    def over_levels(self, x_BxTxD: Array, levels: tuple[tuple[Array, Array], ...]) -> Array:
        """Attention of each position over keys and values of its own, see `attend_over_levels`."""
        y = attend_over_levels(self._queries(x_BxTxD), levels)
        return self.out(y.reshape(*x_BxTxD.shape[:-1], -1))
