"""What changed from one version of the semantic IDs to the next."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.table import Table

from onerec_jax.tokenizer.quality import collisions
from onerec_jax.tokenizer.semantic_ids import SemanticIds


def shared(codes: np.ndarray) -> np.ndarray:
    """Which items bool [I] share their ID int [I,C] with another one."""
    _, group, sizes = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    return sizes[group.ravel()] > 1


def version_report(
    old: SemanticIds, new: SemanticIds, old_items: np.ndarray | None = None, new_items: np.ndarray | None = None
) -> dict[str, Any]:
    """Items whose ID was kept, changed, added or removed, and how many items collide, as plain values.

    `changed_by_level` is the share of the items of both versions that have another code at each level; a level that one
    version does not have counts as changed. `collision_rate_added` is the share of added items that share their ID with any.

    Args:
        old, new: the versions.
        old_items, new_items: the caller's ids of their rows, by which items are matched; by default the row is the item.
    """
    old_items = np.arange(len(old.codes)) if old_items is None else old_items
    new_items = np.arange(len(new.codes)) if new_items is None else new_items
    _, in_old, in_new = np.intersect1d(old_items, new_items, return_indices=True)
    added = np.setdiff1d(np.arange(len(new_items)), in_new)
    levels = max(old.codes.shape[1], new.codes.shape[1])
    before, after = (
        np.pad(codes, ((0, 0), (0, levels - codes.shape[1])), constant_values=-1)
        for codes in (old.codes[in_old], new.codes[in_new])
    )
    differs = before != after
    changed = int(differs.any(1).sum())
    return {
        "items_old": len(old_items),
        "items_new": len(new_items),
        "kept": len(in_old) - changed,
        "changed": changed,
        "added": len(added),
        "removed": len(old_items) - len(in_old),
        "changed_by_level": [float(share) for share in differs.mean(0)] if len(in_old) else [0.0] * levels,
        "codebook_sizes_old": list(old.codebook_sizes),
        "codebook_sizes_new": list(new.codebook_sizes),
        "collision_rate_old": collisions(old.codes)["collision_rate"],
        "collision_rate_new": collisions(new.codes)["collision_rate"],
        "collision_rate_added": float(shared(new.codes)[added].mean()) if len(added) else 0.0,
    }


def table(report: dict[str, Any]) -> Table:
    """The report as a table to print."""
    out = Table("semantic IDs", "old", "new", title="Semantic IDs, from version to version")
    out.add_row("items", f"{report['items_old']:,}", f"{report['items_new']:,}")
    sizes = (" × ".join(f"{size:,}" for size in report[f"codebook_sizes_{name}"]) for name in ("old", "new"))
    out.add_row("codes per level", *sizes)
    rates = (f"{report[f'collision_rate_{name}']:.2%}" for name in ("old", "new"))
    out.add_row("items that share their ID", *rates)
    out.add_row("  of the added items", "", f"{report['collision_rate_added']:.2%}")
    for name in ("kept", "changed", "added", "removed"):
        out.add_row(f"items {name}", "", f"{report[name]:,}")
    for number, share in enumerate(report["changed_by_level"], 1):
        out.add_row(f"level {number}: codes changed", "", f"{share:.2%}")
    return out
