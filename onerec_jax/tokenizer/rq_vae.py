"""RQ-VAE, TIGER's quantizer (Rajput et al. 2023; REFERENCE 7.1): residual quantization of a learned latent.

    z = encoder(x),   r_1 = z,   e_l = the code of level l nearest to r_l,   r_{l+1} = r_l - e_l,   q = sum_l e_l
    loss = ||x - decoder(q)||^2 + sum_l ||sg[r_l] - e_l||^2 + beta ||r_l - sg[e_l]||^2

What keeps the codebooks alive: they start from k-means of the initial latents' residuals, level by level; a code that no
item of the last `dead_after` steps took moves to a residual of the step; and when training ends, a code that no item has
moves to a residual that is far from its own code. The other codes stay: the decoder has learned them where they are, and
Lloyd's iterations at that point raise the squared error of what it decodes (by 3 % on Beauty at 3 x 256).

Axis letters: B items of a step, L levels, E width of the latent, D of the vectors, K_l codes of level l.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from onerec_jax.config import RQVAE
from onerec_jax.errors import InputError
from onerec_jax.tokenizer import autoencoder, letter, rq_kmeans
from onerec_jax.tokenizer.autoencoder import mlp
from onerec_jax.tokenizer.kmeans import k_means, nearest
from onerec_jax.tokenizer.quantizer import Arrays, Fitted, Items, checked, with_codebooks

_ROUNDS = 8  # a code that moves may take the last item of another

Parameters = dict[str, Any]  # encoder, decoder: Layers; books: L x [K_l,E]; projection [E,d] with LETTER's InfoNCE


class Quantized(NamedTuple):
    """Of every level: codes int32 [B], the residuals [B,E] that were quantized, the chosen codes' vectors [B,E]."""

    codes: tuple[jax.Array, ...]
    residuals: tuple[jax.Array, ...]
    chosen: tuple[jax.Array, ...]


class Constants(NamedTuple):
    """What steps read: standardised vectors [I,D], behaviour [I,d] or [I,0], LETTER's groups of codes, a random key."""

    vectors: jax.Array
    behaviour: jax.Array
    groups: tuple[letter.Groups, ...]
    key: jax.Array


class State(NamedTuple):
    """What a step changes; `idle` counts the steps since a code of each level was last taken, int32 [K_l]."""

    parameters: Parameters
    moments: optax.OptState
    idle: tuple[jax.Array, ...]
    step: jax.Array


def quantize(books: tuple[jax.Array, ...], latent: jax.Array) -> Quantized:
    """Residual quantization of latents [B,E]; gradients reach the residuals and the chosen codes, never across."""
    codes, residuals, chosen = [], [], []
    residual = latent
    for book in books:
        code = jnp.argmin(0.5 * jnp.sum(book**2, 1) - residual @ book.T, 1).astype(jnp.int32)
        codes.append(code)
        residuals.append(residual)
        chosen.append(book[code])
        residual = residual - jax.lax.stop_gradient(chosen[-1])
    return Quantized(tuple(codes), tuple(residuals), tuple(chosen))


def straight_through(latent: jax.Array, quantized: jax.Array) -> jax.Array:
    """`quantized` [B,E], with the gradient of `latent` [B,E]."""
    return jax.lax.stop_gradient(quantized) + (latent - jax.lax.stop_gradient(latent))


def rotated(latent: jax.Array, quantized: jax.Array) -> jax.Array:
    """`quantized` [B,E] as the constant rotation and rescaling of `latent` [B,E] onto it (Fifty et al. 2024, eq. 4).

    q = sg[ |q| / |z| (I - 2 w w' + 2 q^ z^') ] z with unit vectors q^, z^ and w along q^ + z^.
    """

    def unit(vector: jax.Array) -> jax.Array:
        return vector / jnp.maximum(jnp.linalg.norm(vector, axis=1, keepdims=True), 1e-12)

    frozen, quantized = jax.lax.stop_gradient(latent), jax.lax.stop_gradient(quantized)
    start, end = unit(frozen), unit(quantized)
    middle = unit(start + end)
    scale = jnp.linalg.norm(quantized, axis=1, keepdims=True) / jnp.maximum(
        jnp.linalg.norm(frozen, axis=1, keepdims=True), 1e-12
    )

    def along(vector: jax.Array) -> jax.Array:
        return jnp.sum(vector * latent, 1, keepdims=True)

    moved = scale * (latent - 2 * middle * along(middle) + 2 * end * along(start))
    return quantized + (moved - jax.lax.stop_gradient(moved))  # exact, whatever the rounding of the rotation


