"""Lists with items that nobody had met in training: a drafter proposes by content, the generative model accepts or rejects.

A model that generates semantic IDs knows the codes of a new item but hardly ever its whole ID, so beams pass it by. Here a
drafter proposes candidates, new ones among them, and the model scores each by the mean log-probability of its codes, of which
the last one does not count for new items: it tells an item from those like it, and that is what cannot be known of it. What
scores above a threshold is accepted. Where fewer than k are, more is drafted among items whose IDs begin as the model's own
beams do, first by one code, then by two; what is still missing are the best of all that was looked at and of the beams.

Source: SpecGR (Ding et al. 2024, arXiv 2410.02939). There the beams that guide a round are those of its level and grow with
the rounds; here one search is made before, and its beams guide all rounds.

Axis letters beyond `model/__init__.py`: N requests, I items, J candidates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.progress import track

from onerec_jax.data.pipeline import make_batch
from onerec_jax.errors import InputError
from onerec_jax.generate.beam import beam_search, resolve_items
from onerec_jax.generate.drafter import Drafter, profiles
from onerec_jax.generate.ranking import Ragged, rank
from onerec_jax.generate.recommender import Recommender, slice_ragged
from onerec_jax.generate.scoring import code_log_p
from onerec_jax.model.batch import Batch
from onerec_jax.model.encoder import Context
from onerec_jax.model.onerec import Model
from onerec_jax.model.prefixes import DeviceTrie, device_trie
from onerec_jax.parallel.mesh import data_parallel, make_mesh, on_mesh
from onerec_jax.parallel.sharding import put_batch


@dataclasses.dataclass(frozen=True)
class ColdOptions:
    """How drafts are accepted.

    Attributes:
        draft: candidates of a round.
        threshold: what the mean log-probability of a candidate's codes must exceed.
        cold_levels: codes of a new item that count, by default all but the last.
    """

    draft: int = 50
    threshold: float = -2.5
    cold_levels: int | None = None

    def __post_init__(self) -> None:
        if self.draft < 1 or (self.cold_levels is not None and self.cold_levels < 1):
            raise InputError(f"drafts of {self.draft}, {self.cold_levels} levels of new items: each must be 1 at least")

    def counted(self, new_I: np.ndarray, levels: int) -> np.ndarray:
        """How many of its codes count for each item, int32 [I]."""
        cold = min(self.cold_levels or max(1, levels - 1), levels)
        return np.where(new_I, cold, levels).astype(np.int32)


class Drafted(NamedTuple):
    """Lists and how they came about."""

    items: np.ndarray  # int32 [N,k], best first, -1 = nothing
    scores: np.ndarray  # float32 [N,k], mean log P of the codes that count, -inf where there is no item
    accepted: np.ndarray  # int32 [N], drafts above the threshold
    rounds: np.ndarray  # int32 [N], rounds in which something was drafted


class _Request(NamedTuple):
    """An encoded batch and the beams of its search."""

    context: Context
    codes: Array  # int32 [B,W,C]
    leaf: Array  # int32 [B,W], -1 = no beam
    score: Array  # float32 [B,W]


def mean_log_p(log_p_BxJxC: Array, counted_BxJ: Array) -> Array:
    """The mean over the first `counted` codes, float32 [B,J]."""
    counts = jnp.arange(log_p_BxJxC.shape[-1]) < counted_BxJ[..., None]
    return jnp.sum(jnp.where(counts, log_p_BxJxC, 0.0), axis=-1) / counted_BxJ


class Verifier:
    """A run's model as a judge of candidates, with `evaluate.beam_width` beams; new are the items without train events.

    Raises:
        InputError: the model has an item head alone, which gives codes no probability.
    """

    def __init__(self, recommender: Recommender):
        model, ids = recommender.model, recommender.ids
        if model.config.head == "items":
            raise InputError("model.head items has no semantic IDs to verify drafts by; use codes or both")
        self.recommender, self.codes = recommender, ids.codes
        self.width = recommender.recipe.evaluate.beam_width
        self.new = recommender.dataset.items.train_count == 0
        self.mesh = make_mesh(recommender.recipe.mesh)
        self.trie = device_trie(ids.trie, model.config)
        self.nodes = [ids.trie.find(ids.codes[:, :depth]) for depth in range(ids.codes.shape[1])]
        self._open, self._score = (on_mesh(self.mesh, f) for f in _compiled(model, self.width))

    def open(self, batch: Batch) -> _Request:
        """Encodes a batch and searches its beams."""
        state = self.recommender.state
        return self._open(state.params, state.tables, state.bias, batch, self.trie)

    def verify(self, request: _Request, items_bxJ: np.ndarray, counted_I: np.ndarray) -> np.ndarray:
        """Mean log P float32 [b,J] of candidates of the first b requests, -inf where there is none (-1)."""
        padded = np.zeros((request.codes.shape[0], items_bxJ.shape[1]), np.int64)
        padded[: len(items_bxJ)] = np.maximum(items_bxJ, 0)
        state = self.recommender.state
        found = self._score(state.params, state.bias, request.context, self.trie, self.codes[padded], counted_I[padded])
        return np.where(items_bxJ < 0, -np.inf, np.asarray(found)[: len(items_bxJ)])

    def begins_as_beams(self, request: _Request, depth: int, count: int) -> np.ndarray:
        """Which items' first `depth` codes are those of a beam, bool [count,I]."""
        leaf, codes = np.asarray(request.leaf)[:count], np.asarray(request.codes)[:count]
        trie = self.recommender.ids.trie
        node = trie.find(codes.reshape(-1, codes.shape[-1])[:, :depth]).reshape(leaf.shape)
        reached = np.zeros((count, int(self.nodes[depth].max()) + 1), bool)
        row, beam = np.nonzero(leaf >= 0)
        reached[row, node[row, beam]] = True
        return reached[:, self.nodes[depth]]

    def items_of_beams(self, request: _Request, exclude: Ragged | None, k: int, count: int) -> np.ndarray:
        """The first k items int32 [count,k] of each request's beams, -1 = no more."""
        leaf, score = (np.asarray(x)[:count] for x in (request.leaf, request.score))
        return resolve_items(self.recommender.ids.trie, leaf, score, k, exclude)[0]


