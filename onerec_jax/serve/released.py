"""An export as the server holds it: the model, its catalogue, and sample users to try it with."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from onerec_jax.config import ModelConfig, TablesConfig
from onerec_jax.data.records import event_rows, unpack_feedback
from onerec_jax.data.schema import Vocabulary
from onerec_jax.data.tensor_files import HASHES
from onerec_jax.export.artifact import load_artifact
from onerec_jax.generate.step import Catalogue
from onerec_jax.model.onerec import Model, build
from onerec_jax.model.table_rows import Table
from onerec_jax.model.tables import SPREAD_ROWS, stored_rows, stripe, table_shapes


@dataclasses.dataclass(frozen=True)
class SampleUser:
    """A user of the log that the model was trained on; n events, F features."""

    id: int | str
    row: int
    features: np.ndarray  # int32 [F]
    events: np.ndarray  # EVENT [n], the latest, oldest first
    older: np.ndarray  # EVENT, positive events before those that the model reads
    lifelong: np.ndarray | None  # EVENT, what stands in the lifelong pathway; None = to be made of `events`
    seen: np.ndarray  # int32, all items met


@dataclasses.dataclass(frozen=True)
class Released:
    """What is served; I items, C code levels, D content dimensions, Y labels."""

    name: str
    step: int
    digest: str  # changes with any file of the export
    model: Model
    params: Any
    tables: dict[str, Table]
    bias: dict[str, Array]
    catalogue: Catalogue
    item_ids: list[int | str]  # by item row
    titles: list[str]
    codes: np.ndarray  # int32 [I,C]
    author: np.ndarray  # int32 [I]
    tag: np.ndarray  # int32 [I]
    duration_s: np.ndarray  # float32 [I], -1 = unknown
    content: np.ndarray | None  # float32 [I,D], of lifelong clusters
    positive_labels: tuple[str, ...]  # any of which makes an event positive; empty = every event is
    lifelong_refresh: int  # R, events between two snapshots of lifelong clusters
    cluster_size: int  # M, most events of a cluster
    list_length: int  # by default
    width: int  # beams by default
    item_weight: float
    exclude_seen: bool  # by default
    samples: list[SampleUser]
    stranger: int  # user row of people whom the log does not know

    @property
    def vocabulary(self) -> Vocabulary:
        return self.model.vocabulary

    @property
    def labels(self) -> tuple[str, ...]:
        return self.vocabulary.labels

    @functools.cached_property
    def item_row(self) -> dict[str, int]:
        """Item rows by id, as text."""
        return {str(item): row for row, item in enumerate(self.item_ids)}

    @functools.cached_property
    def users(self) -> dict[str, SampleUser]:
        """Sample users by id, as text."""
        return {str(user.id): user for user in self.samples}

    def feedback(self, events: np.ndarray) -> np.ndarray:
        """The feedback of rows EVENT [n], uint8 [n,Y]."""
        return unpack_feedback(events, len(self.labels))

    def positive(self, feedback: np.ndarray) -> np.ndarray:
        """Which events are positive bool [n], by their feedback uint8 [n,Y]."""
        return positive_events(feedback, self.labels, self.positive_labels)


def load_released(directory: str | Path) -> Released:
    """Reads an export directory.

    Raises:
        InputError: there is none, it is of another format version, or a file of it is missing, changed or added.
    """
    artifact = load_artifact(directory)
    config, catalogue = artifact.config, artifact.catalogue
    params, tables, bias = artifact.parameters
    model = build(_local(artifact.model.config), artifact.vocabulary)
    tables, stranger = with_stranger(tables, model)
    labels, positive = artifact.vocabulary.labels, tuple(config["positive_labels"])
    return Released(
        name=config["name"],
        step=config["step"],
        digest=hashlib.sha256((artifact.directory / HASHES).read_bytes()).hexdigest(),
        model=model,
        params=params,
        tables=tables,
        bias=bias,
        catalogue=artifact.on_device,
        item_ids=artifact.item_ids,
        titles=artifact.titles,
        codes=catalogue["codes"],
        author=catalogue["author"],
        tag=catalogue["tag"],
        duration_s=catalogue["duration_s"],
        content=catalogue.get("embedding"),
        positive_labels=positive,
        lifelong_refresh=config["lifelong"]["refresh"],
        cluster_size=config["lifelong"]["cluster_size"],
        list_length=config["lists"]["k"],
        width=config["lists"]["width"],
        item_weight=config["lists"]["item_weight"],
        exclude_seen=config["exclude_seen"],
        samples=[_sample_user(values, labels, positive) for values in artifact.users],
        stranger=stranger,
    )


def _local(config: ModelConfig) -> ModelConfig:
    """The same model for one device, whatever it is, and for tables that are only read."""
    moe = config.moe.model_copy(update={"backend": "auto", "transport": "local"})
    return config.model_copy(update={"attention": "auto", "remat": "none", "moe": moe, "tables": TablesConfig()})


def _sample_user(values: dict[str, Any], labels: tuple[str, ...], positive: tuple[str, ...]) -> SampleUser:
    """A line of `users.jsonl`."""
    events, lifelong = _events(values["events"], labels, positive), values.get("lifelong")
    liked = _events(values.get("positive", []), labels, positive)
    kept = int(events["positive"].sum())  # of the positive run its last ones
    return SampleUser(
        id=values["id"],
        row=values["row"],
        features=np.array(values["features"], np.int32),
        events=events,
        older=liked[: max(0, len(liked) - kept)],
        lifelong=None if lifelong is None else _events(lifelong, labels, positive),
        seen=np.union1d(np.array(values["seen"], np.int32), events["item"]),
    )


def _events(events: list[dict[str, Any]], labels: tuple[str, ...], positive: tuple[str, ...]) -> np.ndarray:
    """Rows EVENT [n] of events as an export lists them."""
    feedback = np.array([[label in e["feedback"] for label in labels] for e in events], np.uint8)
    feedback = feedback.reshape(len(events), len(labels))

    def seconds(name: str) -> np.ndarray:
        return np.array([-1 if e[name] is None else e[name] for e in events], np.float32)

    return event_rows(
        np.array([e["item"] for e in events], np.int32),
        np.array([e["timestamp_ms"] for e in events], np.int64),
        seconds("playtime_s"),
        seconds("duration_s"),
        feedback,
        positive_events(feedback, labels, positive),
    )


def positive_events(feedback: np.ndarray, labels: tuple[str, ...], positive: tuple[str, ...]) -> np.ndarray:
    """Which events bool [n] have one of the positive labels, by their feedback uint8 [n,Y]; all, where there are no such."""
    if not positive:
        return np.ones(len(feedback), bool)
    return np.any(feedback[:, [labels.index(label) for label in positive]], axis=1)


def with_stranger(tables: dict[str, Table], model: Model) -> tuple[dict[str, Table], int]:
    """The tables with one user more, the mean of all, and that user's row: for people whom the log does not know.

    Where users share rows by hashing, strangers share one as well. A spread table may have no place left, which is so for one
    number of users in 3,072; strangers are then taken for the first user.
    """
    users = model.vocabulary.users
    rows = table_shapes(model.config, model.vocabulary).get("user", (0, 0))[0]
    if rows < users:
        return tables, users
    known = jnp.asarray(tables["user"]["rows"])
    mean = jnp.mean(known[stripe(jnp.arange(rows), rows)].astype(jnp.float32), axis=0).astype(known.dtype)
    if rows < SPREAD_ROWS:
        grown = jnp.concatenate([known, mean[None]])
    elif rows < stored_rows(rows):
        grown = known.at[stripe(jnp.asarray(rows), rows)].set(mean)
    else:
        return tables, 0
    return {**tables, "user": {**tables["user"], "rows": grown}}, users
