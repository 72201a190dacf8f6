"""Training, validation, search and checkpoints of a model with a spread table are the same on every mesh."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny import VOCABULARY, random_batch, tiny_model, tiny_values

from onerec_jax.config import MeshConfig, Recipe
from onerec_jax.generate.beam import make_beam_search
from onerec_jax.model import tables
from onerec_jax.model.onerec import Model, build
from onerec_jax.model.prefixes import device_trie
from onerec_jax.parallel.mesh import make_mesh, on_mesh
from onerec_jax.parallel.sharding import put_batch
from onerec_jax.plan.collectives import collectives
from onerec_jax.plan.program import read
from onerec_jax.recipe import make_recipe
from onerec_jax.tokenizer.trie import Trie
from onerec_jax.train.checkpoint import Checkpoints, same_bits
from onerec_jax.train.metrics import ratios
from onerec_jax.train.optimizer import make_optimizer
from onerec_jax.train.state import TrainState, abstract_state, create_state
from onerec_jax.train.step import compile_step, make_eval_step, make_train_step

MESHES = {
    "1": (1, MeshConfig()),
    "8: data 2 x fsdp 4": (8, MeshConfig(data=2, fsdp=4)),
    "8: fsdp 2 x expert 2 x tensor 2": (8, MeshConfig(data=1, fsdp=2, expert=2, tensor=2)),
}
SAVED_ON = "8: data 2 x fsdp 4"
MANY = dataclasses.replace(VOCABULARY, items=20_000)
STEPS = 2


@pytest.fixture(scope="module", autouse=True)
def the_item_table_is_spread():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "SPREAD_ROWS", 10_000)
        yield


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The compiled step of one mesh."""

    mesh: jax.sharding.Mesh
    abstract: TrainState
    compiled: Any

    def train(self, state: TrainState, batches: list[Any]) -> tuple[TrainState, list[dict[str, float]]]:
        lines = []
        for batch in batches:
            state, metrics = self.compiled(state, put_batch(batch, self.mesh), None)
            lines.append(ratios(metrics))
        return state, lines


def _recipe(folder: Path, **tables: Any) -> Recipe:
    values = tiny_values(folder)
    moe = {"experts": 4, "active": 2, "hidden": 16, "tile": 8}
    values["model"] = tiny_model(positive_length=0, lifelong_length=0, moe=moe, tables=tables).model_dump()
    values["train"] |= {"steps": STEPS, "warmup_steps": 0, "batch_size": 16, "accumulation": 2}
    return make_recipe(values)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return _recipe(tmp_path_factory.mktemp("spread"))


@pytest.fixture(scope="module")
def model(recipe: Recipe) -> Model:
    return build(recipe.model, MANY)


@pytest.fixture(scope="module")
def batches(recipe: Recipe) -> list[Any]:
    return [random_batch(recipe.model, MANY, batch=recipe.train.batch_size, seed=i) for i in range(STEPS)]


def _mesh(name: str) -> jax.sharding.Mesh:
    devices, config = MESHES[name]
    return make_mesh(config, jax.devices()[:devices])


@pytest.fixture(scope="module")
def trainers(recipe: Recipe, model: Model, batches: list[Any]) -> dict[str, Trainer]:
    optimizer = make_optimizer(recipe.train)
    made = {}
    for name in MESHES:
        mesh = _mesh(name)
        abstract = abstract_state(model, optimizer, mesh)
        step: Any = compile_step(make_train_step(model, recipe, optimizer), abstract, mesh)
        compiled = on_mesh(mesh, step.__wrapped__.lower)(abstract, put_batch(batches[0], mesh), None).compile()
        made[name] = Trainer(mesh, abstract, compiled)
    return made


@pytest.fixture(scope="module")
def undisturbed(trainers: dict[str, Trainer], recipe: Recipe, model: Model, batches: list[Any]):
    """The fresh state, that after all steps on one device, and the metrics."""
    fresh = create_state(model, make_optimizer(recipe.train), recipe.seed, trainers["1"].mesh)
    start = jax.tree.map(np.array, fresh)
    state, lines = trainers["1"].train(fresh, batches)
    return start, jax.tree.map(np.array, state), lines


def _check(state: TrainState, lines: list[dict[str, float]], undisturbed: Any) -> None:
    for line, expected in zip(lines, undisturbed[2][-len(lines) :], strict=True):
        for name in ("loss", "loss/level1", "loss/level3"):
            assert abs(line[name] - expected[name]) < 1e-5, name
        assert abs(line["gradient_norm"] / expected["gradient_norm"] - 1) < 1e-4
    before = undisturbed[0].tables["item"]["rows"]
    found, expected = (np.asarray(s.tables["item"]["rows"]) for s in (state, undisturbed[1]))
    same = (expected == before).all(axis=1)
    assert 0 < (~same).sum() < 16 * 6 * STEPS
    np.testing.assert_array_equal(found[same], before[same])
    np.testing.assert_allclose(found[~same], expected[~same], atol=2e-4)


