"""Reject-sampling fine-tuning: pre-training goes on, on the requests that were watched longest (REFERENCE 1.8).

The report drops the bottom half of the exposure sessions by play duration and anneals to small rates; the loss stays that of
pre-training. So it is a recipe: another start, fewer requests, other rates. Keeping the model's own best generations
beside the log is `rl.objective: best_of`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from onerec_jax.config import Recipe
from onerec_jax.train.loop import pretrain


def rsft_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the RSFT run `NAME-rsft`: starts at pre-training's last rate, or at its own where that is higher."""
    settings, train = recipe.rsft, recipe.train
    last = train.learning_rate * (train.final_rate if train.schedule == "cosine" else 1.0)
    peak = max(last, settings.learning_rate)
    changes = {
        "init_from": settings.init_from or str(recipe.run_directory),
        "kept_share": settings.share,
        "kept_per": settings.per,
        "steps": settings.steps,
        "warmup_steps": 0,
        "schedule": "cosine",
        "learning_rate": peak,
        "final_rate": settings.learning_rate / peak,
        "table_rate": settings.table_rate,
        "half_life_from": 0.0,
    }
    return recipe.stage("rsft", train=train.model_copy(update=changes))


def rsft(recipe: Recipe, report: Callable[[str], None] = print) -> Path:
    """Fine-tunes the recipe's pre-training run, or `rsft.init_from`; returns the run directory."""
    return pretrain(rsft_recipe(recipe), report)
