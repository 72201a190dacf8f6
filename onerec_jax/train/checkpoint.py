"""Checkpoints of a run: {train state, data position, recipe}, asynchronous, found whole or not at all.

A checkpoint is written beside its final name and renamed when complete, so a kill at any moment leaves the one before. What
was written is recorded (`integrity`), and a newest checkpoint that is damaged is put aside for the one before it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint.experimental import v1 as ocp

from onerec_jax.config import Recipe, TrainConfig
from onerec_jax.errors import InputError, StorageError
from onerec_jax.parallel.sharding import path_name
from onerec_jax.recipe import make_recipe
from onerec_jax.storage import COMMITTED, folder, is_remote, move, reach
from onerec_jax.train import integrity
from onerec_jax.train.state import TrainState

POLICY = ("params", "tables", "bias")  # what a forward pass needs of a train state

logging.getLogger("absl").setLevel(logging.ERROR)


JSON = "json"
VALIDATION = "valid/loss"  # what the best checkpoints of `train.keep_best` have least of


class Checkpoints:
    """The checkpoints of one run directory.

    Args:
        run: the run directory.
        kept: which ones a writer keeps; None only reads, and leaves what another process is writing alone.
        report: told of damage.

    Raises:
        StorageError: for a writer, the directory could not be read.
    """

    def __init__(self, run: Path, kept: TrainConfig | None = None, report: Callable[[str], object] = print):
        reach(run)
        self.directory = run / "checkpoints" if is_remote(run) else (run / "checkpoints").resolve()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._writes, self._report = kept is not None, report
        if self._writes:
            self._put_damaged_aside()
        every_step: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
        # Weights hardly shrink, and compressing them takes longer than writing them.
        saving = ocp.options.ArrayOptions.Saving(use_compression=False)
        with ocp.Context(array_options=ocp.options.ArrayOptions(saving=saving)):
            self._checkpointer = ocp.training.Checkpointer(
                str(self.directory),
                save_decision_policy=every_step,
                preservation_policy=_preserved(kept or TrainConfig(keep=1)),
                cleanup_tmp_directories=self._writes,
            )
        self._pending: _Pending | None = None
        self._sound: set[int] = set()

    def steps(self) -> list[int]:
        return [c.step for c in self._checkpointer.checkpoints]

    def save(
        self,
        step: int,
        state: TrainState,
        position: dict[str, int],
        recipe: Recipe,
        behaviour: Any = None,
        validation: float | None = None,
    ) -> None:
        """Starts writing; returns once the state is copied, so that the loop may go on and donate it.

        `behaviour` is of RL: the older policy that generates. `validation` is the last validation loss, if there is one.

        Raises:
            StorageError: the save before this one failed, or this one could not begin; none that was there is deleted.
        """
        self.wait()
        parts = {"state": _as_dict(state), "data": position, "recipe": _as_array(recipe)}
        path = self.directory / str(step)
        again = step in self.steps()
        if again and jax.process_index() == 0:
            integrity.forget(path)
        try:
            written = self._checkpointer.save_checkpointables_async(
                step,
                parts if behaviour is None else parts | {"behaviour": behaviour},
                force=True,
                overwrite=again,
                metrics=None if validation is None else {VALIDATION: validation},
            )
        except (OSError, ValueError) as error:  # TensorStore's are of both kinds
            raise self._failed(step, error) from error
        self._pending = _Pending(step, path, written)

    def wait(self) -> None:
        """Returns when the last save is on disk.

        Raises:
            StorageError: it failed; none that was there before is deleted.
        """
        pending, self._pending = self._pending, None
        if pending is not None and (error := pending.join()) is not None:
            raise self._failed(pending.step, error) from error

    def _failed(self, step: int, error: BaseException) -> StorageError:
        reason = " ".join(str(error).split())
        kept = ", ".join(str(s) for s in sorted(_steps_in(self.directory)) if s != step)
        there = f"those of step {kept} are whole" if kept else "there is none before it"
        return StorageError(
            f"the checkpoint of step {step} could not be written to {self.directory}: {reason}; {there}"
        )

    def _put_damaged_aside(self) -> None:
        """Renames newest checkpoints until one is whole; every process reads its share of the files."""
        share = jax.process_index(), jax.process_count()
        for step in sorted(_steps_in(self.directory), reverse=True):
            path = self.directory / str(step)
            reason = integrity.damage(path, share)
            found = _in_any_process(reason is not None)
            if not found:
                break
            aside = self.directory.with_name("checkpoints_damaged") / str(step)
            if reason is not None:
                self._report(f"warning: checkpoint {step} is damaged: {reason}; it is put aside as {aside}")
            if jax.process_index() == 0:
                _move(path, aside)
                integrity.forget(path)
            _in_any_process(False)  # nobody looks at the next one before this one is gone
        if jax.process_index() == 0:
            integrity.forget_deleted(self.directory)

    def recipe(self, step: int | None = None) -> Recipe:
        """The recipe that wrote a checkpoint."""
        values = self._checkpointer.load_checkpointables(self._known(step), {"recipe": None})["recipe"]
        return make_recipe(_from_array(values), str(self.directory))

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
        """Waits for the last save, as `wait` does."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(OSError, ValueError):  # of a failed save, which `wait` told
                self._checkpointer.close()

    def _known(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise InputError(f"{self.directory} holds no checkpoint; `onerec pretrain RECIPE` writes one")
        if step is not None and step not in steps:
            raise InputError(f"{self.directory} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
        if self._writes:
            return steps[-1] if step is None else step  # of a writer the newest one has been looked at
        return self._whole(steps[::-1] if step is None else [step])

    def _whole(self, steps: list[int]) -> int:
        """The first of these that is not damaged."""
        reason = None
        for step in steps:
            reason = None if step in self._sound else integrity.damage(self.directory / str(step))
            if reason is None:
                self._sound.add(step)
                return step
            self._report(f"warning: checkpoint {step} is damaged: {reason}")
        raise InputError(f"{self.directory} holds no whole checkpoint of step {', '.join(map(str, steps))}: {reason}")

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


class _Pending:
    """A save on its way: once it is on disk, a thread records what was written."""

    def __init__(self, step: int, path: Path, written: Any):
        self.step, self._path, self._written = step, path, written
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._finish, name=f"checkpoint {step}")
        self._thread.start()

    def _finish(self) -> None:
        try:
            self._written.result()
            if jax.process_index() == 0:
                integrity.record(self._path)
        except Exception as error:  # given to whoever waits
            self._error = error

    def join(self) -> BaseException | None:
        self._thread.join()
        return self._error


def _preserved(kept: TrainConfig) -> Any:
    policies = ocp.training.preservation_policies
    chosen: list[Any] = [policies.LatestN(kept.keep)]
    if kept.keep_every:
        chosen.append(policies.EveryNSteps(kept.keep_every))
    if kept.keep_best:
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics[VALIDATION], reverse=True, n=kept.keep_best,
            keep_checkpoints_without_metrics=False,
        )  # fmt: skip
        chosen.append(best)
    return policies.AnyPreservationPolicy(chosen)


