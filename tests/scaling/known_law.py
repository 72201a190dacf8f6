"""Runs whose law is known."""

from __future__ import annotations

import numpy as np

from onerec_jax.scaling.runs import Runs, make_runs

# Besiroglu et al. 2024
E, A, ALPHA, B, BETA = 1.8172, 482.01, 0.3478, 2085.43, 0.3658


def grid_runs(sizes: int = 6, amounts: int = 4, noise: float = 0.0, seed: int = 0) -> Runs:
    """Every size with every amount of data, of the law above with noise of this relative width."""
    axes = np.meshgrid(np.logspace(7.5, 10, sizes), np.logspace(9, 11.5, amounts))
    params, tokens = (axis.ravel() for axis in axes)
    loss = E + A / params**ALPHA + B / tokens**BETA
    loss = loss * np.exp(noise * np.random.default_rng(seed).normal(size=loss.size))
    return make_runs({"params": params, "tokens": tokens, "loss": loss})


# OneRec-V2, table 5, dense rows
V2_RUNS = make_runs(
    {
        "params": np.array([0.1, 0.2, 0.5, 1, 2, 4, 8]) * 1e9,
        "loss": np.array([3.57, 3.46, 3.33, 3.27, 3.23, 3.20, 3.19]),
    }
)
