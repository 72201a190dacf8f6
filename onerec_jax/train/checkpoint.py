"""Checkpoints of a run: {train state, data position, recipe}, asynchronous, found whole or not at all.

A checkpoint is written beside its final name and renamed when complete, so a kill at any moment leaves the one before.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint.experimental import v1 as ocp

from onerec_jax.config import Recipe
from onerec_jax.errors import InputError
from onerec_jax.parallel.sharding import path_name
from onerec_jax.recipe import make_recipe
from onerec_jax.train.state import TrainState

POLICY = ("params", "tables", "bias")  # what a forward pass needs of a train state

logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpoints:
    """The checkpoints of one run directory.

    Args:
        run: the run directory.
        keep: how many a writer keeps, the most recent; None only reads, and leaves what another process is writing alone.
    """

    def __init__(self, run: Path, keep: int | None = None):
        self.directory = (run / "checkpoints").resolve()
        self.directory.mkdir(parents=True, exist_ok=True)
        keep_latest: Any = ocp.training.preservation_policies.LatestN(keep or 1)
        every_step: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
        self._checkpointer = ocp.training.Checkpointer(
            str(self.directory),
            save_decision_policy=every_step,
            preservation_policy=keep_latest,
            cleanup_tmp_directories=keep is not None,
        )
        self._pending: Any = None

    def steps(self) -> list[int]:
        return [c.step for c in self._checkpointer.checkpoints]

    def save(
        self, step: int, state: TrainState, position: dict[str, int], recipe: Recipe, behaviour: Any = None
    ) -> None:
        """Starts writing; returns once the state is copied, so that the loop may go on and donate it.

        `behaviour` is of RL: the older policy that generates.
        """
        self.wait()
        parts = {"state": _as_dict(state), "data": position, "recipe": recipe.model_dump(mode="json")}
        self._pending = self._checkpointer.save_checkpointables_async(
            step,
            parts if behaviour is None else parts | {"behaviour": behaviour},
            force=True,
            overwrite=step in self.steps(),
        )

    def wait(self) -> None:
        """Returns when the last save is on disk; raises what it failed with."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def recipe(self, step: int | None = None) -> Recipe:
        """The recipe that wrote a checkpoint."""
        values = self._checkpointer.load_checkpointables(self._known(step), {"recipe": None})
        return make_recipe(values["recipe"], str(self.directory))

    def restore(
        self, abstract: TrainState, recipe: Recipe, step: int | None = None
    ) -> tuple[TrainState, dict[str, int]]:
        """State placed as `abstract` says (any mesh), and the data position.

        Raises:
            InputError: the checkpoint is of another model, optimizer or dataset, or there is none.
        """
        wanted = _as_dict(abstract)
        step = self._fitting(wanted, recipe, step)
        loaded = self._checkpointer.load_checkpointables(step, {"state": wanted, "data": None})
        return TrainState(**loaded["state"]), {k: int(v) for k, v in loaded["data"].items()}

    def restore_behaviour(self, abstract: TrainState, step: int | None = None) -> dict[str, Any]:
        """`params`, `tables` and `bias` of the policy that generated when an RL run wrote this checkpoint."""
        wanted = {name: getattr(abstract, name) for name in POLICY}
        return self._checkpointer.load_checkpointables(self._known(step), {"behaviour": wanted})["behaviour"]

    def restore_model(self, abstract: TrainState, recipe: Recipe, step: int | None = None) -> dict[str, Any]:
        """`params`, `tables` and `bias` alone, placed as `abstract` says, whatever optimizer they were trained with.

        Raises:
            InputError: the checkpoint is of another model or dataset, or there is none.
        """
        wanted = {name: getattr(abstract, name) for name in POLICY}
        step = self._fitting(wanted, recipe, step)
        loading = ocp.options.PyTreeOptions.Loading(partial_load=True)
        with ocp.Context(pytree_options=ocp.options.PyTreeOptions(loading=loading)):
            return self._checkpointer.load_checkpointables(step, {"state": wanted})["state"]

    def close(self) -> None:
        self.wait()
        self._checkpointer.close()

    def _known(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise InputError(f"{self.directory} holds no checkpoint; `onerec pretrain RECIPE` writes one")
        if step is None:
            return steps[-1]
        if step not in steps:
            raise InputError(f"{self.directory} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
        return step

    def _fitting(self, wanted: dict[str, Any], recipe: Recipe, step: int | None) -> int:
        """The step to load, once it is sure that it holds what is wanted."""
        step = self._known(step)
        self._check_settings(step, recipe, "optimizer" in wanted)
        self._check_leaves(step, wanted)
        return step

    def _check_settings(self, step: int, recipe: Recipe, with_optimizer: bool) -> None:
        saved = self.recipe(step)
        theirs = {f"model.{name}": value for name, value in saved.model.model_dump().items()}
        mine = {f"model.{name}": value for name, value in recipe.model.model_dump().items()}
        if with_optimizer:
            theirs["train.optimizer"], mine["train.optimizer"] = saved.train.optimizer, recipe.train.optimizer
        different = [f"{k} is {mine[k]!r} but {theirs[k]!r} in the checkpoint" for k in mine if mine[k] != theirs[k]]
        if different:
            raise InputError(
                f"{self.directory}/{step} is of another model: {'; '.join(different)}; "
                "use the recipe it was trained with, or another name"
            )

    def _check_leaves(self, step: int, wanted: dict[str, Any]) -> None:
        metadata = self._checkpointer.checkpointables_metadata(step).metadata["state"]
        there, here = _shapes({name: metadata[name] for name in wanted}), _shapes(wanted)
        different = [name for name in there.keys() | here.keys() if there.get(name) != here.get(name)]
        if different:
            name = min(different, key=lambda name: (name.startswith("optimizer/"), name))
            raise InputError(
                f"{self.directory}/{step} does not fit this dataset: {name} is {there.get(name, 'missing')} there and "
                f"{here.get(name, 'missing')} here; use the dataset and semantic IDs it was trained on"
            )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in ("step", "params", "optimizer", "tables", "bias")}


def has_checkpoint(run: Path) -> bool:
    """Whether a run directory holds a whole checkpoint; makes no folder, as opening `Checkpoints` does."""
    return any(path.name.isdigit() for path in (run / "checkpoints").glob("*"))


def parse_run(reference: str, runs: str) -> tuple[Path, int | None]:
    """RUN or RUN@STEP, as a folder or a name under `runs`.

    Raises:
        InputError: no such run.
    """
    name, at, step = reference.partition("@")
    if at and not step.isdigit():
        raise InputError(f"'{reference}' must be RUN or RUN@STEP with a whole number of steps")
    for folder in (Path(name), Path(runs) / name):
        if (folder / "config.yaml").is_file():
            return folder, int(step) if at else None
    known = sorted(p.parent.name for p in Path(runs).glob("*/config.yaml")) if Path(runs).is_dir() else []
    place = f"one of {', '.join(known)} in {runs}/" if known else f"in {runs}/, where there is none yet"
    raise InputError(f"no run '{name}': neither a run folder nor {place}")


def same_bits(a: Any, b: Any) -> bool:
    """Whether two trees hold the same bits."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)
