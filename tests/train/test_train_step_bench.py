"""tools/bench/train_step.py runs with the few packages that an accelerator image has, and keeps its table in order."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "tools" / "bench" / "train_step.py"
TINY = (
    "model.d_model=16", "model.heads=2", "model.ffn_hidden=16", "model.encoder_layers=1", "model.decoder_layers=1",
    "model.moe.experts=0", "model.short_length=4", "model.positive_length=4", "model.lifelong_length=4",
    "model.lifelong_queries=2", "train.batch_size=4", "tokenizer.codebook_sizes=[8,8,8]",
)  # fmt: skip

WITHOUT = """
import runpy, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1].split(","):
            raise ImportError(name + " is not on this machine")

sys.meta_path.insert(0, Missing())
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
NEEDED = {"jax", "flax", "optax", "orbax-checkpoint", "pydantic>=2", "omegaconf", "numpy"}
IMPORTED_AS = {"scikit-learn": "sklearn", "tensorboardX": "tensorboardX"}


def _others() -> str:
    """Modules of the project's other dependencies, but for those that the needed ones bring along."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    brought = {"rich", "tensorstore", "scipy"}
    names = {name for name in project["dependencies"] if name.split(">")[0] not in {n.split(">")[0] for n in NEEDED}}
    return ",".join([*sorted(IMPORTED_AS.get(name, name) for name in names - brought), "tokamax"])


def test_it_runs_with_little_installed_and_prints_a_row():
    others = _others()
    assert {"grain", "polars", "pyarrow", "sklearn", "typer"} <= set(others.split(","))
    command = [sys.executable, "-c", WITHOUT, others, str(SCRIPT), "quickstart", *TINY, "--steps", "1", "--no-row"]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert found.returncode == 0, found.stderr
    row = json.loads(found.stdout)
    assert row["recipe"] == "quickstart" and row["device"].startswith("1 x cpu") and 0 < row["loss"] < 20


def test_bad_settings_are_one_sentence():
    command = [sys.executable, str(SCRIPT), "quickstart", "train.batch_size=5", "train.accumulation=5", "mesh.fsdp=3"]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert found.returncode == 2 and len(found.stderr.splitlines()) == 1 and "mesh" in found.stderr


def test_rows_go_to_the_end_of_their_table(tmp_path: Path):
    spec = importlib.util.spec_from_file_location("train_step_bench", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = tmp_path / "page.md"
    page.write_text("# Benchmarks\n\ntext\n")
    for name in ("one", "two"):
        script.add_row(page, {**dict.fromkeys(script.COLUMNS, ""), "recipe": name})
    page.write_text(page.read_text() + "\n## After\n\n| a | b |\n|---|---|\n| c | d |\n")
    script.add_row(page, {**dict.fromkeys(script.COLUMNS, ""), "recipe": "three"})
    lines = page.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| one"))
    assert [line.split()[1] for line in lines[first : first + 3]] == ["one", "two", "three"]
    assert lines[0] == "# Benchmarks" and lines[-1] == "| c | d |"
