"""Reject-sampling fine-tuning: the recipe it is, and a run of it."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import ALONE, tiny_values

from onerec_jax.config import Recipe, TrainConfig
from onerec_jax.errors import InputError
from onerec_jax.generate.load import load_recommender
from onerec_jax.parallel.mesh import make_mesh
from onerec_jax.posttrain.rsft import rsft, rsft_recipe
from onerec_jax.recipe import make_recipe
from onerec_jax.train.checkpoint import Checkpoints
from onerec_jax.train.loop import load_inputs, write_config
from onerec_jax.train.metrics import read_metrics
from onerec_jax.train.optimizer import learning_rate, make_optimizer
from onerec_jax.train.state import TrainState, create_state


def _recipe(folder: Path, sections: dict[str, dict] | None = None, **train) -> Recipe:
    values = tiny_values(folder)
    values["train"] |= train
    return make_recipe(values | (sections or {}))


def test_the_run_has_a_name_of_its_own_on_the_same_dataset_and_semantic_ids(tmp_path: Path):
    values = tiny_values(tmp_path)
    del values["data"]["directory"]  # then it follows from the name, which changes
    recipe = make_recipe(values | {"rsft": {"share": 0.25, "per": "user", "steps": 7, "table_rate": 3e-4}})
    own = rsft_recipe(recipe)
    assert own.name == "tiny-rsft" and own.run_directory == tmp_path / "runs" / "tiny-rsft"
    assert own.dataset_directory == recipe.dataset_directory == Path("datasets/tiny")
    assert own.tokenizer_directory == recipe.tokenizer_directory
    assert own.train.init_from == str(tmp_path / "runs" / "tiny")
    train = own.train
    assert (train.kept_share, train.kept_per, train.steps, train.table_rate) == (0.25, "user", 7, 3e-4)
    assert own.model == recipe.model and own.train.batch_size == recipe.train.batch_size
    assert make_recipe(own.model_dump(mode="json")) == own


def test_another_run_to_start_from_is_taken_as_it_is_named(tmp_path: Path):
    assert rsft_recipe(_recipe(tmp_path, {"rsft": {"init_from": "other@3"}})).train.init_from == "other@3"


@pytest.mark.parametrize(
    ("train", "last"),
    [
        (
            {"learning_rate": 2e-3, "final_rate": 0.1, "warmup_steps": 3, "half_life_days": 2.0, "half_life_from": 0.5},
            2e-4,
        ),
        ({"learning_rate": 2e-3, "schedule": "constant"}, 2e-3),
        ({"learning_rate": 2e-3, "final_rate": 0.01}, 8e-5),  # below the rate to end at: no way down is left
    ],
)
def test_the_rate_anneals_from_the_last_of_pre_training_to_its_own(tmp_path: Path, train: dict, last: float):
    recipe = _recipe(tmp_path, {"rsft": {"steps": 40, "learning_rate": 8e-5}}, steps=30, **train)
    own = rsft_recipe(recipe).train
    rate = np.array([learning_rate(own)(step) for step in range(41)])
    assert rate[0] == pytest.approx(max(np.asarray(learning_rate(recipe.train)(30)), 8e-5), rel=1e-5)
    middle = 8e-5 + (last - 8e-5) * (1 + np.cos(np.pi * np.arange(41) / 40)) / 2
    np.testing.assert_allclose(rate, middle, rtol=1e-5)
    assert own.half_life_at(0) == recipe.train.half_life_days


def _pre_trained(recipe: Recipe) -> TrainState:
    """A run whose checkpoint holds parameters that the recipe's own seed does not give."""
    model, optimizer = load_inputs(recipe)[2], make_optimizer(recipe.train)
    state = create_state(model, optimizer, recipe.seed + 1, make_mesh(recipe.mesh))
    checkpoints = Checkpoints(recipe.run_directory, TrainConfig(keep=1))
    checkpoints.save(6, state, {"step": 6}, recipe)
    checkpoints.close()
    write_config(recipe.run_directory, recipe)
    return state


def test_it_starts_from_the_pre_trained_parameters_and_can_be_served(
    tiny_recipe: Recipe, tiny_folder: Path, tmp_path: Path
):
    """With rates at which no parameter moves, so that what it ends with is what it began with."""
    values = tiny_values(tiny_folder)
    values["model"] |= {**ALONE, "head": "items", "moe": {"experts": 0}}
    values["train"] |= {"final_rate": 0.0}
    values |= {"runs": str(tmp_path), "rsft": {"steps": 2, "learning_rate": 1e-30, "table_rate": 1e-30}}
    recipe = make_recipe(values)
    with pytest.raises(InputError, match="no run"):
        rsft(recipe)
    assert not (tmp_path / "tiny-rsft").exists()
    before = _pre_trained(recipe)
    run = rsft(recipe, lambda line: None)
    assert run == tmp_path / "tiny-rsft"
    assert (run / "config.yaml").read_text().partition("\n")[2] == rsft_recipe(recipe).to_yaml()
    lines = read_metrics(run)
    assert lines[-1]["step"] == 2 and np.isfinite(lines[-1]["loss"])
    checkpoints = Checkpoints(run)
    assert checkpoints.steps() == [2]
    checkpoints.close()
    after = load_recommender("tiny-rsft", runs=str(tmp_path))
    for name, tree in (("params", before.params), ("bias", before.bias)):
        for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(getattr(after.state, name)), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-20)
    for name, table in before.tables.items():
        np.testing.assert_array_equal(table["rows"], after.state.tables[name]["rows"])
    examples = after.dataset.examples("valid")[:4]
    items, scores = after.recommend(examples, None, 5)
    assert (items >= 0).all() and np.isfinite(scores).all() and (np.diff(scores, axis=1) <= 0).all()
