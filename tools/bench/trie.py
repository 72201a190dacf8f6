"""Time and memory of building the trie of ten million items, and of looking IDs up in it.

    python tools/bench/trie.py [--items 10000000] [--levels 3] [--codes 8192]

Codes and popularity are drawn at random. Memory is the peak over what the process held before the build.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from onerec_jax.tokenizer.trie import Trie


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("items", 10_000_000), ("levels", 3), ("codes", 8192), ("lookups", 1_000_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    codes = rng.integers(0, given.codes, (given.items, given.levels), dtype=np.int32)
    popularity = rng.integers(0, 1000, given.items)
    before = peak_gib()
    started = time.perf_counter()
    trie = Trie.build(codes, popularity)
    built = time.perf_counter() - started
    over = peak_gib() - before
    asked = codes[rng.integers(0, given.items, given.lookups)]
    started = time.perf_counter()
    leaves = trie.find(asked)
    found = time.perf_counter() - started
    started = time.perf_counter()
    trie.children(given.levels - 1, rng.integers(0, len(trie.token[-2]), given.lookups))
    gathered = time.perf_counter() - started
    assert (leaves >= 0).all()
    print(
        f"{given.items:,} items x {given.levels} levels of {given.codes}: built in {built:.1f} s, {over:.2f} GiB on top"
    )
    print(f"{given.lookups:,} whole IDs looked up in {found:.2f} s; children of as many nodes in {gathered:.3f} s")


if __name__ == "__main__":
    main()
