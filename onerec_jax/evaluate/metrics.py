"""Item-level ranking metrics over the full catalogue, as (sum, weight) pairs until they are printed.

Lists are `ranked` int32 [N,K] item rows, best first, -1 = nothing; what was relevant is `Ragged`, a set per example.

Axis letters: N examples, K places of a list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

Ragged = tuple[
    np.ndarray, np.ndarray
]  # item rows int32 flat, offsets int64 [N+1]; example n owns flat[offsets[n]:offsets[n+1]]
Metric = tuple[float, float]  # (sum, weight)


def value(metric: Metric) -> float:
    """The number to print: sum / weight, NaN when nothing was measured."""
    total, weight = metric
    return total / weight if weight else float("nan")


def add(left: Mapping[str, Metric], right: Mapping[str, Metric]) -> dict[str, Metric]:
    """Metrics of two disjoint sets of examples taken together; exact however unevenly they were cut."""
    return {
        name: (
            left.get(name, (0.0, 0.0))[0] + right.get(name, (0.0, 0.0))[0],
            left.get(name, (0.0, 0.0))[1] + right.get(name, (0.0, 0.0))[1],
        )
        for name in {**left, **right}
    }


def _relevant_keys(relevant: Ragged, stride: int) -> np.ndarray:
    """Distinct (example, item) pairs as sorted integers, example * stride + item."""
    items, offsets = relevant
    example = np.repeat(np.arange(len(offsets) - 1, dtype=np.int64), np.diff(offsets))
    return np.unique(example * stride + items)


def hits(ranked: np.ndarray, relevant: Ragged) -> tuple[np.ndarray, np.ndarray]:
    """Which places of each list hold a relevant item, and how many distinct items were relevant.

    A relevant item counts at its first place only, so that repeating it gains nothing.

    Returns:
        hit bool [N,K], relevant_count int64 [N].

    Raises:
        ValueError: `relevant` is not about the same N examples.
    """
    examples = len(ranked)
    if len(relevant[1]) != examples + 1:
        raise ValueError(
            f"{examples} ranked lists need {examples + 1} offsets of relevant items, not {len(relevant[1])}"
        )
    stride = 1 + max(int(ranked.max(initial=0)), int(relevant[0].max(initial=0)))
    relevant_keys = _relevant_keys(relevant, stride)
    place = np.flatnonzero(ranked >= 0)
    keys = np.repeat(np.arange(examples, dtype=np.int64) * stride, ranked.shape[1])[place] + ranked.ravel()[place]
    distinct, first = np.unique(keys, return_index=True)
    hit = np.zeros(ranked.shape, dtype=bool)
    hit.flat[place[first]] = np.isin(distinct, relevant_keys, assume_unique=True)
    return hit, np.bincount(relevant_keys // stride, minlength=examples)


def recall(hit: np.ndarray, relevant_count: np.ndarray, k: int) -> Metric:
    """Recall@k averaged over examples: hits in the first k places / number of relevant items."""
    has = relevant_count > 0
    return float((hit[has, :k].sum(axis=1) / relevant_count[has]).sum()), float(has.sum())


def pair_recall(hit: np.ndarray, relevant_count: np.ndarray, k: int) -> Metric:
    """Recall@k over pairs: hits of all examples / relevant (example, item) pairs of all examples."""
    return float(hit[:, :k].sum()), float(relevant_count.sum())


def hit_rate(hit: np.ndarray, relevant_count: np.ndarray, k: int) -> Metric:
    """Share of examples with at least one relevant item in the first k places."""
    return float(hit[:, :k].any(axis=1).sum()), float((relevant_count > 0).sum())


def ndcg(hit: np.ndarray, relevant_count: np.ndarray, k: int) -> Metric:
    """NDCG@k with binary relevance: sum of 1/log2(place + 1) over the best that min(k, relevant) items allow.

    Source: Järvelin and Kekäläinen, TOIS 2002; with one relevant item it is the NDCG of the leave-one-out papers.
    """
    has = relevant_count > 0
    discount = 1.0 / np.log2(np.arange(2, k + 2))
    gain = hit[has, :k] @ discount[: hit.shape[1]]
    ideal = np.cumsum(discount)[np.minimum(relevant_count[has], k) - 1]
    return float((gain / ideal).sum()), float(has.sum())


def coverage(ranked: np.ndarray, k: int, num_items: int) -> Metric:
    """Share of the catalogue that is in the first k places of any list.

    A union, not a sum: pass the lists of all examples at once, never `add` the coverages of parts.
    """
    top = ranked[:, :k]
    return float(len(np.unique(top[top >= 0]))), float(num_items)


def ranking_metrics(ranked: np.ndarray, relevant: Ragged, ks: Sequence[int]) -> dict[str, Metric]:
    """`recall@k`, `pair_recall@k`, `hit_rate@k` and `ndcg@k` for every k; parts over disjoint examples may be `add`ed.

    Examples without a relevant item have no weight. Places a list lacks hold nothing.
    """
    hit, relevant_count = hits(ranked, relevant)
    measures = {"recall": recall, "pair_recall": pair_recall, "hit_rate": hit_rate, "ndcg": ndcg}
    return {f"{name}@{k}": measure(hit, relevant_count, k) for k in ks for name, measure in measures.items()}
