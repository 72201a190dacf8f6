"""Baselines that need no training: popularity, a Markov chain, item-kNN and EASE.

Each is fitted on the train part of a log and scores the whole catalogue for any context. They are printed beside every
number of a model, under the model's own protocol.

Axis letters: N examples, I items, U users, E train events, k places of a list.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse
from scipy.linalg import get_lapack_funcs

from onerec_jax.config import EvaluateConfig
from onerec_jax.data.train_log import TrainLog
from onerec_jax.evaluate.metrics import Ragged

Scorer = Callable[[Ragged], np.ndarray]  # contexts, oldest event first -> scores float32 [N,I]

MARKOV_GAPS = 5  # DESIGN 7: gaps 1-5, weight 1/gap
MARKOV_CONTEXT = 10  # most recent events of a context the chain looks at


def fit_floor(name: str, log: TrainLog, config: EvaluateConfig) -> Scorer:
    """The scorer of a floor by its name in `evaluate.floors`.

    A scorer takes contexts (item rows, oldest first) and returns scores float32 [N,I]; call it on chunks of examples.
    Items it knows nothing about score 0.
    """
    return FLOORS[name](log, config)


def popularity(log: TrainLog, config: EvaluateConfig) -> Scorer:
    """Positive events per item over the whole of train."""
    del config
    return _constant(np.bincount(log.item[log.positive], minlength=log.num_items))


def recent_popularity(log: TrainLog, config: EvaluateConfig) -> Scorer:
    """Positive events per item over the last `recent_days` before the latest event of train."""
    return _constant(log.recent_positives(config.recent_days))


def markov(log: TrainLog, config: EvaluateConfig) -> Scorer:
    """Markov chain with gaps: P(b|a) is proportional to 1/gap summed over every b up to `MARKOV_GAPS` after a.

    The last `MARKOV_CONTEXT` events of a context vote with weight `history_decay` per step back.
    """
    source, follower, weight = [], [], []
    for gap in range(1, MARKOV_GAPS + 1):
        same_user = log.user[gap:] == log.user[:-gap]
        source.append(log.item[:-gap][same_user])
        follower.append(log.item[gap:][same_user])
        weight.append(np.full(len(source[-1]), 1.0 / gap))
    counts = scipy.sparse.coo_array(
        (np.concatenate(weight), (np.concatenate(source), np.concatenate(follower))), shape=(log.num_items,) * 2
    ).tocsr()
    chain = _product(_inverse_or_zero(counts.sum(axis=1)), counts).astype(np.float32)

    def score(contexts: Ragged) -> np.ndarray:
        recent = _recent_events(contexts, log.num_items, config.history_decay)
        return _product(recent, chain).toarray()

    return score


def item_knn(log: TrainLog, config: EvaluateConfig) -> Scorer:
    """Item-kNN: cosine between the sets of users two items were shown to, all neighbours, summed over the context.

    The context's items weigh `history_decay` per step back; an item is no neighbour of itself.
    Source: Sarwar et al., WWW 2001.
    """
    seen = _interactions(log)
    unit = _product(seen, _inverse_or_zero(np.sqrt(seen.sum(axis=0))))
    cosine = _product(unit.T, unit).tocsr()
    cosine.setdiag(0.0)
    cosine.eliminate_zeros()
    cosine = cosine.astype(np.float32)

    def score(contexts: Ragged) -> np.ndarray:
        return _product(_profile(contexts, log.num_items, config.history_decay), cosine).toarray()

    return score


def ease(log: TrainLog, config: EvaluateConfig) -> Scorer:
    """EASE: the item-item matrix B of least |X - XB|^2 + ease_lambda |B|^2 with zero diagonal.

    X [U,I] is binary and holds every event of train, positive or not. The context's items weigh `history_decay` per
    step back; with 1 the context is binary, as in the paper.

    Memory: 20 bytes per pair of items while fitting, 4 after.
    Source: Steck, WWW 2019, equation 8.
    """
    weights = ease_weights(_interactions(log), config.ease_lambda)

    def score(contexts: Ragged) -> np.ndarray:
        return _profile(contexts, log.num_items, config.history_decay) @ weights

    return score


FLOORS: dict[str, Callable[[TrainLog, EvaluateConfig], Scorer]] = {
    "popularity": popularity,
    "recent_popularity": recent_popularity,
    "markov": markov,
    "item_knn": item_knn,
    "ease": ease,
}


def ease_weights(interactions: scipy.sparse.csr_array, ridge: float) -> np.ndarray:
    """B float32 [I,I] of EASE from interactions [U,I]: B = I - P / diag(P) by columns, P = (X'X + ridge I)^-1."""
    gram = _product(interactions.T, interactions).toarray(order="F")
    diagonal = np.diag_indices(len(gram))
    gram[diagonal] += ridge
    potrf, potri = get_lapack_funcs(("potrf", "potri"), (gram,))
    inverse, failed = potrf(gram, lower=1, overwrite_a=1)
    if not failed:
        inverse, failed = potri(inverse, lower=1, overwrite_c=1)
    if failed:
        raise np.linalg.LinAlgError(f"X'X + {ridge} I of EASE has no Cholesky factor (LAPACK info {failed})")
    for row in range(len(inverse)):  # potri fills the lower triangle only; row by row needs no third matrix
        inverse[row, row + 1 :] = inverse[row + 1 :, row]
    inverse /= -np.diag(inverse)
    inverse[diagonal] = 0.0
    return inverse.astype(np.float32, order="C")


def _constant(counts: np.ndarray) -> Scorer:
    scores = counts.astype(np.float32)
    return lambda contexts: np.broadcast_to(scores, (len(contexts[1]) - 1, len(scores)))


def _interactions(log: TrainLog) -> scipy.sparse.csr_array:
    """Binary float64 [U,I]: 1 where any event of train joins user and item, positive or not."""
    matrix = scipy.sparse.coo_array(
        (np.ones(len(log.item)), (log.user, log.item)), shape=(log.num_users, log.num_items)
    ).tocsr()
    matrix.data[:] = 1.0
    return matrix


def _product(left: Any, right: Any) -> scipy.sparse.csr_array:
    """left @ right of two sparse arrays; type checkers cannot read from scipy's code that it is one too."""
    return left @ right


def _inverse_or_zero(values: np.ndarray) -> scipy.sparse.dia_array:
    """Diagonal matrix of 1 / values, 0 where a value is 0."""
    inverse = np.divide(1.0, values, out=np.zeros(len(values)), where=values > 0)
    return scipy.sparse.diags_array(inverse)


def _recent_events(contexts: Ragged, num_items: int, decay: float) -> scipy.sparse.csr_array:
    """Float32 [N,I]: decay ** steps back, summed over the last `MARKOV_CONTEXT` events of each context."""
    flat, offsets = contexts
    example, steps_back = _steps_back(offsets)
    near = steps_back < MARKOV_CONTEXT
    weight = (decay ** steps_back[near]).astype(np.float32)
    return scipy.sparse.coo_array((weight, (example[near], flat[near])), shape=(len(offsets) - 1, num_items)).tocsr()


def _profile(contexts: Ragged, num_items: int, decay: float) -> scipy.sparse.csr_array:
    """Float32 [N,I]: decay ** steps back of each item's most recent event, so that repeats do not count twice."""
    flat, offsets = contexts
    example, steps_back = _steps_back(offsets)
    # Read backwards, the first event of each (example, item) is the most recent one.
    keys = example[::-1] * num_items + flat[::-1]
    _, recent = np.unique(keys, return_index=True)
    recent = len(flat) - 1 - recent
    weight = (decay ** steps_back[recent]).astype(np.float32)
    return scipy.sparse.coo_array(
        (weight, (example[recent], flat[recent])), shape=(len(offsets) - 1, num_items)
    ).tocsr()


def _steps_back(offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every event of ragged contexts: its example, and how many events of that context follow it."""
    example = np.repeat(np.arange(len(offsets) - 1, dtype=np.int64), np.diff(offsets))
    steps_back = offsets[1:][example] - 1 - np.arange(len(example))
    return example, steps_back
