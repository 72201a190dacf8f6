"""What a checkpoint costs: how long it stops the training loop, and how fast it is written and read, beside the disk's own speed.

    python tools/bench/checkpoint.py onerec_0.121b train.batch_size=8 model.dtype=float32 --to /tmp

Steps are the recipe's own on made-up batches. A save follows every few of them, as in training: the state
is copied and the next step begins while files are written; the stall is the time until it begins. Right after a step, on a
CPU, whoever asks for memory next is stopped until the system has taken back that of the step. Another step pays for it as a
save does, so it is waited for before the save and shown apart. The disk's speed is that of one file of the same size, written
with fsync and read after it was dropped from the page cache.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table
from train_step import ready  # puts the repository on the path

from onerec_jax.config import Recipe
from onerec_jax.recipe import load_recipe
from onerec_jax.train.checkpoint import Checkpoints
from onerec_jax.train.integrity import damage
from onerec_jax.train.optimizer import make_optimizer
from onerec_jax.train.state import abstract_state

BLOCK = 1 << 24


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def settle() -> None:
    """Starts a thread, whose stack has to wait for the memory of the step to be given back."""
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()


def drop(folder: Path) -> None:
    """Takes the files of a folder out of the page cache, so that reading them reads the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_file(path: Path, size: int) -> None:
    block = os.urandom(BLOCK)
    with path.open("wb", buffering=0) as file:
        for _ in range(-(-size // BLOCK)):
            file.write(block)
        os.fsync(file.fileno())


def read_file(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(BLOCK):
            pass


def measure(recipe: Recipe, saves: int, between: int, folder: Path) -> Table:
    """A table of what was measured."""
    mesh, model, step, state, batches, trie = ready(recipe)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.optimizer, state.tables, state.bias)))
    run = folder / "run"
    checkpoints = Checkpoints(run, recipe.train.model_copy(update={"keep": 1}))
    state, metrics = jax.block_until_ready(step(state, batches[0], trie))
    steps: list[float] = []
    waits: list[float] = []
    pauses: list[float] = []
    stalls: list[float] = []
    for number in range(1, saves + 1):
        for i in range(between):
            started = time.perf_counter()
            state, metrics = step(state, batches[i % 2], trie)
            jax.block_until_ready((state, metrics))
            steps.append(time.perf_counter() - started)
        pauses.append(timed(settle))
        waits.append(timed(checkpoints.wait))
        stalls.append(timed(functools.partial(checkpoints.save, number, state, {"step": number}, recipe)))
    written = stalls[-1] + timed(checkpoints.wait)
    checkpoints.close()
    drop(run)
    abstract = abstract_state(model, make_optimizer(recipe.train), mesh)
    del state, metrics
    reader = Checkpoints(run)
    restored = timed(lambda: jax.block_until_ready(reader.restore(abstract, recipe)[0]))
    reader.close()
    file = folder / "file"
    disk_write = timed(lambda: write_file(file, size))
    drop(folder)
    disk_read = timed(lambda: read_file(file))

    checked = timed(lambda: damage(run / "checkpoints" / str(saves)))
    step_s, stall, gb = statistics.median(steps), statistics.median(stalls), size / 1e9
    every, device = recipe.train.checkpoint_every, jax.devices()[0].device_kind
    table = Table("", "seconds", "GB/s", title=f"{recipe.name}, {gb:.2f} GB of state, {device}", title_justify="left")
    table.add_row(f"step of {recipe.train.batch_size} requests, median of {len(steps)}", f"{step_s:.2f}", "")
    table.add_row(f"stall of a save, median of {saves}", f"{stall:.3f}", "")
    table.add_row("  of one step", f"{stall / step_s:.1%}", "")
    table.add_row(f"  of the {every:,} steps between two saves", f"{stall / step_s / every:.4%}", "")
    table.add_row("pause after a step, whatever comes next", f"{statistics.median(pauses):.3f}", "")
    table.add_row(f"wait for a save that began {between} steps before", f"{statistics.median(waits[1:]):.2f}", "")
    for name, seconds in (
        ("save, until all is on disk and checked", written), ("restore", restored), ("checksums of all files", checked),
        ("the disk: one file written, fsync", disk_write), ("the disk: one file read", disk_read),
    ):  # fmt: skip
        table.add_row(name, f"{seconds:.2f}", f"{gb / seconds:.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", help="settings of the recipe, as key.path=value")
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6, help="between saves")
    parser.add_argument("--to", type=Path, default=Path("."), help="folder on the disk that is meant")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.to) as folder:
        Console().print(measure(load_recipe(given.recipe, given.overrides), given.saves, given.steps, Path(folder)))


if __name__ == "__main__":
    main()
