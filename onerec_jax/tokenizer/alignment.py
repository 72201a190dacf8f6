"""Collaborative alignment: content vectors trained so that items that behaviour pairs lie close (REFERENCE 1.1, TR 2.1.1).

    L = InfoNCE(z_i, z_j) + reconstruction_weight * MSE(V z, x)

x is content, z its projection on the unit sphere, V a linear decoder. For content vectors the projection is a linear map
plus an MLP of two layers; for token vectors it is a QFormer whose outputs are joined. Content is centred and divided by
one number, so that an MSE of 1 means that nothing of it is kept.

Axis letters: I items, N vectors, B pairs of a batch, M tokens, D content width, W aligned width, Q queries, S steps.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from onerec_jax.config import AlignmentConfig
from onerec_jax.errors import InputError
from onerec_jax.tokenizer.kmeans import Rows
from onerec_jax.tokenizer.pairs import Pairs
from onerec_jax.tokenizer.quantizer import Arrays, checked

QUERIES = 4  # as in the report
LAYERS = 2  # the report has 4, over 1280 tokens
_LAYER = ("query", "key", "value", "attention_out", "ffn_in", "ffn_out")
_OPTIMIZER = optax.adamw(1.0)  # its updates are scaled by the rate of the step
PREFIX = "align_"
_STEPS_AT_ONCE = 50
_VALUES_AT_ONCE = 1 << 24  # floats of content put on the device at once
_ROWS_AT_ONCE = 65_536

Params = dict[str, Array]
Content = TypeVar("Content", bound=Rows)


class Alignment(NamedTuple):
    """What `project` reads, names prefixed `align_`, and the loss float32 [S] of every step."""

    arrays: Arrays
    loss: np.ndarray


def info_nce(left: Array, right: Array, left_item: Array, right_item: Array, temperature: float) -> Array:
    """Symmetric in-batch InfoNCE of unit vectors [B,W], each with the item row int [B] it is of.

        -1/2B sum_b [ log softmax_c(left_b . right_c / tau)_b + log softmax_c(right_b . left_c / tau)_b ]

    An item is no negative of itself nor of its partner: where a vector c != b is of either item of pair b, it is left
    out of the sum of pair b.
    """
    score = left @ right.T / temperature
    own = jnp.eye(len(left), dtype=bool)

    def one_way(score: Array, anchor: Array, candidate: Array) -> Array:
        known = (candidate == candidate[:, None]) | (candidate == anchor[:, None])
        score = jnp.where(known & ~own, -jnp.inf, score)
        return jnp.mean(jax.nn.logsumexp(score, axis=1) - jnp.diagonal(score))

    return (one_way(score, left_item, right_item) + one_way(score.T, right_item, left_item)) / 2


def _rms_norm(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def _mlp(params: Params, x: Array) -> Array:
    return x @ params["linear"] + jax.nn.gelu(x @ params["mlp_in"] + params["mlp_bias"]) @ params["mlp_out"]


def _qformer(params: Params, x: Array) -> Array:
    """Q <- Q + CrossAttn(Q, M, M); Q <- Q + FFN(RMSNorm(Q)), one head; joined [B,W]. Residuals as REFERENCE 8.4."""
    tokens = _rms_norm(x)

    def layer(h: Array, weights: Params) -> tuple[Array, None]:
        query = _rms_norm(h) @ weights["query"]
        score = jnp.einsum("bqw,bmw->bqm", query, tokens @ weights["key"]) / query.shape[-1] ** 0.5
        h = h + jax.nn.softmax(score, axis=-1) @ (tokens @ weights["value"]) @ weights["attention_out"]
        return h + jax.nn.gelu(_rms_norm(h) @ weights["ffn_in"]) @ weights["ffn_out"], None

    h = jnp.broadcast_to(params["queries"], (len(x), *params["queries"].shape))
    h, _ = jax.lax.scan(layer, h, {name: params[name] for name in _LAYER})
    return h.reshape(len(x), -1)


def _project(params: Params, content: Array) -> Array:
    """Unit vectors [B,W] of standardised content [B,D] or [B,M,D]."""
    z = _qformer(params, content) if "queries" in params else _mlp(params, content)
    return z * jax.lax.rsqrt(jnp.sum(z**2, -1, keepdims=True) + 1e-12)


def _standardised(constants: Params, content: Array) -> Array:
    return (content - constants["center"]) / constants["scale"]


def _summary(content: Any) -> Any:
    """What the decoder gives back, [B,D]: content vectors, or the mean of an item's tokens."""
    return content.mean(1) if content.ndim == 3 else content


