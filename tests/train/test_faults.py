"""What a training run does when it is asked to leave, when its loss diverges, and when its disk fails. The model is linear."""

from __future__ import annotations

import dataclasses
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from stand_ins import instant_reinforcement, instant_reward_training, linear_model
from tiny import tiny_values, untimed

from onerec_jax.config import Recipe
from onerec_jax.data.pipeline import Pipeline
from onerec_jax.errors import PreemptedError, StoppedError, StorageError
from onerec_jax.parallel.mesh import make_mesh
from onerec_jax.posttrain import loop as rl_loop
from onerec_jax.recipe import make_recipe
from onerec_jax.reward import training as reward_training
from onerec_jax.train import loop
from onerec_jax.train.checkpoint import Checkpoints, same_bits
from onerec_jax.train.goodput import LOST, goodput
from onerec_jax.train.metrics import read_metrics
from onerec_jax.train.optimizer import make_optimizer
from onerec_jax.train.state import TrainState, abstract_state


@pytest.fixture
def made(
    tiny_recipe: Recipe, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Recipe]:
    """Recipes of runs in `tmp_path` on the shared dataset, with settings changed."""
    monkeypatch.setattr(loop, "build", linear_model)

    def make(name: str = "run", faults: dict | None = None, **train) -> Recipe:
        values = tiny_values(tiny_folder)
        values["train"] |= {"log_every": 1, "checkpoint_every": 4, "steps": 12, **train}
        return make_recipe(values | {"name": name, "runs": str(tmp_path / "runs"), "faults": faults or {}})

    return make


def _silent(line: str) -> None:
    pass


def _at(start: str, what: Callable[[], object]) -> Callable[[str], None]:
    """A report that does something at the line that begins so."""
    return lambda line: what() if line.startswith(start) else None


def _sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _state(recipe: Recipe, step: int | None = None) -> TrainState:
    _, _, model = loop.load_inputs(recipe)
    checkpoints = Checkpoints(recipe.run_directory)
    abstract = abstract_state(model, make_optimizer(recipe.train), make_mesh(recipe.mesh, jax.devices()[:1]))
    state, _ = checkpoints.restore(abstract, recipe, step)
    checkpoints.close()
    return state


def _lines(recipe: Recipe) -> list[dict[str, float]]:
    return [untimed(line) for line in read_metrics(recipe.run_directory)]


class Poisoned(Pipeline):
    """Batches of these data steps weigh nothing that is a number."""

    steps: frozenset[int] = frozenset()
    taken: list[int]

    def __next__(self):
        at, batch = self.state()["step"], super().__next__()
        type(self).taken.append(at)
        if at not in self.steps:
            return batch
        return dataclasses.replace(batch, target_weight=np.full_like(batch.target_weight, np.nan))


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    def put(*steps: int) -> list[int]:
        taken: list[int] = []
        monkeypatch.setattr(loop, "Pipeline", type("Put", (Poisoned,), {"steps": frozenset(steps), "taken": taken}))
        return taken

    return put


def test_a_sigterm_saves_the_step_that_is_being_taken_and_the_run_goes_on_to_the_same_bits(made):
    settings = {"log_every": 3}  # the line that the leaving cuts in two is not of the same steps
    whole, left = made("whole", **settings), made("left", **settings)
    loop.pretrain(whole, _silent)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(PreemptedError, match="after step 7"):
        loop.pretrain(left, _at("step 6/12", _sigterm))
    assert signal.getsignal(signal.SIGTERM) is before
    assert Checkpoints(left.run_directory).steps() == [4, 7]
    said: list[str] = []
    loop.pretrain(left, said.append)
    assert said[0].endswith("at step 7")
    assert same_bits(_state(left), _state(whole))
    of_whole = {line["step"]: line for line in _lines(whole)}
    assert [line for line in _lines(left) if line["step"] == 12] == [of_whole[12]]


def test_a_sigterm_before_the_first_step_leaves_at_once_and_one_at_the_last_step_ends_as_usual(made, monkeypatch):
    recipe = made()
    monkeypatch.setattr(loop, "load_inputs", lambda recipe: _sigterm())
    with pytest.raises(PreemptedError, match="before the first step"):
        loop.pretrain(recipe, _silent)
    assert not recipe.run_directory.exists()
    monkeypatch.undo()
    monkeypatch.setattr(loop, "build", linear_model)
    assert loop.pretrain(recipe, _at("step 12/12", _sigterm)) == recipe.run_directory


