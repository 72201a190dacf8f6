"""Time of building ActionPiece's vocabulary against the slow reference of the tests, which counts anew for every merge.

    python tools/bench/action_piece.py --sequences 100000 --merges 1000

The reference runs on `--sample` of the sequences, where both must find the same merges, and its time is extrapolated: it
is proportional to the number of sequences.
"""

from __future__ import annotations

import argparse
import runpy
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from onerec_jax.tokenizer.action_piece import ActionPieces, fit

REFERENCE = Path(__file__).resolve().parents[2] / "tests" / "tokenizer" / "action_piece_reference.py"
ITEMS, TOPICS, CODES, LEVELS = 20_000, 200, 256, 5


def sequences_of_items(sequences: int, actions: int) -> np.ndarray:
    """Features int32 [S,A,5]: every item has a code of each of 5 codebooks; a sequence stays with a few topics."""
    rng = np.random.default_rng(0)
    preferred = rng.integers(0, CODES, (TOPICS, LEVELS))
    topic = np.sort(rng.integers(0, TOPICS, ITEMS))
    own = rng.integers(0, CODES, (ITEMS, LEVELS))
    codes = np.where(rng.random((ITEMS, LEVELS)) < 0.5, preferred[topic], own) + CODES * np.arange(LEVELS)
    liked = rng.integers(0, TOPICS, (sequences, 3))
    first = np.searchsorted(topic, np.take_along_axis(liked, rng.integers(0, 3, (sequences, actions)), 1))
    items = np.minimum(first + (rng.pareto(1.0, (sequences, actions)) * 5).astype(np.int64), ITEMS - 1)
    features = codes[items].astype(np.int32)
    features[np.arange(actions) >= rng.integers(actions // 2, actions + 1, (sequences, 1))] = -1
    return features


def merges(pieces: ActionPieces) -> list[tuple[int, int, float]]:
    return list(zip(pieces.left.tolist(), pieces.right.tolist(), pieces.weight.tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("sequences", 100_000), ("actions", 10), ("merges", 1000), ("sample", 200)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    features = sequences_of_items(given.sequences, given.actions)
    size = len(np.unique(features[features >= 0])) + given.merges

    start = time.perf_counter()
    pieces = fit(features, size)
    ours = time.perf_counter() - start
    start = time.perf_counter()
    encoded = pieces.encode(features, seed=0)
    encoding = time.perf_counter() - start

    sample = features[: given.sample]
    known = np.unique(sample[sample >= 0])
    tokens = np.where(sample >= 0, np.searchsorted(known, sample), -1).tolist()
    corpus = [[{token for token in action if token >= 0} for action in sequence] for sequence in tokens]
    start = time.perf_counter()
    expected = runpy.run_path(str(REFERENCE))["construct"](corpus, len(known) + given.merges)
    reference = time.perf_counter() - start
    same = merges(fit(sample, len(known) + given.merges)) == expected

    per_sequence = reference / len(sample)
    table = Table(
        "vocabulary", "sequences", "merges", "seconds", title=f"up to {given.actions} actions of {LEVELS} features"
    )
    table.add_row("onerec_jax", f"{given.sequences:,}", f"{len(pieces.left):,}", f"{ours:.1f}")
    table.add_row("reference", f"{len(sample):,}", f"{len(expected):,}", f"{reference:.1f}")
    table.add_row(
        "reference, extrapolated", f"{given.sequences:,}", f"{given.merges:,}", f"{per_sequence * given.sequences:.0f}"
    )
    Console().print(table)
    share = (encoded >= 0).sum() / (features >= 0).sum()
    print(f"same merges on the sample: {same}; ratio {per_sequence * given.sequences / ours:.0f}")
    print(f"encoding all sequences: {encoding:.1f} s, {share:.2f} tokens per feature")


if __name__ == "__main__":
    main()
