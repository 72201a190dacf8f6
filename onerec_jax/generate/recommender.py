"""A trained run as a function from requests to lists of items."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from onerec_jax.config import Recipe
from onerec_jax.data.pipeline import make_batch
from onerec_jax.data.schema import ItemFeatures
from onerec_jax.data.store import Dataset
from onerec_jax.generate.beam import make_beam_search, resolve_items
from onerec_jax.generate.ranking import Ragged, rank
from onerec_jax.model.batch import Batch
from onerec_jax.model.onerec import Model
from onerec_jax.model.prefixes import device_trie, legal_log_probabilities
from onerec_jax.parallel.mesh import data_parallel, make_mesh
from onerec_jax.parallel.sharding import put_batch
from onerec_jax.tokenizer.semantic_ids import SemanticIds
from onerec_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Recommender:
    """Model, parameters, data and semantic IDs of one run."""

    run: Path
    recipe: Recipe
    dataset: Dataset
    ids: SemanticIds
    model: Model
    state: TrainState

    @property
    def rows(self) -> dict[str, jax.Array]:
        return {name: table["rows"] for name, table in self.state.tables.items()}

    def _batches(self, examples: np.ndarray, size: int, inference: int = 0) -> Iterator[tuple[int, int, Batch]]:
        """(first example, how many are real, batch) with contexts that end at each example's cut.

        Every `inference` but the first leaves some events out.
        """
        mesh = make_mesh(self.recipe.mesh)
        ways = data_parallel(mesh)
        size = -(-min(size, max(1, len(examples))) // ways) * ways
        for first in range(0, len(examples), size):
            part = examples[first : first + size]
            padded = part[np.resize(np.arange(len(part)), size)]
            batch = make_batch(self.dataset, self.ids.codes, self.recipe.model, padded, 1, frozen=True)
            if inference:
                rng = np.random.default_rng((self.recipe.seed, inference, first))
                batch = leave_out(batch, self.recipe.evaluate.left_out, rng)
            yield first, len(part), put_batch(batch, mesh)

    def recommend(
        self, examples: np.ndarray, seen: Ragged | None, k: int, *, progress: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lists of item rows int32 [N,k] (-1 = nothing) and their scores, log P(item).

        With `evaluate.inferences` above 1 the probabilities of several lists, five times as long, are averaged.
        """
        count = self.recipe.evaluate.inferences
        if count == 1:
            return self._lists(examples, seen, k, progress, 0)
        lists = [self._lists(examples, seen, 5 * k, progress, inference) for inference in range(count)]
        return average_lists(np.stack([items for items, _ in lists]), np.stack([score for _, score in lists]), k)

    def _lists(
        self, examples: np.ndarray, seen: Ragged | None, k: int, progress: bool, inference: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The lists of one inference.

        By trie-constrained beam search. A model with only an item head scores every item; one with both heads adds
        `evaluate.item_weight` times the item's own log-probability to the score of its beam, and ranks by the sum.
        """
        if self.recipe.model.head == "items":
            return self._rank_all(examples, seen, k, progress, inference)
        settings = self.recipe.evaluate
        search = make_beam_search(self.model, settings.beam_width)
        trie = device_trie(self.ids.trie)
        items, scores = np.full((len(examples), k), -1, np.int32), np.full((len(examples), k), -np.inf, np.float32)
        batches = self._batches(examples, settings.batch_size, inference)
        total = -(-len(examples) // settings.batch_size)
        for first, count, batch in track(batches, "beam search", total, disable=not progress, transient=True):
            beams = search(self.state.params, self.rows, self.state.bias, batch, trie)
            leaf, score = np.asarray(beams.leaf)[:count], np.asarray(beams.score)[:count]
            part = slice(first, first + count)
            exclude = slice_ragged(seen, part)
            if self.recipe.model.head == "codes":
                items[part], scores[part] = resolve_items(self.ids.trie, leaf, score, k, exclude)
                continue
            found, score = resolve_items(self.ids.trie, leaf, score, max(k, settings.beam_width), exclude)
            own = np.asarray(self._score_all(self.state.params, self.rows, self.state.bias, batch))[:count]
            score = score + settings.item_weight * np.take_along_axis(own, np.maximum(found, 0), axis=1)
            best = np.argsort(-score, axis=1, kind="stable")[:, :k]
            items[part], scores[part] = np.take_along_axis(found, best, 1), np.take_along_axis(score, best, 1)
        return items, scores

    @functools.cached_property
    def _score_all(self) -> Callable[..., jax.Array]:
        """(params, rows, bias, batch) -> log P of every item [B,I] of the first target, by the item head."""

        @jax.jit
        def score(params, rows, bias, batch: Batch):
            batch, _ = self.model.localise(batch, touched_only=False)
            return jax.nn.log_softmax(self.model.bind(params).item_logits(batch, rows, bias)[:, 0])

        return score

    def _rank_all(
        self, examples: np.ndarray, seen: Ragged | None, k: int, progress: bool, inference: int
    ) -> tuple[np.ndarray, np.ndarray]:
        size = self.recipe.evaluate.batch_size
        items, scores = [np.zeros((0, k), np.int32)], [np.zeros((0, k), np.float32)]
        total = -(-len(examples) // size)
        for first, count, batch in track(
            self._batches(examples, size, inference), "scoring", total, disable=not progress, transient=True
        ):
            found = np.asarray(self._score_all(self.state.params, self.rows, self.state.bias, batch))[:count]
            items.append(rank(found, slice_ragged(seen, slice(first, first + count)), k))
            best = np.take_along_axis(found, np.maximum(items[-1], 0), axis=1)
            scores.append(np.where(items[-1] < 0, -np.inf, best))
        return np.concatenate(items), np.concatenate(scores)

    def legality(self, examples: np.ndarray) -> float:
        """Share of unconstrained beams whose semantic ID belongs to an item."""
        search = make_beam_search(self.model, self.recipe.evaluate.beam_width, free=True)
        trie = device_trie(self.ids.trie)
        legal = beams_seen = 0
        for _, count, batch in self._batches(examples, self.recipe.evaluate.batch_size):
            beams = search(self.state.params, self.rows, self.state.bias, batch, trie)
            codes = np.asarray(beams.codes)[:count].reshape(-1, self.ids.codes.shape[1])
            legal += int((self.ids.trie.find(codes) >= 0).sum())
            beams_seen += len(codes)
        return legal / max(1, beams_seen)


def leave_out(batch: Batch, share: float, rng: np.random.Generator) -> Batch:
    """The batch without a random `share` of the events of `short`, of which the most recent always stays.

    A pathway's features are as they were: the age of an event still counts from the event before it in the log.
    """
    item = batch.short.item
    valid = item >= 0
    last = np.arange(item.shape[1]) == valid.sum(axis=1, keepdims=True) - 1
    keep = valid & ((rng.random(item.shape) >= share) | last)
    order = np.argsort(~keep, axis=1, kind="stable")
    kept = keep.sum(axis=1, keepdims=True)
    room = np.arange(item.shape[1]) < kept

    def shorter(values: np.ndarray) -> np.ndarray:
        shape = values.shape[:2] + (1,) * (values.ndim - 2)
        moved = np.take_along_axis(values, order.reshape(shape), axis=1)
        return np.where(room.reshape(shape), moved, -1 if values is item else 0).astype(values.dtype)

    short = {field.name: shorter(getattr(batch.short, field.name)) for field in dataclasses.fields(batch.short)}
    return dataclasses.replace(
        batch, short=ItemFeatures(**short), visible=np.minimum(batch.visible, kept).astype(batch.visible.dtype)
    )


def average_lists(items_ExNxK: np.ndarray, scores_ExNxK: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k items of the highest mean probability over E lists per request; one that a list lacks has 0 there."""
    lists, n, _ = items_ExNxK.shape
    items = items_ExNxK.transpose(1, 0, 2).reshape(n, -1)
    scores = scores_ExNxK.transpose(1, 0, 2).reshape(n, -1).astype(np.float64)
    top = np.max(scores, axis=1, keepdims=True, initial=-np.inf)
    share = np.where(items < 0, 0.0, np.exp(scores - np.where(np.isfinite(top), top, 0.0)))
    order = np.argsort(items, axis=1, kind="stable")
    items, share = np.take_along_axis(items, order, 1), np.take_along_axis(share, order, 1)
    opens = np.ones(items.shape, bool)
    opens[:, 1:] = items[:, 1:] != items[:, :-1]
    start = np.flatnonzero(opens)
    total = np.zeros(items.shape)
    total.reshape(-1)[start] = np.add.reduceat(share.reshape(-1), start)
    total = np.where(opens & (items >= 0), total, -1.0)
    best = np.argsort(-total, axis=1, kind="stable")[:, :k]
    total, found = np.take_along_axis(total, best, 1), np.take_along_axis(items, best, 1)
    with np.errstate(divide="ignore"):
        mean = np.log(np.maximum(total, 0.0) / lists) + np.where(np.isfinite(top), top, 0.0)
    missing = total < 0
    return np.where(missing, -1, found).astype(np.int32), np.where(missing, -np.inf, mean).astype(np.float32)


def slice_ragged(ragged: Ragged | None, part: slice) -> Ragged | None:
    """The requests of `part` of (flat values, offsets)."""
    if ragged is None:
        return None
    flat, offsets = ragged
    own = offsets[part.start : part.stop + 1]
    return flat[own[0] : own[-1]], own - own[0]


def scores_of_items(recommender: Recommender, examples: np.ndarray, items_NxJ: np.ndarray) -> np.ndarray:
    """Log-probability float32 [N,J] of items by the teacher-forced forward pass: the oracle of a beam's score."""
    codes = recommender.ids.codes[items_NxJ]
    batch = make_batch(recommender.dataset, recommender.ids.codes, recommender.recipe.model, examples, 1, frozen=True)
    batch = dataclasses.replace(
        batch,
        targets=codes.astype(np.int32),
        target_item=items_NxJ,
        target_weight=np.ones(items_NxJ.shape, np.float32),
        visible=np.repeat(batch.visible[:, :1], items_NxJ.shape[1], axis=1),
    )

    trie = device_trie(recommender.ids.trie) if recommender.recipe.model.softmax == "legal" else None

    @jax.jit
    def score(params, rows, bias, batch, trie):
        local, _ = recommender.model.localise(batch, touched_only=False)
        logits, _ = recommender.model.bind(params)(local, rows, bias, None)
        if trie is None:
            levels = [jax.nn.log_softmax(level) for level in logits]
        else:
            levels = [log_p for log_p, _ in legal_log_probabilities(logits, batch.targets, trie)]
        per_level = [
            jnp.take_along_axis(log_p, batch.targets[..., i : i + 1], axis=-1)[..., 0] for i, log_p in enumerate(levels)
        ]
        return sum(per_level[1:], start=per_level[0])

    return np.asarray(score(recommender.state.params, recommender.rows, recommender.state.bias, batch, trie))
