"""What a reward is given: generated candidates, and what is known of every item."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from onerec_jax.data.schema import Batch
from onerec_jax.data.store import Dataset


class Candidates(NamedTuple):
    """G candidates for each of B requests, as a rollout left them; most probable first under beam search."""

    codes: Array  # int32 [B,G,C], semantic ID
    item: Array  # int32 [B,G], row of the item that is served for it; -1 where it belongs to none
    score: Array  # float32 [B,G], log-probability by which they were generated; -inf where there is no candidate


class Catalogue(NamedTuple):
    """What is known of every item."""

    codes: Array  # int32 [I,C]
    author: Array  # int32 [I]
    tag: Array  # int32 [I]
    duration_s: Array  # float32 [I], negative = unknown
    exposures: Array  # float32 [I], how often the train part shows it


Reward = Callable[[Batch, Candidates], Array]


def make_catalogue(dataset: Dataset, codes: np.ndarray) -> Catalogue:
    """The catalogue of a dataset with semantic IDs `codes` int [I,C]."""
    return Catalogue(
        codes=jnp.asarray(codes, jnp.int32),
        author=jnp.asarray(dataset.items.author, jnp.int32),
        tag=jnp.asarray(dataset.items.tag, jnp.int32),
        duration_s=jnp.asarray(dataset.items.duration_s, jnp.float32),
        exposures=jnp.asarray(dataset.items.train_count, jnp.float32),
    )
