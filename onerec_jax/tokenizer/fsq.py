"""Finite scalar quantization (Mentzer et al. 2024, arXiv 2309.15505): an autoencoder whose latent is rounded.

Level l owns a group of latent dimensions; dimension i of it takes V_i values and prod_i V_i = K_l. With n = (V - 1) / 2
and o = 1/2 for even V, 0 for odd,

    bounded = n (1 + eps) tanh(z) - o,   value = round(bounded) in {-floor(V/2), ..., ceil(V/2) - 1}

and a code is the mixed-radix number of its group's values. Two departures from the paper: z is not shifted so that 0
maps to 0, which at V = 2 takes the gradient to a thousandth; and every z is normalised over the batch (after training:
over all items), without which some saturate and their codes lie idle.

Axis letters: N, B vectors, D their width, L levels, K_l codes of level l, G latent dimensions of all levels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from onerec_jax.config import FiniteScalarQuantizer
from onerec_jax.errors import InputError
from onerec_jax.tokenizer import autoencoder
from onerec_jax.tokenizer.autoencoder import mlp
from onerec_jax.tokenizer.quantizer import Arrays, Fitted, Items, check_codes, checked

_EPSILON = 1e-3  # the outermost values are reached, not only approached
_FEW, _MOST = 8, 16  # values of one dimension: a few, or up to 16 where the size has a factor of 11 or 13
_LARGEST_PRIME = 13
_SPREAD = 0.9  # deviation of a latent: tanh of it is close to uniform


class Constants(NamedTuple):
    """What steps read: standardised vectors [I,D]; the number of values of each latent dimension [G]."""

    vectors: jax.Array
    values: jax.Array


class State(NamedTuple):
    """What a step changes: `encoder` and `decoder`, and the optimizer's moments."""

    parameters: dict[str, Any]
    moments: optax.OptState


