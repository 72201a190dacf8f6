"""The contracts between rooms: canonical tables, vocabulary sizes, and the `Batch` a model reads.

Nothing here imports jax, so that loader workers stay light; `onerec_jax.model.batch` registers the dataclasses as pytrees.

Axis letters: B examples, L events of one pathway, T targets of one request, C code levels, F user features, Y feedback labels.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 1
DAY_MS = 86_400_000

# Feedback labels this project knows; a source provides any subset, and `card.json` lists those present, in this order.
LABELS = (
    "click",
    "long_view",
    "finish",
    "like",
    "follow",
    "comment",
    "forward",
    "hate",
    "profile_enter",
)

EVENT_COLUMNS = {
    "user_id": "integer or string",
    "item_id": "integer or string",
    "timestamp_ms": "integer, milliseconds, >= 0",
    "playtime_ms": "integer, milliseconds, null when unknown (optional)",
    "duration_ms": "integer, milliseconds, null when unknown (optional)",
    "request_id": "integer or string (optional)",
}
ITEM_COLUMNS = {
    "item_id": "integer or string, unique",
    "author_id": "integer or string (optional)",
    "tags": "list of integers or strings (optional)",
    "duration_ms": "integer (optional)",
    "upload_time_ms": "integer (optional)",
    "text": "string (optional)",
    "embedding": "fixed-size list of float32 (optional)",
}
USER_COLUMNS = {"user_id": "integer or string, unique"}


@dataclasses.dataclass(frozen=True)
class Tables:
    """Canonical tables of one log: what every source returns and `prepare` reads.

    `events` may come in any order; equal timestamps of one user keep their order in the table. `users` has one column per
    categorical feature beside `user_id`. `skipped` counts rows a source left out, by reason.
    """

    events: pa.Table
    items: pa.Table
    users: pa.Table
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Every size a model needs to know of its data: rows of each table and classes of each head."""

    users: int
    items: int
    authors: int
    tags: int
    user_features: tuple[int, ...]  # classes of each categorical user feature beside the id
    labels: tuple[str, ...]
    codebook_sizes: tuple[int, ...]  # per level, the dedup level included

    @property
    def levels(self) -> int:
        return len(self.codebook_sizes)


@dataclasses.dataclass(frozen=True)
class ItemFeatures:
    """One pathway's events, oldest first, left-aligned; padding has `item == -1` and any value elsewhere."""

    item: Any  # int32 [B,L], row of the item, -1 = padding
    codes: Any  # int32 [B,L,C], semantic ID
    author: Any  # int32 [B,L]
    tag: Any  # int32 [B,L]
    age_s: Any  # float32 [B,L], seconds from the event to the request (causal encoder: since the event before)
    playtime_s: Any  # float32 [B,L], negative = unknown
    duration_s: Any  # float32 [B,L], negative = unknown
    feedback: Any  # uint8 [B,L,Y], 0 or 1 per label


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one training step reads. All shapes are static; T targets of a request share one context."""

    user: Any  # int32 [B,1+F], user row, then categorical features
    short: ItemFeatures  # the most recent events
    positive: ItemFeatures  # the most recent events with a positive label
    lifelong: ItemFeatures  # the compressed whole history
    targets: Any  # int32 [B,T,C]
    target_item: Any  # int32 [B,T], -1 = no target
    target_weight: Any  # float32 [B,T], 0 = no target
    visible: Any  # int32 [B,T], how many of `short`'s events precede the target's request time
    feedback: Any  # uint8 [B,T,Y]
    playtime_s: Any  # float32 [B,T]
