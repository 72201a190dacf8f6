"""Registers the data contracts as pytrees, so that a `Batch` can pass through `jax.jit`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from onerec_jax.data.schema import Batch, ItemFeatures

for _contract in (ItemFeatures, Batch):
    jax.tree_util.register_dataclass(
        _contract, data_fields=[f.name for f in dataclasses.fields(_contract)], meta_fields=[]
    )


def pathways(batch: Batch) -> dict[str, ItemFeatures]:
    """The event pathways that this batch has, by name, in the order of the context."""
    named = {"short": batch.short, "positive": batch.positive, "lifelong": batch.lifelong}
    return {name: events for name, events in named.items() if events.item.shape[-1]}


def replace_pathways(batch: Batch, changed: dict[str, Any]) -> Batch:
    return dataclasses.replace(batch, **changed)


__all__ = ["Batch", "ItemFeatures", "pathways", "replace_pathways"]
