"""A trained run as a function from requests to lists of items."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.progress import track

from onerec_jax.config import Recipe
from onerec_jax.data.pipeline import make_batch
from onerec_jax.data.store import Dataset
from onerec_jax.data.train_log import train_log
from onerec_jax.generate.beam import Beams, make_beam_search, resolve_items
from onerec_jax.generate.inferences import average_lists, leave_out
from onerec_jax.generate.label_shift import label_shift, shifted
from onerec_jax.generate.ranking import Ragged, rank
from onerec_jax.generate.step import Catalogue, ListOptions, Lists, make_catalogue, make_recommend_step
from onerec_jax.model.batch import Batch
from onerec_jax.model.onerec import Model
from onerec_jax.model.prefixes import DeviceTrie, device_trie, legal_log_probabilities
from onerec_jax.parallel.mesh import data_parallel, make_mesh, on_mesh
from onerec_jax.parallel.sharding import put_batch
from onerec_jax.tokenizer.semantic_ids import SemanticIds
from onerec_jax.train.state import TrainState

SHIFT_USERS = 4096
FREQUENCIES = "item_frequencies.npy"  # in the directory of an RL run: of the run it started from


def kept_frequencies(run: Path) -> np.ndarray | None:
    """Item frequencies float64 [I] that an RL run keeps of the run it started from; None: the run keeps none."""
    kept = run / FREQUENCIES
    if not kept.exists():
        return None
    with kept.open("rb") as file:
        return np.load(file, allow_pickle=False)


@dataclasses.dataclass(frozen=True)
class Recommender:
    """Model, parameters, data and semantic IDs of one run; of an RL run, the item frequencies where RL began."""

    run: Path
    recipe: Recipe
    dataset: Dataset
    ids: SemanticIds
    model: Model
    state: TrainState
    frequencies: np.ndarray | None = None  # float64 [I], of `item_frequencies` where it is not the model's own

    @functools.cached_property
    def _mesh(self) -> Mesh:
        return make_mesh(self.recipe.mesh)

    def with_state(self, state: TrainState) -> Recommender:
        """The same with other parameters; what was compiled is kept."""
        other = dataclasses.replace(self, state=state)
        kept = ("_mesh", "_trie", "_search", "_free_search", "_score_all", "_score_codes", "_steps")
        vars(other).update({name: value for name, value in vars(self).items() if name in kept})
        return other

    def _batches(self, examples: np.ndarray, size: int, inference: int = 0) -> Iterator[tuple[int, int, Batch]]:
        """(first example, how many are real, batch) with contexts that end at each example's cut.

        Every `inference` but the first leaves some events out.
        """
        ways = data_parallel(self._mesh)
        size = -(-min(size, max(1, len(examples))) // ways) * ways
        for first in range(0, len(examples), size):
            part = examples[first : first + size]
            padded = part[np.resize(np.arange(len(part)), size)]
            batch = make_batch(self.dataset, self.ids.codes, self.recipe.model, padded, 1, frozen=True)
            if inference:
                rng = np.random.default_rng((self.recipe.seed, inference, first))
                batch = leave_out(batch, self.recipe.evaluate.left_out, rng)
            yield first, len(part), put_batch(batch, self._mesh)

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

        By trie-constrained beam search. A model with only an item head scores every item. One with both heads takes the
        items of all beams and as many of its best items, and ranks them by the sum of their log-probability by codes and
        `evaluate.item_weight` times that by the item head.
        """
        if self.recipe.model.head == "items":
            return self._rank_all(examples, seen, k, progress, inference)
        settings = self.recipe.evaluate
        items, scores = np.full((len(examples), k), -1, np.int32), np.full((len(examples), k), -np.inf, np.float32)
        batches = self._batches(examples, settings.batch_size, inference)
        total = -(-len(examples) // settings.batch_size)
        for first, count, batch in track(batches, "beam search", total, disable=not progress, transient=True):
            beams = self._search(self.state.params, self.state.tables, self.state.bias, batch, self._trie)
            leaf, score = np.asarray(beams.leaf)[:count], np.asarray(beams.score)[:count]
            part = slice(first, first + count)
            exclude = slice_ragged(seen, part)
            if beams.item_score is None:
                items[part], scores[part] = resolve_items(self.ids.trie, leaf, score, k, exclude)
                continue
            most = settings.beam_width * int(np.diff(self.ids.trie.item_start).max())
            found, score = resolve_items(self.ids.trie, leaf, score, max(k, most), exclude)
            own = self._corrected(np.asarray(beams.item_score)[:count])
            other, other_score = self._best_items(batch, own, exclude, max(k, settings.beam_width))
            known = (other[:, :, None] == found[:, None, :]).any(axis=2)
            found = np.concatenate([found, np.where(known, -1, other)], axis=1)
            score = np.concatenate([score, other_score], axis=1)
            score = score + settings.item_weight * np.take_along_axis(own, np.maximum(found, 0), axis=1)
            score = np.where(found < 0, -np.inf, score)
            best = np.argsort(-score, axis=1, kind="stable")[:, :k]
            items[part], scores[part] = np.take_along_axis(found, best, 1), np.take_along_axis(score, best, 1)
        return items, scores

    def _best_items(
        self, batch: Batch, own_nxI: np.ndarray, exclude: Ragged | None, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k items [n,k] that the item head puts first (-1 = no more), and their log-probability by codes [n,k].

        n may be fewer than the batch holds: what pads a batch has no scores.
        """
        items = rank(own_nxI, exclude, k)
        padded = np.resize(np.maximum(items, 0), (batch.user.shape[0], items.shape[1]))
        return items, self.log_p_of_items(batch, padded)[: len(items)]

    def log_p_of_items(self, batch: Batch, items_BxJ: np.ndarray) -> np.ndarray:
        """Log-probability float32 [B,J] of items by their codes, in the teacher-forced forward pass."""
        batch = dataclasses.replace(
            batch,
            targets=self.ids.codes[items_BxJ].astype(np.int32),
            target_item=items_BxJ.astype(np.int32),
            target_weight=np.ones(items_BxJ.shape, np.float32),
            visible=np.repeat(np.asarray(batch.visible)[:, :1], items_BxJ.shape[1], axis=1),
        )
        return np.asarray(self._score_codes(self.state.params, self.state.tables, self.state.bias, batch, self._trie))

    @functools.cached_property
    def _trie(self) -> DeviceTrie:
        return device_trie(self.ids.trie, self.recipe.model)

    @functools.cached_property
    def catalogue(self) -> Catalogue:
        """All items, for the step of `generate/step.py`."""
        items = self.dataset.items
        return make_catalogue(self.ids.trie, self.recipe.model, items.author, items.tag, self.shift)

    @functools.cached_property
    def _steps(self) -> dict[ListOptions, Callable[..., Lists]]:
        """Compiled once for each way in which lists are made."""
        return {}

    def lists(
        self, examples: np.ndarray, exclude: list[np.ndarray], allow: list[np.ndarray] | None, options: ListOptions
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lists of item rows int32 [N,k] (-1 = nothing) and their scores by the step that is exported and served.

        Args:
            examples: as `recommend`.
            exclude: items that each request may not list.
            allow: the only items that each request may list, None = all.
            options: how lists are made.
        """
        if options not in self._steps:
            self._steps[options] = on_mesh(self._mesh, make_recommend_step(self.model, options))
        step = self._steps[options]
        left_out, kept = padded_lists(exclude), None if allow is None else padded_lists(allow)
        parts = []
        for first, count, batch in self._batches(examples, self.recipe.evaluate.batch_size):
            rows = np.resize(np.arange(first, first + count), batch.user.shape[0])
            given = put_batch((left_out[rows], None if kept is None else kept[rows]), self._mesh)
            found = step(self.state.params, self.state.tables, self.state.bias, self.catalogue, batch, *given)
            parts.append([np.asarray(part)[:count] for part in found])
        items, scores = zip(*parts, strict=True)
        return np.concatenate(items), np.concatenate(scores)

    @functools.cached_property
    def _score_codes(self) -> Callable[..., jax.Array]:
        """(params, tables, bias, batch, trie) -> log P of every target [B,T], the sum over its codes."""

        @jax.jit
        def score(params, tables, bias, batch: Batch, trie: DeviceTrie):
            local, rows = self.model.read(tables, batch)
            logits, _ = self.model.bind(params)(local, rows, bias, None, trie)
            if self.recipe.model.softmax == "legal":
                levels = [log_p for log_p, _ in legal_log_probabilities(logits, batch.targets, trie)]
            else:
                levels = [jax.nn.log_softmax(level) for level in logits]
            own = [jnp.take_along_axis(p, batch.targets[..., i, None], axis=-1) for i, p in enumerate(levels)]
            return jnp.sum(jnp.concatenate(own, axis=-1), axis=-1)

        return on_mesh(self._mesh, score)

    @functools.cached_property
    def _search(self) -> Callable[..., Beams]:
        """Compiled once, however many inferences follow."""
        return on_mesh(self._mesh, make_beam_search(self.model, self.recipe.evaluate.beam_width))

    @functools.cached_property
    def _free_search(self) -> Callable[..., Beams]:
        return on_mesh(self._mesh, make_beam_search(self.model, self.recipe.evaluate.beam_width, free=True))

    @functools.cached_property
    def _score_all(self) -> Callable[..., jax.Array]:
        """(params, tables, bias, batch, trie) -> log P of every item [B,I] by the item head."""

        @jax.jit
        def score(params, tables, bias, batch: Batch, trie: DeviceTrie):
            return self.model.item_scores(params, batch, self.model.encode(params, tables, bias, batch), trie)

        return on_mesh(self._mesh, score)

    def _corrected(self, log_p_BxI: np.ndarray) -> np.ndarray:
        """The item head's log-probabilities, corrected where `evaluate.label_shift_days` asks for it."""
        return log_p_BxI if self.shift is None else shifted(log_p_BxI, self.shift)

    def item_frequencies(self) -> np.ndarray:
        """Mean P(item) float64 [I] by the item head over `SHIFT_USERS` users as they are where train ends.

        Of an RL run that of the run it started from (`kept_frequencies`): by its own, whatever RL made more frequent would be
        taken for something that the log had more of, and be undone.
        """
        if self.frequencies is not None:
            return self.frequencies
        users = self.dataset.num_users
        chosen = np.sort(np.random.default_rng(0).permutation(users)[:SHIFT_USERS])
        examples = self.dataset.requests_after_train(chosen)
        total = np.zeros(self.dataset.num_items)
        for _, count, batch in self._batches(examples, self.recipe.evaluate.batch_size):
            found = self._score_all(self.state.params, self.state.tables, self.state.bias, batch, self._trie)
            total += np.exp(np.asarray(found)[:count], dtype=np.float64).sum(axis=0)
        return total / len(examples)

    @functools.cached_property
    def shift(self) -> np.ndarray | None:
        """What `label_shift` adds to the item head's log-probabilities, float32 [I]; None where it is not asked for."""
        settings = self.recipe.evaluate
        if not settings.label_shift_days:
            return None
        return label_shift(
            np.maximum(self.item_frequencies(), np.finfo(np.float32).tiny),
            train_log(self.dataset).recent_positives(settings.label_shift_days),
            settings.label_shift_prior,
        )

    def _rank_all(
        self, examples: np.ndarray, seen: Ragged | None, k: int, progress: bool, inference: int
    ) -> tuple[np.ndarray, np.ndarray]:
        size = self.recipe.evaluate.batch_size
        items, scores = [np.zeros((0, k), np.int32)], [np.zeros((0, k), np.float32)]
        total = -(-len(examples) // size)
        for first, count, batch in track(
            self._batches(examples, size, inference), "scoring", total, disable=not progress, transient=True
        ):
            given = (self.state.params, self.state.tables, self.state.bias, batch, self._trie)
            found = self._corrected(np.asarray(self._score_all(*given))[:count])
            items.append(rank(found, slice_ragged(seen, slice(first, first + count)), k))
            best = np.take_along_axis(found, np.maximum(items[-1], 0), axis=1)
            scores.append(np.where(items[-1] < 0, -np.inf, best))
        return np.concatenate(items), np.concatenate(scores)

    def legality(self, examples: np.ndarray) -> float:
        """Share of unconstrained beams whose semantic ID belongs to an item."""
        search = self._free_search
        legal = beams_seen = 0
        for _, count, batch in self._batches(examples, self.recipe.evaluate.batch_size):
            beams = search(self.state.params, self.state.tables, self.state.bias, batch, self._trie)
            codes = np.asarray(beams.codes)[:count].reshape(-1, self.ids.codes.shape[1])
            legal += int((self.ids.trie.find(codes) >= 0).sum())
            beams_seen += len(codes)
        return legal / max(1, beams_seen)


def padded_lists(lists: list[np.ndarray]) -> np.ndarray:
    """Lists of items as one array int32 [N,X], -1 = none; X is a power of two, so that few shapes are compiled."""
    longest = max((len(items) for items in lists), default=0)
    padded = np.full((len(lists), 1 << max(0, longest - 1).bit_length()), -1, np.int32)
    for row, items in zip(padded, lists, strict=True):
        row[: len(items)] = items
    return padded


def slice_ragged(ragged: Ragged | None, part: slice) -> Ragged | None:
    """The requests of `part` of (flat values, offsets)."""
    if ragged is None:
        return None
    flat, offsets = ragged
    own = offsets[part.start : part.stop + 1]
    return flat[own[0] : own[-1]], own - own[0]


def scores_of_items(recommender: Recommender, examples: np.ndarray, items_NxJ: np.ndarray) -> np.ndarray:
    """Log-probability float32 [N,J] of items by the teacher-forced forward pass: the oracle of a beam's score."""
    batch = make_batch(recommender.dataset, recommender.ids.codes, recommender.recipe.model, examples, 1, frozen=True)
    return recommender.log_p_of_items(batch, items_NxJ)
