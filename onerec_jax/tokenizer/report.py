"""`report.html`: how good a set of semantic IDs is, as one page to open in a browser, with nothing to load.

This file counts and measures; `report.html` beside it lays out and draws. The page holds the numbers as JSON.
"""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onerec_jax.errors import InputError
from onerec_jax.tokenizer import alignment
from onerec_jax.tokenizer.content import train_co_occurrence
from onerec_jax.tokenizer.item_map import plane
from onerec_jax.tokenizer.kmeans import Rows
from onerec_jax.tokenizer.neighbours import neighbour_recall
from onerec_jax.tokenizer.quality import level_usage, reconstruction
from onerec_jax.tokenizer.semantic_ids import SemanticIds

if TYPE_CHECKING:
    from onerec_jax.data.store import Dataset

_WHOLE = 50_000  # items up to which the tree holds every one of them
_SAMPLED = 40_000  # items it holds of a larger catalogue
_CODES = 200_000  # codes of IDs listed in full
_TITLE_LETTERS = 1_000_000  # of all titles together, so that the page stays light
_MAP_ITEMS = 1_200
_CURVE_POINTS = 400
_HISTOGRAM_BARS = 24
_DECODED_ITEMS = 50_000
_SIMILARITIES = 400_000_000
_SHARED_BY = (1, 2, 3, 4, 5, 10, 20, 50, 100, 1000)  # items per ID: lower ends of the rows of the collision table


