"""Step time, MFU and memory of a recipe's train step on whatever devices are here.

    python tools/bench/train_step.py onerec_0.121b train.batch_size=64
    python tools/bench/train_step.py onerec_0.935b train.batch_size=32 model.remat=dots mesh.fsdp=1 --profile trace/

Contexts are full, 20 + 256 + 2000 events in the report's sizes, and 5 targets share one; batches are made up, so that nothing
waits for data. A row with device, versions and commit goes to the end of BENCHMARKS.md (`--no-row` keeps it out). It imports only
jax, flax, optax, orbax, pydantic and OmegaConf: accelerator images carry little else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from onerec_jax.config import Recipe  # noqa: E402
from onerec_jax.data.schema import Batch, ItemFeatures, Vocabulary  # noqa: E402
from onerec_jax.errors import InputError  # noqa: E402
from onerec_jax.model.attention import attention_name  # noqa: E402
from onerec_jax.model.moe.backends import backend_name  # noqa: E402
from onerec_jax.model.onerec import Model, build, planned_vocabulary  # noqa: E402
from onerec_jax.model.prefixes import DeviceTrie, training_trie  # noqa: E402
from onerec_jax.parallel.mesh import check_batch, make_mesh, use_mesh  # noqa: E402
from onerec_jax.parallel.sharding import put_batch  # noqa: E402
from onerec_jax.recipe import load_recipe  # noqa: E402
from onerec_jax.tokenizer.trie import Trie  # noqa: E402
from onerec_jax.train.flops import peak_flops, request_flops  # noqa: E402
from onerec_jax.train.optimizer import make_optimizer  # noqa: E402
from onerec_jax.train.state import TrainState, abstract_state, create_state  # noqa: E402
from onerec_jax.train.step import compile_step, make_train_step  # noqa: E402

HEADING = "## Train steps on accelerators"
COLUMNS = ("recipe", "device", "settings", "ms a step", "requests/s", "target tokens/s", "MFU", "GiB", "jax", "commit")


def made_up_batch(recipe: Recipe, vocabulary: Vocabulary, codes: np.ndarray, seed: int) -> Batch:
    """Full contexts and targets of random items."""
    rng, size, model = np.random.default_rng(seed), recipe.train.batch_size, recipe.model
    targets = recipe.data.targets

    def events(length: int) -> ItemFeatures:
        item = rng.integers(0, vocabulary.items, (size, length), np.int32)
        seconds = rng.exponential(3600, (3, size, length)).astype(np.float32)
        return ItemFeatures(
            item=item,
            codes=codes[item],
            author=rng.integers(0, vocabulary.authors, (size, length), np.int32),
            tag=rng.integers(0, vocabulary.tags, (size, length), np.int32),
            age_s=seconds[0],
            playtime_s=seconds[1],
            duration_s=seconds[2],
            feedback=rng.integers(0, 2, (size, length, len(vocabulary.labels)), np.uint8),
        )

    item = rng.integers(0, vocabulary.items, (size, targets), np.int32)
    users = [rng.integers(0, n, size) for n in (vocabulary.users, *vocabulary.user_features)]
    last = model.short_length
    visible = np.arange(last - targets + 1, last + 1) if model.causal else np.full(targets, last)
    return Batch(
        user=np.stack(users, axis=1).astype(np.int32),
        short=events(model.short_length),
        positive=events(model.positive_length),
        lifelong=events(model.lifelong_length),
        targets=codes[item],
        target_item=item,
        target_weight=np.ones((size, targets), np.float32),
        visible=np.broadcast_to(np.maximum(visible, 1), (size, targets)).astype(np.int32),
        feedback=np.zeros((size, targets, len(vocabulary.labels)), np.uint8),
        playtime_s=np.zeros((size, targets), np.float32),
    )


def ready(recipe: Recipe) -> tuple[Mesh, Model, Any, TrainState, list[Any], DeviceTrie | None]:
    """All that a train step takes, on the device: two batches are enough to go on for ever."""
    mesh, vocabulary = make_mesh(recipe.mesh), planned_vocabulary(recipe)
    check_batch(mesh, recipe.train.batch_size, recipe.train.accumulation)
    model, optimizer = build(recipe.model, vocabulary), make_optimizer(recipe.train)
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(0, n, vocabulary.items) for n in vocabulary.codebook_sizes], axis=1).astype(np.int32)
    trie = None
    if recipe.model.softmax == "legal" or recipe.model.coded_items:
        trie = training_trie(recipe.model, Trie.build(codes, np.zeros(vocabulary.items)))
    step = compile_step(make_train_step(model, recipe, optimizer), abstract_state(model, optimizer, mesh), mesh)
    state = create_state(model, optimizer, 0, mesh)
    batches = [put_batch(made_up_batch(recipe, vocabulary, codes, seed), mesh) for seed in range(2)]
    return mesh, model, step, state, batches, trie


def measure(recipe: Recipe, steps: int, profile: str) -> dict[str, object]:
    """Times the compiled step; the row's values by column, and what else is known."""
    mesh, model, step, state, batches, trie = ready(recipe)
    vocabulary = model.vocabulary
    started = time.perf_counter()
    state, metrics = jax.block_until_ready(step(state, batches[0], trie))
    compiled = time.perf_counter() - started
    for i in range(3):
        state, metrics = step(state, batches[i % 2], trie)
    jax.block_until_ready(state)
    seconds = []
    for _part in range(3):  # the host runs ahead within a part, as in training
        started = time.perf_counter()
        for i in range(steps):
            state, metrics = step(state, batches[i % 2], trie)
        jax.block_until_ready((state, metrics))
        seconds.append((time.perf_counter() - started) / steps)
    if profile:
        with jax.profiler.trace(profile):
            for i in range(3):
                state, metrics = step(state, batches[i % 2], trie)
            jax.block_until_ready((state, metrics))
    loss, weight = (float(x) for x in metrics["loss"])
    device, median = mesh.devices.flat[0], statistics.median(seconds)
    config, size, targets = recipe.model, recipe.train.batch_size, recipe.data.targets
    flops = size * request_flops(
        config, vocabulary, short=config.short_length, positive=config.positive_length, lifelong=config.lifelong_length,
        targets=targets, sampled_items=recipe.train.sampled_items, decoded=recipe.train.code_targets or None,
    ).training  # fmt: skip
    peak = peak_flops(device, config.dtype)
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    with use_mesh(mesh):
        experts = f", {backend_name(config.moe)} experts" if config.moe.experts else ""
        kinds = f"attention {attention_name(config.attention)}{experts}"
    axes = ", ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1)
    return {
        "recipe": recipe.name,
        "device": f"{mesh.devices.size} x {device.device_kind}",
        "settings": f"batch {size} x {targets} targets, remat {config.remat}, {kinds}{', mesh ' + axes if axes else ''}",
        "ms a step": f"{1000 * median:.1f} ({1000 * min(seconds):.1f} - {1000 * max(seconds):.1f})",
        "requests/s": f"{size / median:,.1f}",
        "target tokens/s": f"{size * targets * vocabulary.levels / median:,.0f}",
        "MFU": f"{flops / median / peak / mesh.devices.size:.1%}" if peak else "",
        "GiB": f"{memory / 2**30:.1f}" if memory else "",
        "jax": jax.__version__,
        "commit": _commit(),
        "compile_s": round(compiled, 1),
        "loss": round(loss / weight, 4),
        "tflops_a_device": round(flops / median / mesh.devices.size / 1e12, 3),
    }


