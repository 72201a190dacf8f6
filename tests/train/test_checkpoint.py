"""What a checkpoint holds, which are kept, and what does not fit is refused with the reason."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import VOCABULARY, tiny_values

from onerec_jax.config import Recipe, TrainConfig
from onerec_jax.data.schema import Vocabulary
from onerec_jax.errors import InputError
from onerec_jax.model.onerec import build
from onerec_jax.parallel.mesh import make_mesh
from onerec_jax.parallel.sharding import path_name
from onerec_jax.recipe import make_recipe
from onerec_jax.train.checkpoint import Checkpoints, has_checkpoint, parse_run, same_bits
from onerec_jax.train.optimizer import make_optimizer
from onerec_jax.train.state import TrainState, abstract_state


def _recipe(folder: Path, model: dict | None = None, **train) -> Recipe:
    values = tiny_values(folder)
    values["model"] |= {"positive_length": 0, "lifelong_length": 0, **(model or {})}
    values["train"] |= train
    return make_recipe(values)


def _abstract(recipe: Recipe, vocabulary: Vocabulary = VOCABULARY) -> TrainState:
    mesh = make_mesh(recipe.mesh, jax.devices()[:1])
    return abstract_state(build(recipe.model, vocabulary), make_optimizer(recipe.train), mesh)


def _random_state(abstract: TrainState, seed: int) -> TrainState:
    """Every leaf filled with its own random bits, NaNs, infinities and negative zeros among them."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        return jax.device_put(np.frombuffer(rng.bytes(4 * leaf.size), leaf.dtype).reshape(leaf.shape), leaf.sharding)

    return jax.tree.map(fill, abstract)


def _save(recipe: Recipe, states: dict[int, TrainState], keep: int = 1) -> Path:
    checkpoints = Checkpoints(recipe.run_directory, TrainConfig(keep=keep))
    for step, state in states.items():
        checkpoints.save(step, state, {"step": 10 * step}, recipe)
    checkpoints.close()
    return recipe.run_directory


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return _recipe(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def abstract(recipe: Recipe) -> TrainState:
    return _abstract(recipe)


@pytest.fixture(scope="module")
def states(abstract: TrainState) -> dict[int, TrainState]:
    return {step: _random_state(abstract, step) for step in (1, 2, 3)}


@pytest.fixture(scope="module")
def run(recipe: Recipe, states: dict[int, TrainState]) -> Path:
    """A run that saved at steps 1, 2 and 3 and kept two."""
    return _save(recipe, states, keep=2)


def test_a_restored_state_has_every_bit_of_the_saved_one(run: Path, recipe: Recipe, abstract: TrainState, states):
    names = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract)}
    for held in ("step", "tables/item/accumulator", "tables/user/rows", "bias/decoder", "params/decoder/bos"):
        assert held in names
    assert any(name.startswith("optimizer/") and name.endswith("nu/decoder/bos") for name in names)
    restored, position = Checkpoints(run).restore(abstract, recipe)
    assert jax.tree.structure(restored) == jax.tree.structure(states[3])
    assert same_bits(restored, states[3])
    assert position == {"step": 30}


def test_two_trees_that_differ_in_one_bit_are_not_the_same(states: dict[int, TrainState]):
    zero = {"a": np.zeros(3, np.float32)}
    assert same_bits(zero, {"a": np.zeros(3, np.float32)})
    assert not same_bits(zero, {"a": np.array([0.0, 0.0, -0.0], np.float32)})
    assert not same_bits(states[1], states[2])


def test_only_the_most_recent_checkpoints_are_kept(run: Path, recipe: Recipe, abstract: TrainState, states):
    assert Checkpoints(run).steps() == [2, 3]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "3"]
    assert same_bits(Checkpoints(run).restore(abstract, recipe, 2)[0], states[2])
    with pytest.raises(InputError, match=r"has no checkpoint of step 1; it has 2, 3$"):
        Checkpoints(run).restore(abstract, recipe, 1)


def test_a_step_saved_again_replaces_the_one_before(tmp_path: Path, abstract: TrainState, states):
    recipe = _recipe(tmp_path)
    _save(recipe, {1: states[1]})
    _save(recipe, {1: states[2]})
    assert Checkpoints(recipe.run_directory).steps() == [1]
    assert same_bits(Checkpoints(recipe.run_directory).restore(abstract, recipe)[0], states[2])


