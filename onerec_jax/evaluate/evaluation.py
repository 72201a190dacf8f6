"""One run against its floors on one split, under one protocol, as a table and as `evaluation.json`."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter
from rich.box import SIMPLE_HEAD
from rich.progress import track
from rich.table import Table

from onerec_jax.config import Recipe, SimulatorSource, Source
from onerec_jax.data.store import Dataset
from onerec_jax.data.train_log import train_log
from onerec_jax.evaluate.floors import fit_floor
from onerec_jax.evaluate.jackknife import Interval, interval, mean_over_users
from onerec_jax.evaluate.metrics import coverage, ranking_metrics, value
from onerec_jax.evaluate.requests import Requests, collect_requests
from onerec_jax.evaluate.rerank import ranked
from onerec_jax.generate.ranking import rank
from onerec_jax.generate.recommender import Recommender, slice_ragged
from onerec_jax.parallel.mesh import make_mesh
from onerec_jax.reward.lists import ListScorer
from onerec_jax.reward.training import load_reward

_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Metrics by row ("model" and each floor), and the protocol they were measured under."""

    protocol: str
    rows: dict[str, dict[str, float]]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    def table(self) -> Table:
        columns = [name for name in next(iter(self.rows.values())) if not name.endswith("±")]  # that is in the JSON
        table = Table(title=self.protocol, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True)
        table.add_column("")
        for name in columns:
            table.add_column(name, justify="right")
        for name, metrics in self.rows.items():
            cells = [f"{metrics[c]:{'.2f' if metrics[c] >= 10 else '.4f'}}" if c in metrics else "" for c in columns]
            table.add_row(name, *cells, style="bold" if name == "model" else None)
        return table


def floor_lists(name: str, dataset: Dataset, requests: Requests, recipe: Recipe, k: int) -> np.ndarray:
    """Lists int32 [N,k] of one baseline fitted on the train part."""
    scorer = fit_floor(name, train_log(dataset), recipe.evaluate)
    lists = []
    for first in range(0, len(requests), _CHUNK):
        context = slice_ragged(requests.context, slice(first, min(first + _CHUNK, len(requests))))
        assert context is not None
        lists.append(rank(scorer(context), context if recipe.evaluate.exclude_seen else None, k))
    return np.concatenate(lists)


def watch_time(dataset: Dataset) -> Callable[[Requests, np.ndarray], Interval] | None:
    """For simulated logs: mean true expected seconds of watching an item of these lists; None for real ones.

    With a 95 % interval over users, whose requests go together.
    """
    source = TypeAdapter(Source).validate_python(dataset.card["source"])
    if not isinstance(source, SimulatorSource):
        return None
    from onerec_jax.data.sources.simulator import expected_watch_time, make_platform

    platform = make_platform(source, int(dataset.card["seed"]))

    def measure(requests: Requests, lists_NxK: np.ndarray) -> Interval:
        users = np.repeat(dataset.user_ids[requests.user], lists_NxK.shape[1])
        times = np.repeat(requests.time_ms, lists_NxK.shape[1])
        items = lists_NxK.reshape(-1)
        filled = items >= 0
        seconds = expected_watch_time(platform, users[filled], dataset.item_ids[items[filled]], times[filled])
        return interval(lambda mean: mean, mean_over_users(seconds, users[filled]))

    return measure


def _metrics(lists: np.ndarray, requests: Requests, dataset: Dataset, recipe: Recipe) -> dict[str, float]:
    """Recall and NDCG at each cut-off, and coverage at the largest."""
    settings = recipe.evaluate
    found = {name: value(metric) for name, metric in ranking_metrics(lists, requests.relevant, settings.ks).items()}
    kind = "pair_recall" if settings.recall == "pair" else "recall"
    chosen = {f"R@{k}": found[f"{kind}@{k}"] for k in settings.ks} | {f"N@{k}": found[f"ndcg@{k}"] for k in settings.ks}
    k = max(settings.ks)
    return chosen | {f"coverage@{k}": value(coverage(lists, k, dataset.num_items))}


def _protocol(requests: Requests, dataset: Dataset, recipe: Recipe) -> str:
    settings = recipe.evaluate
    return (
        f"{settings.split}: {len(requests)} requests, {len(requests.relevant[0])} relevant pairs "
        f"({'positive events' if settings.targets == 'positive' else 'all events'}), full catalogue of "
        f"{dataset.num_items} items, seen items {'excluded' if settings.exclude_seen else 'kept'}, "
        f"{'pair' if settings.recall == 'pair' else 'request'}-level recall, beam {settings.beam_width}"
    )


def _measure(requests: Requests, dataset: Dataset, recipe: Recipe) -> Callable[[np.ndarray], dict[str, float]]:
    """Lists -> their metrics; of simulated logs the true watch time too."""
    watched = watch_time(dataset)

    def measure(lists: np.ndarray) -> dict[str, float]:
        found = _metrics(lists, requests, dataset, recipe)
        if watched is None:
            return found
        seconds = watched(requests, lists)
        return found | {"watch s": seconds.value, "watch ±": seconds.high - seconds.value}

    return measure


def _rewards(recommender: Recommender, requests: Requests, lists: np.ndarray) -> dict[str, float]:
    """The mean P-Score, and every learnt reward that `rl.rewards` weighs, of the shortest lists' items."""
    recipe, run = recommender.recipe, recommender.recipe.evaluate.reward_run
    if run is None:
        return {}
    reward, k = load_reward(run, recipe), min(recipe.evaluate.ks)
    scorer = ListScorer(recipe, recommender.dataset, recommender.ids, *reward, make_mesh(recipe.mesh))
    return {f"{name}@{k}": mean for name, mean in scorer.means(requests.examples, lists[:, :k]).items()}


def _floors(requests: Requests, dataset: Dataset, recipe: Recipe) -> dict[str, dict[str, float]]:
    k, measure = max(recipe.evaluate.ks), _measure(requests, dataset, recipe)
    names = track(recipe.evaluate.floors, "floors", transient=True)
    return {name: measure(floor_lists(name, dataset, requests, recipe, k)) for name in names}


def evaluate_floors(dataset: Dataset, recipe: Recipe) -> Evaluation:
    """The floors of `evaluate.floors` alone, under the recipe's protocol."""
    requests = collect_requests(dataset, recipe)
    return Evaluation(_protocol(requests, dataset, recipe), _floors(requests, dataset, recipe))


def evaluate(recommender: Recommender, report: Callable[[str], None] = print) -> Evaluation:
    """Model and floors on the recipe's split; writes `evaluation.json` into the run."""
    recipe, dataset = recommender.recipe, recommender.dataset
    settings = recipe.evaluate
    requests = collect_requests(dataset, recipe)
    seen = requests.context if settings.exclude_seen else None
    started = time.perf_counter()
    lists = ranked(recommender).recommend(requests.examples, seen, max(settings.ks), progress=True)[0]
    model = _measure(requests, dataset, recipe)(lists)
    report(f"lists for {len(requests)} requests: {time.perf_counter() - started:.1f} s")
    if settings.free_examples and recipe.model.head != "items" and recipe.model.softmax == "all":
        model["legal"] = recommender.legality(requests.examples[: settings.free_examples])
    rows = {"model": model | _rewards(recommender, requests, lists)} | _floors(requests, dataset, recipe)
    evaluation = Evaluation(_protocol(requests, dataset, recipe), rows)
    evaluation.save(recommender.run / "evaluation.json")
    return evaluation
