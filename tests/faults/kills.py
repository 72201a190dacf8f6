"""Kills a training run with SIGKILL again and again, and compares what it ends with to a run that was left alone.

    python tests/faults/kills.py --kills 50

A kill comes at a random moment of one of three kinds: while the process starts and compiles, while a checkpoint is being
written, or between steps. What must hold: the same final state, bit for bit, the same log lines, and that no start goes on from
an older checkpoint than the newest that was seen complete.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
from tiny import COMPILED, tiny_values, untimed  # noqa: E402

from onerec_jax.config import Recipe  # noqa: E402
from onerec_jax.data.prepare import prepare  # noqa: E402
from onerec_jax.data.store import Dataset  # noqa: E402
from onerec_jax.parallel.mesh import make_mesh  # noqa: E402
from onerec_jax.recipe import make_recipe  # noqa: E402
from onerec_jax.tokenizer.semantic_ids import fit_semantic_ids  # noqa: E402
from onerec_jax.train.checkpoint import Checkpoints, same_bits  # noqa: E402
from onerec_jax.train.loop import load_inputs  # noqa: E402
from onerec_jax.train.metrics import read_metrics  # noqa: E402
from onerec_jax.train.optimizer import make_optimizer  # noqa: E402
from onerec_jax.train.state import abstract_state  # noqa: E402

KINDS = ("while starting", "while writing a checkpoint", "between steps")
EVERY = 4  # steps between checkpoints
PER_KILL = 6  # steps that the run comes nearer to its end with each kill


def kill_recipe(folder: Path, kills: int) -> Recipe:
    """A tiny recipe of enough steps for so many kills, in `folder`, with id tables, experts and dropout."""
    values = tiny_values(folder)
    values["model"] |= {"dropout": 0.1, "positive_length": 0, "lifelong_length": 0}
    steps = PER_KILL * kills + 20
    values["train"] |= {"steps": steps, "warmup_steps": 10, "log_every": 1, "checkpoint_every": EVERY, "keep": 2}
    return make_recipe(values | {"runs": str(folder / "kills")})


def start(
    recipe: Path, name: str, log: Path, *words: str, environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """`onerec pretrain` in a process of its own; what it prints is appended to `log`."""
    known = (
        os.environ
        | (environment or {})
        | {
            "JAX_COMPILATION_CACHE_DIR": str(COMPILED),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
            "PYTHONPATH": str(ROOT),
        }
    )
    command = [sys.executable, "-m", "onerec_jax.cli", "pretrain", str(recipe), f"name={name}", *words]
    with log.open("ab") as output:
        return subprocess.Popen(command, cwd=ROOT, env=known, stdout=output, stderr=output)


def lines_of(run: Path) -> list[dict[str, float]]:
    """Every whole line logged so far, repeated steps included, without what is timed."""
    path = run / "metrics.jsonl"
    text = path.read_text().split("\n")[:-1] if path.exists() else []
    return [untimed(json.loads(line)) for line in text]


def complete(run: Path) -> int:
    """The newest checkpoint that is whole, 0 if there is none."""
    return max((int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit()), default=0)


def kill(process: subprocess.Popen[bytes], run: Path, kind: str, step: int, rng: random.Random) -> int:
    """Kills at a moment of that kind, from `step` on; returns the newest whole checkpoint before it."""
    if kind == KINDS[0]:
        time.sleep(rng.uniform(0.0, 6.0))
    else:
        while process.poll() is None:
            lines = lines_of(run)
            writing = any("tmp" in path.name for path in (run / "checkpoints").glob("*"))
            if lines and lines[-1]["step"] >= step and (writing or kind == KINDS[2]):
                break
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.02 if kind == KINDS[1] else 0.3))
    newest = complete(run)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return newest


def killed_run(recipe: Recipe, kills: int, seed: int, folder: Path) -> Counter[str]:
    """Trains once undisturbed and once with kills; returns how many there were of each kind.

    Raises:
        AssertionError: the killed run is not the undisturbed one, or lost a checkpoint.
    """
    path, log, rng, counts = folder / "recipe.yaml", folder / "log.txt", random.Random(seed), Counter[str]()
    path.write_text(recipe.to_yaml())
    assert start(path, "undisturbed", log).wait() == 0, log.read_text()
    runs, steps = Path(recipe.runs), recipe.train.steps
    undisturbed = {line["step"]: line for line in lines_of(runs / "undisturbed")}
    assert sorted(undisturbed) == list(range(1, steps + 1))
    run = runs / "killed"
    while sum(counts.values()) < kills:
        done = sum(counts.values())
        kind = KINDS[done % 3] if done < 3 else rng.choice(KINDS)
        log.write_bytes(b"")
        before, process = complete(run), start(path, "killed", log)
        try:
            kill(process, run, kind, PER_KILL * done + rng.randint(1, PER_KILL), rng)
        finally:
            process.kill()
        assert process.returncode == -signal.SIGKILL, f"the run ended before kill {done + 1}: {log.read_text()}"
        went_on = re.findall(r"resumed .* at step (\d+)", log.read_text())
        assert not went_on or int(went_on[0]) >= before, f"went on from {went_on[0]}, {before} was there"
        assert complete(run) >= before, f"checkpoint {before} was lost"
        assert "damaged" not in log.read_text(), log.read_text()
        counts[kind] += 1
    assert start(path, "killed", log).wait() == 0, log.read_text()
    for line in lines_of(run):
        assert line == undisturbed[line["step"]], f"step {line['step']} is not what it was"
    assert [line["step"] for line in read_metrics(run)] == list(range(1, steps + 1))
    states = [final_state(recipe.model_copy(update={"name": name})) for name in ("undisturbed", "killed")]
    assert states[0][1] == states[1][1] == {"step": steps} and int(states[0][0].step) == steps
    assert same_bits(states[0][0], states[1][0]), "the final states differ"
    return counts


def final_state(recipe: Recipe):
    """What a finished run ended with: its train state and its position in the data."""
    _, _, model = load_inputs(recipe)
    checkpoints = Checkpoints(recipe.run_directory)
    abstract = abstract_state(model, make_optimizer(recipe.train), make_mesh(recipe.mesh, jax.devices()[:1]))
    try:
        return checkpoints.restore(abstract, recipe, recipe.train.steps)
    finally:
        checkpoints.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = kill_recipe(Path(folder), asked.kills)
        prepare(recipe)
        ids = fit_semantic_ids(Dataset(recipe.dataset_directory), recipe.tokenizer, recipe.seed)
        ids.save(recipe.tokenizer_directory)
        started = time.perf_counter()
        counts = killed_run(recipe, asked.kills, asked.seed, Path(folder))
        kinds = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS)
        print(
            f"{asked.kills} kills in {recipe.train.steps} steps, seed {asked.seed}: {kinds}; final state and all log lines"
        )
        print(f"bit-identical to a run left alone, no checkpoint lost ({time.perf_counter() - started:.0f} s)")


if __name__ == "__main__":
    main()
