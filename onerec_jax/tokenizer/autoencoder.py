"""What the learned constructions share: standardised vectors, an MLP each way, AdamW, many steps in one compiled loop.

Axis letters: N vectors, D their width, S steps, B items per step.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from onerec_jax.config import RQVAE, FiniteScalarQuantizer
from onerec_jax.errors import InputError
from onerec_jax.tokenizer.quantizer import Arrays

CHUNK = 250  # steps per call into the compiled loop

Layers = tuple[tuple[jax.Array, jax.Array], ...]  # (kernel [in,out], bias [out]) of each layer


def new_layers(widths: tuple[int, ...], rng: np.random.Generator) -> Layers:
    """Layers from width to width: He-normal kernels, zero biases."""
    return tuple(
        (jnp.asarray(rng.normal(0, (2 / max(into, 1)) ** 0.5, (into, out)), jnp.float32), jnp.zeros(out))
        for into, out in itertools.pairwise(widths)
    )


def mlp(layers: Layers, rows: jax.Array) -> jax.Array:
    """rows [B,in] through the layers, ReLU between them: [B,out]."""
    for kernel, bias in layers[:-1]:
        rows = jax.nn.relu(rows @ kernel + bias)
    kernel, bias = layers[-1]
    return rows @ kernel + bias


_mlp = jax.jit(mlp)


def outputs(layers: Layers, rows: np.ndarray, batch_size: int) -> np.ndarray:
    """`mlp` of rows [N,in], float32 [N,out], a batch of one static shape at a time."""
    size = min(batch_size, len(rows))
    parts = [np.zeros((0, layers[-1][0].shape[1]), np.float32)]
    for start in range(0, len(rows), max(size, 1)):
        batch = rows[start : start + size]
        parts.append(np.asarray(_mlp(layers, np.pad(batch, ((0, size - len(batch)), (0, 0)))))[: len(batch)])
    return np.concatenate(parts)


def standard(vectors: np.ndarray) -> Arrays:
    """`mean` [D] and one `scale` []: the root mean square of what is left of vectors [N,D] without their mean.

    One scale for all dimensions, so that the loss stays proportional to the squared error of the vectors.
    """
    mean = vectors.mean(0, dtype=np.float64)
    scale = np.sqrt(np.mean((vectors - mean) ** 2))
    rounding = 1e-6 * np.abs(mean).max()
    return {"mean": mean.astype(np.float32), "scale": np.asarray(scale if scale > rounding else 1, np.float32)}


def standardised(arrays: Arrays, vectors: np.ndarray) -> np.ndarray:
    """vectors [N,D] without the mean, divided by the scale.

    Raises:
        InputError: the width is not that of the fitted vectors.
    """
    if vectors.shape[1] != len(arrays["mean"]):
        raise InputError(
            f"vectors of width {vectors.shape[1]} do not fit an encoder of vectors of width {len(arrays['mean'])}"
        )
    return (vectors - arrays["mean"]) / arrays["scale"]


def as_arrays(name: str, layers: Layers) -> Arrays:
    """`NAME_0_kernel`, `NAME_0_bias`, ...: what `as_layers` reads back."""
    arrays = {}
    for number, (kernel, bias) in enumerate(layers):
        arrays |= {f"{name}_{number}_kernel": np.asarray(kernel), f"{name}_{number}_bias": np.asarray(bias)}
    return arrays


def as_layers(name: str, arrays: Arrays) -> Layers:
    """The layers that `as_arrays` wrote."""
    count = sum(key.startswith(f"{name}_") and key.endswith("_kernel") for key in arrays)
    return tuple(
        (jnp.asarray(arrays[f"{name}_{number}_kernel"]), jnp.asarray(arrays[f"{name}_{number}_bias"]))
        for number in range(count)
    )


def optimizer(settings: RQVAE | FiniteScalarQuantizer) -> optax.GradientTransformation:
    """AdamW, its rate falling to 0 along a cosine; only the kernels of the two MLPs decay."""

    def kernels(parameters: dict[str, Any]) -> dict[str, Any]:
        return {
            name: jax.tree.map(lambda leaf, mlp=name in ("encoder", "decoder"): mlp and leaf.ndim == 2, part)
            for name, part in parameters.items()
        }

    rate = optax.cosine_decay_schedule(settings.learning_rate, settings.steps)
    return optax.adamw(rate, mask=kernels)


def check_trained(parameters: dict[str, Any], settings: RQVAE | FiniteScalarQuantizer) -> None:
    """Raises InputError where training has left numbers that are not finite."""
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(parameters)):
        raise InputError(
            f"training of {settings.kind} diverged with tokenizer.quantizer.learning_rate {settings.learning_rate}; "
            f"lower it"
        )


def batches(items: int, settings: RQVAE | FiniteScalarQuantizer, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Item rows int32 [S,B] of all steps, S at most CHUNK; every item once before any comes again.

    B is `batch_size`, or the number of items where they are fewer.
    """
    size = min(settings.batch_size, items)
    queue = np.zeros(0, np.int32)
    for start in range(0, settings.steps, CHUNK):
        steps = min(CHUNK, settings.steps - start)
        parts, ready = [queue], len(queue)
        while ready < steps * size:
            parts.append(rng.permutation(items).astype(np.int32))
            ready += items
        drawn = np.concatenate(parts)
        queue = drawn[steps * size :]
        yield drawn[: steps * size].reshape(steps, size)


@functools.partial(jax.jit, static_argnames=("step", "settings"), donate_argnames="state")
def _run(step: Callable, settings: Any, state: Any, constants: Any, rows: jax.Array, count: int) -> Any:
    return jax.lax.fori_loop(0, count, lambda number, state: step(settings, state, constants, rows[number]), state)


def run(step: Callable, settings: RQVAE | FiniteScalarQuantizer, state: Any, constants: Any, rows: np.ndarray) -> Any:
    """`state = step(settings, state, constants, rows[n])` for every n of int32 [S,B], compiled once for any S.

    `step` is a function of a module and `settings` hashable: both are part of the compiled program's key.
    """
    padding = min(CHUNK, settings.steps) - len(rows)
    return _run(step, settings, state, constants, jnp.asarray(np.pad(rows, ((0, padding), (0, 0)))), len(rows))
