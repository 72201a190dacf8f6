"""Seconds from the start of a process to the first list of an export, with jax and NumPy alone.

    python tools/bench/cold_start.py [--recipe onerec_0.015b] [--items 100000] [--dtype float32] [--python PYTHON]

Weights, semantic IDs and one user's history, as long as the model reads, are drawn at random. `--python` is an interpreter with
jax and numpy; without it a virtual environment is made with these two alone. What is timed is `recommend.py --user 0` of the
export: starting Python, importing jax, checking all digests, reading the weights, compiling, and one list.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from onerec_jax.config import Recipe
from onerec_jax.data.schema import LABELS
from onerec_jax.export.artifact import Contents, catalogue_arrays, write_artifact
from onerec_jax.model.onerec import Model, build, planned_vocabulary
from onerec_jax.model.tables import stored_rows
from onerec_jax.recipe import load_recipe
from onerec_jax.tokenizer.trie import Trie


def random_weights(model: Model) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)

    def drawn(shape: tuple[int, ...]) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) * np.float32(0.02)

    params = jax.tree.map(lambda leaf: drawn(leaf.shape), model.abstract)
    tables = {name: {"rows": drawn((stored_rows(rows), width))} for name, (rows, width) in model.tables.items()}
    return params, tables, jax.tree.map(np.asarray, model.init_bias())


def random_user(model: Model, items: int) -> dict[str, Any]:
    config = model.config
    length = max(config.short_length + 1, config.positive_length, config.lifelong_length)
    item = np.random.default_rng(1).integers(0, items, length).tolist()
    events = [
        {"item": row, "timestamp_ms": 60_000 * n, "playtime_s": 5.0, "duration_s": 20.0, "feedback": ["click"]}
        for n, row in enumerate(item)
    ]
    features = [0] * len(model.vocabulary.user_features)
    runs = {name: events for name in ("positive", "lifelong") if getattr(config, f"{name}_length")}
    return {"id": 0, "row": 0, "features": features, "events": events[-200:], "seen": [], **runs}


def random_contents(recipe: Recipe, items: int) -> Contents:
    vocabulary = dataclasses.replace(planned_vocabulary(recipe), items=items, authors=items)
    model, rng = build(recipe.model, vocabulary), np.random.default_rng(2)
    codes = np.stack([rng.integers(0, size, items, np.int32) for size in vocabulary.codebook_sizes], axis=1)
    trie = Trie.build(codes, np.zeros(items))
    author, tag = rng.integers(0, items, items, np.int32), rng.integers(0, vocabulary.tags, items, np.int32)
    params, tables, bias = random_weights(model)
    config = {
        "model": model.config.model_dump(mode="json"),
        "vocabulary": dataclasses.asdict(vocabulary),
        "labels": LABELS,
        "positive_labels": ["long_view"],
        "exclude_seen": True,
        "excluded": 4096,
        "lifelong": {"refresh": recipe.data.lifelong_refresh},
        "lists": {"k": 10, "width": recipe.evaluate.beam_width, "item_weight": recipe.evaluate.item_weight},
    }
    return Contents(
        config=config, model=model, params=params, tables=tables, bias=bias,
        catalogue=catalogue_arrays(trie, author, tag, np.full(items, 20, np.float32)), trie=trie,
        item_ids=list(range(items)), titles=[f"title {row}" for row in range(items)], users=[random_user(model, items)],
        tokenizer={}, tokenizer_arrays={}, card="",
    )  # fmt: skip


def fresh_python(folder: Path) -> Path:
    """An interpreter with jax and numpy, of the versions here, and what these two need."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    wanted = [f"{name}=={version(name)}" for name in ("jax", "numpy")]
    subprocess.run([str(folder / "bin" / "python"), "-m", "pip", "install", "-q", *wanted], check=True)
    return folder / "bin" / "python"


def seconds_to_first_list(python: Path, place: Path) -> float:
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_COMPILATION", "PYTHON"))
    }
    started = time.perf_counter()
    process = subprocess.Popen(
        [str(python), str(place / "recommend.py"), "--user", "0"], stdout=subprocess.PIPE, text=True, env=env
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    seconds = time.perf_counter() - started
    process.communicate()
    if process.returncode or not first:
        raise SystemExit("no list")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="onerec_0.015b")
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "int8"))
    parser.add_argument("--python", type=Path, default=None)
    parser.add_argument("--starts", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        python = given.python or fresh_python(Path(folder) / "venv")
        place = Path(folder) / "export"
        started = time.perf_counter()
        write_artifact(random_contents(load_recipe(given.recipe), given.items), place, given.dtype)
        size = sum(path.stat().st_size for path in place.iterdir()) / 2**20
        seconds = time.perf_counter() - started
        print(f"{given.recipe}, {given.items:,} items, {given.dtype}: {size:,.0f} MiB, exported in {seconds:.1f} s")
        for n in range(given.starts):
            print(f"start {n + 1}: first list after {seconds_to_first_list(python, place):.2f} s")


if __name__ == "__main__":
    main()