def test_reward_training_and_rl_leave_as_pre_training_does(made, monkeypatch: pytest.MonkeyPatch):
    recipe = made()
    reward = {"steps": 6, "batch_size": 8}
    rl = {
        "init_from": "run",
        "steps": 6,
        "requests": 4,
        "batch_size": 4,
        "rewards": {"hit": 1.0},
        "watch_every": 0,
        "log_every": 1,
    }
    recipe = make_recipe(recipe.model_dump() | {"reward": recipe.reward.model_dump() | reward, "rl": rl})
    loop.pretrain(recipe, _silent)
    instant_reinforcement(monkeypatch)
    instant_reward_training(monkeypatch)
    for stage, train in (
        ("reward", lambda say: reward_training.train_reward(recipe, say)),
        ("rl", lambda say: rl_loop.reinforce(recipe, lambda recipe, dataset: None, say)),  # type: ignore[arg-type]
    ):
        with pytest.raises(PreemptedError, match="after step 3"):
            train(_at("step 2/6", _sigterm))
        run = recipe.run_directory.with_name(f"run-{stage}")
        assert Checkpoints(run).steps() == [3]
        assert train(_silent) == run
        assert Checkpoints(run).steps()[-1] == 6
        spent, starts = goodput(run)
        assert starts == 2 and spent["step"] > 0 and spent["checkpoint"] > 0


def test_a_step_that_is_not_finite_changes_nothing_but_its_number(made, poison):
    recipe = made(steps=6, log_every=6, checkpoint_every=6)
    clean, dirty = made("clean", steps=3, log_every=3), made("dirty", steps=4, log_every=4)
    loop.pretrain(clean, _silent)
    poison(3)
    said: list[str] = []
    loop.pretrain(dirty, said.append)
    before, after = _state(clean), _state(dirty)
    assert int(after.step) == 4
    assert same_bits(after.params, before.params) and same_bits(after.optimizer, before.optimizer)
    assert same_bits(after.tables, before.tables) and same_bits(after.bias, before.bias)
    (line,), (of_clean,) = _lines(dirty), _lines(clean)
    assert line["skipped"] == 0.25 and "25% of the steps skipped" in said[-1]
    assert line["loss"] == of_clean["loss"]
    loop.pretrain(recipe, _silent)
    assert np.isfinite(_lines(recipe)[-1]["loss"]) and not same_bits(_state(recipe).params, after.params)


def test_a_run_that_diverges_goes_back_to_its_checkpoint_and_past_the_data(made, poison):
    recipe = made(log_every=2)
    taken = poison(5, 6, 7)  # the line of steps 7 and 8 has no finite step
    said: list[str] = []
    loop.pretrain(recipe, said.append)
    assert taken == list(range(16))
    assert "diverged at step 8: no step had a finite loss and gradient; back to step 4, and past the data since" in said
    state, position = _state(recipe), Checkpoints(recipe.run_directory)
    assert int(state.step) == 12
    _, _, model = loop.load_inputs(recipe)
    abstract = abstract_state(model, make_optimizer(recipe.train), make_mesh(recipe.mesh, jax.devices()[:1]))
    assert position.restore(abstract, recipe)[1] == {"step": 16}
    spent, starts = goodput(recipe.run_directory)
    assert starts == 1 and spent[LOST] > 0


def test_a_loss_that_leaps_sends_the_run_back_and_too_many_end_it(made, monkeypatch: pytest.MonkeyPatch):
    recipe = made(faults={"spike_factor": 2.0, "rollbacks": 1})
    said: list[str] = []

    def leaps(step, abstract, mesh):
        def stand_in(state, batch, trie):
            loss = 1.0 if int(state.step) < 6 else 2.5
            return dataclasses.replace(state, step=state.step + 1), {"loss": (loss, 1.0), "skipped": (0.0, 1.0)}

        return stand_in

    monkeypatch.setattr(loop, "compile_step", leaps)
    with pytest.raises(
        StoppedError, match=r"step 7: the loss leapt from 1.000 to 2.500 .*after 1 of faults.rollbacks 1"
    ):
        loop.pretrain(recipe, said.append)
    assert sum(line.startswith("diverged at step 7") for line in said) == 1
    assert Checkpoints(recipe.run_directory).steps() == [4]


def test_a_run_that_diverges_before_any_checkpoint_stops(made, poison):
    recipe = made()
    poison(1)
    with pytest.raises(StoppedError, match=r"step 2: .* before the first checkpoint"):
        loop.pretrain(recipe, _silent)


def test_a_full_disk_is_told_at_the_next_save_and_takes_no_older_checkpoint_away(made):
    recipe, limits = made(keep=1), resource.getrlimit(resource.RLIMIT_FSIZE)

    def full() -> None:
        written = recipe.run_directory / "checkpoints_written" / "4.json"
        while not written.exists():  # saves go on beside the steps
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    said: list[str] = []

    def report(line: str) -> None:
        said.append(line)
        if line.startswith("step 5/12"):
            full()

    try:
        with pytest.raises(StorageError, match=r"step 8 could not be written .*those of step 4 are whole"):
            loop.pretrain(recipe, report)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert any(line.startswith("step 11/12") for line in said)
    assert Checkpoints(recipe.run_directory).steps() == [4]
    assert loop.pretrain(recipe, said.append) == recipe.run_directory
    assert Checkpoints(recipe.run_directory).steps() == [12]
