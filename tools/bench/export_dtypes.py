"""What weights in fewer bytes cost and save: size, and how far lists move, of a run exported as float32, bfloat16 and int8.

    python tools/bench/export_dtypes.py RUN [--requests 4000] [--top 10] [KEY=VALUE]...

Each export is written, read back with its checksums compared, and asked for the lists of the same test requests, seen items left
out. `overlap` is the mean share of a list's items that the float32 export lists too; recall is of the positive events after the
request. Sizes are of the weights alone, since catalogue and titles are the same in all.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any, get_args

import numpy as np
from rich.console import Console
from rich.table import Table

from onerec_jax.evaluate.metrics import ranking_metrics, value
from onerec_jax.evaluate.requests import collect_requests
from onerec_jax.export.artifact import load_artifact
from onerec_jax.export.quantize import DType
from onerec_jax.export.verb import export_run
from onerec_jax.generate.load import load_recommender
from onerec_jax.generate.step import ListOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--top", type=int, default=10)
    given = parser.parse_args()
    overrides = [*given.overrides, f"evaluate.max_examples={given.requests}"]
    recommender = load_recommender(given.run, overrides)
    settings = recommender.recipe.evaluate
    requests = collect_requests(recommender.dataset, recommender.recipe)
    flat, offsets = requests.context
    seen = np.split(flat, offsets[1:-1]) if settings.exclude_seen else [flat[:0]] * len(requests)
    options = ListOptions(given.top, settings.beam_width, settings.item_weight)
    found: dict[str, tuple[int, np.ndarray]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in get_args(DType):
            place = export_run(given.run, str(Path(folder) / dtype), given.overrides, dtype=dtype, users=0)
            artifact = load_artifact(place)
            params, tables, bias = artifact.parameters
            state: Any = dataclasses.replace(recommender.state, params=params, tables=tables, bias=bias)
            lists = recommender.with_state(state).lists(requests.examples, seen, None, options)[0]
            found[dtype] = sum(file.stat().st_size for file in place.glob("model*.safetensors")), lists
    table = Table(
        "weights",
        "MB",
        "of float32",
        f"top-{given.top} overlap",
        f"Recall@{given.top}",
        title=f"{given.run}, {len(requests)} test requests",
    )
    reference = found["float32"]
    for dtype, (size, lists) in found.items():
        both = [
            len(np.intersect1d(a[a >= 0], b[b >= 0])) / max(1, (b >= 0).sum())
            for a, b in zip(lists, reference[1], strict=True)
        ]
        recall = value(ranking_metrics(lists, requests.relevant, (given.top,))[f"recall@{given.top}"])
        table.add_row(dtype, f"{size / 1e6:.1f}", f"{size / reference[0]:.3f}", f"{np.mean(both):.4f}", f"{recall:.4f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
