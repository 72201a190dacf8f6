"""The requests of a split as evaluation sees them: what was seen before, and what turned out relevant."""

from __future__ import annotations

import dataclasses

import numpy as np

from onerec_jax.config import Recipe
from onerec_jax.data.store import Dataset
from onerec_jax.errors import InputError
from onerec_jax.evaluate.metrics import Ragged


@dataclasses.dataclass(frozen=True)
class Requests:
    """N requests that have at least one relevant item."""

    examples: np.ndarray  # int64 [N,4], as in the dataset
    context: Ragged  # item rows before each request, oldest first
    relevant: Ragged  # distinct relevant item rows
    time_ms: np.ndarray  # int64 [N], time of the request
    user: np.ndarray  # int64 [N], user rows

    def __len__(self) -> int:
        return len(self.examples)


def _ragged(parts: list[np.ndarray]) -> Ragged:
    offsets = np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int64)
    return (np.concatenate(parts) if parts else np.zeros(0)).astype(np.int32), offsets


def collect_requests(dataset: Dataset, recipe: Recipe) -> Requests:
    """The split's examples with a relevant item, all of them or a fixed random sample of `evaluate.max_examples`.

    Raises:
        InputError: no example of the split has a relevant item.
    """
    settings = recipe.evaluate
    examples = np.asarray(dataset.examples(settings.split))
    if settings.max_examples and len(examples) > settings.max_examples:
        # the same sample whatever the run's seed, so that seeds of one board are compared on the same requests
        chosen = np.random.default_rng(0).choice(len(examples), settings.max_examples, replace=False)
        examples = examples[np.sort(chosen)]
    kept, contexts, relevants, times = [], [], [], []
    for first in range(0, len(examples), 4096):
        part = examples[first : first + 4096]
        for example, history in zip(part, dataset.histories(part[:, 0]), strict=True):
            _, cut, start, stop = example.tolist()
            item = history.item[start:stop]
            relevant = item if settings.targets == "all" else item[history.positive[start:stop]]
            if len(relevant):
                kept.append(example)
                contexts.append(history.item[:cut])
                relevants.append(np.unique(relevant))
                times.append(history.timestamp_ms[start])
    examples = np.asarray(kept, np.int64).reshape(-1, 4)
    if not len(examples):
        raise InputError(
            f"no {settings.split} request of {dataset.directory} has a relevant item; "
            "set evaluate.targets=all or change data.split"
        )
    return Requests(examples, _ragged(contexts), _ragged(relevants), np.asarray(times), examples[:, 0])
