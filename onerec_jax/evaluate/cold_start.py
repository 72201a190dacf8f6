"""How well a run does on items that nobody had met where train ends, apart from those that it was trained on.

Rows are the plain model, drafts that it verified (`generate/cold.py`), the drafter alone, its new items alone, the model with
every third place theirs, which says what is gained by listing new items at all, and popularity, which knows none. Recall of
warm or of new items is that of requests with a relevant item of the kind, over these items only.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from onerec_jax.config import Recipe
from onerec_jax.errors import InputError
from onerec_jax.evaluate.evaluation import floor_lists
from onerec_jax.evaluate.metrics import Ragged, ranking_metrics, value
from onerec_jax.evaluate.requests import Requests, collect_requests
from onerec_jax.generate.cold import ColdOptions, Verifier, draft_and_verify
from onerec_jax.generate.drafter import Drafter, fit_drafter, item_content, profiles
from onerec_jax.generate.ranking import rank
from onerec_jax.generate.recommender import Recommender, slice_ragged

QUANTILES = (0.5, 0.75, 0.9)  # of the scores of first drafts: thresholds that are tried
VALID_REQUESTS = 1000  # examples that options are chosen by
_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class ColdStart:
    """Metrics by row, what they were measured on, and the threshold of the drafts."""

    protocol: str
    threshold: float
    rows: dict[str, dict[str, float]]

    def table(self) -> Table:
        columns = list(next(iter(self.rows.values())))
        table = Table(title=self.protocol, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True)
        table.add_column("", no_wrap=True)
        for name in columns:
            table.add_column(name, justify="right")
        for name, metrics in self.rows.items():
            table.add_row(name, *(f"{metrics[column]:.4f}" for column in columns))
        return table


def only(relevant: Ragged, keep_I: np.ndarray) -> Ragged:
    """The relevant items that `keep` bool [I] names, per request; some may have none."""
    flat, offsets = relevant
    kept = keep_I[flat]
    return flat[kept], np.concatenate([[0], np.cumsum(kept)])[offsets]


def drafter_lists(
    drafter: Drafter, recommender: Recommender, requests: Requests, k: int, keep_I: np.ndarray | None = None
) -> np.ndarray:
    """Lists int32 [N,k] of the drafter alone, of the items that `keep` bool [I] names, or of all."""
    lists = [np.zeros((0, k), np.int32)]
    for first in range(0, len(requests), _CHUNK):
        part = slice(first, first + _CHUNK)
        scores = drafter.scores(profiles(recommender.dataset, drafter.content, requests.examples[part]))
        scores = scores if keep_I is None else np.where(keep_I, scores, -np.inf)
        lists.append(rank(scores, _seen(recommender.recipe, requests, part), k))
    return np.concatenate(lists)


def every_third(lists_NxK: np.ndarray, other_NxK: np.ndarray) -> np.ndarray:
    """Lists whose third, sixth, .. places are the first of the other lists, and no item comes twice."""
    k = lists_NxK.shape[1]
    other = np.arange(k) % 3 == 2
    taken = other_NxK[:, : other.sum()]
    again = (lists_NxK[:, :, None] == taken[:, None, :]).any(axis=2)
    mixed = np.full_like(lists_NxK, -1)
    mixed[:, other] = taken
    kept = np.take_along_axis(lists_NxK, np.argsort(again, axis=1, kind="stable"), axis=1)
    mixed[:, ~other] = kept[:, : k - other.sum()]
    return mixed


def _seen(recipe: Recipe, requests: Requests, part: slice = slice(0, None)) -> Ragged | None:
    stop = len(requests) if part.stop is None else min(part.stop, len(requests))
    return slice_ragged(requests.context, slice(part.start, stop)) if recipe.evaluate.exclude_seen else None


def metrics_apart(lists_NxK: np.ndarray, relevant: Ragged, new_I: np.ndarray, recipe: Recipe) -> dict[str, float]:
    """Recall at each cut-off over all, warm and new items, and the share of new items in the lists."""
    kind = "pair_recall" if recipe.evaluate.recall == "pair" else "recall"
    found = {}
    for name, keep in (("all", np.ones(len(new_I), bool)), ("warm", ~new_I), ("new", new_I)):
        measured = ranking_metrics(lists_NxK, only(relevant, keep), recipe.evaluate.ks)
        found |= {f"R@{k} {name}": value(measured[f"{kind}@{k}"]) for k in recipe.evaluate.ks}
    listed = lists_NxK[lists_NxK >= 0]
    return found | {"new in lists": float(new_I[listed].mean()) if len(listed) else float("nan")}


def choose_options(verifier: Verifier, drafter: Drafter, options: ColdOptions) -> ColdOptions:
    """The options of the highest recall over all items on the validation split, at the largest cut-off.

    Tried are thresholds at the `QUANTILES` of what the model scores first drafts, the lowest of which accepts half of them, and
    with each as many codes of new items as there may be short of all, unless the options say how many.
    """
    recommender = verifier.recommender
    settings = recommender.recipe.evaluate
    most = min(VALID_REQUESTS, settings.max_examples or VALID_REQUESTS)
    settings = settings.model_copy(update={"split": "valid", "max_examples": most})
    recipe = recommender.recipe.model_copy(update={"evaluate": settings})
    requests, k = collect_requests(recommender.dataset, recipe), max(settings.ks)
    seen, levels = _seen(recipe, requests), verifier.codes.shape[1]
    best = -np.inf, options
    for counted in (options.cold_levels,) if options.cold_levels else range(1, max(2, levels)):
        trial = dataclasses.replace(options, cold_levels=counted, threshold=-np.inf)
        scores = draft_and_verify(verifier, drafter, requests.examples, seen, options.draft, trial).scores
        for threshold in np.quantile(scores[np.isfinite(scores)], QUANTILES).tolist():
            trial = dataclasses.replace(trial, threshold=threshold)
            lists = draft_and_verify(verifier, drafter, requests.examples, seen, k, trial).items
            recall = metrics_apart(lists, requests.relevant, verifier.new, recipe)[f"R@{k} all"]
            best = max(best, (recall, trial), key=lambda pair: pair[0])
    return best[1]


def evaluate_cold(
    recommender: Recommender,
    options: ColdOptions,
    *,
    choose: bool = False,
    report: Callable[[str], None] = print,
) -> ColdStart:
    """Fits the drafter, measures all rows on the recipe's split, and writes `cold_start.json` into the run.

    Args:
        recommender: a run whose model generates semantic IDs.
        options: of the drafts.
        choose: take `choose_options` instead of the options' threshold, and of their `cold_levels` where they have none.
        report: called with lines of progress.

    Raises:
        InputError: no item is without train events, or the model has an item head alone.
    """
    recipe, dataset = recommender.recipe, recommender.dataset
    new = dataset.items.train_count == 0
    if not new.any():
        raise InputError(f"every item of {dataset.directory} has a train event; move data.split.valid_from earlier")
    drafter = fit_drafter(dataset, item_content(dataset, recipe.tokenizer, recipe.seed), recipe.seed)
    verifier = Verifier(recommender)
    if choose:
        options = choose_options(verifier, drafter, options)
        report(
            f"best on the validation split: threshold {options.threshold:.3f}, {options.cold_levels} codes of new items"
        )
    requests, k = collect_requests(dataset, recipe), max(recipe.evaluate.ks)
    seen = _seen(recipe, requests)
    drafted = draft_and_verify(verifier, drafter, requests.examples, seen, k, options, progress=True)
    report(f"{drafted.accepted.mean():.1f} drafts accepted and {drafted.rounds.mean():.2f} rounds a request")
    model = recommender.recommend(requests.examples, seen, k, progress=True)[0]
    fresh = drafter_lists(drafter, recommender, requests, k, new)
    lists = {
        "model": model,
        "drafted, verified": drafted.items,
        "drafter alone": drafter_lists(drafter, recommender, requests, k),
        "drafter, new alone": fresh,
        "model, 1/3 of those": every_third(model, fresh),
        "popularity": floor_lists("popularity", dataset, requests, recipe, k),
    }
    protocol = (
        f"{recipe.evaluate.split}: {len(requests)} requests, {new[requests.relevant[0]].mean():.0%} of "
        f"{len(requests.relevant[0])} relevant pairs with one of {new.sum()} new items, full catalogue of "
        f"{dataset.num_items}, drafts of {options.draft}, threshold {options.threshold:.3f}, beam {verifier.width}"
    )
    rows = {name: metrics_apart(items, requests.relevant, new, recipe) for name, items in lists.items()}
    result = ColdStart(protocol, options.threshold, rows)
    path = recommender.run / "cold_start.json"
    path.write_text(json.dumps(dataclasses.asdict(result), indent=1) + "\n")
    return result
