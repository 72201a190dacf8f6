"""Whether a later stage made a run better: both serve the same held-out requests, compared user by user."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from onerec_jax.config import Recipe
from onerec_jax.data.store import Dataset
from onerec_jax.errors import InputError
from onerec_jax.evaluate.jackknife import interval, mean_over_users
from onerec_jax.evaluate.metrics import hits
from onerec_jax.evaluate.requests import Requests, collect_requests
from onerec_jax.generate.load import load_recommender
from onerec_jax.generate.recommender import Recommender
from onerec_jax.train.checkpoint import Checkpoints, parse_run
from onerec_jax.train.promotion import decided_at, served_run, write_promotion


def check_promotable(recipe: Recipe) -> None:
    """Raises InputError where there is nothing to compare by."""
    dataset = Dataset(recipe.dataset_directory)
    if not len(dataset.examples("valid")):
        raise InputError(
            f"promote: better needs held-out requests, and {dataset.directory} has no valid examples; set it to always, or "
            "move data.split.valid_from before data.split.test_from"
        )


def promote(run: Path, start: str, recipe: Recipe, report: Callable[[str], None]) -> None:
    """Decides whether the newest checkpoint of a run is served, or the run that it started from, and says why.

    It is where its recall, on all requests of the validation split, is above that of `start` by more than the 95 % interval of
    their difference, users paired.

    Args:
        run: the directory of a finished run.
        start: RUN or RUN@STEP, as the run's `init_from`.
    """
    checkpoints = Checkpoints(run)
    step = checkpoints.steps()[-1]
    checkpoints.close()
    if decided_at(run) == step:
        return
    before, before_step = served_run(*parse_run(start, recipe.runs))
    chosen = recipe.evaluate.model_copy(update={"split": "valid", "max_examples": 0})
    new = load_recommender(f"{run}@{step}")
    old = load_recommender(str(before) if before_step is None else f"{before}@{before_step}")
    requests = collect_requests(new.dataset, recipe.model_copy(update={"evaluate": chosen}))
    k = recipe.rl.watch_k
    report(f"comparing with {before} on {len(requests)} held-out requests")
    was, is_now = (_recalls(recommender, requests, k) for recommender in (old, new))
    gain = interval(lambda mean: mean, mean_over_users(is_now - was, requests.user))
    measured = {f"recall@{k}": float(is_now.mean()), f"recall@{k} before": float(was.mean()), "gain": gain._asdict()}
    write_promotion(run, step, before, before_step, gain.low > 0, measured)
    report(
        f"held-out Recall@{k} {was.mean():.4f} -> {is_now.mean():.4f}, gain {gain.value:+.4f} ({gain.low:+.4f} to "
        f"{gain.high:+.4f}): " + ("promoted" if gain.low > 0 else f"no better, so that {before} is served in its place")
    )


def _recalls(recommender: Recommender, requests: Requests, k: int) -> np.ndarray:
    """Recall@k of every request, float64 [N]."""
    seen = requests.context if recommender.recipe.evaluate.exclude_seen else None
    lists = recommender.recommend(requests.examples, seen, k, progress=True)[0]
    hit, relevant = hits(lists, requests.relevant)
    return hit[:, :k].sum(axis=1) / np.maximum(relevant, 1)
