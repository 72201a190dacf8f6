"""From a run to what its export directory holds: facts, arrays, titles, and a sample of users."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from onerec_jax.config import TablesConfig
from onerec_jax.data.batch import lifelong_run, positive_run
from onerec_jax.data.histories import positive_labels
from onerec_jax.data.records import EVENT, unpack_feedback
from onerec_jax.data.store import Dataset
from onerec_jax.data.tensor_files import Tensors
from onerec_jax.export.artifact import Contents, catalogue_arrays
from onerec_jax.export.card import model_card
from onerec_jax.export.quantize import DType
from onerec_jax.generate.recommender import Recommender
from onerec_jax.model.tables import SPREAD_ROWS, STRIPES, table_shapes
from onerec_jax.tokenizer.semantic_ids import SemanticIds

LEAST_EXCLUDED, MOST_EXCLUDED = 64, 4096  # items that a request may leave out
EVENTS = 200  # of a sample user's history, and as many as the model reads


def contents_of(recommender: Recommender, dtype: DType, k: int, width: int, users: int) -> Contents:
    """What `write_artifact` writes of a run.

    Args:
        dtype: as which the weights will be stored.
        k: items of a list.
        width: beams.
        users: sample users, the first of those with a history; 0 = none.
    """
    dataset, ids, model = recommender.dataset, recommender.ids, recommender.model
    state, settings = recommender.state, recommender.recipe.evaluate
    lists = {"k": k, "width": width, "item_weight": settings.item_weight}
    config = facts(recommender) | {"lists": lists}
    clustered = bool(model.config.lifelong_length)
    return Contents(
        config=config,
        model=model,
        params=state.params,
        tables=settled(state.tables, model.config.tables),
        bias=state.bias,
        catalogue=catalogue_arrays(
            ids.trie,
            dataset.items.author,
            dataset.items.tag,
            dataset.items.duration_s,
            recommender.shift,
            lifelong_content(dataset, ids) if clustered else None,
        ),
        trie=ids.trie,
        item_ids=dataset.item_ids.tolist(),
        titles=list(dataset.items.text),
        users=sample_users(dataset, model.config, users),
        tokenizer={
            "kind": ids.kind, "levels": ids.levels, "codebook_sizes": list(ids.codebook_sizes), "origin": ids.origin,
        },
        tokenizer_arrays=dict(ids.arrays),
        card=model_card(recommender, config, dtype, users),
    )  # fmt: skip


def facts(recommender: Recommender) -> dict[str, Any]:
    """`config.json` but for what is chosen on exporting."""
    dataset, ids, model, recipe = recommender.dataset, recommender.ids, recommender.model, recommender.recipe
    shapes = table_shapes(model.config, model.vocabulary)
    wanted = recipe.data.positive_labels
    return {
        "name": recipe.name,
        "step": int(recommender.state.step),
        "recipe_digest": recipe.digest(),
        "dataset": dataset.card.get("content_hash"),
        "model": model.config.model_dump(mode="json"),
        "vocabulary": dataclasses.asdict(model.vocabulary),
        "levels": ids.levels,
        "labels": list(dataset.labels),
        "positive_labels": list(positive_labels(wanted, dataset.labels)),
        "exclude_seen": recipe.evaluate.exclude_seen,
        "excluded": room_for_seen(dataset),
        "lifelong": {
            "refresh": dataset.lifelong_refresh,
            "cluster_size": recipe.data.lifelong_cluster_size,
            "content": "embedding" if dataset.items.embedding is not None else "decoded",
        },
        "tables": {
            name: {"rows": rows, "width": width, "stripes": STRIPES if rows >= SPREAD_ROWS else 0}
            for name, (rows, width) in shapes.items()
        },
        "items_per_id": int(np.diff(ids.trie.item_start).max(initial=1)),
        "branching": list(ids.trie.branching),
    }


def room_for_seen(dataset: Dataset) -> int:
    """How many items a request has room to leave out: a power of two that holds the longest history, within bounds."""
    longest = max(int(dataset.train_stops.max(initial=0)), int(dataset.examples("test")[:, 3].max(initial=0)))
    return min(MOST_EXCLUDED, max(LEAST_EXCLUDED, 1 << (longest - 1).bit_length()))


def settled(tables: Any, settings: TablesConfig) -> dict[str, Tensors]:
    """Tables as a forward pass reads them: rows that wait for admission are zero."""
    found: dict[str, Tensors] = {}
    for name, table in tables.items():
        rows = np.array(table["rows"])
        if "appearances" in table:
            rows[np.asarray(table["appearances"]) < settings.admit_after] = 0
        found[name] = {"rows": rows}
    return found


def lifelong_content(dataset: Dataset, ids: SemanticIds) -> np.ndarray:
    """Vectors float32 [I,D] to cluster histories by: the dataset's embeddings, else what the semantic IDs decode to.

    Without embeddings the dataset was clustered by hashed features that it does not keep.
    """
    return ids.decode(ids.codes) if dataset.items.embedding is None else dataset.items.embedding


def sample_users(dataset: Dataset, model: Any, count: int) -> list[dict[str, Any]]:
    """The first users with a history as JSON values: id, row, features and the latest events, oldest first.

    `seen` are items met before those; `positive` and `lifelong`, where the model has these pathways, what stands in them.
    """
    found: list[dict[str, Any]] = []
    for row in range(dataset.num_users):
        if len(found) == count:
            break
        history = dataset.history(row)
        n = len(history.item)
        if not n:
            continue
        kept = max(EVENTS, model.short_length + 1)
        user = {
            "id": dataset.user_ids[row : row + 1].tolist()[0],
            "row": row,
            "features": dataset.user_features[row].tolist(),
            "events": event_values(history.rows[-kept:], dataset.labels),
            "seen": np.unique(history.item[:-kept]).tolist(),
        }
        if model.positive_length:
            user["positive"] = event_values(positive_run(history, n, model.positive_length), dataset.labels)
        if model.lifelong_length:
            run = lifelong_run(history, n, model.lifelong_length, dataset.lifelong_refresh)
            user["lifelong"] = event_values(run, dataset.labels)
        found.append(user)
    return found


def event_values(rows: np.ndarray, labels: tuple[str, ...]) -> list[dict[str, Any]]:
    """Events ROW [n] as JSON values, null for what is unknown."""
    events = rows.view(EVENT)
    feedback = unpack_feedback(events, len(labels))
    return [
        {
            "item": int(event["item"]),
            "timestamp_ms": int(event["timestamp_ms"]),
            "playtime_s": _known(event["playtime_s"]),
            "duration_s": _known(event["duration_s"]),
            "feedback": [label for label, on in zip(labels, given, strict=True) if on],
        }
        for event, given in zip(events, feedback, strict=True)
    ]


def _known(seconds: np.float32) -> float | None:
    return None if seconds < 0 else float(seconds)
