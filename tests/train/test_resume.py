"""A training process that is killed and started again gives the bits of one that never was."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from tiny import tiny_values

from onerec_jax.config import Recipe
from onerec_jax.parallel.mesh import make_mesh
from onerec_jax.recipe import make_recipe
from onerec_jax.train.checkpoint import Checkpoints, same_bits
from onerec_jax.train.loop import load_inputs
from onerec_jax.train.metrics import MetricsLog, read_metrics
from onerec_jax.train.optimizer import make_optimizer
from onerec_jax.train.state import TrainState, abstract_state

ROOT = Path(__file__).resolve().parents[2]
STEPS = 100
CHECKPOINT_EVERY = 10
# the first may come before any checkpoint; each leaves the run room for the next and for 20 more steps
KILL_BETWEEN = ((2, 16), (30, 40), (55, 65))
# of every line, what must not depend on the machine's speed
TIMED = {"time", "examples_per_s", "target_tokens_per_s", "gflops", "data_wait", "step_ms", "mfu"}


def _start(recipe: Path, name: str, log: Path) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(jax.config.jax_persistent_cache_min_compile_time_secs),
    }
    command = [sys.executable, "-m", "onerec_jax.cli", "pretrain", str(recipe), f"name={name}"]
    with open(log, "ab") as output:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)


def _lines(run: Path) -> list[dict[str, float]]:
    """Every whole line logged so far, repeated steps included."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def _values(line: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name not in TIMED}


def _kill_when_past(process: subprocess.Popen, run: Path, step: int, delay_s: float) -> None:
    """SIGKILL, `delay_s` seconds after this process has logged `step`."""
    path = run / "metrics.jsonl"
    before = path.stat().st_size if path.exists() else 0
    while not path.exists() or path.stat().st_size <= before or _lines(run)[-1]["step"] < step:
        assert process.poll() is None, f"the run ended by itself before step {step}"
        time.sleep(0.02)
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def _final_state(recipe: Recipe) -> TrainState:
    _, _, model = load_inputs(recipe)
    checkpoints = Checkpoints(recipe.run_directory)
    abstract = abstract_state(model, make_optimizer(recipe.train), make_mesh(recipe.mesh, jax.devices()[:1]))
    state, position = checkpoints.restore(abstract, recipe, STEPS)
    assert position == {"step": STEPS}
    checkpoints.close()
    return state


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Recipe, tiny_folder: Path) -> Recipe:
    values = tiny_values(tiny_folder)
    values["model"] |= {"dropout": 0.1, "positive_length": 0, "lifelong_length": 0}
    values["train"] |= {"steps": STEPS, "warmup_steps": 10, "log_every": 1, "checkpoint_every": CHECKPOINT_EVERY}
    made = make_recipe(values | {"runs": str(tiny_folder / "resume")})
    assert made.model.item_input == "both" and made.model.user_id and made.model.moe.experts
    return made


def test_three_kills_at_random_moments_change_no_bit_of_the_losses_or_of_the_final_state(
    recipe: Recipe, tmp_path: Path
):
    path, log = tmp_path / "recipe.yaml", tmp_path / "log.txt"
    path.write_text(recipe.to_yaml())
    assert _start(path, "undisturbed", log).wait() == 0, log.read_text()
    undisturbed = {line["step"]: _values(line) for line in _lines(Path(recipe.runs) / "undisturbed")}
    assert sorted(undisturbed) == list(range(1, STEPS + 1))

    killed = Path(recipe.runs) / "killed"
    seed = random.SystemRandom().getrandbits(32)
    print(f"kills drawn with seed {seed}")
    rng = random.Random(seed)
    last_seen = []
    for first, last in KILL_BETWEEN:
        process = _start(path, "killed", log)
        try:
            _kill_when_past(process, killed, rng.randint(first, last), rng.uniform(0.0, 0.1))
        finally:
            process.kill()
        last_seen.append(_lines(killed)[-1]["step"])
    assert last_seen[-1] <= STEPS - 20
    assert _start(path, "killed", log).wait() == 0, log.read_text()
    assert log.read_text().count("resumed") >= 2

    for line in _lines(killed):
        assert _values(line) == undisturbed[line["step"]], f"step {line['step']}, kills after steps {last_seen}"
    assert [line["step"] for line in read_metrics(killed)] == list(range(1, STEPS + 1))
    states = [_final_state(recipe.model_copy(update={"name": name})) for name in ("undisturbed", "killed")]
    assert int(states[0].step) == STEPS
    assert same_bits(*states)


def test_a_log_line_cut_by_a_kill_is_neither_read_nor_joined_with_the_next(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.5}]
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write(2, {"loss": 2.25})
    log.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 2.5), (2, 2.25)]
    path.write_text('{"step": 1, "lo')
    MetricsLog(tmp_path, tensorboard=False).close()
    assert read_metrics(tmp_path) == []
