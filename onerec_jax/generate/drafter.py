"""A drafter that knows items by their content alone, so that one which nobody has met yet is as good a candidate as any.

A request is the mean content of its recent events and of its recent positive ones. A linear map takes that to what the next
positive item's content is like, and items are scored by the inner product with theirs. The map is contrastive: it maximises
the probability of the items taken in train among all that were known by then.

Axis letters: N requests, I items, D width of the content, F = 2 D + 1 width of a profile, S targets of a step, M negatives.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from onerec_jax.config import TokenizerConfig
from onerec_jax.data.store import Dataset
from onerec_jax.errors import InputError
from onerec_jax.tokenizer.content import content_vectors

RECENT = 50  # events of a context that a profile is made of
DECAY = 0.9  # weight per step back
_USERS_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True)
class DrafterOptions:
    """How the map is fitted.

    Attributes:
        steps: of Adam.
        batch_size: targets of a step.
        learning_rate: of Adam.
        negatives: known items that a step's targets are told from, drawn anew where there are more.
        examples: train examples looked at, drawn where there are more.
    """

    steps: int = 300
    batch_size: int = 512
    learning_rate: float = 1e-2
    negatives: int = 8192
    examples: int = 100_000


@dataclasses.dataclass(frozen=True)
class Drafter:
    """The fitted map, and the content of every item."""

    weights: np.ndarray  # float32 [F,D]
    content: np.ndarray  # float32 [I,D], of length 1

    def scores(self, profiles_NxF: np.ndarray) -> np.ndarray:
        """Of every item, float32 [N,I]; the candidates of a request are those of the highest."""
        return profiles_NxF @ self.weights @ self.content.T


def item_content(dataset: Dataset, config: TokenizerConfig, seed: int) -> np.ndarray:
    """The tokenizer's content without behaviour, which new items have none of; float32 [I,D] of length 1.

    Raises:
        InputError: nothing but behaviour is named.
    """
    kept = tuple(kind for kind in config.content if kind != "behaviour")
    if not kept:
        raise InputError(
            "tokenizer.content is behaviour alone, which new items have none of; add 'text' or 'embedding'"
        )
    vectors = content_vectors(dataset, config.model_copy(update={"content": kept}), seed)
    vectors = vectors.mean(axis=1) if vectors.ndim == 3 else vectors
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(norm > 0, norm, 1)).astype(np.float32)


def profiles(dataset: Dataset, content_IxD: np.ndarray, examples: np.ndarray) -> np.ndarray:
    """What is known of each request, float32 [N,F]: mean content of its last `RECENT` events, of those positive, and 1.

    Means weigh `DECAY` per step back among the events they are of, and are 0 where there are none.

    Args:
        dataset: where the histories are.
        content_IxD: of every item.
        examples: (user row, cut, start, stop), int64 [N,4]; nothing after the cut is read.
    """
    width = content_IxD.shape[1]
    found = np.ones((len(examples), 2 * width + 1), np.float32)
    for first in range(0, len(examples), _USERS_AT_ONCE):
        part = examples[first : first + _USERS_AT_ONCE]
        for row, (cut, history) in enumerate(
            zip(part[:, 1].tolist(), dataset.histories(part[:, 0]), strict=True), first
        ):
            recent = slice(max(0, cut - RECENT), cut)
            item, positive = history.item[recent], history.positive[recent]
            found[row, :width] = _decayed_mean(content_IxD[item])
            found[row, width:-1] = _decayed_mean(content_IxD[item[positive]])
    return found


def _decayed_mean(vectors_LxD: np.ndarray) -> np.ndarray:
    weight = DECAY ** np.arange(len(vectors_LxD) - 1, -1, -1.0)
    return weight @ vectors_LxD / max(weight.sum(), 1e-9)


def _targets(dataset: Dataset, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which example each positive target is of, and its item row; int64 [S] both."""
    rows, items = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for first in range(0, len(examples), _USERS_AT_ONCE):
        part = examples[first : first + _USERS_AT_ONCE]
        spans = zip(part[:, 2].tolist(), part[:, 3].tolist(), dataset.histories(part[:, 0]), strict=True)
        for row, (start, stop, history) in enumerate(spans, first):
            items.append(history.item[start:stop][history.positive[start:stop]].astype(np.int64))
            rows.append(np.full(len(items[-1]), row))
    return np.concatenate(rows), np.concatenate(items)


def fit_drafter(
    dataset: Dataset, content_IxD: np.ndarray, seed: int, options: DrafterOptions = DrafterOptions()
) -> Drafter:
    """A drafter of the train examples; their positive targets are told from the items with train events.

    Raises:
        InputError: no train example has a positive target.
    """
    rng = np.random.default_rng((seed, 0))
    examples = np.asarray(dataset.examples("train"))
    if len(examples) > options.examples:
        examples = examples[np.sort(rng.choice(len(examples), options.examples, replace=False))]
    row, item = _targets(dataset, examples)
    if not len(item):
        raise InputError(f"no train example of {dataset.directory} has a positive target for a drafter to learn from")
    known = np.flatnonzero(dataset.items.train_count > 0)
    inputs_NxF = profiles(dataset, content_IxD, examples)
    optimizer = optax.adam(options.learning_rate)

    @jax.jit
    def step(weights: Array, state: optax.OptState, x: Array, target: Array, negative: Array):
        gradient = jax.grad(contrast)(weights, x, target, negative, jnp.asarray(content_IxD))
        update, state = optimizer.update(gradient, state)
        return jnp.asarray(optax.apply_updates(weights, update)), state

    weights = jnp.zeros((inputs_NxF.shape[1], content_IxD.shape[1]), jnp.float32)
    state = optimizer.init(weights)
    for _ in range(options.steps):
        chosen = rng.integers(0, len(item), options.batch_size)
        negative = known if len(known) <= options.negatives else rng.choice(known, options.negatives, replace=False)
        weights, state = step(weights, state, inputs_NxF[row[chosen]], item[chosen], negative)
    return Drafter(np.asarray(weights), content_IxD)


def contrast(weights: Array, x_SxF: Array, target_S: Array, negative_M: Array, content_IxD: Array) -> Array:
    """Mean of -log softmax of each target among itself and the negatives; it is no negative of its own."""
    wanted_SxD = x_SxF @ weights
    own = jnp.sum(wanted_SxD * content_IxD[target_S], axis=-1, keepdims=True)
    others = jnp.where(negative_M == target_S[:, None], -jnp.inf, wanted_SxD @ content_IxD[negative_M].T)
    return jnp.mean(jax.nn.logsumexp(jnp.concatenate([own, others], axis=-1), axis=-1) - own[:, 0])