def _init(shape: tuple[int, ...], width: int, rng: np.random.Generator) -> Arrays:
    """Initial parameters for items of content `shape`, [D] or [M,D]."""

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) / np.float32(shape[-2] ** 0.5)

    params = {"decoder": normal(width, shape[-1])}
    if len(shape) == 1:
        return params | {
            "linear": normal(shape[0], width),
            "mlp_in": normal(shape[0], 2 * width),
            "mlp_bias": np.zeros(2 * width, np.float32),
            "mlp_out": np.zeros((2 * width, width), np.float32),
        }
    each = width // QUERIES
    return params | {
        "queries": normal(QUERIES, each),
        "query": normal(LAYERS, each, each),
        "key": normal(LAYERS, shape[1], each),
        "value": normal(LAYERS, shape[1], each),
        "attention_out": normal(LAYERS, each, each),
        "ffn_in": normal(LAYERS, each, 4 * each),
        "ffn_out": normal(LAYERS, 4 * each, each),
    }


class _Steps(NamedTuple):
    """What S steps read: both sides of B pairs each."""

    rate: np.ndarray  # float [S]
    content: np.ndarray  # [S,2,B,D] or [S,2,B,M,D]
    items: np.ndarray  # int32 [S,2,B]


@functools.partial(jax.jit, donate_argnames=("params", "state"))
def _train(
    params: Params, state: optax.OptState, constants: Params, steps: _Steps, temperature: float, kept_weight: float
) -> tuple[Params, optax.OptState, Array]:
    """Parameters and optimizer state after the steps, and the losses [S]. One compiled program for all settings."""

    def loss(params: Params, content: Array, items: Array) -> Array:
        x = _standardised(constants, content.reshape(-1, *content.shape[2:]))
        z = _project(params, x)
        lost = jnp.mean((z @ params["decoder"] * z.shape[-1] ** 0.5 - _summary(x)) ** 2)
        left, right = jnp.split(z, 2)
        return info_nce(left, right, items[0], items[1], temperature) + kept_weight * lost

    def step(carry: tuple[Params, optax.OptState], now: _Steps):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, now.content, now.items)
        updates, state = _OPTIMIZER.update(gradient, state, params)
        return (jax.tree.map(lambda p, u: p + now.rate * u, params, updates), state), value

    (params, state), losses = jax.lax.scan(step, (params, state), steps)
    return params, state, losses


def _check(content: np.ndarray, pairs: Pairs, settings: AlignmentConfig) -> np.ndarray:
    if not len(pairs.items):
        raise InputError("there are no item pairs to align content by; set tokenizer.alignment.steps=0")
    if content.ndim != 3:
        return checked(content)
    if settings.width % QUERIES:
        raise InputError(
            f"tokenizer.alignment.width {settings.width} cannot be split among {QUERIES} queries; give a multiple"
        )
    checked(content.reshape(len(content), -1))
    return content