def estimated(settings: RQVAE, latent: jax.Array, found: Quantized) -> jax.Array:
    """The quantized latent [B,E] with the gradient that the settings choose.

    The rotation is that of each level's residual onto its code; with one rotation of the whole latent onto the sum of
    the codes latents shrink in training and reconstruction is worse (on Beauty at 3 x 256).
    """
    if settings.estimator == "rotation":
        return sum(map(rotated, found.residuals, found.chosen), jnp.zeros_like(latent))
    return straight_through(latent, sum(found.chosen, jnp.zeros_like(latent)))


def objective(
    parameters: Parameters, settings: RQVAE, constants: Constants, rows: jax.Array, key: jax.Array
) -> tuple[jax.Array, Quantized]:
    """The loss [] of item rows int32 [B], summed over dimensions, averaged over items; and what they were quantized to."""
    vectors = constants.vectors[rows]
    latent = mlp(parameters["encoder"], vectors)
    found = quantize(parameters["books"], latent)
    through = estimated(settings, latent, found)
    loss = jnp.sum((vectors - mlp(parameters["decoder"], through)) ** 2)
    for residual, chosen in zip(found.residuals, found.chosen, strict=True):
        loss += jnp.sum((jax.lax.stop_gradient(residual) - chosen) ** 2)
        loss += settings.commitment * jnp.sum((residual - jax.lax.stop_gradient(chosen)) ** 2)
    loss /= len(rows)
    if settings.collaborative_weight:
        projected = through @ parameters["projection"]
        loss += settings.collaborative_weight * letter.collaborative(projected, constants.behaviour[rows])
    if settings.diversity_weight:
        for level, (book, codes) in enumerate(zip(parameters["books"], found.codes, strict=True)):
            drawn = jax.random.fold_in(key, level)
            loss += settings.diversity_weight * letter.diversity(book, codes, constants.groups[level], drawn)
    return loss, found


def revive(
    books: tuple[jax.Array, ...], idle: tuple[jax.Array, ...], found: Quantized, dead_after: int, step: jax.Array
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Codebooks with codes idle for `dead_after` steps moved to residuals of this step, and the new idle counts.

    The moments of the optimizer stay: a code that has not been taken has had no gradient to build any.
    """
    moved, counts = [], []
    for book, count, codes, residuals in zip(books, idle, found.codes, found.residuals, strict=True):
        count = (count + 1).at[codes].set(0)
        dead = count >= dead_after
        # The rows of a step are in random order already; by the step, two codes do not meet at one residual again.
        source = residuals[(jnp.arange(len(book)) + step) % len(residuals)]
        moved.append(jnp.where(dead[:, None], source, book))
        counts.append(jnp.where(dead, 0, count))
    return tuple(moved), tuple(counts)


def train_step(settings: RQVAE, state: State, constants: Constants, rows: jax.Array) -> State:
    """One AdamW step on item rows int32 [B], then `revive`."""
    key = jax.random.fold_in(constants.key, state.step)
    gradient, found = jax.grad(objective, has_aux=True)(state.parameters, settings, constants, rows, key)
    updates, moments = autoencoder.optimizer(settings).update(gradient, state.moments, state.parameters)
    moved: Any = optax.apply_updates(cast(Any, state.parameters), updates)
    parameters, idle = dict(moved), state.idle
    if settings.dead_after:
        parameters["books"], idle = revive(parameters["books"], idle, found, settings.dead_after, state.step)
    return State(parameters, moments, idle, state.step + 1)


def _first_books(latent: np.ndarray, data: Items) -> list[np.ndarray]:
    """Codebooks by k-means of the residuals of latents [I,E], level by level."""
    residual, books = latent, []
    for level, size in enumerate(data.codebook_sizes):
        books.append(k_means(residual, size, data.iterations, (data.seed, level), data.batch_size))
        residual = residual - books[-1][nearest(residual, books[-1], data.batch_size)[0]]
    return books


def use_all(latent: np.ndarray, books: list[np.ndarray], batch_size: int) -> list[np.ndarray]:
    """Codebooks of which each code that no latent [I,E] has sits on one of the residuals farthest from their codes."""
    residual, filled = latent, []
    for book in books:
        book = book.copy()
        for _ in range(_ROUNDS):
            codes, distances = nearest(residual, book, batch_size)
            members = np.bincount(codes, minlength=len(book))
            unused = np.flatnonzero(members == 0)
            spare = np.flatnonzero((members[codes] > 1) & (distances > 0))
            if not (unused.size and spare.size):
                break
            farthest = spare[np.argsort(-distances[spare], kind="stable")][: 4 * unused.size]
            _, first = np.unique(residual[farthest], axis=0, return_index=True)
            rows = farthest[np.sort(first)][: unused.size]
            book[unused[: rows.size]] = residual[rows]
        residual = residual - book[nearest(residual, book, batch_size)[0]]
        filled.append(book)
    return filled


def _behaviour(data: Items, settings: RQVAE) -> np.ndarray:
    """Unit behaviour vectors [I,d] for LETTER's InfoNCE, [I,0] without it; an item without behaviour stays 0."""
    if not settings.collaborative_weight:
        return np.zeros((int(data.vectors.shape[0]), 0), np.float32)
    if data.behaviour is None:
        raise InputError(
            f"tokenizer.quantizer.collaborative_weight is {settings.collaborative_weight} but these items come without "
            f"behaviour vectors; give some or set it to 0"
        )
    vectors = np.asarray(data.behaviour(), np.float32)
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norm > 0, norm, 1)


