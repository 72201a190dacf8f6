"""A later stage is served only where it has made the recall better; else whoever reads its run gets the one it began from."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from stand_ins import instant_training
from tiny import tiny_values

from onerec_jax.config import Recipe
from onerec_jax.errors import InputError
from onerec_jax.evaluate import promotion
from onerec_jax.evaluate.requests import collect_requests
from onerec_jax.evaluate.stages import fine_tune
from onerec_jax.generate.load import load_recommender
from onerec_jax.posttrain.rsft import rsft_recipe
from onerec_jax.recipe import make_recipe
from onerec_jax.train.checkpoint import same_bits
from onerec_jax.train.loop import pretrain
from onerec_jax.train.promotion import FILE, served_run


def _silent(line: str) -> None:
    pass


@pytest.fixture
def recipe(tiny_recipe: Recipe, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A run `start` of 2 steps, and its RSFT of 3 more, which adds one to every parameter at every step."""
    instant_training(monkeypatch)
    values = tiny_values(tiny_folder)
    values["train"] |= {"steps": 2, "checkpoint_every": 1, "keep": 9}
    made = make_recipe(
        values
        | {"name": "start", "runs": str(tmp_path / "runs"), "rsft": {"steps": 3, "share": 1.0, "promote": "better"}}
    )
    pretrain(made, _silent)
    return made


@pytest.fixture
def hit_share(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Lists that hold the relevant items of this share of the requests, by run."""
    shares: dict[str, float] = {}
    load = promotion.load_recommender

    def loaded(run: str):
        real = load(run)

        def recommend(examples, seen, k, *, progress):
            requests = collect_requests(
                real.dataset,
                real.recipe.model_copy(
                    update={"evaluate": real.recipe.evaluate.model_copy(update={"split": "valid", "max_examples": 0})}
                ),
            )
            flat, offsets = requests.relevant
            lists = np.full((len(examples), k), -1)
            for i in range(int(shares[Path(run.partition("@")[0]).name] * len(examples))):
                items = flat[offsets[i] : offsets[i + 1]][:k]
                lists[i, : len(items)] = items
            return (lists,)

        return SimpleNamespace(dataset=real.dataset, recipe=real.recipe, recommend=recommend)

    monkeypatch.setattr(promotion, "load_recommender", loaded)
    return shares


@pytest.mark.parametrize(("share", "promoted"), [(1.0, True), (0.5, False), (0.0, False)])
def test_a_run_is_served_where_its_held_out_recall_is_above_its_start_by_more_than_chance(
    share: float, promoted: bool, recipe: Recipe, hit_share: dict[str, float]
):
    hit_share |= {"start": 0.5, "start-rsft": share}
    said: list[str] = []
    run = fine_tune(recipe, said.append)
    decided = json.loads((run / FILE).read_text())
    assert decided["promoted"] is promoted and decided["step"] == 3
    k = recipe.rl.watch_k
    assert decided["gain"]["value"] == pytest.approx(decided[f"recall@{k}"] - decided[f"recall@{k} before"])
    assert decided["gain"]["low"] <= decided["gain"]["value"] <= decided["gain"]["high"]
    assert ("promoted" if promoted else "is served in its place") in said[-1]
    served = load_recommender(str(run))
    expected = load_recommender(f"{run}@3" if promoted else str(recipe.run_directory))
    assert same_bits(served.state, expected.state) and served.run == run
    assert not same_bits(load_recommender(f"{run}@3").state, load_recommender(str(recipe.run_directory)).state)


def test_what_starts_from_a_run_that_was_not_promoted_starts_from_its_start(recipe: Recipe, hit_share):
    hit_share |= {"start": 0.5, "start-rsft": 0.5}
    run = fine_tune(recipe, _silent)
    assert served_run(run, None) == (recipe.run_directory, None) and served_run(run, 2) == (run, 2)
    later = recipe.train.model_copy(update={"init_from": str(run), "steps": 1})
    after = pretrain(recipe.model_copy(update={"name": "later", "train": later}), _silent)
    added = load_recommender(str(recipe.run_directory)).state.params["heads"]
    kernel = load_recommender(str(after)).state.params["heads"]
    np.testing.assert_array_equal(
        *(np.asarray(x) for x in (kernel["0"]["kernel"], added["0"]["kernel"] + np.float32(1.0)))
    )


def test_a_decision_stands_until_the_run_has_gone_on(recipe: Recipe, hit_share):
    hit_share |= {"start": 0.5, "start-rsft": 0.0}
    run = fine_tune(recipe, _silent)
    hit_share["start-rsft"] = 1.0
    fine_tune(recipe, _silent)
    assert not json.loads((run / FILE).read_text())["promoted"]
    fine_tune(recipe.model_copy(update={"rsft": recipe.rsft.model_copy(update={"steps": 4})}), _silent)
    decided = json.loads((run / FILE).read_text())
    assert decided["promoted"] and decided["step"] == 4


def test_a_start_by_step_is_served_by_its_step(recipe: Recipe, hit_share):
    hit_share |= {"start": 0.5, "start-rsft": 0.5}
    changed = recipe.model_copy(update={"rsft": recipe.rsft.model_copy(update={"init_from": "start@1"})})
    run = rsft_recipe(changed).run_directory
    assert fine_tune(changed, _silent) == run
    assert same_bits(load_recommender(str(run)).state, load_recommender("start@1", runs=recipe.runs).state)


def test_promotion_needs_held_out_requests_before_anything_is_trained(recipe: Recipe, monkeypatch, tmp_path: Path):
    class Without:
        directory = tmp_path

        def __init__(self, directory: Path):
            pass

        def examples(self, split: str) -> list[int]:
            return []

    monkeypatch.setattr(promotion, "Dataset", Without)
    with pytest.raises(InputError, match=r"promote: better needs held-out requests"):
        fine_tune(recipe, _silent)
    assert not rsft_recipe(recipe).run_directory.exists()


def test_a_promotion_names_its_start_from_its_own_folder(recipe: Recipe, hit_share, tmp_path: Path):
    hit_share |= {"start": 0.5, "start-rsft": 0.5}
    run = fine_tune(recipe, _silent)
    moved = (tmp_path / "runs").rename(tmp_path / "moved")
    assert served_run(moved / run.name, None)[0] == moved / "start"