def test_saving_does_not_hold_the_state_so_that_it_can_be_donated(tmp_path: Path, abstract: TrainState, states):
    recipe = _recipe(tmp_path)
    state = jax.tree.map(lambda leaf: jax.device_put(np.array(leaf), leaf.sharding), states[1])
    checkpoints = Checkpoints(recipe.run_directory, TrainConfig(keep=1))
    checkpoints.save(1, state, {"step": 1}, recipe)
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    checkpoints.wait()
    assert same_bits(checkpoints.restore(abstract, recipe)[0], states[1])


def test_the_recipe_that_wrote_a_checkpoint_is_in_it(run: Path, recipe: Recipe):
    assert Checkpoints(run).recipe() == recipe


def test_a_checkpoint_of_another_model_is_refused_with_the_settings_that_differ(run: Path, tmp_path: Path):
    other = _recipe(tmp_path, {"d_model": 48, "dropout": 0.5})
    with pytest.raises(InputError) as error:
        Checkpoints(run).restore(_abstract(other), other)
    message = str(error.value)
    assert "checkpoints/3 is of another model" in message
    assert "model.d_model is 48 but 32 in the checkpoint" in message
    assert "model.dropout is 0.5 but 0.0 in the checkpoint" in message
    assert "ffn_hidden" not in message


def test_a_checkpoint_of_another_optimizer_is_refused(run: Path, tmp_path: Path):
    other = _recipe(tmp_path, optimizer="muon")
    with pytest.raises(InputError, match=r"train.optimizer is 'muon' but 'adamw' in the checkpoint"):
        Checkpoints(run).restore(_abstract(other), other)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"items": 101}, r"tables/item/accumulator is \(100,\) there and \(101,\) here"),
        ({"codebook_sizes": (16, 16)}, r"params/decoder/codes/embedding is \(48, 32\) there and \(32, 32\) here"),
        ({"user_features": (3, 4, 5)}, r"params/encoder/static/.* is .* there and .* here"),
        ({"labels": VOCABULARY.labels[:3]}, r"params/encoder/.*feedback.* is .* there and .* here"),
    ],
)
def test_a_checkpoint_of_another_dataset_is_refused_with_the_first_array_that_differs(
    run: Path, recipe: Recipe, changes: dict, named: str
):
    abstract = _abstract(recipe, dataclasses.replace(VOCABULARY, **changes))
    with pytest.raises(InputError, match=f"checkpoints/3 does not fit this dataset: {named}; use the dataset"):
        Checkpoints(run).restore(abstract, recipe)


def test_a_run_without_checkpoints_says_what_writes_one(tmp_path: Path, recipe: Recipe, abstract: TrainState):
    assert not has_checkpoint(tmp_path)
    with pytest.raises(InputError, match="holds no checkpoint; `onerec pretrain RECIPE` writes one"):
        Checkpoints(tmp_path).restore(abstract, recipe)


@pytest.mark.parametrize("step", [2, None])
def test_the_model_alone_is_restored_whatever_optimizer_comes_next(run: Path, tmp_path: Path, states, step: int | None):
    other = _recipe(tmp_path, optimizer="muon")
    given = Checkpoints(run).restore_model(_abstract(other), other, step)
    expected = states[step or 3]
    assert sorted(given) == ["bias", "params", "tables"]
    for name, tree in given.items():
        assert same_bits(tree, getattr(expected, name)), name
    wider = _recipe(tmp_path, {"d_model": 48})
    with pytest.raises(InputError, match=r"model.d_model is 48 but 32 in the checkpoint"):
        Checkpoints(run).restore_model(_abstract(wider), wider)


def test_a_half_written_checkpoint_is_ignored_and_the_next_writer_clears_it_away(
    tmp_path: Path, abstract: TrainState, states
):
    recipe = _recipe(tmp_path)
    run = _save(recipe, {1: states[1]})
    half = run / "checkpoints" / "2.orbax-checkpoint-tmp"
    (half / "state").mkdir(parents=True)
    (half / "state" / "manifest.ocdbt").write_bytes(b"half")
    assert has_checkpoint(run)
    reader = Checkpoints(run)
    assert reader.steps() == [1]
    assert same_bits(reader.restore(abstract, recipe)[0], states[1])
    reader.close()
    assert half.exists(), "it may be what a running writer is at"
    writer = Checkpoints(run, TrainConfig(keep=2))
    writer.save(2, states[2], {"step": 2}, recipe)
    writer.close()
    assert not half.exists()
    assert Checkpoints(run).steps() == [1, 2]
    assert same_bits(Checkpoints(run).restore(abstract, recipe)[0], states[2])


def test_only_half_of_the_first_checkpoint_is_no_checkpoint(tmp_path: Path):
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    assert not has_checkpoint(tmp_path)
    assert Checkpoints(tmp_path, TrainConfig(keep=1)).steps() == []


