"""Real processes that train as one: the same losses on any number of them, and the same data order after a restart."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import portpicker
import pytest
from omegaconf import OmegaConf
from tiny import COMPILED, tiny_model, tiny_values

from onerec_jax.data.prepare import prepare
from onerec_jax.data.store import Dataset
from onerec_jax.errors import ExitCode
from onerec_jax.recipe import make_recipe
from onerec_jax.tokenizer.semantic_ids import fit_and_save
from onerec_jax.train.goodput import goodput
from onerec_jax.train.metrics import read_metrics

STEPS, SAVED_AT = 6, 3
WORKER = Path(__file__).with_name("worker.py")
SECONDS = 300


def _start(recipe: Path, name: str, processes: int, *settings: str) -> list[subprocess.Popen[str]]:
    """The processes of a run on eight devices, which they share."""
    compiled = {"JAX_COMPILATION_CACHE_DIR": str(COMPILED), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
    environment = {**os.environ, **compiled, "PYTHONPATH": os.pathsep.join(sys.path)}
    coordinator = f"127.0.0.1:{portpicker.pick_unused_port()}"
    started = []
    for i in range(processes):
        others = [
            f"distributed.coordinator={coordinator}",
            f"distributed.processes={processes}",
            f"distributed.process={i}",
        ]
        command = [sys.executable, str(WORKER), str(8 // processes), str(recipe), f"name={name}", *settings]
        started.append(
            subprocess.Popen(
                command + (others if processes > 1 else []),
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    return started


def _train(recipe: Path, name: str, processes: int, *settings: str) -> list[dict[str, float]]:
    """The metrics of a run on eight devices, shared out among the processes."""
    started = _start(recipe, name, processes, *settings)
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
    run = Path(outputs[0].strip().splitlines()[-1])
    assert [output.strip().count("step ") for output in outputs[1:]] == [0] * (processes - 1)
    return read_metrics(run)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    values = tiny_values(folder)
    values["model"] = tiny_model(
        positive_length=0, lifelong_length=0, encoder_layers=1, decoder_layers=1,
        moe={"experts": 4, "active": 2, "hidden": 16, "backend": "ragged"},
    ).model_dump(mode="json")  # fmt: skip
    values["train"] |= {"steps": STEPS, "log_every": 1, "checkpoint_every": SAVED_AT, "keep": 3}
    values["mesh"] = {"data": 2, "fsdp": 2, "expert": 2}
    path = folder / "tiny.yaml"
    path.write_text(OmegaConf.to_yaml(values))
    loaded = make_recipe(values)
    dataset = Dataset(prepare(loaded))
    fit_and_save(dataset, loaded.tokenizer, loaded.seed, loaded.tokenizer_directory)
    return path


@pytest.fixture(scope="module")
def alone(recipe: Path) -> list[dict[str, float]]:
    return _train(recipe, "alone", 1)


@pytest.fixture(scope="module")
def two(recipe: Path) -> list[dict[str, float]]:
    return _train(recipe, "two", 2)


def _same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    exact = ("step", "targets", "learning_rate")
    close = ("loss", "loss/level1", "loss/level3", "gradient_norm", "experts/decoder_max_over_mean")
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        for name in exact:
            assert mine.get(name) == theirs.get(name)
        for name in close:
            np.testing.assert_allclose(mine.get(name, 0), theirs.get(name, 0), rtol=1e-6, atol=1e-6, err_msg=name)


def test_two_processes_of_four_devices_train_as_one_process_of_eight(alone, two):
    assert [line["step"] for line in alone] == [*range(1, STEPS + 1)]
    _same(two, alone)


@pytest.mark.parametrize("processes", [1, 4])
def test_a_run_of_two_processes_goes_on_with_the_same_data_on(processes: int, recipe: Path, alone, two):
    runs = recipe.parent / "runs"
    name = f"restarted_{processes}"
    shutil.copytree(runs / "two", runs / name, ignore=shutil.ignore_patterns("metrics.jsonl", str(STEPS)))
    _same(_train(recipe, name, processes), [line for line in alone if line["step"] > SAVED_AT])


def test_a_sigterm_to_one_of_two_processes_saves_the_same_step_in_both_and_both_leave(recipe: Path):
    name, runs, steps = "asked_to_leave", recipe.parent / "runs", ("train.steps=60", "train.checkpoint_every=50")
    started = _start(recipe, name, 2, *steps)
    lines = runs / name / "metrics.jsonl"
    try:
        while not lines.exists() or lines.read_text().count("\n") < 2:
            assert all(process.poll() is None for process in started), started[0].communicate()[0][-3000:]
            time.sleep(0.02)
        started[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=SECONDS)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [ExitCode.PREEMPTED] * 2, outputs[0][-3000:]
    (saved,) = {int(re.findall(r"asked to leave after step (\d+)", output)[0]) for output in outputs}
    assert 2 <= saved < 60
    assert [path.name for path in (runs / name / "checkpoints").iterdir()] == [str(saved)]
    assert [line["step"] for line in _train(recipe, name, 2, *steps)] == [*range(1, 61)]
    spent, starts = goodput(runs / name)
    assert starts == 2 and spent["step"] > 0
