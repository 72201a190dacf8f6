"""The training input: `(seed, step) -> Batch`, the same global batch on any number of processes.

Order is decided in index space: Grain shuffles the example numbers of each epoch anew and repeats them without end;
step s takes numbers `[s * batch_size, (s + 1) * batch_size)` of that order, and each process loads its own consecutive
share of them. With `train.length_buckets` the numbers of `_POOL` steps are first sorted by the length of their windows,
so that a step's requests are of like length; all of them are still taken once per epoch. Grain then runs this pure
function of the step ahead of the training loop, in threads or processes. The position is the step alone.

With `train.masked_share` an example of train is a user, and which events are its targets is drawn anew at every step.
With `train.kept_share` only the requests, or there the targets, of the longest play time are trained on.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from onerec_jax.config import Recipe
from onerec_jax.data.batch import TargetWeights, make_batch, make_masked_batch, window_lengths
from onerec_jax.data.schema import Batch, ItemFeatures
from onerec_jax.data.selection import least_playtime, longest_watched
from onerec_jax.data.store import Dataset
from onerec_jax.errors import DamagedError, InputError

__all__ = ["Pipeline", "make_batch"]

_LAST_STEP = 1 << 40
_POOL = 32


class Pipeline:
    """An endless iterator over this process's rows of each step's global batch.

    Args:
        dataset: where the examples are.
        codes: semantic ID of each item, int32 [I,C].
        recipe: `train.batch_size`, loader settings, `data.targets`, the model's pathways and the seed.
        split: which examples; "end": every user's next request, after all of train, which has no targets.
        process_index: which of the processes this is.
        process_count: processes that share each global batch.

    Raises:
        InputError: the batch does not divide among the processes, the split is empty, or `codes` is of another dataset.
    """

    def __init__(
        self,
        dataset: Dataset,
        codes: np.ndarray,
        recipe: Recipe,
        split: str = "train",
        process_index: int = 0,
        process_count: int = 1,
    ):
        if recipe.train.batch_size % process_count:
            raise InputError(
                f"train.batch_size {recipe.train.batch_size} must be a multiple of the {process_count} processes"
            )
        masked = recipe.train.masked_share and split == "train"
        if masked:
            users = np.flatnonzero(dataset.train_stops >= 2)
            examples = np.stack([users, *[dataset.train_stops[users]] * 3], axis=1)
        elif split == "end":
            examples = dataset.requests_after_train()
        else:
            examples = dataset.examples(split)
            if split == "train":
                examples = longest_watched(dataset, examples, recipe.train.kept_share, recipe.train.kept_per)
        if not len(examples):
            raise InputError(f"{dataset.directory} has no {split} examples; data.split of its recipe leaves none")
        if len(codes) != dataset.num_items:
            raise InputError(
                f"the semantic IDs cover {len(codes)} items but {dataset.directory} has {dataset.num_items}; "
                "make them anew with `onerec tokenize RECIPE`"
            )
        import grain  # Imports jax, which processes that only prepare data do not need.

        least = least_playtime(dataset, recipe.train.kept_share, recipe.train.kept_per) if masked else None
        order = _Order(
            grain.MapDataset.range(len(examples)).shuffle(seed=recipe.seed % 2**32).repeat(),
            window_lengths(recipe.model, examples, recipe.data.targets, frozen=_frozen(dataset, split))
            if recipe.train.length_buckets
            else None,
            (*recipe.train.length_buckets, recipe.model.short_length),
            recipe.train.batch_size,
            recipe.seed,
        )
        rows = recipe.train.batch_size // process_count
        self._grain = grain
        damaged = Damaged(dataset, recipe.faults.bad_records)
        self._load = _Load(dataset, codes, recipe, split, examples, order, process_index * rows, rows, least, damaged)
        self._train = recipe.train
        self._step = 0
        self._iterator: Any = None

    def batch_at(self, step: int) -> Batch:
        """This process's rows of the global batch of a step."""
        return _as_batch(self._load(step))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = iter(self._ahead(self._step))
        arrays = next(self._iterator)
        self._step += 1
        return _as_batch(arrays)

    def _ahead(self, step: int) -> Any:
        options = self._grain.ReadOptions(num_threads=self._train.threads, prefetch_buffer_size=self._train.prefetch)
        loaded = self._grain.MapDataset.range(step, _LAST_STEP).map(self._load).to_iter_dataset(options)
        if not self._train.workers:
            return loaded
        from absl import flags

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's worker processes read a flag, and fail before any parsing.
        per_worker = -(-self._train.prefetch // self._train.workers)
        return loaded.mp_prefetch(
            self._grain.MultiprocessingOptions(self._train.workers, per_worker_buffer_size=per_worker)
        )

    def state(self) -> dict[str, int]:
        """The position: the step of the next batch. It holds for any number of processes, workers and threads."""
        return {"step": self._step}

    def restore(self, state: dict[str, int]) -> None:
        """Continues at a position that `state` gave."""
        self.close()
        self._step = int(state["step"])

    def close(self) -> None:
        """Ends loader processes and drops batches made ahead; iterating starts them again."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None and hasattr(iterator, "close"):
            iterator.close()


class _Order:
    """Step -> the example numbers of its global batch, and the length that its short pathway needs."""

    def __init__(self, shuffled: Any, lengths: np.ndarray | None, buckets: tuple[int, ...], size: int, seed: int):
        self._shuffled, self._lengths, self._buckets, self._size, self._seed = shuffled, lengths, buckets, size, seed
        self._pool: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __call__(self, step: int) -> tuple[np.ndarray, int]:
        if self._lengths is None:
            return self._numbers(step * self._size, self._size), self._buckets[-1]
        index, place = divmod(step, _POOL)
        made = self._pool  # one read: other threads may put another pool there
        if made[0] != index:
            made = self._pool = (index, self._sorted(index, self._lengths))
        numbers = made[1][place]
        longest = self._lengths[numbers].max()
        return numbers, next(length for length in self._buckets if length >= longest)

    def _numbers(self, first: int, count: int) -> np.ndarray:
        return np.array([self._shuffled[i] for i in range(first, first + count)])

    def _sorted(self, index: int, lengths: np.ndarray) -> np.ndarray:
        """The numbers of `_POOL` steps, shortest windows together, as steps in random order [_POOL, size]."""
        numbers = self._numbers(index * _POOL * self._size, _POOL * self._size)
        numbers = numbers[np.argsort(lengths[numbers], kind="stable")].reshape(_POOL, self._size)
        return np.random.default_rng((self._seed, index)).permutation(numbers)


@dataclasses.dataclass(frozen=True)
class _Load:
    """Step -> arrays of one process's rows; loader processes receive it as it stands."""

    dataset: Dataset
    codes: np.ndarray
    recipe: Recipe
    split: str
    examples: np.ndarray
    order: _Order
    first: int
    rows: int
    least_playtime_s: np.ndarray | None  # float64 [U], what a masked target must have been played, None = nothing
    damaged: Damaged

    def __call__(self, step: int) -> dict[str, Any]:
        numbers, length = self.order(step)
        chosen = self.examples[numbers[self.first : self.first + self.rows]]
        lost = self.damaged.among(chosen[:, 0])
        while True:
            if lost.any():  # their places are taken by a request that can be read, and weigh nothing
                chosen[lost] = chosen[np.argmin(lost)]
            try:
                batch = self._batch(step, chosen, length)
            except DamagedError as error:
                lost |= self.damaged.found(chosen[:, 0], str(error))
            else:
                batch.target_weight[lost] = 0
                return _as_arrays(batch)

    def _batch(self, step: int, chosen: np.ndarray, length: int) -> Batch:
        recipe, train = self.recipe, self.recipe.train
        mine = slice(self.first, self.first + self.rows)
        model = recipe.model.model_copy(update={"short_length": length})
        weights = TargetWeights(train.negative_weight, train.half_life_at(step))
        given = self.dataset, self.codes, model
        if train.masked_share and self.split == "train":
            shape = train.batch_size, 1 + recipe.model.short_length  # of all processes, whose number must not matter
            random = np.random.default_rng((recipe.seed, step)).random(shape)[mine]
            users = chosen[:, 0]
            least = None if self.least_playtime_s is None else self.least_playtime_s[users]
            targets = recipe.data.targets
            return make_masked_batch(*given, users, targets, train.masked_share, random, weights, least)
        return make_batch(*given, chosen, recipe.data.targets, weights, frozen=_frozen(self.dataset, self.split))


def _frozen(dataset: Dataset, split: str) -> bool:
    """Whether contexts end at each example's cut, under a causal encoder too."""
    return split == "end" or (split != "train" and dataset.frozen)


class Damaged:
    """The users whose histories cannot be read; `faults.bad_records` says how many there may be."""

    def __init__(self, dataset: Dataset, share: float):
        self._dataset, self._share = dataset, share
        self._users: set[int] = set()

    def among(self, users_B: np.ndarray) -> np.ndarray:
        """Which of these are known to be damaged, bool [B]."""
        return np.array([user in self._users for user in users_B.tolist()])

    def found(self, users_B: np.ndarray, reason: str) -> np.ndarray:
        """Which of these are damaged, bool [B], now that one is, for this reason.

        Raises:
            DamagedError: more than may be, or all of these.
        """
        lost = np.array([not self._readable(user) for user in users_B.tolist()])
        new = set(users_B[lost].tolist()) - self._users
        self._users |= new
        limit = self._share * self._dataset.num_users
        if len(self._users) > limit or lost.all() or not lost.any():
            more = (
                f"; {len(self._users)} histories are damaged, faults.bad_records allows {int(limit)}"
                if self._share
                else ""
            )
            raise DamagedError(reason + more)
        for user in sorted(new):
            print(f"warning: {reason}: user row {user} is skipped, {len(self._users)} so far", file=sys.stderr)
        return lost

    def _readable(self, user: int) -> bool:
        try:
            self._dataset.history(user)
        except DamagedError:
            return False
        return True


def _as_arrays(batch: Batch) -> dict[str, Any]:
    """Plain nested dicts, which Grain moves between processes in shared memory."""
    return {name: vars(value) if isinstance(value, ItemFeatures) else value for name, value in vars(batch).items()}


def _as_batch(arrays: dict[str, Any]) -> Batch:
    fields = {name: ItemFeatures(**value) if isinstance(value, dict) else value for name, value in arrays.items()}
    return Batch(**fields)