def fit(content: np.ndarray, pairs: Pairs, settings: AlignmentConfig, seed: int) -> Alignment:
    """Trains the projection on pairs drawn by their weight; nothing at all where `settings.steps` is 0.

    Args:
        content: float32 [I,D], or tokens float32 [I,M,D].
        pairs: item rows and weights.
        settings: steps, batch, rate, temperature, width and reconstruction weight.
        seed: of the start and of the draws.

    Raises:
        InputError: no pairs, a value that is not finite, or a width that cannot be split among the queries.
    """
    if not settings.steps:
        return Alignment({}, np.zeros(0, np.float32))
    content = _check(content, pairs, settings)
    summary = _summary(content)
    center = summary.mean(0, dtype=np.float64).astype(np.float32)
    scale = np.sqrt(np.mean((summary - center) ** 2, dtype=np.float64))
    constants = {"center": center, "scale": np.float32(scale if scale > 1e-6 * np.abs(center).max() else 1)}
    total, rng = np.cumsum(pairs.weight, dtype=np.float64), np.random.default_rng(seed)
    params = _init(content.shape[1:], settings.width, rng)
    state, losses = jax.jit(_OPTIMIZER.init)(params), []
    most = _VALUES_AT_ONCE // (2 * settings.batch_size * content[0].size)
    calls = -(-settings.steps // min(_STEPS_AT_ONCE, max(1, most)))
    count = -(-settings.steps // calls)
    # Every call has one shape. The last may go on past the last step, where the rate is 0 and nothing moves.
    progress = np.minimum(np.arange(calls * count) / settings.steps, 1).reshape(calls, count)
    rates = (settings.learning_rate * (1 + np.cos(np.pi * progress)) / 2).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        for rate in rates:
            drawn = np.searchsorted(total, rng.random((count, settings.batch_size)) * total[-1], side="right")
            items = pairs.items[np.minimum(drawn, len(total) - 1)].swapaxes(1, 2)
            steps = _Steps(rate, content[items], items)
            params, state, loss = _train(
                params, state, constants, steps, settings.temperature, settings.reconstruction_weight
            )
            losses.append(np.asarray(loss))
    kept = {PREFIX + name: np.asarray(value) for name, value in (params | constants).items() if name != "decoder"}
    return Alignment(kept, np.concatenate(losses)[: settings.steps])


_project_batch = jax.jit(lambda params, content: _project(params, _standardised(params, content)))


def project(arrays: Arrays, content: Content) -> Content | np.ndarray:
    """Aligned vectors float32 [N,W], of norm 1, of content [N,D] or [N,M,D]; as it is where `arrays` has no alignment.

    Content in a store is loaded whole to be aligned.

    Raises:
        InputError: content of another shape than the alignment's, or a value that is not finite.
    """
    params = {name.removeprefix(PREFIX): array for name, array in arrays.items() if name.startswith(PREFIX)}
    if not params:
        return content
    whole = np.asarray(content[:])
    rank, width = 3 if "queries" in params else 2, len(params["center"])
    if whole.ndim != rank or whole.shape[-1] != width or not whole.size:
        raise InputError(
            f"content of shape {list(whole.shape)} does not fit the alignment, which was fitted on "
            f"[items, {'tokens, ' if rank == 3 else ''}{width}]"
        )
    checked(whole.reshape(len(whole), -1))
    size = min(len(whole), _ROWS_AT_ONCE, max(1, _VALUES_AT_ONCE // whole[0].size))
    result = np.empty((len(whole), params["linear"].shape[1] if rank == 2 else params["queries"].size), np.float32)
    with jax.default_matmul_precision("highest"):
        for first in range(0, len(whole), size):
            rows = np.asarray(whole[first : first + size], np.float32)
            padded = np.pad(rows, ((0, size - len(rows)), *((0, 0),) * (rank - 1)))
            result[first : first + size] = np.asarray(_project_batch(params, padded))[: len(rows)]
    return result


def align(content: np.ndarray, pairs: Pairs, settings: AlignmentConfig, seed: int) -> np.ndarray:
    """Aligned vectors float32 [I,W] of all items, those without pairs too; content as it is where `steps` is 0."""
    return project(fit(content, pairs, settings, seed).arrays, content)
