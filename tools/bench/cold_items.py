"""Recall of warm and of new items where neither tokenizer nor model has seen the new ones.

    python tools/bench/cold_items.py quickstart --folder FOLDER

The recipe's log is prepared as ever. New are the items without train events: semantic IDs are fitted on the others
(`tokenizer/known_items.py`) and new items encoded by the frozen codebooks; then the model is trained, and drafts by content are
verified by it (`generate/cold.py`). Called again, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from onerec_jax.data.prepare import prepare
from onerec_jax.data.store import Dataset
from onerec_jax.evaluate.cold_start import evaluate_cold
from onerec_jax.generate.cold import ColdOptions
from onerec_jax.generate.load import load_recommender
from onerec_jax.recipe import load_recipe
from onerec_jax.tokenizer.known_items import fit_known_items
from onerec_jax.train.loop import pretrain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--folder", type=Path, required=True, help="of dataset, semantic IDs and run")
    parser.add_argument("--draft", type=int, default=50, help="candidates of a round")
    given = parser.parse_intermixed_args()
    places = {"data.directory": "dataset", "tokenizer.directory": "semantic_ids", "runs": "runs"}
    own = [f"{setting}={given.folder / name}" for setting, name in places.items()]
    recipe = load_recipe(given.recipe, [*given.overrides, *own])
    if not (recipe.dataset_directory / "card.json").exists():
        prepare(recipe)
    if not (recipe.tokenizer_directory / "card.json").exists():
        ids = fit_known_items(Dataset(recipe.dataset_directory), recipe.tokenizer, recipe.seed)
        ids.save(recipe.tokenizer_directory)
    recommender = load_recommender(str(pretrain(recipe)))
    Console(width=120).print(evaluate_cold(recommender, ColdOptions(given.draft), choose=True).table())


if __name__ == "__main__":
    main()