def _steps_in(directory: Path) -> list[int]:
    return [int(path.name) for path in _finished(directory)]


def _in_any_process(flag: bool) -> bool:
    """Whether `flag` is true in some process; every process has to ask."""
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def _finished(directory: Path) -> list[Path]:
    """The checkpoints of a folder that are there as a whole, or once were."""
    numbered = [path for path in directory.glob("*") if path.name.isdigit()]
    return [path for path in numbered if (path / COMMITTED).exists()] if is_remote(directory) else numbered


def _move(path: Path, to: Path) -> None:
    number = 0
    while to.exists():
        number += 1
        to = to.with_name(f"{path.name}_{number}")
    move(path, to)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in ("step", "params", "optimizer", "tables", "bias")}


def _as_array(recipe: Recipe) -> dict[str, np.ndarray]:
    """A recipe as the bytes of its JSON: Orbax would write, and ask a bucket for, every setting by itself."""
    return {JSON: np.frombuffer(recipe.model_dump_json().encode(), np.uint8)}


def _from_array(values: dict[str, Any]) -> dict[str, Any]:
    return json.loads(np.asarray(values[JSON]).tobytes()) if set(values) == {JSON} else values  # older ones are trees


def has_checkpoint(run: Path) -> bool:
    """Whether a run directory holds a whole checkpoint; makes no folder, as opening `Checkpoints` does."""
    return bool(_finished(run / "checkpoints"))


def parse_run(reference: str, runs: str) -> tuple[Path, int | None]:
    """RUN or RUN@STEP, as a folder or a name under `runs`.

    Raises:
        InputError: no such run.
    """
    name, at, step = reference.partition("@")
    if at and not step.isdigit():
        raise InputError(f"'{reference}' must be RUN or RUN@STEP with a whole number of steps")
    place = folder(runs)
    for run in (folder(name),) if is_remote(name) else (Path(name), place / name):
        reach(run)
        if (run / "config.yaml").is_file():
            return run, int(step) if at else None
    known = sorted(p.parent.name for p in place.glob("*/config.yaml")) if place.is_dir() else []
    there = f"one of {', '.join(known)} in {runs}/" if known else f"in {runs}/, where there is none yet"
    raise InputError(f"no run '{name}': neither a run folder nor {there}")


def same_bits(a: Any, b: Any) -> bool:
    """Whether two trees hold the same bits."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)
