"""Lists for several queries at a time, by programs that are compiled once for each of a few shapes."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from onerec_jax.data.batch import lifelong_run, make_batch
from onerec_jax.data.prepare import lifelong_rows
from onerec_jax.data.records import EVENT, ROW, History
from onerec_jax.data.schema import Batch
from onerec_jax.data.store import Dataset
from onerec_jax.generate.step import ListOptions, make_recommend_step
from onerec_jax.serve.released import Released
from onerec_jax.serve.requests import MAX_IDS, MAX_LEFT_OUT, Query

# Lists of items to leave out or to keep to are padded to one of these lengths; the first two are compiled when a server starts.
LIST_SIZES = (64, MAX_IDS, MAX_LEFT_OUT)
WARM_SIZES = LIST_SIZES[:2]


class Kind(NamedTuple):
    """What queries of one batch have in common."""

    beams: int
    diversity: float
    limited: bool  # whether there is a list of items to keep to


class Shape(NamedTuple):
    """What a program is compiled for."""

    kind: Kind
    batch: int
    exclude: int
    allow: int  # 0 = no such list


class Answer(NamedTuple):
    """A list, best first."""

    items: np.ndarray  # int32 [<= k], item rows
    scores: np.ndarray  # float32 [<= k], log P


@dataclasses.dataclass(frozen=True)
class Items:
    """Of `data.items.ItemArrays` what a batch is made from."""

    author: np.ndarray
    tag: np.ndarray


class RequestHistories:
    """Queries in place of a dataset, whose users they are: what `make_batch` reads of one.

    An event at the time of the request stands after the context, as the first target does in training; nothing of it but its
    time is read. What stands in the lifelong pathway is made here, and handed on as the clusters of a snapshot that reaches to
    the end of the context.
    """

    lifelong_refresh = 1  # hence the snapshot is always the latest, and no event is after it

    def __init__(self, queries: list[Query], released: Released):
        self.items = Items(released.author, released.tag)
        self.labels = released.labels
        self.user_features = np.stack([query.user_features for query in queries])
        self._queries = queries
        self._released = released

    def histories(self, rows: np.ndarray) -> list[History]:
        return [self._history(self._queries[row]) for row in rows.tolist()]

    def _history(self, query: Query) -> History:
        rows = query.events
        lifelong = self._lifelong(rows) if query.lifelong is None else query.lifelong
        starts = np.zeros(len(rows) + 1, np.int32)
        starts[-1] = len(lifelong) if len(rows) else 0
        if query.request_ms is not None:
            request = np.zeros(1, EVENT)
            request["timestamp_ms"] = query.request_ms
            rows = np.concatenate([rows, request])
        return History(rows.view(ROW), len(self.labels), starts, lifelong.view(ROW))

    def _lifelong(self, events: np.ndarray) -> np.ndarray:
        """Clusters of the events up to the latest snapshot of a dataset, then the events after it; EVENT."""
        released = self._released
        length, refresh = released.model.config.lifelong_length, released.lifelong_refresh
        clusters = events[:0]
        until = len(events) // refresh * refresh
        if until and length > len(events) - until:
            assert released.content is not None, "an export with a lifelong pathway has content"
            clusters = lifelong_rows(events[:until], released.content[events["item"][:until]], released.cluster_size)
        starts = np.zeros(until // refresh + 1, np.int32)
        starts[-1] = len(clusters)
        history = History(events.view(ROW), len(self.labels), starts, clusters.view(ROW))
        return lifelong_run(history, len(events), length, refresh).view(EVENT)


def features(queries: list[Query], released: Released) -> Batch:
    """The batch of some queries, as those of training are made; NumPy arrays, one placeholder target each."""
    dataset = cast(Dataset, RequestHistories(queries, released))
    cuts = np.array([len(query.events) for query in queries], np.int64)
    examples = np.stack([np.arange(len(queries)), cuts, cuts, cuts], axis=1)
    batch = make_batch(dataset, released.codes, released.model.config, examples, 1, frozen=True)
    batch.user[:, 0] = [query.user for query in queries]
    return batch


class Engine:
    """The model on the device. Two threads may use it: one that compiles, one that runs.

    Args:
        released: what is served.
        batch_sizes: queries are padded to the smallest of these that holds them; ascending.
    """

    def __init__(self, released: Released, batch_sizes: tuple[int, ...]):
        self.released = released
        self.batch_sizes = batch_sizes
        self._programs: dict[Shape, Callable[..., Any]] = {}
        self._compiling = threading.Lock()
        self._weights = jax.device_put((released.params, released.tables, released.bias, released.catalogue))
        self._nobody = Query(
            user=0,
            user_features=np.zeros(len(released.vocabulary.user_features), np.int32),
            events=np.zeros(0, EVENT),
            lifelong=None,
            request_ms=None,
            exclude=np.zeros(0, np.int32),
            allow=None,
            k=1,
            beams=1,
            diversity=0.0,
        )

    def kind(self, query: Query) -> Kind:
        return Kind(query.beams, query.diversity, query.allow is not None)

    def shape(self, queries: list[Query]) -> Shape:
        """The program that queries of one kind need."""
        kind = self.kind(queries[0])
        exclude = _fitting(LIST_SIZES, max(len(query.exclude) for query in queries))
        allow = (
            _fitting(LIST_SIZES, max(len(query.allow) for query in queries if query.allow is not None))
            if kind.limited
            else 0
        )
        return Shape(kind, _fitting(self.batch_sizes, len(queries)), exclude, allow)

    def warm_shapes(self, beams: int) -> list[Shape]:
        """The programs of queries that ask for nothing special."""
        kind = Kind(beams, 0.0, False)
        return [Shape(kind, size, exclude, 0) for size in self.batch_sizes for exclude in WARM_SIZES]

    def compiled(self, shape: Shape) -> bool:
        return shape in self._programs

    def compile(self, shape: Shape) -> None:
        """Compiles a program and runs it once; does nothing where it is there."""
        with self._compiling:
            if shape in self._programs:
                return
            options = ListOptions(
                k=shape.kind.beams,
                width=shape.kind.beams,
                item_weight=self.released.item_weight,
                diversity=shape.kind.diversity,
            )
            given = self._arguments([self._nobody], shape)
            program = make_recommend_step(self.released.model, options).lower(*self._weights, *given).compile()
            jax.block_until_ready(program(*self._weights, *given))
            self._programs[shape] = program

    def run(self, queries: list[Query]) -> list[Answer]:
        """The lists of queries of one kind, whose program is compiled."""
        shape = self.shape(queries)
        lists = self._programs[shape](*self._weights, *self._arguments(queries, shape))
        items, scores = np.asarray(lists.items), np.asarray(lists.scores)
        counts = [min(query.k, int((row >= 0).sum())) for query, row in zip(queries, items, strict=False)]
        return [Answer(items[n, :count], scores[n, :count]) for n, count in enumerate(counts)]

    def _arguments(self, queries: list[Query], shape: Shape) -> tuple[Batch, np.ndarray, np.ndarray | None]:
        padded = queries + [self._nobody] * (shape.batch - len(queries))
        exclude = _lists([query.exclude for query in padded], shape.exclude)
        allow = _lists([() if query.allow is None else query.allow for query in padded], shape.allow)
        return features(padded, self.released), exclude, allow if shape.allow else None


def _fitting(sizes: tuple[int, ...], needed: int) -> int:
    return next(size for size in sizes if size >= needed)


def _lists(rows: list[Any], size: int) -> np.ndarray:
    """int32 [B,size], -1 = none."""
    padded = np.full((len(rows), size), -1, np.int32)
    for n, row in enumerate(rows):
        padded[n, : len(row)] = row
    return padded
