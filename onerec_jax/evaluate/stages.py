"""The runs behind a row of a board: pre-training, and where the row asks for it what comes after.

Runs are shared between rows wherever their settings say the same, each named by a digest of what it depends on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from onerec_jax.config import Recipe, Section, digest_of
from onerec_jax.evaluate.held_out import make_watch
from onerec_jax.evaluate.promotion import check_promotable, promote
from onerec_jax.posttrain.judge import learnt
from onerec_jax.posttrain.loop import reinforce, rl_recipe
from onerec_jax.posttrain.rsft import rsft, rsft_recipe
from onerec_jax.reward.training import reward_recipe, train_reward
from onerec_jax.train.loop import pretrain

Stage = Literal["", "rsft", "rl"]
PREFIX = "stage="


def split_stage(changes: tuple[str, ...]) -> tuple[Stage, list[str]]:
    """The stage a row is of, from an entry `stage=rsft` or `stage=rl` among its overrides, and the overrides.

    Raises:
        ValueError: there is no such stage.
    """
    stages = [change.removeprefix(PREFIX) for change in changes if change.startswith(PREFIX)]
    stage = stages[-1] if stages else ""
    if stage not in get_args(Stage):
        raise ValueError(f"stage={stage} must be one of {', '.join(filter(None, get_args(Stage)))}")
    return stage, [change for change in changes if not change.startswith(PREFIX)]  # type: ignore[return-value]


def relevant(recipe: Recipe, stage: Stage) -> Recipe:
    """The recipe without what stages after this one are told, so that a change of theirs changes no earlier result."""
    later = {"": ("rsft", "reward", "rl"), "rsft": ("reward", "rl"), "rl": ()}[stage]
    return recipe.model_copy(update={name: type(getattr(recipe, name))() for name in later})


@dataclasses.dataclass(frozen=True)
class Runs:
    """The recipes of a row's runs in the order in which they are made; the last is the one that is evaluated."""

    pretraining: Recipe
    rsft: Recipe | None = None
    reward: Recipe | None = None
    rl: Recipe | None = None

    @property
    def names(self) -> list[str]:
        return [recipe.name for recipe in (self.pretraining, self.rsft, self.reward, self.rl) if recipe is not None]

    @property
    def last(self) -> Path:
        """The directory of the run that is evaluated."""
        if self.rl is not None:
            return rl_recipe(self.rl).run_directory
        return self.pretraining.run_directory if self.rsft is None else rsft_recipe(self.rsft).run_directory

    def make(self, report: Callable[[str], None]) -> Path:
        """Trains what is missing; returns the directory of the last run."""
        run = pretrain(self.pretraining, report)
        if self.rsft is not None:
            run = fine_tune(self.rsft, report)
        if self.reward is not None:
            train_reward(self.reward, report)
        return run if self.rl is None else reinforce_watched(self.rl, report)


def fine_tune(recipe: Recipe, report: Callable[[str], None]) -> Path:
    """RSFT, and whether it is served; returns the run directory."""
    if recipe.rsft.promote == "always":
        return rsft(recipe, report)
    check_promotable(recipe)
    run = rsft(recipe, report)
    promote(run, rsft_recipe(recipe).train.init_from or "", recipe, report)
    return run


def reinforce_watched(recipe: Recipe, report: Callable[[str], None]) -> Path:
    """RL under watch of the held-out recall, and whether it is served; returns the run directory."""
    if recipe.rl.promote == "always":
        return reinforce(recipe, make_watch, report)
    check_promotable(recipe)
    run = reinforce(recipe, make_watch, report)
    promote(run, rl_recipe(recipe).train.init_from or "", recipe, report)
    return run


def runs_of(recipe: Recipe, stage: Stage, pretraining: Recipe) -> Runs:
    """What a row trains: `recipe` says what the row is, `pretraining` which run it begins with."""
    if not stage:
        return Runs(pretraining)
    base = recipe.model_copy(update={"runs": pretraining.runs})

    def named(name: str, recipe: Recipe) -> Recipe:
        return recipe.model_copy(update={"name": name})

    def with_section(recipe: Recipe, name: str, **changes: str) -> Recipe:
        section: Section = getattr(recipe, name)
        return recipe.model_copy(update={name: section.model_copy(update=changes)})

    tuned = named(f"{pretraining.name}_{digest_of(recipe.rsft.stated())}", base)
    tuned = with_section(tuned, "rsft", init_from=str(pretraining.run_directory))
    if stage == "rsft":
        return Runs(pretraining, tuned)
    judge = None
    if learnt(recipe):
        made_of = recipe.reward.stated(), recipe.data.stated(), recipe.tokenizer.stated(), recipe.seed
        judge = named(f"reward_{digest_of(*made_of)}", base)
    row = with_section(
        named(f"{recipe.name}_{recipe.digest()}", base), "rl", init_from=str(rsft_recipe(tuned).run_directory)
    )
    if judge is not None:
        row = with_section(row, "rl", reward_run=str(reward_recipe(judge).run_directory))
    return Runs(pretraining, tuned, judge, row)
