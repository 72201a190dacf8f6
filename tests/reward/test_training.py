"""Runs of the reward model: what they leave behind, that they go on as if never stopped, and what is measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from onerec_jax.config import ModelConfig, Recipe, RewardConfig
from onerec_jax.data.batch import make_batch
from onerec_jax.data.schema import Batch
from onerec_jax.data.store import Dataset
from onerec_jax.errors import InputError
from onerec_jax.evaluate.evaluation import evaluate
from onerec_jax.evaluate.requests import collect_requests
from onerec_jax.parallel.mesh import make_mesh
from onerec_jax.recipe import make_recipe
from onerec_jax.reward import training
from onerec_jax.reward.candidates import Candidates, make_catalogue
from onerec_jax.reward.lists import ListScorer
from onerec_jax.reward.pscore import RewardModel, learnt_rewards, objectives, reward_names
from onerec_jax.reward.training import (
    impressions_by,
    load_reward,
    load_reward_inputs,
    measure_reward,
    quality_table,
    reward_recipe,
    train_reward,
)
from onerec_jax.tokenizer.semantic_ids import SemanticIds
from onerec_jax.train.checkpoint import Checkpoints, same_bits
from onerec_jax.train.metrics import read_metrics
from onerec_jax.train.state import TrainState

REWARD = RewardConfig(width=8, heads=2, hidden=8, steps=4, batch_size=16, history=6, playtime_cap_s=40.0)


class Stop(Exception):
    """Ends a run from its report, as a kill would."""


@pytest.fixture(scope="module")
def made(tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    """Recipes of runs in a folder of their own on the shared dataset."""

    def make(**reward) -> Recipe:
        train = tiny_recipe.train.model_copy(update={"log_every": 1, "checkpoint_every": 2})
        changes = {"name": "cheap", "runs": str(tmp_path_factory.mktemp("reward")), "train": train}
        return tiny_recipe.model_copy(update={**changes, "reward": REWARD.model_copy(update=reward)})

    return make


@pytest.fixture(scope="module")
def trained(made: Callable[..., Recipe]) -> tuple[Recipe, Path, list[str]]:
    recipe, said = made(), []
    return recipe, train_reward(recipe, said.append), said


Loaded = tuple[RewardModel, Any, Dataset, SemanticIds]


@pytest.fixture(scope="module")
def loaded(trained: tuple[Recipe, Path, list[str]]) -> Loaded:
    """The trained model, read with a recipe whose own reward settings are others, and what it was trained on."""
    recipe, _, _ = trained
    dataset, ids, _ = load_reward_inputs(reward_recipe(recipe))
    other = recipe.model_copy(update={"reward": RewardConfig(width=32, hidden=12)})
    return *load_reward("cheap-reward", other), dataset, ids


def _states(*recipes: Recipe) -> list[TrainState]:
    """The last checkpoint of reward runs of one shape."""
    own = reward_recipe(recipes[0])
    model, optimizer = load_reward_inputs(own)[2], training._optimizer(own)
    abstract, found = training._abstract(model, optimizer, make_mesh(own.mesh)), []
    for recipe in map(reward_recipe, recipes):
        checkpoints = Checkpoints(recipe.run_directory)
        state, position = checkpoints.restore(abstract, recipe)
        checkpoints.close()
        assert position == {"step": int(state.step)} == {"step": 4}
        found.append(state)
    return found


@pytest.fixture
def long_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """The requests of every split are one per user: all events after train."""

    def examples(self: Dataset, split: str) -> np.ndarray:
        stops = self.train_stops.tolist()
        rows = [[user, stop, stop, len(self.history(user).item)] for user, stop in enumerate(stops)]
        return np.array([row for row in rows if row[2] < row[3]])

    monkeypatch.setattr(Dataset, "examples", examples)


def _losses(run: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if name != "time"} for line in read_metrics(run)]


def test_a_run_leaves_its_recipe_its_losses_and_its_checkpoints(trained: tuple[Recipe, Path, list[str]]):
    recipe, run, said = trained
    assert run == Path(recipe.runs) / "cheap-reward"
    own = reward_recipe(recipe)
    head, *body = (run / "config.yaml").read_text().splitlines()
    assert head.startswith(f"# digest {own.digest()}, revision ")
    assert "\n".join(body) == own.to_yaml().rstrip("\n")
    checkpoints = Checkpoints(run)
    assert checkpoints.steps() == [2, 4] and checkpoints.recipe() == own
    checkpoints.close()
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    labels = objectives(Dataset(recipe.dataset_directory).labels)
    for line in lines:
        assert {"loss", "loss/p_score", "gradient_norm", *(f"loss/{name}" for name in labels)} < line.keys()
        assert all(np.isfinite(value) for value in line.values())
    assert [line.split()[1] for line in said] == ["1/4", "2/4", "3/4", "4/4"]


def test_the_rate_falls_by_a_cosine_to_a_twentieth_at_the_last_step(made: Callable[..., Recipe]):
    """Of one parameter whose gradient is always 1 Adam's step is the rate itself."""
    optimizer = training._optimizer(made(steps=10, learning_rate=0.5, weight_decay=0.0))
    param = jnp.zeros(())
    state, sizes = optimizer.init(param), []
    for _ in range(11):
        update, state = optimizer.update(jnp.ones(()), state, param)
        sizes.append(-np.asarray(update))
    expected = [0.5 * (0.05 + 0.95 * (1 + np.cos(np.pi * step / 10)) / 2) for step in range(11)]
    np.testing.assert_allclose(sizes, expected, rtol=1e-4)


