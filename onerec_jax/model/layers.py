"""The small layers everything is built from, as flax.nnx modules with plain call signatures."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from onerec_jax.parallel.mesh import platform
from onerec_jax.parallel.sharding import by_batch


def product(equation: str, x: Array, y: Array) -> Array:
    """einsum in the type of its operands.

    On a CPU, XLA is asked for float32 sums, which it then rounds: bfloat16 sums take it twice as long, and other processors sum
    in float32 unasked.
    """
    sums = jnp.float32 if platform() == "cpu" else None
    return jnp.einsum(equation, x, y, preferred_element_type=sums).astype(x.dtype)


@jax.custom_vjp
def matmul(x: Array, w: Array) -> Array:
    """x [...,D] @ w [D,F]; the gradient of w is x^T dy as it stands, where XLA would transpose dy, often the larger."""
    return product("...d,df->...f", x, w)


def _matmul_backward(saved: tuple[Array, Array], dy: Array):
    x, w = saved
    dw = product("xd,xf->df", x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]))
    return product("...f,fd->...d", dy, w.T), dw


def _matmul_forward(x: Array, w: Array):
    # the product itself: a policy of rematerialisation sees none inside a function with a derivative of its own
    return product("...d,df->...f", x, w), (x, w)


matmul.defvjp(_matmul_forward, _matmul_backward)


class Linear(nnx.Module):
    """y = x W (+ b); W is float32 and cast to the type of x."""

    def __init__(self, d_in: int, d_out: int, rngs: nnx.Rngs, *, bias: bool = False, scale: float = 1.0):
        self.kernel = nnx.Param(jax.random.truncated_normal(rngs.params(), -2, 2, (d_in, d_out)) * scale * d_in**-0.5)
        self.bias = nnx.Param(jnp.zeros((d_out,))) if bias else None

    def __call__(self, x: Array) -> Array:
        y = matmul(x, self.kernel[...].astype(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Embedding(nnx.Module):
    """A dense lookup table; tables of ids live in `model.tables` instead."""

    def __init__(self, rows: int, width: int, rngs: nnx.Rngs, *, scale: float = 0.02):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (rows, width)) * scale)

    def __call__(self, ids: Array, dtype: jnp.dtype) -> Array:
        return by_batch(jnp.take(self.embedding[...].astype(dtype), ids, axis=0))


class CodeEmbedding(nnx.Module):
    """The codes of all levels in one table, those of a level after those of the level before."""

    def __init__(self, codebook_sizes: tuple[int, ...], width: int, rngs: nnx.Rngs):
        self.offsets = tuple(sum(codebook_sizes[:i]) for i in range(len(codebook_sizes)))
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (sum(codebook_sizes), width)) * 0.02)

    def level(self, level: int, codes: Array, dtype: jnp.dtype) -> Array:
        """Codes [...] of one level -> [..., D]."""
        return by_batch(self._found(level, codes, dtype))

    def item(self, codes_xC: Array, dtype: jnp.dtype) -> Array:
        """The sum over the levels of semantic IDs [..., C] -> [..., D]: an item as one token."""
        levels = range(len(self.offsets))
        return by_batch(sum((self._found(i, codes_xC[..., i], dtype) for i in levels), start=jnp.zeros((), dtype)))

    def _found(self, level: int, codes: Array, dtype: jnp.dtype) -> Array:
        """As the mesh splits the table; on it a sum of levels is exchanged once."""
        return jnp.take(self.embedding[...].astype(dtype), codes + self.offsets[level], axis=0)

    def tokens(self, codes_BxLxC: Array, dtype: jnp.dtype) -> Array:
        """One token per code [B, L*C, D]."""
        codes = codes_BxLxC + jnp.asarray(self.offsets)
        return by_batch(jnp.take(self.embedding[...].astype(dtype), codes.reshape(codes.shape[0], -1), axis=0))


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, with the statistics in float32."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones((width,)))

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + 1e-6)
        return (normed * self.scale[...]).astype(x.dtype)


class PathwayMLP(nnx.Module):
    """Dense(LeakyReLU(Dense(f))), the projection of every pathway (TR 2.2.1)."""

    def __init__(self, d_in: int, hidden: int, d_out: int, rngs: nnx.Rngs):
        self.up = Linear(d_in, hidden, rngs, bias=True)
        self.down = Linear(hidden, d_out, rngs, bias=True)

    def __call__(self, x: Array) -> Array:
        return by_batch(self.down(jax.nn.leaky_relu(self.up(x))))


class FeedForward(nnx.Module):
    """The dense feed-forward of two matrices, ReLU between them (its derivative is the cheapest to recompute)."""

    def __init__(self, d_model: int, hidden: int, rngs: nnx.Rngs, *, scale: float = 1.0):
        self.up = Linear(d_model, hidden, rngs)
        self.down = Linear(hidden, d_model, rngs, scale=scale)

    def __call__(self, x: Array) -> Array:
        return self.down(jax.nn.relu(self.up(x)))


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Inverted dropout; the identity without a key (evaluation) or a rate.

    The mask is a hash of (key, position), which fuses into its consumer: drawing it from the key's own generator costs more
    than the matmuls around it on a CPU.
    """
    if key is None or not rate:
        return x
    low, high = jax.random.key_data(key).astype(jnp.uint32)[-2:]
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        position = position * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    bits = _mix(_mix(position ^ low) + high)
    return jnp.where(bits >= jnp.uint32(int(rate * 2**32)), x / (1 - rate), 0)


def _mix(bits: Array) -> Array:
    """A 32-bit finaliser of low bias (lowbias32, Wellons 2018)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)


KEPT = "crossed_the_mesh"  # what `jax.ad_checkpoint.checkpoint_name` calls a value that no policy recomputes


def remat(body: Callable, policy: str) -> Callable:
    """Wraps a scanned body so that its backward pass recomputes what `policy` says, but never what is named `KEPT`."""
    if policy == "none":
        return body
    keep = jax.checkpoint_policies.save_only_these_names(KEPT)
    if policy == "dots":
        dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        keep = jax.checkpoint_policies.save_from_both_policies(dots, keep)
    return jax.checkpoint(body, policy=keep, prevent_cse=False)
