"""How often the 95 % intervals of scaling-law fits hold the truth, on runs made of known constants and 1 % noise.

    python tools/bench/fit_coverage.py --trials 200

Of every constant, and of predictions beyond the runs: the metric at ten times the largest size, and the best size and data for ten
times the largest budget. `--plain` takes the percentiles of the same resamples without the correction of their bias.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import numpy as np
from rich.console import Console
from rich.table import Table

from onerec_jax.evaluate.jackknife import Interval
from onerec_jax.scaling import fit as fitting
from onerec_jax.scaling.fit import fit_law, parametric, power
from onerec_jax.scaling.isoflop import fit_isoflop
from onerec_jax.scaling.law import Law
from onerec_jax.scaling.runs import make_runs

E, A, ALPHA, B, BETA = 1.8172, 482.01, 0.3478, 2085.43, 0.3658  # Besiroglu et al. 2024
Found = dict[str, tuple[Interval, float]]  # interval and truth by name


def noisy(values_R: np.ndarray, seed: int, noise: float) -> np.ndarray:
    return values_R * np.exp(noise * np.random.default_rng(seed).normal(size=values_R.size))


def parametric_trial(sizes: int, amounts: int) -> Callable[[int, float], Found]:
    """A grid of sizes and amounts of data."""

    def trial(seed: int, noise: float) -> Found:
        params, tokens = (x.ravel() for x in np.meshgrid(np.logspace(7.5, 10, sizes), np.logspace(9, 11.5, amounts)))
        loss = noisy(E + A / params**ALPHA + B / tokens**BETA, seed, noise)
        fit = fit_law(make_runs({"params": params, "tokens": tokens, "loss": loss}), parametric(), seed=seed)
        found = of_constants(fit.constants(), {"E": E, "A": A, "alpha": ALPHA, "B": B, "beta": BETA})
        flops = 60 * params.max() * tokens.max()
        best = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA)) * (flops / 6) ** (BETA / (ALPHA + BETA))
        optimum = fit.optimum(flops)
        found["a"] = fit.exponents()[0], BETA / (ALPHA + BETA)
        found["N at 10 C"] = optimum.params, best
        found["D at 10 C"] = optimum.tokens, flops / 6 / best
        found["loss at 10 N, 10 D"] = (
            fit.predict(params=1e11, tokens=10**12.5), E + A / 1e11**ALPHA + B / 10 ** (12.5 * BETA),
        )  # fmt: skip
        return found

    return trial


def power_trial(law: Law, metric: Callable[[np.ndarray], np.ndarray], truth: dict[str, float], runs: int):
    """One variable over four decades."""

    def trial(seed: int, noise: float) -> Found:
        params = np.logspace(6, 10, runs)
        fit = fit_law(make_runs({"params": params, "loss": noisy(metric(params), seed, noise)}), law, seed=seed)
        at = fit.predict(params=1e11), float(metric(np.array(1e11)))
        return {**of_constants(fit.constants(), truth), "metric at 10 N": at}

    return trial


def isoflop_trial(budgets: int, sizes: int) -> Callable[[int, float], Found]:
    """Parabolas around known minima, sizes from a tenth of the best to ten times as large."""

    def trial(seed: int, noise: float) -> Found:
        flops = np.logspace(18, 21, budgets)
        best, least = 2e8 * (flops / 1e18) ** 0.46, 2 + (flops / 1e18) ** -0.1
        offset = np.tile(np.linspace(-2.3, 2.3, sizes), budgets)
        loss = noisy(np.repeat(least, sizes) + 0.05 * offset**2, seed, noise)
        params = np.repeat(best, sizes) * np.exp(offset)
        fit = fit_isoflop(make_runs({"params": params, "flops": np.repeat(flops, sizes), "loss": loss}), seed=seed)
        (a, b), optimum, first = fit.exponents(), fit.optimum(1e22), fit.curves[0]
        params_at, tokens_at = 2e8 * 1e4**0.46, 1e22 / 6 / (2e8 * 1e4**0.46)
        return {
            "a": (a, 0.46), "b": (b, 0.54), "N of a budget": (first.params, best[0]),
            "loss of a budget": (first.metric, least[0]), "N at 10 C": (optimum.params, params_at),
            "D at 10 C": (optimum.tokens, tokens_at),
        }  # fmt: skip

    return trial


def of_constants(found: dict[str, Interval], truth: dict[str, float]) -> Found:
    return {name: (found[name], truth[name]) for name in truth}


def cases() -> Iterator[tuple[str, Callable[[int, float], Found]]]:
    yield "L(N,D), 8 x 6 runs", parametric_trial(8, 6)
    yield "L(N,D), 6 x 4 runs", parametric_trial(6, 4)
    falling = {"E": 1.7, "A": 400.0, "alpha": 0.34}
    for objective in ("huber_log", "squares"):
        law = power("params", objective, None)
        yield f"L(N), {objective}, 16 runs", power_trial(law, lambda n: 1.7 + 400 / n**0.34, falling, 16)
    rising = {"E": 0.12, "A": 1.4, "alpha": 0.25}
    law = power("params", "huber_log", None, rising=True)
    yield "Recall(N), rising, 16 runs", power_trial(law, lambda n: 0.12 - 1.4 / n**0.25, rising, 16)
    yield "IsoFLOP, 4 budgets x 7 runs", isoflop_trial(4, 7)


def uncorrected(value: float, resampled_S: np.ndarray, width: float) -> Interval:
    """The plain percentiles."""
    return Interval(value, *(float(v) for v in np.quantile(resampled_S[np.isfinite(resampled_S)], [0.025, 0.975])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--noise", type=float, default=0.01)
    parser.add_argument("--plain", action="store_true", help="percentiles without the correction of their bias")
    given = parser.parse_args()
    if given.plain:
        fitting.bias_corrected = uncorrected
    for title, trial in cases():
        started, hits = time.process_time(), {}
        for seed in range(given.trials):
            for name, ((_, low, high), truth) in trial(seed, given.noise).items():
                hits.setdefault(name, []).append(low <= truth <= high)
        seconds = (time.process_time() - started) / given.trials
        table = Table("", *hits, title=f"{title}, {seconds:.2f} s a fit", title_justify="left")
        table.add_row("covered, %", *(f"{100 * np.mean(held):.1f}" for held in hits.values()))
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
