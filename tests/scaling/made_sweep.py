"""A finished sweep that no one trained: runs whose losses are of a known law, with the files that real ones have."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from onerec_jax.scaling.points import SweepFolder, plan
from onerec_jax.scaling.sweep import Sweep, param, prod

LAW = {"E": 1.8, "A": 40.0, "alpha": 0.34, "B": 60.0, "beta": 0.36}
SIZES = (16, 24, 32, 48, 64)
BUDGETS = (1e12, 4e12, 1.6e13)
FACTOR = 6.0


def loss_of(params: float, tokens: float) -> float:
    return LAW["E"] + LAW["A"] / params ** LAW["alpha"] + LAW["B"] / tokens ** LAW["beta"]


def best_params(budget: float) -> float:
    """In closed form (Hoffmann et al. 2022, equation 4)."""
    alpha, beta = LAW["alpha"], LAW["beta"]
    g = (alpha * LAW["A"] / (beta * LAW["B"])) ** (1 / (alpha + beta))
    return g * (budget / FACTOR) ** (beta / (alpha + beta))


def made_sweep(recipe: str, noise: float = 0.002, seed: int = 0) -> SweepFolder:
    """Five sizes around the best one at each of three budgets, in `runs/sweeps/made` of the working folder."""
    points = prod(param("train.steps", [100, 200, 400]), param("model.ffn_hidden", SIZES))
    sweep = plan("made", Sweep(recipe, points))
    sweep.write()
    rng = np.random.default_rng(seed)
    for run in sweep.points:
        steps = run.point["train.steps"]
        budget = BUDGETS[(100, 200, 400).index(steps)]
        params = best_params(budget) * run.point["model.ffn_hidden"] / 32
        tokens = budget / (FACTOR * params)
        final = loss_of(params, tokens) * (1 + noise * rng.standard_normal())
        _write_run(run.folder, steps, params, tokens, final, run.recipe.train.batch_size)
    return sweep


def _write_run(folder: Path, steps: int, params: float, tokens: float, final: float, batch: int) -> None:
    lines = []
    for step in np.unique(np.linspace(1, steps, 50).astype(int)):
        value = final + 4.0 * (step**-0.5 - steps**-0.5)
        per_request = tokens / (steps * batch)
        speed = {
            "examples_per_s": 10.0,
            "target_tokens_per_s": 10 * per_request,
            "targets_per_context": per_request / 3,
        }
        speed |= {"gflops": 10 * FACTOR * params * per_request / 1e9, "step_ms": 100.0}
        lines.append({"step": int(step), "time": 1e9 + float(step), "loss": value + 0.05, **speed})
        if step % 5 == 0 or step == steps:
            lines.append({"step": int(step), "time": 1e9 + float(step), "valid/loss": value})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    numbers = {
        "params": params, "params_total": 2 * params, "params_tables": 5e3, "tokens": tokens, "targets": tokens / 3,
        "flops": FACTOR * params * tokens, "loss": final + 0.05, "valid_loss": final, "epochs": steps / 500,
    }  # fmt: skip
    done = {"status": "done", "numbers": numbers, "metrics": None, "seconds": steps / 10, "device": "1 x made"}
    (folder / "done.json").write_text(json.dumps(done))
