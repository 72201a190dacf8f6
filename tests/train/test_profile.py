"""What a profile of a training step shows: a trace of the steps asked for, under the names of the model's modules."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import pytest
from stand_ins import linear_model
from tiny import VOCABULARY, random_batch, tiny_model, tiny_trie, tiny_values

from onerec_jax import model
from onerec_jax.config import Recipe
from onerec_jax.errors import InputError
from onerec_jax.model.onerec import build
from onerec_jax.recipe import make_recipe
from onerec_jax.train import loop
from onerec_jax.train.optimizer import make_optimizer
from onerec_jax.train.state import init_state
from onerec_jax.train.step import make_train_step


def test_the_operations_of_a_step_are_named_by_the_modules_of_the_model(tmp_path: Path):
    config = tiny_model(head="both", item_memory=3, moe={"experts": 3})
    recipe = make_recipe(tiny_values(tmp_path))
    built, optimizer = build(config, VOCABULARY), make_optimizer(recipe.train)
    state = jax.eval_shape(lambda: init_state(built, optimizer, 0))
    step = jax.jit(make_train_step(built, recipe, optimizer))
    text = step.lower(state, random_batch(config), tiny_trie(config)).as_text(debug_info=True)
    scopes = {part for name in re.findall(r'"(jit\(step\)[^"]*)"', text) for part in re.findall(r"[a-z_]+", name)}
    modules = {path.stem for path in Path(model.__file__).parent.iterdir()}
    wanted = {"pathways", "encoder", "decoder", "item_head", "attention", "moe", "tables"}
    assert wanted <= modules
    assert wanted | {"optimizer"} <= scopes


def test_the_steps_asked_for_are_traced(
    tiny_recipe: Recipe, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loop, "build", linear_model)
    traced: list[tuple[str, int]] = []
    at = [0]
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: traced.append((folder, at[0])))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: traced.append(("stop", at[0])))
    values = tiny_values(tiny_folder)
    values["train"] |= {"steps": 6, "log_every": 1, "profile_steps": "3..4"}
    recipe = make_recipe(values | {"runs": str(tmp_path / "runs")})

    def report(line: str) -> None:
        at[0] = int(line.split()[1].split("/")[0])

    run = loop.pretrain(recipe, report)
    assert traced == [(str(run / "profile"), 1), ("stop", 3)]  # asked before the line of its step is told


def test_a_trace_is_a_file_that_xprof_reads(
    tiny_recipe: Recipe, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loop, "build", linear_model)
    values = tiny_values(tiny_folder)
    values["train"] |= {"steps": 3, "profile_steps": "2..9"}
    run = loop.pretrain(make_recipe(values | {"runs": str(tmp_path / "runs")}), lambda line: None)
    assert list((run / "profile").rglob("*.xplane.pb"))


def test_the_last_profiled_step_is_not_before_the_first(tmp_path: Path):
    for wrong in ("5..4", "5", "0..3", "a..b"):
        values = tiny_values(tmp_path)
        values["train"] |= {"profile_steps": wrong}
        with pytest.raises(InputError, match="profile_steps"):
            make_recipe(values)
