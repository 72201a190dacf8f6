"""Points as processes of this machine: with stand-ins for them, and once with real ones that are told to end and go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import COMPILED

from onerec_jax.errors import ExitCode, InputError
from onerec_jax.scaling import launcher
from onerec_jax.scaling.fit import fit_law, power
from onerec_jax.scaling.local import locked
from onerec_jax.scaling.points import load_folder
from onerec_jax.scaling.runs import read_runs
from onerec_jax.scaling.sweep import name_of
from onerec_jax.train.metrics import read_metrics

# Does what a point does without training: its folder tells what happens to it. Every start and end is noted in `log`.
STAND_IN = """
import json, os, pathlib, signal, sys, time
if sys.argv[1] in ("data", "tokenize"):
    sys.exit(0)
folder = pathlib.Path(sys.argv[3]).parent
def note(what):
    with open("log", "a") as log:
        log.write(f"{what} {folder.name} {len(os.sched_getaffinity(0))}\\n")
def leave(number, frame):
    note("left")
    sys.exit(6)
signal.signal(signal.SIGTERM, leave)
note("start")
(folder / "goodput.jsonl").touch()
if (folder / "dies").exists():
    os.kill(os.getpid(), signal.SIGKILL)
if (folder / "breaks").exists():
    sys.exit("first line\\nValueError: broken")
while pathlib.Path("wait").exists():
    time.sleep(0.02)