def test_a_run_is_found_by_name_or_folder_with_or_without_a_step(tmp_path: Path):
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    runs = str(tmp_path / "runs")
    assert parse_run("first", runs) == (folder, None)
    assert parse_run("first@120", runs) == (folder, 120)
    assert parse_run(str(folder), "elsewhere") == (folder, None)
    assert parse_run(f"{folder}@0", "elsewhere") == (folder, 0)
    for reference in ("first@", "first@last", "first@-1"):
        with pytest.raises(InputError, match=f"'{reference}' must be RUN or RUN@STEP with a whole number of steps"):
            parse_run(reference, runs)
    with pytest.raises(InputError, match=r"no run 'second': neither a run folder nor one of first in "):
        parse_run("second", runs)
    with pytest.raises(InputError, match=r"no run 'second'.*none yet"):
        parse_run("second", str(tmp_path / "nowhere"))


def _files(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size)


@pytest.fixture
def saved(tmp_path: Path, recipe: Recipe, run: Path) -> Callable[[], Path]:
    """A fresh copy of the run with checkpoints 2 and 3, as often as it is asked for."""

    def copy() -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        return Path(shutil.copytree(run, tmp_path / "copy"))

    return copy


def test_whatever_file_of_the_newest_checkpoint_is_cut_the_one_before_is_used_and_one_warning_names_it(
    saved: Callable[[], Path], recipe: Recipe, abstract: TrainState, states
):
    names = [file.relative_to(saved()) for file in _files(saved() / "checkpoints" / "3")]
    assert len(names) > 5
    for name in names:
        copy, said = saved(), []
        file = copy / name
        size = file.stat().st_size
        os.truncate(file, size - 1)
        writer = Checkpoints(copy, TrainConfig(keep=2), said.append)
        assert writer.steps() == [2]
        writer.close()
        (warning,) = said
        assert f"checkpoint 3 is damaged: {file} has {size - 1:,} of {size:,} bytes" in warning
        assert (copy / "checkpoints_damaged" / "3").is_dir()
    writer = Checkpoints(copy, TrainConfig(keep=2))
    assert same_bits(writer.restore(abstract, recipe)[0], states[2])
    writer.save(3, states[3], {"step": 30}, recipe)
    writer.close()
    assert same_bits(Checkpoints(copy).restore(abstract, recipe)[0], states[3])


def test_a_bit_that_flipped_and_a_file_that_is_gone_are_damage_too(saved: Callable[[], Path]):
    for harm in (_flip, Path.unlink):
        copy, said = saved(), []
        harm(max(_files(copy / "checkpoints" / "3"), key=lambda path: path.stat().st_size))
        writer = Checkpoints(copy, TrainConfig(keep=2), said.append)
        assert writer.steps() == [2] and len(said) == 1
        writer.close()


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_reader_goes_past_a_damaged_checkpoint_and_leaves_it_where_it_is(
    saved: Callable[[], Path], recipe: Recipe, abstract: TrainState, states
):
    copy, said = saved(), []
    _flip(max(_files(copy / "checkpoints" / "3"), key=lambda path: path.stat().st_size))
    reader = Checkpoints(copy, report=said.append)
    assert same_bits(reader.restore(abstract, recipe)[0], states[2])
    assert len(said) == 1 and "checkpoint 3 is damaged" in said[0]
    with pytest.raises(InputError, match=r"no whole checkpoint of step 3: .* does not hold what was written"):
        reader.restore(abstract, recipe, 3)
    assert (copy / "checkpoints" / "3").is_dir()
    _flip(max(_files(copy / "checkpoints" / "2"), key=lambda path: path.stat().st_size))
    with pytest.raises(InputError, match=r"no whole checkpoint of step 3, 2"):
        Checkpoints(copy, report=said.append).restore(abstract, recipe)


def test_the_last_ones_every_so_many_steps_and_the_best_are_kept(tmp_path: Path, abstract: TrainState, states):
    recipe = _recipe(tmp_path, keep=1, keep_every=4, keep_best=1, eval_every=1)
    checkpoints = Checkpoints(recipe.run_directory, recipe.train)
    for step, loss in zip(range(1, 8), (5.0, 3.0, 4.0, 4.0, 2.5, 3.5, 3.6), strict=True):
        checkpoints.save(step, states[1], {"step": step}, recipe, validation=loss)
    checkpoints.close()
    assert Checkpoints(recipe.run_directory).steps() == [4, 5, 7]
    records = recipe.run_directory / "checkpoints_written"
    Checkpoints(recipe.run_directory, recipe.train).close()
    assert sorted(path.stem for path in records.iterdir()) == ["4", "5", "7"]