def test_a_run_that_was_stopped_ends_with_the_bits_of_one_that_was_not_and_these_are_loaded(
    trained: tuple[Recipe, Path, list[str]], made: Callable[..., Recipe], loaded: Loaded
):
    whole, run, _ = trained
    cut = made()
    assert cut.reward.dropout > 0

    def stop(line: str) -> None:
        if line.startswith("step 3/4"):
            raise Stop

    with pytest.raises(Stop):
        train_reward(cut, stop)
    said: list[str] = []
    other = train_reward(cut, said.append)
    assert said[0] == f"resumed {other} at step 2"
    assert [line.split()[1] for line in said[1:]] == ["3/4", "4/4"]
    assert _losses(other) == _losses(run)
    states = _states(cut, whole)
    assert same_bits(*states)
    assert loaded[0].config == REWARD and same_bits(loaded[1], states[1].params)


@pytest.mark.usefixtures("long_ranges")
def test_all_impressions_of_the_test_split_are_measured_once(
    trained: tuple[Recipe, Path, list[str]], monkeypatch: pytest.MonkeyPatch
):
    """Of every fifth item no play time is known."""
    recipe, run, _ = trained

    def partly_known(*given, **options) -> Batch:
        batch = make_batch(*given, **options)
        return dataclasses.replace(batch, playtime_s=np.where(batch.target_item % 5, batch.playtime_s, -1))

    monkeypatch.setattr(training, "make_batch", partly_known)
    measured = measure_reward(run)
    kept = json.loads((run / "reward.json").read_text())
    defined = {n: {k: None if np.isnan(v) else v for k, v in values.items()} for n, values in measured.items()}
    assert kept == {"split": "test", "labels": defined}, "what is not defined is null in a file that any reader takes"
    dataset = Dataset(recipe.dataset_directory)
    examples = dataset.examples("test")
    sizes = examples[:, 3] - examples[:, 2]
    assert (sizes > recipe.data.targets).any() and (sizes % recipe.data.targets).any()
    feedback, played = [], []
    for user, _, start, stop in examples.tolist():
        history = dataset.history(user)
        feedback.append(history.feedback[start:stop])
        played.append(np.where(history.item[start:stop] % 5, history.playtime_s[start:stop], -1))
    outcome = np.concatenate(feedback).astype(float), np.concatenate(played)
    assert 0 < (outcome[1] >= 0).sum() < len(outcome[1])
    labels = objectives(dataset.labels)
    assert tuple(measured) == tuple(f"p_{name}" for name in labels)
    for i, name in enumerate(labels):
        values = measured[f"p_{name}"]
        known = outcome[1] >= 0 if name == "playtime" else np.ones(len(outcome[1]), bool)
        y = np.clip(outcome[1] / 40.0, 0, 1) if name == "playtime" else outcome[0][:, i]
        assert values["impressions"] == known.sum()
        assert values["rate"] == pytest.approx(y[known].mean(), rel=1e-5)
        assert np.isnan(values["AUC"]) == (name != "playtime" and y.min() == y.max())
    assert quality_table(measured).row_count == len(labels)