def _compiled(model: Model, width: int) -> tuple[Callable[..., _Request], Callable[..., Array]]:
    """(params, tables, bias, batch, trie) -> _Request; (params, bias, context, trie, codes [B,J,C], counted [B,J]) -> [B,J]."""

    @jax.jit
    def begin(params: Any, tables: Any, bias: Any, batch: Batch, trie: DeviceTrie) -> _Request:
        context = model.encode(params, tables, bias, batch)
        beams = beam_search(model.bind(params), context, bias, trie, width, free=False)
        return _Request(context, beams.codes, beams.leaf, beams.score)

    @jax.jit
    def score(params: Any, bias: Any, context: Context, trie: DeviceTrie, codes: Array, counted: Array) -> Array:
        return mean_log_p(code_log_p(model.bind(params), context, bias, trie, codes), counted)

    return begin, score


def draft_and_verify(
    verifier: Verifier,
    drafter: Drafter,
    examples: np.ndarray,
    seen: Ragged | None,
    k: int,
    options: ColdOptions,
    *,
    progress: bool = False,
) -> Drafted:
    """Lists of k items of each request, new ones among them.

    Args:
        verifier: the model.
        drafter: what proposes.
        examples: (user row, cut, start, stop), int64 [N,4]; contexts end at the cut.
        seen: items not to list, or None.
        k: items of a list.
        options: how drafts are accepted.
        progress: show a bar.
    """
    recommender = verifier.recommender
    ways = data_parallel(verifier.mesh)
    size = -(-min(recommender.recipe.evaluate.batch_size, max(1, len(examples))) // ways) * ways
    parts = []
    for first in track(range(0, len(examples), size), "drafting", disable=not progress, transient=True):
        part = examples[first : first + size]
        padded = part[np.resize(np.arange(len(part)), size)]
        batch = make_batch(recommender.dataset, verifier.codes, recommender.recipe.model, padded, 1, frozen=True)
        request = verifier.open(put_batch(batch, verifier.mesh))
        exclude = slice_ragged(seen, slice(first, first + len(part)))
        scores = drafter.scores(profiles(recommender.dataset, drafter.content, part))
        parts.append(_lists(verifier, request, scores, exclude, k, options))
    return Drafted(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def _lists(
    verifier: Verifier, request: _Request, scores_bxI: np.ndarray, exclude: Ragged | None, k: int, options: ColdOptions
) -> Drafted:
    """Rounds of drafting and verifying for one batch of b requests; of what is not accepted the best fill the list."""
    count, counted = len(scores_bxI), options.counted(verifier.new, verifier.codes.shape[1])
    left = scores_bxI.copy()
    if exclude is not None:
        left[np.repeat(np.arange(count), np.diff(exclude[1])), exclude[0]] = -np.inf
    items, scores = [], []
    accepted, rounds = np.zeros(count, np.int32), np.zeros(count, np.int32)
    for depth in range(len(verifier.nodes)):
        missing = accepted < k
        if not missing.any():
            break
        if depth:
            left[~verifier.begins_as_beams(request, depth, count)] = -np.inf
        drafted = np.where(missing[:, None], rank(left, None, options.draft), -1)
        row, place = np.nonzero(drafted >= 0)
        left[row, drafted[row, place]] = -np.inf
        items.append(drafted)
        scores.append(verifier.verify(request, drafted, counted))
        accepted += (scores[-1] > options.threshold).sum(axis=1, dtype=np.int32)
        rounds += (drafted >= 0).any(axis=1)
    beams = verifier.items_of_beams(request, exclude, max(k, verifier.width), count)
    known = (beams[:, :, None] == np.concatenate(items, axis=1)[:, None, :]).any(axis=2)
    items.append(np.where(known, -1, beams))
    scores.append(verifier.verify(request, items[-1], counted))
    return _best(items, scores, accepted, rounds, k, options.threshold)


def _best(
    items: list[np.ndarray],
    scores: list[np.ndarray],
    accepted: np.ndarray,
    rounds: np.ndarray,
    k: int,
    threshold: float,
) -> Drafted:
    """The k best accepted drafts, where there are so many; else all of them and the best of the rest; by score.

    The last of `items` and `scores` are of the beams and count as rejected, whatever they score.
    """
    every, score = np.concatenate(items, axis=1), np.concatenate(scores, axis=1)
    draft = np.arange(every.shape[1]) < every.shape[1] - items[-1].shape[1]
    first = draft & (score > threshold)
    chosen = np.lexsort((-score, ~first), axis=1)[:, :k]
    kept = np.take_along_axis(score, chosen, axis=1)
    chosen = np.take_along_axis(chosen, np.argsort(-kept, axis=1, kind="stable"), axis=1)
    listed, score = np.take_along_axis(every, chosen, 1), np.take_along_axis(score, chosen, 1)
    room = ((0, 0), (0, k - listed.shape[1]))  # fewer were looked at than a list has places
    return Drafted(
        np.pad(np.where(np.isneginf(score), -1, listed), room, constant_values=-1).astype(np.int32),
        np.pad(score, room, constant_values=-np.inf).astype(np.float32),
        accepted,
        rounds,
    )
