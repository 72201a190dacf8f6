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
from onerec_jax.data.store import Dataset
from onerec_jax.generate.beam import Beams, make_beam_search, resolve_items
from onerec_jax.generate.inferences import average_lists, leave_out
from onerec_jax.generate.ranking import Ragged, rank
from onerec_jax.model.batch import Batch
from onerec_jax.model.onerec import Model
from onerec_jax.model.prefixes import device_trie, legal_log_probabilities, legal_trie
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
        trie = device_trie(self.ids.trie)
        items, scores = np.full((len(examples), k), -1, np.int32), np.full((len(examples), k), -np.inf, np.float32)
        batches = self._batches(examples, settings.batch_size, inference)
        total = -(-len(examples) // settings.batch_size)
        for first, count, batch in track(batches, "beam search", total, disable=not progress, transient=True):
            beams = self._search(self.state.params, self.rows, self.state.bias, batch, trie)
            leaf, score = np.asarray(beams.leaf)[:count], np.asarray(beams.score)[:count]
            part = slice(first, first + count)
            exclude = slice_ragged(seen, part)
            if beams.item_score is None:
                items[part], scores[part] = resolve_items(self.ids.trie, leaf, score, k, exclude)
                continue
            most = settings.beam_width * int(np.diff(self.ids.trie.item_start).max())
            found, score = resolve_items(self.ids.trie, leaf, score, max(k, most), exclude)
            own = np.asarray(beams.item_score)[:count]
            score = score + settings.item_weight * np.take_along_axis(own, np.maximum(found, 0), axis=1)
            best = np.argsort(-score, axis=1, kind="stable")[:, :k]
            items[part], scores[part] = np.take_along_axis(found, best, 1), np.take_along_axis(score, best, 1)
        return items, scores

    @functools.cached_property
    def _search(self) -> Callable[..., Beams]:
        """Compiled once, however many inferences follow."""
        return make_beam_search(self.model, self.recipe.evaluate.beam_width)

    @functools.cached_property
    def _score_all(self) -> Callable[..., jax.Array]:
        """(params, rows, bias, batch) -> log P of every item [B,I], by a model with only an item head."""

        @jax.jit
        def score(params, rows, bias, batch: Batch):
            batch, _ = self.model.localise(batch, touched_only=False)
            return jax.nn.log_softmax(self.model.bind(params)(batch, rows, bias, None)[0][0][:, 0])

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

    trie = legal_trie(recommender.recipe.model, recommender.ids.trie)

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