def _factorisations(size: int, most: int) -> list[tuple[int, ...]]:
    """All ways to write `size` as a product of factors 2 to `most`, each in descending order."""
    if size == 1:
        return [()]
    return [
        (factor, *rest)
        for factor in range(min(size, most), 1, -1)
        if size % factor == 0
        for rest in _factorisations(size // factor, factor)
    ]


def _largest_prime(size: int) -> int:
    prime = 2
    while prime * prime <= size:
        if size % prime:
            prime += 1
        else:
            size //= prime
    return size


def group_values(size: int) -> tuple[int, ...]:
    """Numbers of values, descending, of the latent dimensions of a level with `size` codes; their product is `size`.

    Fewest dimensions with at most 8 values each, the most even ones among those: 256 = 8 x 8 x 4.

    Raises:
        InputError: `size` has a prime factor above 13.
    """
    if (prime := _largest_prime(size)) > _LARGEST_PRIME:
        below = next(near for near in range(size, 0, -1) if _largest_prime(near) <= _LARGEST_PRIME)
        above = next(near for near in range(size, 2 * size) if _largest_prime(near) <= _LARGEST_PRIME)
        raise InputError(
            f"tokenizer.codebook_sizes has {size}, which has a prime factor {prime}; fsq needs sizes that are products of "
            f"2 to {_MOST}, such as {below} or {above}"
        )
    found = _factorisations(size, _FEW) or _factorisations(size, _MOST)
    return min(found, key=lambda values: (len(values), sum(values), values))


def bounded(latent: jax.Array, values: jax.Array) -> jax.Array:
    """Latents [B,G] squeezed so that rounding gives `values` [G] values each."""
    return (values - 1) / 2 * (1 + _EPSILON) * jnp.tanh(latent) - jnp.where(values % 2 == 0, 0.5, 0.0)


def rounded(latent: jax.Array, values: jax.Array) -> jax.Array:
    """The nearest integers [B,G] of bounded latents, with the gradient of the bounded ones."""
    inside = bounded(latent, values)
    return inside + jax.lax.stop_gradient(jnp.round(inside) - inside)


def centred(integers: Any, values: Any) -> Any:
    """Rounded latents [B,G] as what the decoder reads: within [-1, 1]."""
    return integers / (values // 2)


def normalised(latent: jax.Array) -> jax.Array:
    """Latents [B,G] with mean 0 and deviation 0.9 over the batch; a constant one becomes 0."""
    return (latent - latent.mean(0)) * _gain(latent.var(0))


def _gain(variance: Any) -> Any:
    return _SPREAD / jnp.sqrt(variance + 1e-6)


def objective(parameters: dict[str, Any], constants: Constants, rows: jax.Array) -> jax.Array:
    """||x - decoder(rounded encoder(x))||^2 [], summed over dimensions, averaged over item rows int32 [B]."""
    vectors = constants.vectors[rows]
    digits = rounded(normalised(mlp(parameters["encoder"], vectors)), constants.values)
    return jnp.sum((vectors - mlp(parameters["decoder"], centred(digits, constants.values))) ** 2) / len(rows)


def train_step(settings: FiniteScalarQuantizer, state: State, constants: Constants, rows: jax.Array) -> State:
    """One AdamW step on item rows int32 [B]."""
    gradient = jax.grad(objective)(state.parameters, constants, rows)
    updates, moments = autoencoder.optimizer(settings).update(gradient, state.moments, state.parameters)
    return State(optax.apply_updates(state.parameters, updates), moments)  # type: ignore[arg-type]


def _start(vectors: np.ndarray, values: np.ndarray, seed: int, settings: FiniteScalarQuantizer) -> State:
    rng = np.random.default_rng((seed, 0))
    widths = (vectors.shape[1], *settings.hidden, len(values))
    parameters = {
        "encoder": autoencoder.new_layers(widths, rng),
        "decoder": autoencoder.new_layers(widths[::-1], rng),
    }
    return State(parameters, autoencoder.optimizer(settings).init(parameters))


def _normalising(encoder: autoencoder.Layers, vectors: np.ndarray, batch_size: int) -> autoencoder.Layers:
    """The encoder with `normalised` over all items [I,D] as part of its last layer."""
    latent = autoencoder.outputs(encoder, vectors, batch_size)
    gain = _gain(latent.var(0))
    kernel, bias = encoder[-1]
    return (*encoder[:-1], (kernel * gain, (bias - latent.mean(0)) * gain))


def _integers(layers: autoencoder.Layers, rows: np.ndarray, values: np.ndarray, batch_size: int) -> np.ndarray:
    """Rounded latents int32 [N,G] of standardised vectors [N,D]."""
    latent = autoencoder.outputs(layers, rows, batch_size)
    return np.asarray(jnp.round(bounded(jnp.asarray(latent), jnp.asarray(values)))).astype(np.int32)


def _groups(arrays: Arrays) -> list[np.ndarray]:
    """The latent dimensions of each level."""
    return [np.flatnonzero(arrays["level"] == level) for level in range(len(arrays["sizes"]))]


def _radix(values: np.ndarray) -> np.ndarray:
    """What one step of each digit is worth, the first digit the most."""
    return np.cumprod(np.append(values[1:], 1)[::-1])[::-1] if len(values) else np.zeros(0, np.int64)


def codes_of(arrays: Arrays, integers: np.ndarray) -> np.ndarray:
    """Codes int32 [N,L] of rounded latents int [N,G]: the mixed-radix number of each group."""
    digits, values = integers + arrays["values"] // 2, arrays["values"]
    return np.stack([digits[:, own] @ _radix(values[own]) for own in _groups(arrays)], 1).astype(np.int32)


def integers_of(arrays: Arrays, codes: np.ndarray) -> np.ndarray:
    """Rounded latents float32 [N,G] of codes int [N,l]; those of levels not given are the training mean."""
    integers = np.tile(arrays["latent_mean"], (len(codes), 1))
    for column, own in zip(codes.T, _groups(arrays), strict=False):
        values = arrays["values"][own]
        integers[:, own] = column[:, None] // _radix(values) % values - values // 2
    return integers


def fit(data: Items, settings: FiniteScalarQuantizer = FiniteScalarQuantizer()) -> Fitted:  # noqa: B008
    """Trains the autoencoder on the items' vectors.

    Raises:
        InputError: a value is not finite, a codebook size has a prime factor above 13, or training diverged.
    """
    content = checked(data.vectors)
    groups = [group_values(size) for size in data.codebook_sizes]
    arrays = autoencoder.standard(content) | {
        "sizes": np.asarray(data.codebook_sizes, np.int32),
        "values": np.asarray([value for group in groups for value in group], np.int32),
        "level": np.repeat(np.arange(len(groups), dtype=np.int32), [len(group) for group in groups]),
    }
    vectors, values = autoencoder.standardised(arrays, content), arrays["values"]
    state = _start(vectors, values, data.seed, settings)
    constants = Constants(jnp.asarray(vectors), jnp.asarray(values))
    for rows in autoencoder.batches(len(vectors), settings, np.random.default_rng((data.seed, 1))):
        state = autoencoder.run(train_step, settings, state, constants, rows)
    autoencoder.check_trained(state.parameters, settings)
    encoder = _normalising(state.parameters["encoder"], vectors, data.batch_size)
    arrays |= autoencoder.as_arrays("encoder", encoder) | autoencoder.as_arrays("decoder", state.parameters["decoder"])
    integers = _integers(encoder, vectors, values, data.batch_size)
    arrays["latent_mean"] = integers.mean(0, dtype=np.float64).astype(np.float32)
    return Fitted(codes_of(arrays, integers), arrays)


def encode(arrays: Arrays, vectors: np.ndarray, batch_size: int = 65_536) -> np.ndarray:
    """Codes int32 [N,L] of vectors float32 [N,D].

    Raises:
        InputError: a value is not finite, or the width is not that of the fitted vectors.
    """
    rows = autoencoder.standardised(arrays, checked(vectors))
    return codes_of(arrays, _integers(autoencoder.as_layers("encoder", arrays), rows, arrays["values"], batch_size))


def decode(arrays: Arrays, codes: np.ndarray, batch_size: int = 65_536) -> np.ndarray:
    """Vectors float32 [N,D] of codes int [N,L]; with fewer columns the missing levels' latents are the training mean.

    Raises:
        InputError: a code outside its codebook.
    """
    check_codes(codes, tuple(arrays["sizes"].tolist()))
    latent = centred(integers_of(arrays, codes), arrays["values"]).astype(np.float32)
    decoded = autoencoder.outputs(autoencoder.as_layers("decoder", arrays), latent, batch_size)
    return decoded * arrays["scale"] + arrays["mean"]
