"""Codebook expansion on a dataset's items: some are held out as new; how many collide, and does any existing ID change?

    onerec data beauty_small data.source.path=FOLDER
    python tools/bench/expansion.py beauty_small

The tokenizer is fitted on the other items, with the recipe's content and codebooks and without dedup. New items are then
encoded by the frozen tokenizer, and by expansion of the last level; an item collides if another item has its ID.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from onerec_jax.data.store import Dataset
from onerec_jax.recipe import load_recipe
from onerec_jax.tokenizer.content import content_vectors
from onerec_jax.tokenizer.expansion import encode_new, expand
from onerec_jax.tokenizer.semantic_ids import fit_semantic_ids


def collide(codes: np.ndarray, former: int) -> float:
    """Share of the items from row `former` on that share their ID with any other item."""
    _, group, count = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    return float(np.mean(count[group.ravel()][former:] > 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--new", type=float, default=0.15, help="share of the items held out")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_intermixed_args()
    recipe = load_recipe(given.recipe, [*given.overrides, "tokenizer.dedup=none"])
    content = content_vectors(Dataset(recipe.dataset_directory), recipe.tokenizer, recipe.seed)
    table = Table("seed", "existing", "new", "IDs changed", "new that collide: frozen", "expanded", "ratio")
    for seed in range(given.seeds):
        order = np.random.default_rng(seed).permutation(len(content))
        new, old = np.split(content[order], [int(given.new * len(content))])
        known: Any = SimpleNamespace(
            items=SimpleNamespace(train_count=np.zeros(len(old), np.int64)), num_items=len(old), card={}
        )
        ids = fit_semantic_ids(known, recipe.tokenizer, seed, old)
        grown = expand(ids, new, seed=seed).codes
        frozen = collide(np.concatenate([ids.codes, encode_new(ids, new)]), len(old))
        expanded = collide(grown, len(old))
        changed = int((grown[: len(old)] != ids.codes).any(1).sum())
        cells = (
            seed,
            f"{len(old):,}",
            f"{len(new):,}",
            changed,
            f"{frozen:.1%}",
            f"{expanded:.1%}",
            f"{expanded / frozen:.2f}",
        )
        table.add_row(*map(str, cells))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
