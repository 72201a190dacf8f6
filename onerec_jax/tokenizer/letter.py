"""LETTER's two regularisers of a residual-quantized autoencoder (Wang et al. 2024, arXiv 2405.07314, eqs. 4 and 5).

Axis letters: B items of a step, K codes of one codebook, E width of the latent, d width of behaviour vectors.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from onerec_jax.tokenizer.balanced_kmeans import balanced_assignment, balanced_k_means
from onerec_jax.tokenizer.runs import place_in_run

_GROUPS = 10  # groups of codes per codebook, as in the authors' code
_ITERATIONS = 10


def collaborative(projected: jax.Array, behaviour: jax.Array) -> jax.Array:
    """-mean_i log [ exp(z_i . h_i) / sum_j exp(z_i . h_j) ] of quantized latents and behaviour vectors, both [B,d].

    Items without behaviour (h = 0) are left out, as rows and as negatives. The scale of the learned projection of the
    latents takes the place of a temperature.
    """
    known = jnp.any(behaviour != 0, 1)
    scores = jnp.where(known, projected @ behaviour.T, -jnp.inf)
    own = jnp.sum(projected * behaviour, 1)
    # Where no item is known the row of -inf must not reach logsumexp: its gradient is not a number.
    loss = jax.nn.logsumexp(jnp.where(known.any(), scores, 0), 1) - own
    return jnp.sum(jnp.where(known, loss, 0)) / jnp.maximum(known.sum(), 1)


class Groups(NamedTuple):
    """Codes of one codebook in groups: group g is a run of `order`; all int32 [K], the last three by code."""

    order: jax.Array
    first: jax.Array  # where in `order` the code's group begins
    count: jax.Array  # codes in its group
    position: jax.Array  # its place in the group


def group_codes(book: np.ndarray, seed: int | tuple[int, ...]) -> Groups:
    """Balanced k-means of the codes of a codebook float32 [K,E] into groups whose sizes differ by at most one."""
    count = max(1, min(_GROUPS, len(book) // 2))
    group = balanced_assignment(book, balanced_k_means(book, count, _ITERATIONS, seed, len(book)))
    order = np.argsort(group, kind="stable")
    size = np.bincount(group, minlength=count)
    first = np.cumsum(size) - size
    position = np.empty(len(book), int)
    position[order] = place_in_run(group[order])
    return Groups(*(jnp.asarray(array, jnp.int32) for array in (order, first[group], size[group], position)))


def diversity(book: jax.Array, codes: jax.Array, groups: Groups, key: jax.Array) -> jax.Array:
    """-mean_i log [ exp(e_i . e_+) / sum_(j != i) exp(e_i . e_j) ] over the codes int [B] of one level.

    e_+ is another code of the group of e_i, drawn at random; a code alone in its group is left out.
    """
    others = groups.count[codes] - 1
    step = 1 + jnp.floor(jax.random.uniform(key, codes.shape) * others).astype(jnp.int32)
    place = (groups.position[codes] + step) % groups.count[codes]
    positive = groups.order[groups.first[codes] + place]
    scores = book[codes] @ book.T
    rest = jnp.where(jnp.arange(len(book)) == codes[:, None], jnp.finfo(scores.dtype).min, scores)
    loss = jax.nn.logsumexp(rest, 1) - jnp.take_along_axis(scores, positive[:, None], 1)[:, 0]
    return jnp.sum(jnp.where(others > 0, loss, 0)) / jnp.maximum(jnp.sum(others > 0), 1)