def _commit() -> str:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return found.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def add_row(page: Path, row: dict[str, object]) -> None:
    """Puts a row at the end of the page's table of train steps, which is made if there is none."""
    text = page.read_text(encoding="utf-8").rstrip("\n")
    if HEADING not in text:
        text += f"\n\n{HEADING}\n\n`python tools/bench/train_step.py RECIPE SETTINGS`\n\n"
        text += f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"
    before, after = text.split(HEADING)
    lines = after.split("\n")
    end = next(i for i, line in enumerate(lines) if line.startswith("|"))
    while end < len(lines) and lines[end].startswith("|"):
        end += 1
    lines.insert(end, f"| {' | '.join(str(row[column]) for column in COLUMNS)} |")
    page.write_text(before + HEADING + "\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", help="settings of the recipe, as key.path=value")
    parser.add_argument("--steps", type=int, default=10, help="of each of three parts")
    parser.add_argument("--profile", default="", help="also write a trace of three steps to this folder")
    parser.add_argument("--no-row", action="store_true", help="print only")
    given = parser.parse_args()
    try:
        row = measure(load_recipe(given.recipe, given.overrides), given.steps, given.profile)
    except InputError as error:
        print(f"train_step: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(json.dumps(row, indent=1))
    if not given.no_row:
        add_row(ROOT / "BENCHMARKS.md", row)


if __name__ == "__main__":
    main()
