"""Recall of two runs on the same requests, and the 95 % interval of their difference, users paired.

    python tools/paired_recall.py RUN_A RUN_B

Requests, list lengths and what recall counts (pairs, or the mean over requests) are those of RUN_A's recipe. Each user in turn is
left out (`evaluate/jackknife.py`).
"""

from __future__ import annotations

import argparse

import numpy as np

from onerec_jax.evaluate.jackknife import Estimate, Interval, interval, mean_over_users
from onerec_jax.evaluate.metrics import hits
from onerec_jax.evaluate.requests import Requests, collect_requests
from onerec_jax.generate.load import load_recommender
from onerec_jax.generate.recommender import Recommender


def pair_recall(hit_N: np.ndarray, relevant_N: np.ndarray, user_N: np.ndarray) -> Estimate:
    """The share of all relevant pairs that were listed."""
    row_N = np.unique(user_N, return_inverse=True)[1]
    hit, relevant = np.bincount(row_N, weights=hit_N), np.bincount(row_N, weights=relevant_N)
    return Estimate(float(hit.sum() / relevant.sum()), (hit.sum() - hit) / (relevant.sum() - relevant))


def hits_of(recommender: Recommender, requests: Requests, ks: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Relevant items among the first k of every request's list [N,len(ks)], and how many are relevant [N]."""
    seen = requests.context if recommender.recipe.evaluate.exclude_seen else None
    hit, relevant = hits(recommender.recommend(requests.examples, seen, max(ks), progress=True)[0], requests.relevant)
    return np.stack([hit[:, :k].sum(axis=1) for k in ks], axis=1), relevant


def differences(run_a: str, run_b: str) -> dict[int, tuple[float, float, Interval]]:
    """By list length: recall of either run, and that of the second less that of the first."""
    first, second = load_recommender(run_a), load_recommender(run_b)
    settings = first.recipe.evaluate
    requests = collect_requests(first.dataset, first.recipe)
    (hit_a, relevant), (hit_b, _) = (hits_of(run, requests, settings.ks) for run in (first, second))
    found = {}
    for i, k in enumerate(settings.ks):
        a, b = (
            pair_recall(hit[:, i], relevant, requests.user)
            if settings.recall == "pair"
            else mean_over_users(hit[:, i] / relevant, requests.user)
            for hit in (hit_a, hit_b)
        )
        found[k] = a.value, b.value, interval(lambda x, y: y - x, a, b)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Recall of two runs on the same requests, users paired.")
    parser.add_argument("run_a")
    parser.add_argument("run_b")
    given = parser.parse_args()
    for k, (a, b, gain) in differences(given.run_a, given.run_b).items():
        print(f"R@{k}  {a:.4f} -> {b:.4f}  {gain.value:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})")


if __name__ == "__main__":
    main()