def write_report(ids: SemanticIds, dataset: Dataset, vectors: Rows, path: str | Path) -> None:
    """Writes the page. It appears whole or not at all, and is a function of the arguments.

    Vectors that are rows of a store are read in samples, and once in slices of the batch size that the IDs were made with.

    Args:
        ids: the semantic IDs, of any construction.
        dataset: theirs; gives titles, the items' own ids and what was clicked together.
        vectors: content vectors [I,D], or tokens [I,M,D], that the IDs were fitted on, before alignment.
        path: of the file; its folder is made if missing.

    Raises:
        InputError: the vectors are not those of the items, or the file cannot be written.
    """
    if (given := int(vectors.shape[0])) != len(ids.codes):
        raise InputError(f"a report of {len(ids.codes)} items needs as many content vectors; there are {given}")
    page, path = html(contents(ids, dataset, vectors)), Path(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def html(values: dict[str, Any]) -> str:
    """The page that shows the values of `contents`. Titles cannot end the script they stand in."""
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    template = resources.files("onerec_jax.tokenizer").joinpath("report.html").read_text(encoding="utf-8")
    return template.replace("{{REPORT}}", text)


def contents(ids: SemanticIds, dataset: Dataset, vectors: Rows) -> dict[str, Any]:
    """Everything that the page shows, as plain values."""
    seed = int(ids.origin.get("seed", 0))
    bounds = node_bounds(ids)
    quantized = alignment.project(ids.arrays, vectors)
    items = len(ids.codes)
    queries = min(20_000, max(500, _SIMILARITIES // items))
    flat = vectors.reshape(items, -1) if isinstance(vectors, np.ndarray) else vectors
    batch_size = ids.origin.get("tokenizer", {}).get("batch_size", 65_536)
    try:
        met = train_co_occurrence(dataset)
    except InputError:
        met = None  # nobody has two items in train
    return {
        "kind": ids.kind,
        "items": items,
        "quantizer_levels": ids.levels,
        "quality": ids.quality,
        "origin": ids.origin,
        "levels": [level_use(column, size) for column, size in zip(ids.codes.T, ids.codebook_sizes, strict=True)],
        "distinct": [len(starts) - 1 for starts in bounds[1:]],
        "reconstruction": reconstruction_by_level(ids, quantized, seed),
        "collisions": collisions(ids, dataset, bounds[ids.levels]),
        "neighbours": neighbour_recall(
            ids.codes[:, : ids.levels], flat, met, seed=seed, sample=queries, batch_size=batch_size
        ),
        "map": item_map(ids, dataset, quantized, seed),
        "tree": tree(ids, dataset, bounds),
    }


def node_bounds(ids: SemanticIds) -> list[np.ndarray]:
    """For each depth 0 to C of the trie, where the items of each node start in `trie.items`, and the end of the last."""
    item_start = ids.trie.item_start.astype(np.int64)
    return [item_start[ids.trie.leaf_starts(depth)] for depth in range(ids.trie.levels + 1)]


def level_use(column: np.ndarray, size: int) -> dict[str, Any]:
    """How evenly the codes int [I] of one level are used.

    `curve` is items per code, the most used first, at `_CURVE_POINTS` codes at most; `histogram` has rows (from, to,
    codes): the number of codes that have so many items.
    """
    used = np.sort(np.bincount(column, minlength=size))[::-1]
    points = np.unique(np.linspace(0, size - 1, min(size, _CURVE_POINTS)).round().astype(np.int64))
    width = -(-int(used[0]) // _HISTOGRAM_BARS)
    bars = np.bincount(-(-used // width))  # bar 0: the unused, bar b: more than (b - 1) width and up to b width
    return {
        "codes": size,
        "used": int((used > 0).sum()),
        "entropy": level_usage(column, size)["entropy"],
        "ceiling": float(np.log(size)),
        "largest": int(used[0]),
        "curve": [points.tolist(), used[points].tolist()],
        "histogram": [[0, 0, int(bars[0])]]
        + [[(bar - 1) * width + 1, bar * width, int(count)] for bar, count in enumerate(bars) if bar],
    }


def reconstruction_by_level(ids: SemanticIds, vectors: Rows, seed: int) -> list[dict[str, float]]:
    """What the first 0, 1, .. L codes give back of the quantized vectors [I,D], of a seeded sample where I is large.

    `explained` is the share of the vectors' variance, at least 0; no code at all gives their mean.
    """
    rows = np.arange(len(ids.codes))
    if len(rows) > _DECODED_ITEMS:
        rows = np.sort(np.random.default_rng(seed).choice(len(rows), _DECODED_ITEMS, replace=False))
    sample = np.asarray(vectors[rows], np.float32)
    given = [np.broadcast_to(sample.mean(0), sample.shape)]
    given += [ids.decode(ids.codes[rows, :depth]) for depth in range(1, ids.levels + 1)]
    losses = [reconstruction(sample, decoded) for decoded in given]
    spread = max(losses[0]["reconstruction_mse"], 1e-12)
    return [
        {
            "mse": loss["reconstruction_mse"],
            "relative": loss["reconstruction_relative"],
            "explained": max(0.0, 1 - loss["reconstruction_mse"] / spread),
        }
        for loss in losses
    ]


def title_width(shown: int) -> int:
    """Letters per title when so many of them are shown."""
    return max(40, min(90, _TITLE_LETTERS // max(1, shown)))


def titles(dataset: Dataset, rows: np.ndarray, width: int) -> list[str]:
    """The start of the items' texts, or nothing where they have none."""
    found = []
    for row in rows.tolist():
        text = " ".join((dataset.items.text[row] or "")[: 4 * width].split())
        found.append(text if len(text) <= width else f"{text[: width - 1].rstrip()}…")
    return found


def own_ids(dataset: Dataset, rows: np.ndarray) -> list[int | str]:
    """The caller's ids of items."""
    return [item if isinstance(item, int) else str(item) for item in np.asarray(dataset.item_ids)[rows].tolist()]


def collisions(
    ids: SemanticIds, dataset: Dataset, starts: np.ndarray, groups: int = 9, named: int = 5
) -> dict[str, Any]:
    """How many items share an ID of the quantizer's levels, and those that most items share, with titles.

    `starts` are the bounds of the trie's nodes of depth L; `shared_by` has rows (from, to, IDs, items), `to` None for
    no end.
    """
    sizes = np.diff(starts)
    ends = [*(low - 1 for low in _SHARED_BY[1:]), None]
    rows = []
    for low, high in zip(_SHARED_BY, ends, strict=True):
        within = sizes[(sizes >= low) & (sizes <= (high or sizes.max()))]
        if len(within):
            rows.append([low, high, len(within), int(within.sum())])
    largest = np.argsort(-sizes, kind="stable")[:groups]
    crowds = []
    for node in largest[sizes[largest] > 1]:
        items = ids.trie.items[starts[node] : starts[node] + min(named, sizes[node])]
        crowds.append(
            {
                "code": ids.codes[items[0], : ids.levels].tolist(),
                "items": int(sizes[node]),
                "title": titles(dataset, items, 90),
                "id": own_ids(dataset, items),
            }
        )
    return {"shared_by": rows, "largest": crowds}


def item_map(ids: SemanticIds, dataset: Dataset, vectors: Rows, seed: int) -> dict[str, Any]:
    """A seeded sample of items on a plane, with codes and titles."""
    rows = np.random.default_rng(seed).permutation(len(ids.codes))[:_MAP_ITEMS]
    places, layout = plane(np.asarray(vectors[rows], np.float32), seed)
    return {
        "layout": layout,
        "x": (1000 * places[:, 0]).round().astype(int).tolist(),
        "y": (1000 * places[:, 1]).round().astype(int).tolist(),
        "code": ids.codes[rows].tolist(),
        "title": titles(dataset, rows, 90),
        "id": own_ids(dataset, rows),
    }


def tree(ids: SemanticIds, dataset: Dataset, bounds: list[np.ndarray]) -> dict[str, Any]:
    """The trie as a list of its nodes of one depth, in order, so that a node further up is a range of them.

    Depth C, whose nodes are the IDs, with all their items; of long IDs without the last codes that tell nothing apart;
    of a large catalogue the deepest level with few enough nodes, with a sample of the items of each, spread over its
    order. `codes` has one list per level, `items` the number of items of a node, `shown` how many of them `title` and
    `id` go on to list.
    """
    whole, depth, nodes = len(ids.codes) <= _WHOLE, ids.trie.levels, [len(starts) - 1 for starts in bounds]
    while depth > 1 and (
        nodes[depth] == nodes[depth - 1] and depth * nodes[depth] > _CODES if whole else nodes[depth] > _SAMPLED
    ):
        depth -= 1
    starts, count = bounds[depth][:-1], np.diff(bounds[depth])
    shown = count if whole else np.minimum(count, max(1, min(8, _SAMPLED // len(count))))
    within = np.arange(shown.sum()) - np.repeat(np.cumsum(shown) - shown, shown)
    rows = ids.trie.items[np.repeat(starts, shown) + within * np.repeat(count, shown) // np.repeat(shown, shown)]
    return {
        "whole": whole,
        "codes": ids.codes[ids.trie.items[starts], :depth].T.tolist(),
        "items": count.tolist(),
        "shown": shown.tolist(),
        "title": titles(dataset, rows, title_width(len(rows))),
        "id": own_ids(dataset, rows),
    }
