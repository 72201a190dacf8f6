"""A training process that is killed and started again gives the bits of one that never was."""

from __future__ import annotations

import random
from pathlib import Path

from kills import KINDS, kill_recipe, killed_run

from onerec_jax.config import Recipe

KILLS = 5


def test_five_kills_at_random_moments_change_no_bit_of_the_losses_or_of_the_final_state(
    tiny_recipe: Recipe, tiny_folder: Path, tmp_path: Path
):
    seed = random.SystemRandom().getrandbits(32)
    print(f"kills drawn with seed {seed}")
    recipe = kill_recipe(tiny_folder, KILLS)
    assert recipe.model.item_input == "both" and recipe.model.user_id and recipe.model.moe.experts
    counts = killed_run(recipe, KILLS, seed, tmp_path)
    assert set(counts) == set(KINDS)
