"""The loop around the train step: what it logs, what it waits for, where it goes on. The model is a linear stand-in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from stand_ins import linear_model
from tiny import VOCABULARY, random_batch, tiny_model, tiny_values

from onerec_jax.config import MeshConfig, Recipe
from onerec_jax.data.pipeline import Pipeline
from onerec_jax.data.store import Dataset
from onerec_jax.parallel.mesh import make_mesh
from onerec_jax.recipe import make_recipe
from onerec_jax.tokenizer.semantic_ids import SemanticIds
from onerec_jax.train import loop
from onerec_jax.train.checkpoint import Checkpoints, same_bits
from onerec_jax.train.flops import request_flops
from onerec_jax.train.metrics import read_metrics
from onerec_jax.train.optimizer import make_optimizer
from onerec_jax.train.state import TrainState, abstract_state

LEARNING = {
    "loss", "loss/level1", "accuracy/level1", "gradient_norm", "update_norm", "learning_rate", "targets",
    "experts/decoder_max_over_mean", "experts/decoder_entropy", "experts/decoder_dropped", "skipped",
}  # fmt: skip
SKIPPED = {"skipped"}
SPEED = {"examples_per_s", "target_tokens_per_s", "targets_per_context", "gflops", "data_wait", "step_ms"}


class Stop(Exception):
    """Ends a run from its report, as a kill would."""


@pytest.fixture
def made(
    tiny_recipe: Recipe, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Recipe]:
    """Recipes of runs in `tmp_path` on the shared dataset, with settings of `train` changed."""
    monkeypatch.setattr(loop, "build", linear_model)

    def make(name: str = "run", **train) -> Recipe:
        values = tiny_values(tiny_folder)
        values["train"] |= {"negative_weight": 0.25, "log_every": 1, **train}
        return make_recipe(values | {"name": name, "runs": str(tmp_path / "runs")})

    return make


def _silent(line: str) -> None:
    pass


def _stop_at(start: str) -> Callable[[str], None]:
    def report(line: str) -> None:
        if line.startswith(start):
            raise Stop

    return report


def _state(recipe: Recipe, step: int | None = None) -> TrainState:
    _, _, model = loop.load_inputs(recipe)
    abstract = abstract_state(model, make_optimizer(recipe.train), make_mesh(recipe.mesh, jax.devices()[:1]))
    checkpoints = Checkpoints(recipe.run_directory)
    state, position = checkpoints.restore(abstract, recipe, step)
    checkpoints.close()
    assert position == {"step": int(state.step)}
    return state


def _training(lines: list[dict[str, float]]) -> dict[int, dict[str, float]]:
    """Step -> what does not depend on speed."""
    return {int(line["step"]): {k: line[k] for k in LEARNING} for line in lines if "loss" in line}


def test_a_run_directory_has_the_recipe_every_logged_step_and_the_last_checkpoint(made: Callable[..., Recipe]):
    recipe = made(steps=7, log_every=3, checkpoint_every=4, keep=5, tensorboard=True)
    said: list[str] = []
    run = loop.pretrain(recipe, said.append)
    assert run == recipe.run_directory
    head, *body = (run / "config.yaml").read_text().splitlines()
    assert head.startswith(f"# digest {recipe.digest()}, revision ")
    assert "\n".join(body) == recipe.to_yaml().rstrip("\n")
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == [3, 4, 6, 7]  # a line before every checkpoint
    for line in lines:
        assert line.keys() == {"step", "time"} | LEARNING | SPEED
        assert all(np.isfinite(value) for value in line.values())
        assert 0 < line["data_wait"] < 1
        assert line["targets_per_context"] <= recipe.data.targets
    assert Checkpoints(run).steps() == [4, 7]
    assert list((run / "tensorboard").glob("events.*"))
    assert [line.split()[1] for line in said] == ["3/7", "4/7", "6/7", "7/7"]


def test_a_log_line_weighs_each_of_its_steps_by_the_weights_of_its_targets(made: Callable[..., Recipe]):
    single, grouped = made("single", steps=6), made("grouped", steps=6, log_every=3)
    steps = _training(read_metrics(loop.pretrain(single, _silent)))
    groups = _training(read_metrics(loop.pretrain(grouped, _silent)))
    dataset = Dataset(single.dataset_directory)
    pipeline = Pipeline(dataset, SemanticIds.load(single.tokenizer_directory, dataset).codes, single)
    weights = np.array([pipeline.batch_at(i).target_weight.sum() for i in range(6)])
    assert len(set(weights)) > 1
    for last in (3, 6):
        window = slice(last - 3, last)
        for name in ("loss", "accuracy/level1"):
            values = np.array([steps[i][name] for i in range(last - 2, last + 1)])
            assert abs(groups[last][name] - (values * weights[window]).sum() / weights[window].sum()) < 1e-5
        for name in ("gradient_norm", "learning_rate", "targets"):
            values = [steps[i][name] for i in range(last - 2, last + 1)]
            assert abs(groups[last][name] / np.mean(values) - 1) < 1e-5


def test_a_run_that_ends_early_goes_on_from_its_last_checkpoint_to_the_same_bits(made: Callable[..., Recipe]):
    settings = {"steps": 9, "checkpoint_every": 3}
    whole, cut = made("whole", **settings), made("cut", **settings)
    loop.pretrain(whole, _silent)
    with pytest.raises(Stop):
        loop.pretrain(cut, _stop_at("step 8/9"))
    assert Checkpoints(cut.run_directory).steps()[-1] == 6
    said: list[str] = []
    loop.pretrain(cut, said.append)
    assert said[0] == f"resumed {cut.run_directory} at step 6"
    assert [line.split()[1] for line in said[1:]] == ["7/9", "8/9", "9/9"]
    assert _training(read_metrics(cut.run_directory)) == _training(read_metrics(whole.run_directory))
    assert same_bits(_state(cut), _state(whole))


def test_a_finished_run_is_left_as_it_is(made: Callable[..., Recipe]):
    recipe = made(steps=3)
    loop.pretrain(recipe, _silent)
    lines, state = read_metrics(recipe.run_directory), _state(recipe)
    said: list[str] = []
    loop.pretrain(recipe, said.append)
    assert said == [f"resumed {recipe.run_directory} at step 3"]
    assert read_metrics(recipe.run_directory) == lines
    assert same_bits(_state(recipe), state)


def test_a_run_from_another_starts_at_step_zero_with_its_parameters_and_a_fresh_optimizer(made: Callable[..., Recipe]):
    source = made("source", steps=4, checkpoint_every=2, warmup_steps=0)
    loop.pretrain(source, _silent)
    # the first rate of a warm-up is zero, and so small a rate of the tables changes no row
    settings = {"steps": 1, "warmup_steps": 5, "table_rate": 1e-30, "optimizer": "muon"}
    for name, step in (("newest", 4), ("chosen", 2)):
        recipe = made(name, init_from="source" if step == 4 else f"source@{step}", **settings)
        said: list[str] = []
        loop.pretrain(recipe, said.append)
        assert said[0].startswith("step 1/1 ")
        first, given = _state(recipe), _state(source, step)
        assert int(first.step) == 1
        assert same_bits(first.params, given.params)
        assert same_bits(first.tables["author"]["rows"], given.tables["author"]["rows"])
        moved = np.asarray(first.bias["decoder"]) - np.asarray(given.bias["decoder"])
        assert np.all(np.abs(moved) <= 1.01 * recipe.model.moe.balance_rate)
        assert np.any(np.asarray(given.bias["decoder"]))
        counts = [leaf for leaf in jax.tree.leaves(first.optimizer) if leaf.dtype == np.int32]
        assert counts and all(int(count) == 1 for count in counts)
    assert not same_bits(_state(source, 2).params, _state(source, 4).params)


def test_a_run_from_another_that_ends_early_goes_on_from_itself(made: Callable[..., Recipe]):
    loop.pretrain(made("source", steps=2), _silent)
    recipe = made("next", steps=4, checkpoint_every=2, init_from="source")
    with pytest.raises(Stop):
        loop.pretrain(recipe, _stop_at("step 3/4"))
    said: list[str] = []
    loop.pretrain(recipe, said.append)
    assert said[0] == f"resumed {recipe.run_directory} at step 2"


def test_validation_losses_are_logged_beside_the_training_and_change_nothing_of_it(made: Callable[..., Recipe]):
    plain = made("plain", steps=5)
    watched = made("watched", steps=5, eval_every=2, eval_batches=2)
    loop.pretrain(plain, _silent)
    said: list[str] = []
    lines = read_metrics(loop.pretrain(watched, said.append))
    valid = [line for line in lines if "valid/loss" in line]
    assert [line["step"] for line in valid] == [2, 4, 5]
    for line in valid:
        assert line.keys() == {"step", "time", "valid/loss", "valid/loss/level1", "valid/accuracy/level1"}
    assert f"step 4  validation loss {valid[1]['valid/loss']:.4f}" in said
    assert _training(lines) == _training(read_metrics(plain.run_directory))


def test_nothing_is_traced_or_compiled_after_every_kind_of_step_was_done_once(made: Callable[..., Recipe]):
    compiled: list[str] = []

    def heard(event: str, duration: float, **_) -> None:
        if event.startswith("/jax/core/compile/"):
            compiled.append(event)

    after: dict[str, int] = {}
    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        recipe = made(steps=16, log_every=2, checkpoint_every=2, eval_every=4, eval_batches=2, accumulation=2)
        loop.pretrain(recipe, lambda line: after.update({line.split("  ")[0]: len(compiled)}))
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    assert after["step 2/16"] > 0
    # logged, validated and saved once each by step 4; the first save comes before step 3
    assert after["step 6/16"] == after["step 16/16"] == len(compiled)


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(loop, "time", made)
    return made


def test_rates_count_requests_targets_and_waiting_since_the_last_line(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loop, "peak_flops", lambda device, dtype: 1e9)
    values = tiny_values(tmp_path)
    values["train"]["batch_size"] = 4
    recipe = make_recipe(values)
    model = SimpleNamespace(config=tiny_model(), vocabulary=VOCABULARY)
    speed = loop.Speed(model, recipe, make_mesh(MeshConfig(), jax.devices()[:1]))
    batches = [random_batch(model.config, batch=4, targets=3, seed=seed) for seed in range(2)]
    for batch in batches:
        clock.now += 0.25
        speed.waited(0.25)
        speed.count(batch)
        clock.now += 0.75
    counted = speed.window(2)
    assert counted["examples_per_s"] == 4.0
    assert counted["target_tokens_per_s"] == 2 * 4 * 2 * 3 / 2.0  # the third target of every request is missing
    assert counted["targets_per_context"] == 2.0
    assert counted["data_wait"] == 0.25
    assert counted["step_ms"] == 1000.0
    lengths = {
        name: np.mean([(getattr(batch, name).item >= 0).sum(1).mean() for batch in batches])
        for name in ("short", "positive", "lifelong")
    }
    flops = request_flops(model.config, VOCABULARY, targets=2.0, **lengths).training * 4.0
    assert abs(counted["gflops"] / (flops / 1e9) - 1) < 1e-6
    assert abs(counted["mfu"] / (flops / 1e9) - 1) < 1e-6

    clock.now += 5.0
    speed.restart()
    speed.count(batches[0])
    clock.now += 2.0
    again = speed.window(3)
    assert (again["examples_per_s"], again["data_wait"], again["step_ms"]) == (2.0, 0.0, 2000.0)


def test_the_time_in_the_loader_is_the_data_wait_of_the_line(
    made: Callable[..., Recipe], clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    """With a clock that only the loader and the step move: 3 of every 4 seconds are waited."""

    class SlowPipeline(Pipeline):
        def __next__(self):
            clock.now += 3.0
            return super().__next__()

    def slow_step(step, abstract, mesh):
        def run(state, batch, trie):
            clock.now += 1.0
            return state, {"loss": (1.0, 1.0), "skipped": (0.0, 1.0)}

        return run

    monkeypatch.setattr(loop, "Pipeline", SlowPipeline)
    monkeypatch.setattr(loop, "compile_step", slow_step)
    lines = read_metrics(loop.pretrain(made(steps=4, log_every=2, checkpoint_every=4), _silent))
    assert [line["data_wait"] for line in lines] == [0.75, 0.75]
    assert [line["step_ms"] for line in lines] == [4000.0, 4000.0]


def test_the_progress_line_shows_progress_losses_rates_waiting_and_expert_load():
    values = {
        "loss": 7.1234, "loss/level1": 2.5, "loss/level2": 2.25, "loss/level3": 2.375, "examples_per_s": 1234.4,
        "target_tokens_per_s": 9876.5, "gflops": 12.34, "data_wait": 0.034,
        "experts/encoder_max_over_mean": 1.25, "experts/decoder_max_over_mean": 1.5,
    }  # fmt: skip
    line = loop.progress_line(40, 600, values)
    expected = (
        "step 40/600  loss 7.123 (2.50 2.25 2.38)  1234 ex/s  9876 tok/s  12.3 GFLOP/s  data 3%  expert load 1.50"
    )
    assert line == expected
    assert "MFU 41.5%" in loop.progress_line(40, 600, {**values, "mfu": 0.4151})
    dense = {name: value for name, value in values.items() if not name.startswith("experts/")}
    assert "expert" not in loop.progress_line(40, 600, dense)
