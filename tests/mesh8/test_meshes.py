"""Training on eight, four and one devices is the same training, from a fresh state and from a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny import VOCABULARY, random_batch, tiny_model, tiny_values

from onerec_jax.config import MeshConfig, Recipe
from onerec_jax.data.schema import Batch
from onerec_jax.model.onerec import build
from onerec_jax.parallel.mesh import make_mesh
from onerec_jax.parallel.sharding import path_name, put_batch
from onerec_jax.recipe import make_recipe
from onerec_jax.train.checkpoint import Checkpoints, same_bits
from onerec_jax.train.metrics import ratios
from onerec_jax.train.optimizer import make_optimizer
from onerec_jax.train.state import TrainState, abstract_state, create_state
from onerec_jax.train.step import compile_step, make_train_step

MESHES = {
    "8: data 2 x fsdp 2 x tensor 2": (8, MeshConfig(data=2, fsdp=2, tensor=2)),
    "8: data 2 x expert 2 x tensor 2": (8, MeshConfig(data=2, expert=2, tensor=2)),
    "4: fsdp 2 x tensor 2": (4, MeshConfig(data=1, fsdp=2, tensor=2)),
    "1": (1, MeshConfig()),
}
SAVED_ON = "8: data 2 x fsdp 2 x tensor 2"
STEPS, SAVED_AT = 3, 1


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The compiled step of one mesh."""

    recipe: Recipe
    mesh: jax.sharding.Mesh
    abstract: TrainState
    create: Callable[[], TrainState]
    step: Callable[[TrainState, Any], tuple[TrainState, Any]]

    def train(self, state: TrainState, batches: list[Batch]) -> tuple[TrainState, list[dict[str, float]]]:
        lines = []
        for batch in batches:
            state, metrics = self.step(state, put_batch(batch, self.mesh), None)
            lines.append(ratios(metrics))
        return state, lines


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    values = tiny_values(tmp_path_factory.mktemp("meshes"))
    values["model"] = tiny_model(
        positive_length=0, lifelong_length=0, moe={"experts": 4, "active": 2, "hidden": 16, "tile": 8}
    ).model_dump()
    values["train"] |= {"steps": STEPS, "warmup_steps": 0, "batch_size": 8, "accumulation": 2}
    return make_recipe(values)


@pytest.fixture(scope="module")
def trainers(recipe: Recipe) -> dict[str, Trainer]:
    model, optimizer = build(recipe.model, VOCABULARY), make_optimizer(recipe.train)
    made = {}
    for name, (devices, config) in MESHES.items():
        mesh = make_mesh(config, jax.devices()[:devices])
        abstract = abstract_state(model, optimizer, mesh)
        step = compile_step(make_train_step(model, recipe, optimizer), abstract, mesh)
        made[name] = Trainer(
            recipe, mesh, abstract, lambda mesh=mesh: create_state(model, optimizer, recipe.seed, mesh), step
        )
    return made


@pytest.fixture(scope="module")
def batches(recipe: Recipe) -> list[Batch]:
    return [random_batch(recipe.model, batch=recipe.train.batch_size, seed=i) for i in range(STEPS)]


@pytest.fixture(scope="module")
def undisturbed(trainers: dict[str, Trainer], batches: list[Batch]) -> tuple[TrainState, list[dict[str, float]]]:
    """The fresh state, on the host, and the metrics of every step on one device."""
    fresh = trainers["1"].create()
    start = jax.tree.map(np.array, fresh)
    return start, trainers["1"].train(fresh, batches)[1]


@pytest.fixture(scope="module")
def saved(trainers, batches, undisturbed, recipe: Recipe) -> Path:
    """A run whose checkpoint of step `SAVED_AT` was written by eight devices."""
    trainer = trainers[SAVED_ON]
    state = trainer.create()
    assert same_bits(state, undisturbed[0]), "the seed gives another fresh state on another mesh"
    state, lines = trainer.train(state, batches[:SAVED_AT])
    np.testing.assert_allclose(lines[0]["loss"], undisturbed[1][0]["loss"], atol=1e-5)
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(state.params))
    checkpoints = Checkpoints(recipe.run_directory)
    checkpoints.save(SAVED_AT, state, {"step": SAVED_AT}, recipe)
    checkpoints.close()
    return recipe.run_directory


@pytest.mark.parametrize("mesh", MESHES)
def test_a_checkpoint_of_eight_devices_goes_on_with_the_same_losses_on(
    mesh: str, trainers: dict[str, Trainer], batches: list[Batch], undisturbed, saved: Path, recipe: Recipe
):
    trainer = trainers[mesh]
    checkpoints = Checkpoints(saved)
    state, position = checkpoints.restore(trainer.abstract, recipe)
    checkpoints.close()
    assert position == {"step": SAVED_AT} and int(state.step) == SAVED_AT
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(trainer.abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    state, lines = trainer.train(state, batches[SAVED_AT:])
    for line, expected in zip(lines, undisturbed[1][SAVED_AT:], strict=True):
        for name in ("loss", "loss/level1", "loss/level2", "loss/level3", "experts/decoder_max_over_mean"):
            assert abs(line[name] - expected[name]) < 1e-5, name
        assert abs(line["gradient_norm"] / expected["gradient_norm"] - 1) < 1e-4
    assert int(state.step) == STEPS


def test_a_fresh_run_on_a_mesh_with_an_expert_axis_has_the_losses_of_one_device(
    trainers: dict[str, Trainer], batches: list[Batch], undisturbed
):
    trainer = trainers["8: data 2 x expert 2 x tensor 2"]
    state = jax.tree.map(lambda x, wanted: jax.device_put(x, wanted.sharding), undisturbed[0], trainer.abstract)
    experts = next(leaf for path, leaf in jax.tree.leaves_with_path(state.params) if path_name(path).endswith("moe/up"))
    assert experts.sharding.shard_shape(experts.shape)[1] == trainer.recipe.model.moe.experts // 2
    _, lines = trainer.train(state, batches)
    for line, expected in zip(lines, undisturbed[1], strict=True):
        assert abs(line["loss"] - expected["loss"]) < 1e-5