time.sleep(0.3)
numbers = {"params": 1e6, "tokens": 1e6, "flops": 6e12, "loss": 2.0, "epochs": 0.1}
(folder / "metrics.jsonl").touch()
(folder / "done.json").write_text(json.dumps({"numbers": numbers, "metrics": None, "seconds": 1, "device": "none"}))
note("end")
"""


@pytest.fixture
def sweep(sweep_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a sweep of four points in this process, whose points are stand-ins."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(launcher, "onerec", lambda words: [sys.executable, "-S", str(tmp_path / "stand_in.py"), *words])
    name = sweep_file({"param": {"seed": [0, 1, 2, 3]}})

    def run(**options: Any) -> int:
        Path("log").write_text("")
        request = launcher.make_request(name, [], **options)
        return launcher.launch_sweep(request, False, lambda line: None)

    return run


def log() -> list[str]:
    return [" ".join(line.split()[:2]) for line in Path("log").read_text().splitlines()]


def names() -> list[str]:
    return [run.name for run in load_folder("small").points]


def make(fault: str, number: int) -> Path:
    """Lets a point fail; gives the file that makes it so."""
    folder = Path("runs/sweeps/small") / name_of({"seed": number})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / fault).touch()
    return folder / fault


def test_each_point_runs_once_and_no_more_of_them_at_a_time_than_asked_for(sweep):
    assert sweep(max_parallel=2) == 0
    running, most = 0, 0
    for line in log():
        running += {"start": 1, "end": -1}[line.split()[0]]
        most = max(most, running)
    assert most == 2 and sorted(line for line in log() if line.startswith("start")) == [f"start {n}" for n in names()]
    shares = {int(line.split()[2]) for line in Path("log").read_text().splitlines()}
    mine = len(os.sched_getaffinity(0))
    assert shares <= {len(range(place, mine, 2)) or mine for place in range(2)}, "each has its share of the processors"


def test_what_is_done_is_not_run_again(sweep):
    sweep()
    assert sweep() == 0 and log() == []
    (load_folder("small").points[2].done).unlink()
    assert sweep() == 0 and log() == [f"start {names()[2]}", f"end {names()[2]}"]


def test_failed_points_are_named_and_run_again_on_request_alone(sweep):
    killed, broken = make("dies", 1), make("breaks", 2)
    with pytest.raises(InputError) as caught:
        sweep(max_parallel=3)
    said = str(caught.value)
    assert said.startswith("2 of 4 points failed: ") and "--retry-failed" in said and "\n" not in said
    assert f"{killed.parent.name} (exit code 137: ended by signal 9)" in said
    assert f"{broken.parent.name} (exit code 1: ValueError: broken)" in said
    assert "end " + names()[0] in log() and "end " + names()[3] in log(), "the others are done"
    with pytest.raises(InputError, match="2 of 4 points failed"):
        sweep()
    assert log() == []
    killed.unlink()
    with pytest.raises(InputError, match="1 of 4 points failed"):
        sweep(retry_failed=True)
    assert sorted(log()) == sorted(
        [f"start {killed.parent.name}", f"end {killed.parent.name}", f"start {broken.parent.name}"]
    )
    broken.unlink()
    assert sweep(retry_failed=True) == 0 and not list(Path("runs").rglob("failed.json"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_points_are_told_to_save_when_the_sweep_is_told_to_end_and_the_same_call_goes_on(sweep, number: signal.Signals):
    Path("wait").touch()

    def interrupt() -> None:
        while len(log()) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    Path("log").write_text("")
    thread.start()
    assert sweep(max_parallel=2) == ExitCode.PREEMPTED
    thread.join()
    assert sorted(log()) == sorted(f"{what} {name}" for what in ("start", "left") for name in names()[:2])
    assert not list(Path("runs").rglob("failed.json")), "that is no failure"
    Path("wait").unlink()
    assert sweep(max_parallel=2) == 0 and len(log()) == 8


def test_a_sweep_is_not_run_twice_at_a_time(sweep):
    with locked(Path("runs/sweeps/small")), pytest.raises(InputError, match="is being run by another process"):
        sweep()


def test_recall_is_measured_afterwards_where_it_is_asked_for_later(sweep):
    sweep()
    request = launcher.make_request("small.yaml", [], evaluate=True)
    assert [run.name for run in request.missing] == names()
    assert request.job(request.missing[0]).words(Path("F")) == ["sweep", "point", "F/recipe.yaml", "--evaluate"]


def test_several_processes_a_point_are_refused_here(sweep_file):
    with pytest.raises(InputError, match="a point of a sweep is one process here"):
        launcher.make_request(sweep_file({"param": {"seed": [0]}}), ["cluster.processes=2"])


ENVIRONMENT = {
    **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "JAX_COMPILATION_CACHE_DIR": str(COMPILED),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3", "COLUMNS": "200",
}  # fmt: skip


def onerec(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "onerec_jax.cli", *words], env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_real_training_that_is_told_to_end_goes_on_and_its_row_is_one_that_fits_read(sweep_file, tmp_path: Path):
    name = sweep_file({"param": {"train.steps": [150]}})
    common = ("train.log_every=1", "train.checkpoint_every=1000", "train.eval_every=150", "train.eval_batches=1")
    first = onerec("sweep", name, *common)
    deadline = time.monotonic() + 120
    while not (logs := [*tmp_path.glob("runs/sweeps/small/*/metrics.jsonl")]) or logs[0].read_text().count("\n") < 5:
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=120)
    assert first.returncode == ExitCode.PREEMPTED, said
    reached = int(json.loads(logs[0].read_text().splitlines()[-1])["step"])
    assert 5 <= reached < 150 and not [*tmp_path.rglob("done.json")]

    second = onerec("sweep", name, *common)
    _, said = second.communicate(timeout=300)
    assert second.returncode == 0, said
    (run,) = load_folder("small").points
    assert f"at step {reached}" in (run.folder / "output.log").read_text(), "it goes on and does not begin anew"
    assert [line["step"] for line in read_metrics(run.folder) if "loss" in line] == [*range(1, 151)]
    lines = [line for line in said.splitlines() if line.startswith(run.name)]
    assert f": running, step {reached}/150" in lines[0] and ": done, step 150/150" in lines[-1], "each change is a line"
    assert "report: runs/sweeps/small/report.html" in said and Path("runs/sweeps/small/report.html").exists()

    table = read_runs("runs/sweeps/small/runs.csv", "valid_loss")
    result = run.result()
    assert result is not None and result["starts"] == 2 and table.metric == [result["numbers"]["valid_loss"]]
    with pytest.raises(InputError, match="1 runs are too few"):
        fit_law(table, power("params", "huber_log", None))