@pytest.mark.usefixtures("long_ranges")
def test_the_auc_is_of_each_impression_with_its_own_prediction(
    trained: tuple[Recipe, Path, list[str]], loaded: Loaded, monkeypatch: pytest.MonkeyPatch
):
    """Predictions and users as they reach the measurement against those of a plain pass over the split."""
    recipe, run, _ = trained
    model, params, dataset, ids = loaded
    own, given = reward_recipe(recipe), []

    def spy(probability: np.ndarray, label: np.ndarray, user: np.ndarray) -> dict[str, float]:
        given.append((probability, user))
        return dict.fromkeys(("rate", "AUC", "impressions"), 0.0)

    monkeypatch.setattr(training, "quality", spy)
    measure_reward(run)
    catalogue, targets = make_catalogue(dataset, ids.codes), recipe.data.targets
    cut = impressions_by(dataset.examples("test"), targets)[:16]
    batch = make_batch(dataset, ids.codes, own.model, cut, targets)
    scores = jax.jit(lambda b: model.bind(params)(b, b.target_item, catalogue, None))(batch)
    there = np.asarray(batch.target_item) >= 0
    for (probability, user), logit in ((given[0], scores.labels[..., 0]), (given[1], scores.fused)):
        expected = 1 / (1 + np.exp(-np.asarray(logit)[there]))
        np.testing.assert_allclose(probability[: there.sum()], expected, rtol=1e-4)
        assert user[: there.sum()].tolist() == np.broadcast_to(cut[:, :1], there.shape)[there].tolist()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_target_ranges_are_cut_as_a_loop_cuts_them(data):
    sizes, targets = data.draw(st.lists(st.integers(0, 9), max_size=8)), data.draw(st.integers(1, 4))
    examples = np.array([[3 * i, 7 * i, 10 + i, 10 + i + n] for i, n in enumerate(sizes)], np.int64).reshape(-1, 4)
    expected = []
    for user, cut, start, stop in examples.tolist():
        while start < stop:
            expected.append([user, cut, start, min(start + targets, stop)])
            start += targets
    assert impressions_by(examples, targets).tolist() == expected


def test_requests_are_read_by_recent_events_and_all_learnt_from_whatever_pre_training_does(tiny_recipe: Recipe):
    model = tiny_model(positive_length=3, lifelong_length=0)
    changes = {"masked_share": 0.5, "kept_share": 0.5, "length_buckets": (2,), "steps": 99}
    train = tiny_recipe.train.model_copy(update=changes)
    recipe = tiny_recipe.model_copy(update={"model": model, "train": train, "reward": REWARD})
    own = make_recipe(reward_recipe(recipe).model_dump(mode="json"))
    lengths = own.model.short_length, own.model.positive_length, own.model.lifelong_length
    assert lengths == (6, 0, 0) and not own.model.causal
    assert (own.train.masked_share, own.train.kept_share, own.train.length_buckets) == (0.0, 1.0, ())
    assert (own.train.steps, own.train.batch_size) == (4, 16)
    assert own.dataset_directory == recipe.dataset_directory
    assert own.tokenizer_directory == recipe.tokenizer_directory
    causal = recipe.model_copy(update={"model": tiny_model(causal=True, positive_length=0, lifelong_length=0)})
    assert not reward_recipe(causal).model.causal