def test_the_item_table_alone_is_spread(model: Model, trainers: dict[str, Trainer]):
    assert tables.stored_rows(100) == 100
    stored = tables.stored_rows(MANY.items)
    for name, trainer in trainers.items():
        rows = trainer.abstract.tables["item"]["rows"]
        assert rows.shape[0] == stored == 21_504
        assert rows.sharding.shard_shape(rows.shape)[0] == stored // MESHES[name][0]
    assert model.tables["item"][0] == MANY.items


@pytest.mark.parametrize("mesh", [name for name in MESHES if name != "1"])
def test_a_step_is_that_of_one_device_and_moves_no_table(mesh: str, trainers, undisturbed, batches, model: Model):
    trainer = trainers[mesh]
    state = jax.tree.map(lambda x, wanted: jax.device_put(x, wanted.sharding), undisturbed[0], trainer.abstract)
    _check(*trainer.train(state, batches), undisturbed)
    share = 4 * model.tables["item"][0] * model.config.d_model / 8
    moved = collectives(read(trainer.compiled.as_text()), trainer.mesh)
    assert max(collective.bytes for collective in moved) < share
    assert trainer.compiled.memory_analysis().temp_size_in_bytes < 8 * share


@pytest.mark.parametrize("mesh", MESHES)
def test_a_checkpoint_of_eight_devices_goes_on_with_the_same_losses_on(
    mesh: str, trainers, undisturbed, batches, recipe: Recipe, tmp_path: Path
):
    trainer = trainers[SAVED_ON]
    state = jax.tree.map(lambda x, wanted: jax.device_put(x, wanted.sharding), undisturbed[0], trainer.abstract)
    state, _ = trainer.train(state, batches[:1])
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {"step": 1}, recipe)
    checkpoints.wait()
    restored, _ = checkpoints.restore(trainers[mesh].abstract, recipe)
    checkpoints.close()
    _check(*trainers[mesh].train(restored, batches[1:]), undisturbed)


def test_tables_with_options_are_restored_onto_another_mesh(tmp_path: Path):
    recipe = _recipe(tmp_path, dtype="bfloat16", evict_after=3, admit_after=2)
    model, optimizer = build(recipe.model, MANY), make_optimizer(recipe.train)
    state = create_state(model, optimizer, 0, _mesh(SAVED_ON))
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(1, state, {"step": 1}, recipe)
    checkpoints.wait()
    abstract = abstract_state(model, optimizer, _mesh("8: fsdp 2 x expert 2 x tensor 2"))
    restored, _ = checkpoints.restore(abstract, recipe)
    checkpoints.close()
    assert same_bits(state, restored)
    for leaf, wanted in zip(jax.tree.leaves(restored.tables), jax.tree.leaves(abstract.tables), strict=True):
        assert leaf.dtype == wanted.dtype and leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_a_fresh_table_is_made_in_place(recipe: Recipe, model: Model):
    """Each device draws the rows it owns, with the values that one device would draw."""
    optimizer = make_optimizer(recipe.train)
    mesh = _mesh("8: data 2 x fsdp 4")
    places = abstract_state(model, optimizer, mesh).tables
    make = jax.jit(
        lambda: model.init(0)[1], out_shardings=jax.tree.map(lambda leaf: leaf.sharding, places)
    )  # fmt: skip
    compiled = make.lower().compile()
    assert collectives(read(compiled.as_text()), mesh) == []
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 20_000 * model.config.d_model
    np.testing.assert_array_equal(compiled()["item"]["rows"], jax.jit(lambda: model.init(0)[1])()["item"]["rows"])


def test_validation_and_search_on_a_mesh_are_those_of_one_device(undisturbed, model: Model, batches, trainers):
    name = "8: fsdp 2 x expert 2 x tensor 2"
    codes = np.random.default_rng(1).integers(0, 16, (50, 3)).astype(np.int32)
    trie = device_trie(Trie.build(codes, np.zeros(len(codes))), model.config)
    state, losses, beams = undisturbed[1], {}, {}
    for mesh_name in ("1", name):
        mesh, abstract = trainers[mesh_name].mesh, trainers[mesh_name].abstract
        placed = jax.tree.map(lambda x, wanted: jax.device_put(x, wanted.sharding), state, abstract)
        batch = put_batch(batches[0], mesh)
        evaluate = on_mesh(mesh, jax.jit(make_eval_step(model)).lower)(placed, batch, None).compile()
        losses[mesh_name] = ratios(evaluate(placed, batch, None))["loss"]
        if mesh_name == name:
            share = 4 * model.tables["item"][0] * model.config.d_model / 8
            assert max(c.bytes for c in collectives(read(evaluate.as_text()), mesh)) < share
        search = on_mesh(mesh, make_beam_search(model, 4))
        beams[mesh_name] = jax.device_get(search(placed.params, placed.tables, placed.bias, batch, trie))
    assert abs(losses["1"] - losses[name]) < 1e-5
    np.testing.assert_array_equal(beams["1"].codes, beams[name].codes)
    np.testing.assert_allclose(beams["1"].score, beams[name].score, atol=1e-4)
