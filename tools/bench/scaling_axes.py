"""What each axis gives: the gains of sweeps along experts, codes, history and beams, over seeds, beside the report's own.

    onerec sweep experts          # and: onerec sweep codebook --evaluate, history --evaluate, beams --evaluate
    python tools/bench/scaling_axes.py [FOLDER]

FOLDER holds a CSV for each, a copy of `runs/sweeps/NAME/runs.csv`; by default those of docs/results/scaling/axes. A gain is the
mean over seeds of the relative change from the first setting to the last, each seed against itself, with its standard error.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import polars as pl

FOLDER = Path(__file__).parents[2] / "docs" / "results" / "scaling" / "axes"


class Axis(NamedTuple):
    """One sweep, or a part of it, and what the literature found there (REFERENCE 1.11, 3.4 and 4)."""

    name: str
    file: str
    setting: str  # column of what is varied; empty where `metrics` are
    values: tuple[object, ...]
    metrics: tuple[str, ...]
    published: str


AXES = (
    Axis("experts of 2 active", "experts", "model.moe.experts", (0, 8, 32), ("valid_loss",),
         "dense 0.5B to 4B of 0.5B active: loss -3.3 % (V2)"),
    Axis("codes a level", "codebook", "tokenizer.codebook_sizes",
         ("[256, 256, 256]", "[1024, 1024, 1024]", "[4096, 4096, 4096]"), ("recall@10", "ndcg@10"),
         "8K to 32K: P-Score +4.75 %"),
    Axis("levels of 256 codes", "codebook", "tokenizer.codebook_sizes",
         ("[256, 256]", "[256, 256, 256]", "[256, 256, 256, 256]"), ("recall@10", "ndcg@10"), "none"),
    Axis("events of history", "history", "model.short_length", (20, 128, 512), ("valid_loss", "recall@10", "ndcg@10"),
         "100 to 300: Recall +13 %, NDCG +51 % (OneLoc)"),
    Axis("beams served", "beams", "", ("recall@8", "recall@64", "recall@512"), (),
         "8 to 512: P-Score .0811 to .3375"),
)  # fmt: skip


def rows(axis: Axis, table: pl.DataFrame) -> Iterator[tuple[str, list[dict[int, float]]]]:
    """Each metric, and for each setting its value by seed."""
    seeds = table["seed"].to_list()
    if not axis.setting:
        yield "recall", [dict(zip(seeds, table[str(name)].to_list(), strict=True)) for name in axis.values]
        return
    for metric in axis.metrics:
        found = []
        for value in axis.values:
            part = table.filter(pl.col(axis.setting) == value)
            found.append(dict(zip(part["seed"].to_list(), part[metric].to_list(), strict=True)))
        yield metric, [by_seed for by_seed in found if by_seed]


def change(first: dict[int, float], last: dict[int, float]) -> str:
    """Mean relative change of the seeds that both have, with its standard error."""
    each = [last[seed] / first[seed] - 1 for seed in first if seed in last]
    error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else math.nan
    return f"{100 * statistics.fmean(each):+.1f} ± {100 * error:.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    folder = parser.parse_args().folder
    print(
        "| axis | from, .., to | metric | means of the seeds | seeds | change | published |\n|---|---|---|---|---|---|---|"
    )
    for axis in AXES:
        path = folder / f"{axis.file}.csv"
        if not path.exists():
            continue
        for metric, settings in rows(axis, pl.read_csv(path)):
            if len(settings) < 2:
                continue
            values = [str(value).removeprefix("recall@") for value in axis.values]
            means = ", ".join(f"{statistics.fmean(by_seed.values()):.4f}" for by_seed in settings)
            print(
                f"| {axis.name} | {' / '.join(values)} | {metric} | {means} | {min(map(len, settings))} | "
                f"{change(settings[0], settings[-1])} | {axis.published} |"
            )


if __name__ == "__main__":
    main()
