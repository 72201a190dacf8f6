"""Sources, splits and everything else from a log to a dataset directory."""

from __future__ import annotations

import datetime
from typing import Annotated, Literal

from pydantic import Field, model_validator

from onerec_jax.config.section import Section, setting


class SimulatorSource(Section):
    """The built-in short-video platform; needs no download."""

    kind: Literal["simulator"] = "simulator"
    users: int = setting(2_000, "simulated users", ge=1)
    items: int = setting(5_000, "items uploaded over the simulated period", ge=2)
    events_per_user: float = setting(80.0, "mean number of impressions per user over the whole period", gt=0)
    days: int = setting(14, "length of the simulated period", ge=1)
    topics: int = setting(24, "topics; items and interests live around them", ge=2)
    embedding_dim: int = setting(32, "width of the content embeddings it publishes", ge=2)
    drift: float = setting(0.15, "how far a user's interests move per day, 0 = fixed", ge=0)


class KuaiRandSource(Section):
    """KuaiRand-Pure: the publisher's CSV layout, or the Parquet extract of its standard logs."""

    kind: Literal["kuairand"] = "kuairand"
    path: str = setting(..., "folder with log_standard_*.csv or *.parquet and the feature files")


class AmazonSource(Section):
    """Amazon reviews: 5-core JSON lines with metadata, or `user item item ...` sequences with items.jsonl."""

    kind: Literal["amazon"] = "amazon"
    path: str = setting(..., "folder with reviews_*_5.json[.gz] (+ meta_*.json[.gz]), or *.txt + items.jsonl")


class ParquetSource(Section):
    """Any log: Parquet files and a mapping from canonical columns to theirs."""

    kind: Literal["parquet"] = "parquet"
    events: str = setting(..., "Parquet file or glob of events")
    items: str | None = setting(None, "Parquet file or glob of items; without it items are those of the events")
    users: str | None = setting(None, "Parquet file or glob of users; without it users are those of the events")
    columns: dict[str, str] = setting(
        {}, "canonical name -> column name in the files, e.g. {item_id: video_id, like: is_like}"
    )


Source = Annotated[
    SimulatorSource | KuaiRandSource | AmazonSource | ParquetSource,
    Field(discriminator="kind", description="where the log comes from"),
]


class SplitConfig(Section):
    """How events are divided into train, valid and test."""

    kind: Literal["leave_one_out", "time"] = setting(
        "time", "leave_one_out: last event tests, the one before validates; time: by the two moments below"
    )
    valid_from: str | float = setting(
        0.8, "time split: ISO date-time (UTC unless it has an offset), or share of all events before it"
    )
    test_from: str | float = setting(
        0.9, "time split: ISO date-time (UTC unless it has an offset), or share of all events before it"
    )
    context: Literal["rolling", "frozen"] = setting(
        "rolling", "time split: contexts of valid/test end at each request (rolling) or at the split (frozen)"
    )

    @model_validator(mode="after")
    def _ordered(self) -> SplitConfig:
        for name in ("valid_from", "test_from"):
            value = getattr(self, name)
            if isinstance(value, str):
                try:
                    datetime.datetime.fromisoformat(value)
                except ValueError:
                    raise ValueError(
                        f"split.{name} must be an ISO date-time or a share in (0, 1), not '{value}'"
                    ) from None
            elif not 0 < value < 1:
                raise ValueError(f"split.{name} must be an ISO date-time or a share in (0, 1), not {value}")
        return self


class DataConfig(Section):
    """From a log to a dataset directory."""

    source: Source
    directory: str | None = setting(None, "dataset directory; default datasets/NAME")
    split: SplitConfig = SplitConfig()
    positive_labels: tuple[str, ...] = setting(
        ("long_view", "like", "follow", "comment", "forward"),
        "an event with any of these counts as positive; empty = every event",
    )
    request_gap_s: float = setting(1800.0, "a pause longer than this starts a new request", ge=0)
    targets: int = setting(4, "T, most targets of one request; longer requests are cut into several", ge=1)
    target_stride: int = setting(4, "distance between the starts of the requests cut from a long one", ge=1)
    min_history: int = setting(1, "events a train example's context must have", ge=0)
    max_history: int = setting(100_000, "events kept per user, the most recent", ge=1)
    lifelong_cluster_size: int = setting(20, "M, lifelong clusters are split until none is larger", ge=1)
    lifelong_refresh: int = setting(2_000, "events after which a user's lifelong clusters are made anew", ge=1)
    shards: int = setting(1, "ArrayRecord files the histories are spread over", ge=1)
