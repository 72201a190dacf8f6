"""What experts, codes, history and beams gain, in one table beside what OneRec's reports have.

    python tools/scaling_gains.py              the table, from docs/results/scaling/gains/*.csv

Each file is the `runs.csv` of the sweep of its name in configs/sweeps/, run with `--evaluate`. A gain is relative and of one seed:
the same seed at both ends of the axis. Beams are not two runs but two cut-offs of one: the lists of 8 and of 512.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import polars as pl

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results" / "scaling" / "gains"


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis from one end to the other, and what a report says of it.

    Attributes:
        name: of the sweep, and of its file.
        says: the axis in words.
        column: of the table, which holds `ends`; for beams None, where `ends` are columns.
        ends: less and more.
        metrics: columns compared, a loss or metrics that rise.
        report: the like comparison of the report, with its source.
    """

    name: str
    says: str
    column: str | None
    ends: tuple[str, str]
    metrics: tuple[str, ...]
    report: str


AXES = (
    Axis(
        "experts", "dense to 32 experts, 2 active, equal active parameters", "model.moe.experts", ("0", "32"),
        ("loss", "valid_loss", "R@10", "watch s"),
        "loss 3.33 -> 3.22 (-3.3 %), .5B to 4B of which .5B active (OneRec-V2, table 5)",
    ),
    Axis(
        "codebook", "3 x 256 to 3 x 4,096 codes", "tokenizer.codebook_sizes", ("[256, 256, 256]", "[4096, 4096, 4096]"),
        ("R@10", "watch s"),
        "8,192 to 32,768: P-Score .2516 -> .2635 (+4.7 %), long view .5118 -> .5245 (+2.5 %) (OneRec, table 3)",
    ),
    Axis(
        "history", "20 to 512 events of history", "model.short_length", ("20", "512"), ("valid_loss", "R@10", "watch s"),
        "256 positive items to all pathways: P-Score .0749 -> .0966 (+28.9 %), long view +11.3 % (OneRec, note, table 2)",
    ),
    Axis(
        "beams", "8 to 512 beams (Pass@K)", None, ("R@8", "R@512"), ("Recall@K",),
        "Pass@8 to Pass@512: P-Score .0811 -> .3375 (4.2 x), long view .3675 -> .5351 (1.5 x) (OneRec, table 4)",
    ),
)  # fmt: skip


def pairs(axis: Axis, runs: pl.DataFrame, metric: str) -> np.ndarray:
    """float64 [seeds,2]: the metric at both ends for every seed that has both.

    Raises:
        ValueError: no seed has both ends.
    """
    if axis.column is None:
        found = runs.select(axis.ends).to_numpy()
    else:
        ends = [
            dict(runs.filter(pl.col(axis.column).cast(pl.String) == end).select("seed", metric).iter_rows())
            for end in axis.ends
        ]
        found = np.array([[end[seed] for end in ends] for seed in sorted(ends[0].keys() & ends[1].keys())])
    if not len(found):
        raise ValueError(f"{axis.name}: no seed has both {axis.ends[0]} and {axis.ends[1]}")
    return found.astype(np.float64)


def gained(gain: float) -> str:
    """`+5.1 %`, and from twice on `12.5 x`."""
    return f"{1 + gain:.1f} x" if gain >= 1 else f"{100 * gain:+.1f} %"


def row(axis: Axis, values_SxE: np.ndarray, metric: str) -> str:
    """One line of the table: means at both ends, the gain of each seed, their mean."""
    less, more = values_SxE.mean(0)
    gains = values_SxE[:, 1] / values_SxE[:, 0] - 1
    seeds = ", ".join(map(gained, gains))
    verdict = "every seed" if len({*np.sign(gains)}) == 1 else "seeds differ in sign"
    return f"| {axis.says} | {metric} | {less:.4g} -> {more:.4g} | {gained(gains.mean())} | {seeds} | {verdict} | {axis.report} |"


def table(folder: Path = RESULTS) -> str:
    """The table as Markdown."""
    lines = [
        "| axis | metric | less -> more, mean | gain | of each seed | same direction | the reports |",
        "|---|---|---|---|---|---|---|",
    ]
    for axis in AXES:
        runs = pl.read_csv(folder / f"{axis.name}.csv")
        lines += [row(axis, pairs(axis, runs, metric), metric) for metric in axis.metrics]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