@pytest.mark.parametrize("asked", ["nothing-reward", "cheap-reward@3", "cheap-reward@x"])
def test_a_run_or_checkpoint_that_is_not_there_is_refused(trained: tuple[Recipe, Path, list[str]], asked: str):
    recipe, _, _ = trained
    said = {"nothing-reward": "no run 'nothing-reward'.*cheap-reward", "cheap-reward@3": "no checkpoint of step 3"}
    with pytest.raises(InputError, match=said.get(asked, "whole number of steps")):
        load_reward(asked, recipe)


def test_a_split_without_impressions_is_refused(
    trained: tuple[Recipe, Path, list[str]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Dataset, "examples", lambda self, split: np.zeros((0, 4), np.int64))
    with pytest.raises(InputError, match="no valid impressions"):
        measure_reward(trained[1], "valid")


def test_lists_earn_what_the_learnt_rewards_say_of_requests_read_as_the_model_was_trained(
    trained: tuple[Recipe, Path, list[str]], loaded: Loaded
):
    """The recipe at hand reads two events, causally; the model was trained on six and their ages."""
    recipe, _, _ = trained
    changes: dict[str, Any] = {
        "reward": REWARD.model_copy(update={"history": 2}),
        "model": tiny_model(causal=True, positive_length=0, lifelong_length=0),
        "evaluate": recipe.evaluate.model_copy(update={"batch_size": 2}),
    }
    model, params, dataset, ids = loaded
    scorer = ListScorer(recipe.model_copy(update=changes), dataset, ids, model, params, make_mesh(recipe.mesh))
    examples = dataset.examples("valid")[:5]
    items = np.random.default_rng(0).integers(-1, dataset.num_items, (5, 4))
    items[1], items[:, 2] = -1, -1
    found = scorer(examples, items)
    reads = ModelConfig(short_length=6, positive_length=0, lifelong_length=0)
    batch = make_batch(dataset, ids.codes, reads, examples, 1)
    assert (batch.short.item >= 0).sum(axis=1).max() > 2
    catalogue = make_catalogue(dataset, ids.codes)
    candidates = Candidates(jnp.asarray(ids.codes)[np.maximum(items, 0)], jnp.asarray(items), jnp.zeros((5, 4)))
    expected = jax.jit(learnt_rewards(model, params, catalogue))(batch, candidates)
    assert set(found) == set(reward_names(dataset.labels))
    for name, value in found.items():
        assert value.shape == (5, 4) and not value[items < 0].any() and (value[items >= 0] > 0).all()
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, err_msg=name)


def test_an_evaluation_says_what_the_served_items_earn(
    trained: tuple[Recipe, Path, list[str]], loaded: Loaded, tmp_path: Path
):
    """`evaluate.reward_run`: the mean over what is served of the shortest lists, empty places left out."""
    recipe, run, _ = trained
    model, params, dataset, ids = loaded
    changes: dict[str, Any] = {"reward_run": str(run), "ks": (2, 4), "floors": ("popularity",)}
    own = recipe.model_copy(
        update={
            "evaluate": recipe.evaluate.model_copy(update=changes),
            "rl": recipe.rl.model_copy(update={"rewards": {"p_like": 1.0, "p_click": 0.0, "hit": 1.0}}),
        }
    )
    made: list[np.ndarray] = []

    def recommend(examples, seen, k, progress):
        made.append(np.random.default_rng(0).integers(-50, dataset.num_items, (len(examples), k)).clip(-1))
        return made[0], None

    stand_in = SimpleNamespace(
        recipe=own, dataset=dataset, ids=ids, run=tmp_path, recommend=recommend, legality=lambda rows: 1.0
    )
    rows = evaluate(stand_in, lambda line: None).rows  # type: ignore[arg-type]
    assert {name for name in rows["model"] if name.startswith("p_")} == {"p_score@2", "p_like@2"}
    assert not any(name.startswith("p_") for name in rows["popularity"])
    requests, lists = collect_requests(dataset, own), made[0][:, :2]
    assert (lists < 0).any()
    scores = ListScorer(own, dataset, ids, model, params, make_mesh(recipe.mesh))(requests.examples, lists)
    for name in ("p_score", "p_like"):
        assert rows["model"][f"{name}@2"] == pytest.approx(scores[name].sum() / (lists >= 0).sum(), rel=1e-6)
