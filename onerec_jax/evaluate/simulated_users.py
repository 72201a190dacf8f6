"""Fresh users of a simulated platform: their histories so far, the request they make now, and what they do next.

Axis letters: N users, K places of a list.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from onerec_jax.config import DataConfig
from onerec_jax.data.histories import dense_events, positive_labels, user_histories
from onerec_jax.data.prepare import history_records, lifelong_rows
from onerec_jax.data.records import EVENT, ROW, History, decode, event_rows
from onerec_jax.data.schema import Tables
from onerec_jax.data.sources.simulator import Columns
from onerec_jax.data.store import Dataset
from onerec_jax.generate.ranking import Ragged

PAUSE_MS = 2_000  # between the end of one video and the next


class SimulatedUsers:
    """Users that the log of a dataset does not have, in the dataset's place where batches are made.

    They are the users that come after `source.users`. They begin with what the platform showed them up to where the
    dataset's train part ends, made into histories as those of the dataset are. The requests that they make now stand
    at the end of their histories as an event of which only the time is filled in, so that `make_batch` counts ages up
    to it; no context reaches it.

    Attributes:
        user_ids: their ids on the platform, int64 [N].
        user_features: codes of the categorical user features, int32 [N,F], coded as in the dataset.
        request_ms: when they make their request, int64 [N].
        items, item_ids, labels, lifelong_refresh: those of the dataset.
    """

    def __init__(self, dataset: Dataset, fresh: tuple[pa.Table, pa.Table], *, lifelong: bool = True):
        """Puts them where the dataset's train part ends.

        Args:
            dataset: made of a simulated log.
            fresh: events and users of `fresh_log` on the same platform.
            lifelong: keep lifelong clusters, which only a model with that pathway reads.
        """
        log, table = fresh
        users = table.num_rows
        self.items, self.item_ids, self.labels = dataset.items, dataset.item_ids, dataset.labels
        self.lifelong_refresh = dataset.lifelong_refresh
        settings = {**dataset.card["settings"], "source": dataset.card["source"]}
        self._data = DataConfig.model_validate(settings)
        self._positive = positive_labels(self._data.positive_labels, dataset.labels)
        self._content = dataset.items.embedding if lifelong else None
        self.user_ids = table["user_id"].to_numpy()
        self.user_features = _coded(table, dataset)
        known = log.filter(pc.less_equal(log["timestamp_ms"], dataset.train_end_ms))  # pyright: ignore
        tables = Tables(known, pa.table({"item_id": dataset.item_ids}), table)
        events = dense_events(tables, dataset.items.duration_s, self._positive)
        histories = user_histories(events, range(users), self._data.max_history)
        self._first = [decode(record) for record in history_records(histories, self._content, self._data)]
        self._train_end_ms = dataset.train_end_ms
        self.begin()

    def begin(self) -> None:
        """Puts them back to where train ends."""
        self._histories, self.request_ms = self._first, np.full(len(self._first), self._train_end_ms)

    def __len__(self) -> int:
        return len(self.user_ids)

    def histories(self, user_rows: np.ndarray | list[int]) -> list[History]:
        """Histories of several users, each with the request at its end."""
        rows = np.asarray(user_rows, np.int64)
        request = np.zeros(len(rows), EVENT)
        request["timestamp_ms"] = self.request_ms[rows]
        own = [self._histories[row] for row in rows.tolist()]
        return [h._replace(rows=np.append(h.rows, r)) for h, r in zip(own, request.view(ROW), strict=True)]

    @property
    def examples(self) -> np.ndarray:
        """(user row, cut, start, stop) of the requests, int64 [N,4]: everything before is the context."""
        cut = np.array([len(history.rows) for history in self._histories])
        return np.stack([np.arange(len(self)), cut, cut, cut + 1], axis=1)

    @property
    def not_to_show(self) -> Ragged:
        """Item rows of what each user has met, and of what is not uploaded when the request is made."""
        later = [np.flatnonzero(self.items.upload_ms > moment) for moment in self.request_ms.tolist()]
        rows = [np.concatenate([h.item, late]) for h, late in zip(self._histories, later, strict=True)]
        offsets = np.cumsum([0, *(len(own) for own in rows)])
        return np.concatenate(rows).astype(np.int32), offsets

    def ask(self, moment_ms: int) -> None:
        """Makes them ask at this moment; who is still watching then asks afterwards."""
        last = [history.events[-1:] for history in self._histories]
        end_ms = [0 if not len(e) else int(e["timestamp_ms"][0] + 1000.0 * e["playtime_s"][0]) + PAUSE_MS for e in last]
        self.request_ms = np.maximum(moment_ms, end_ms)

    def watch(self, shown_NxK: np.ndarray, responses: Columns) -> None:
        """Appends what was shown for the request, one video after the other from its moment on.

        Args:
            shown_NxK: int item rows, -1 = nothing.
            responses: as `respond` gives them, [N,K] each; those to nothing are not read.
        """
        filled = shown_NxK >= 0
        busy_ms = np.where(filled, responses["playtime_ms"] + PAUSE_MS, 0)
        begins_ms = self.request_ms[:, None] + np.cumsum(busy_ms, axis=1) - busy_ms
        feedback = np.stack([responses[label][filled] for label in self.labels], axis=1)
        liked = [responses[label][filled] for label in self._positive]
        rows = event_rows(
            shown_NxK[filled],
            begins_ms[filled],
            (responses["playtime_ms"][filled] / 1000).astype(np.float32),
            (responses["duration_ms"][filled] / 1000).astype(np.float32),
            feedback.astype(np.uint8),
            np.any(liked, axis=0) if liked else np.ones(len(feedback), bool),
        )
        per_user = np.split(rows.view(ROW), np.cumsum(filled.sum(axis=1))[:-1])
        self._histories = [self._longer(h, new) for h, new in zip(self._histories, per_user, strict=True)]

    def _longer(self, history: History, new: np.ndarray) -> History:
        """The history with events ROW [n] at its end, and lifelong clusters as of every R-th event."""
        rows, refresh = np.concatenate([history.rows, new]), self.lifelong_refresh
        starts, clusters = [*history.snapshot_start.tolist()], [history.clusters]
        if self._content is not None:
            events = rows.view(EVENT)
            for stop in range(len(starts) * refresh, len(rows) + 1, refresh):
                vectors = self._content[events["item"][:stop]]
                made = lifelong_rows(events[:stop], vectors, self._data.lifelong_cluster_size)
                clusters.append(made.view(ROW))
                starts.append(starts[-1] + len(made))
        return History(rows, history.labels, np.array(starts, np.int32), np.concatenate(clusters))


def _coded(table: pa.Table, dataset: Dataset) -> np.ndarray:
    """The categorical columns of a table of users in the codes of the dataset, int32 [N,F]; 0 = a class not in it."""
    logged, columns = pq.read_table(dataset.directory / "users.parquet"), []
    for f, name in enumerate(dataset.card["vocabulary"]["user_features"]):
        code = dict(zip(logged[name].to_pylist(), dataset.user_features[:, f].tolist(), strict=True))
        columns.append([code.get(value, 0) for value in table[name].to_pylist()])
    return np.array(columns, np.int32).T.reshape(table.num_rows, len(columns))
