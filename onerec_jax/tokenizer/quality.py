"""How good a set of semantic IDs is: what the codes lose, how evenly they are used, how many items share an ID."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from rich.table import Table

from onerec_jax.tokenizer.kmeans import Rows


def collisions(codes: np.ndarray) -> dict[str, Any]:
    """Shares and sizes of the groups of items with equal codes int [I,C].

    `collision_rate` is the share of items that share their ID with another one.
    """
    _, group, sizes = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    return {
        "distinct_ids": len(sizes),
        "collision_rate": float((sizes[group.ravel()] > 1).mean()),
        "items_per_id_largest": int(sizes.max()),
        "items_per_id_mean": float(sizes.mean()),
    }


def level_usage(column: np.ndarray, size: int) -> dict[str, Any]:
    """Utilisation (share of codes in use) and entropy in nats (at most log K) of one level's codes int [I]."""
    share = np.bincount(column, minlength=size) / len(column)
    used = share[share > 0]
    return {"codes": size, "utilisation": len(used) / size, "entropy": float(max(0.0, -(used * np.log(used)).sum()))}


def reconstruction(vectors: np.ndarray, decoded: np.ndarray) -> dict[str, float]:
    """Mean squared error per value, and OpenOneRec's relative loss (REFERENCE 1.1).

    The latter is mean |x - y| / (max(|x|, |y|) + 1e-4) over all values of vectors float32 [I,D].
    """
    error = vectors - decoded
    largest = np.maximum(np.abs(vectors), np.abs(decoded)) + 1e-4
    return {
        "reconstruction_mse": float(np.mean(error**2, dtype=np.float64)),
        "reconstruction_relative": float(np.mean(np.abs(error) / largest, dtype=np.float64)),
    }


def quality(
    vectors: Rows,
    decode: Callable[[np.ndarray], np.ndarray],
    codes: np.ndarray,
    codebook_sizes: tuple[int, ...],
    levels: int,
    batch_size: int = 65_536,
) -> dict[str, Any]:
    """The quality report of semantic IDs, as plain values.

    Args:
        vectors: float32 [I,D], what was quantized.
        decode: what codes int32 [N,L] give back of it, float32 [N,D].
        codes: int32 [I,C]; the first `levels` columns are the quantizer's, a further one tells items of one ID apart.
        codebook_sizes: C sizes.
        levels: L.
        batch_size: rows read and decoded at once; bounds memory, not the result but for rounding.
    """
    parts = [slice(first, min(first + batch_size, len(codes))) for first in range(0, len(codes), batch_size)]
    losses = [reconstruction(np.asarray(vectors[part]), decode(codes[part, :levels])) for part in parts]
    weights = [part.stop - part.start for part in parts]
    return {
        "items": len(codes),
        **{name: float(np.average([loss[name] for loss in losses], weights=weights)) for name in losses[0]},
        "levels": [level_usage(column, size) for column, size in zip(codes.T, codebook_sizes, strict=True)],
        **collisions(codes),
        "quantized_collision_rate": collisions(codes[:, :levels])["collision_rate"],
    }


def table(quality: dict[str, Any]) -> Table:
    """The report as a table to print."""
    out = Table("semantic IDs", "value", title=f"Semantic IDs of {quality['items']:,} items")
    out.add_row("reconstruction, mean squared error", f"{quality['reconstruction_mse']:.6f}")
    out.add_row("reconstruction, relative loss", f"{quality['reconstruction_relative']:.4f}")
    for number, level in enumerate(quality["levels"], 1):
        out.add_row(f"level {number}: codes in use", f"{level['utilisation']:.4f} of {level['codes']:,}")
        out.add_row(f"level {number}: entropy in nats", f"{level['entropy']:.4f} of {np.log(level['codes']):.4f}")
    out.add_row("distinct IDs", f"{quality['distinct_ids']:,}")
    out.add_row("items that share their ID", f"{quality['collision_rate']:.2%}")
    if quality["quantized_collision_rate"] != quality["collision_rate"]:
        out.add_row("  before items were told apart", f"{quality['quantized_collision_rate']:.2%}")
    mean, largest = quality["items_per_id_mean"], quality["items_per_id_largest"]
    out.add_row("items per ID, mean and largest", f"{mean:.3f}, {largest:,}")
    return out