def _start(vectors: np.ndarray, behaviour: np.ndarray, data: Items, settings: RQVAE) -> State:
    rng = np.random.default_rng((data.seed, 0))
    widths = (vectors.shape[1], *settings.hidden, settings.latent)
    encoder, decoder = autoencoder.new_layers(widths, rng), autoencoder.new_layers(widths[::-1], rng)
    books = _first_books(autoencoder.outputs(encoder, vectors, data.batch_size), data)
    parameters = {"encoder": encoder, "decoder": decoder, "books": tuple(map(jnp.asarray, books))}
    if settings.collaborative_weight:
        parameters["projection"] = autoencoder.new_layers((settings.latent, behaviour.shape[1]), rng)[0][0]
    idle = tuple(jnp.zeros(len(book), jnp.int32) for book in books)
    return State(parameters, autoencoder.optimizer(settings).init(parameters), idle, jnp.zeros((), jnp.int32))


def fit(data: Items, settings: RQVAE = RQVAE()) -> Fitted:  # noqa: B008
    """Trains on the items' vectors; LETTER's groups of codes are made anew every `autoencoder.CHUNK` steps.

    Raises:
        InputError: a value is not finite, `collaborative_weight` asks for behaviour that the items do not have, or
            training diverged.
    """
    content = checked(data.vectors)
    arrays = autoencoder.standard(content)
    vectors, behaviour = autoencoder.standardised(arrays, content), _behaviour(data, settings)
    state = _start(vectors, behaviour, data, settings)
    constants = Constants(jnp.asarray(vectors), jnp.asarray(behaviour), (), jax.random.key(data.seed))
    for rows in autoencoder.batches(len(vectors), settings, np.random.default_rng((data.seed, 1))):
        if settings.diversity_weight:
            books = map(np.asarray, state.parameters["books"])
            groups = tuple(letter.group_codes(book, (data.seed, level)) for level, book in enumerate(books))
            constants = constants._replace(groups=groups)
        state = autoencoder.run(train_step, settings, state, constants, rows)
    autoencoder.check_trained(state.parameters, settings)
    latent = autoencoder.outputs(state.parameters["encoder"], vectors, data.batch_size)
    books = use_all(latent, [np.asarray(book) for book in state.parameters["books"]], data.batch_size)
    for name in ("encoder", "decoder"):
        arrays |= autoencoder.as_arrays(name, state.parameters[name])
    arrays |= with_codebooks(books)
    return Fitted(encode(arrays, content, data.batch_size), arrays)


def encode(arrays: Arrays, vectors: np.ndarray, batch_size: int = 65_536) -> np.ndarray:
    """Codes int32 [N,L] of vectors float32 [N,D]; ties go to the lowest code.

    Raises:
        InputError: a value is not finite, or the width is not that of the fitted vectors.
    """
    rows = autoencoder.standardised(arrays, checked(vectors))
    latent = autoencoder.outputs(autoencoder.as_layers("encoder", arrays), rows, batch_size)
    return rq_kmeans.encode(arrays, latent, batch_size)


def decode(arrays: Arrays, codes: np.ndarray, batch_size: int = 65_536) -> np.ndarray:
    """Vectors float32 [N,D] of codes int [N,L]: the decoder of the sum of the codes' vectors, of a prefix where fewer.

    Raises:
        InputError: a code outside its codebook.
    """
    latent = rq_kmeans.decode(arrays, codes)
    decoded = autoencoder.outputs(autoencoder.as_layers("decoder", arrays), latent, batch_size)
    return decoded * arrays["scale"] + arrays["mean"]
