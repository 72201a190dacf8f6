"""From examples to a `Batch`: slices of histories, packed left-aligned into arrays of static shape.

Nothing of an event at or after the request time of a target enters what that target can see: contexts end at the
example's cut, lifelong clusters come from snapshots of earlier events, and under a causal encoder `visible` ends each
target's view.

Axis letters: B examples, L events of one pathway, T targets, C code levels, Y labels; N events of a group of examples.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from onerec_jax.config import ModelConfig
from onerec_jax.data.records import EVENT, History, unpack_feedback
from onerec_jax.data.schema import DAY_MS, Batch, ItemFeatures
from onerec_jax.data.store import Dataset

# Examples read and packed together: few enough that their histories (60 kB each at 2,500 events) stay in cache.
_GROUP = 16


class TargetWeights(NamedTuple):
    """How much each target counts in the loss; a positive one at the end of train counts 1."""

    negative: float = 1.0  # a target without a positive label
    half_life_days: float = 0.0  # halved for every so many days before the end of train, 0 = never


ALIKE = TargetWeights()


class _Span(NamedTuple):
    """Positions in one history: the cut, the chosen targets, and the window of the short pathway."""

    cut: int
    start: int
    stop: int
    window_start: int
    window_stop: int


def make_batch(
    dataset: Dataset,
    codes: np.ndarray,
    model: ModelConfig,
    examples: np.ndarray,
    targets: int,
    weights: TargetWeights = ALIKE,
    *,
    frozen: bool = False,
) -> Batch:
    """The batch of some examples.

    The request time of an example is that of the event at its target start (of the history's last one where it ends before); ages
    count from there, or under a causal encoder from the event before. A causal encoder's window reaches up to the last
    target but one, and `visible` tells how much of it each target may see; any other encoder's window ends at the cut.
    Of a longer target range the first `targets` are taken; `visible` of a missing target is the whole window.

    Args:
        dataset: where the histories are.
        codes: semantic ID of each item, int32 [I,C].
        model: lengths of the pathways, and whether the encoder is causal.
        examples: (user row, cut, start, stop), int64 [B,4].
        targets: T.
        weights: what makes `target_weight`; targets after the end of train are not older than it.
        frozen: end every context at the cut, under a causal encoder too.

    Returns:
        NumPy arrays with leading axis B; padding is item -1 and 0 elsewhere.
    """
    examples = np.asarray(examples, np.int64)
    user = examples[:, 0]
    batch = _unfilled_batch(dataset, codes.shape[1], model, len(examples), targets)
    batch.user[:, 0], batch.user[:, 1:] = user, dataset.user_features[user]
    for first in range(0, len(examples), _GROUP):
        group = slice(first, first + _GROUP)
        histories = dataset.histories(user[group])
        spans = [
            _span(model, cut, start, min(stop, start + targets), frozen)
            for _, cut, start, stop in examples[group].tolist()
        ]
        rolling = model.causal and not frozen
        _fill_contexts(batch, group, dataset, codes, model, histories, spans)
        targets_of = [history.rows[span.start : span.stop] for history, span in zip(histories, spans, strict=True)]
        _fill_targets(batch, group, dataset, codes, targets_of, weights)
        batch.visible[group] = [
            _visible(history, span, targets, rolling) for history, span in zip(histories, spans, strict=True)
        ]
    return batch


def make_masked_batch(
    dataset: Dataset,
    codes: np.ndarray,
    model: ModelConfig,
    users: np.ndarray,
    targets: int,
    share: float,
    random: np.ndarray,
    weights: TargetWeights = ALIKE,
    least_playtime_s: np.ndarray | None = None,
) -> Batch:
    """Requests whose targets are events taken out of the context at random, wherever in it they were.

    Of a user's train part a random window is read, `share` of its events is taken out, and `targets` of those at most, in
    random order, are to be predicted from what is left. The request is made when the window ends. For an encoder that is not
    causal: a set is predicted from a set.

    Args:
        dataset: where the histories are; `users` int64 [B] have two events of train or more each.
        codes: semantic ID of each item, int32 [I,C].
        model: lengths of the pathways; none of it is lifelong.
        targets: T.
        share: how much of a window is taken out, above 0 and below 1; one event at least is, and one stays.
        random: uniform numbers in [0, 1), float64 [B, 1 + events of a window].
        weights: what makes `target_weight`.
        least_playtime_s: float [B], targets that were played for less, where that is known, count nothing.
    """
    batch = _unfilled_batch(dataset, codes.shape[1], model, len(users), targets)
    batch.user[:, 0], batch.user[:, 1:] = users, dataset.user_features[users]
    for first in range(0, len(users), _GROUP):
        group = slice(first, first + _GROUP)
        kept, taken, request_ms = [], [], []
        for user, history, draw in zip(
            users[group].tolist(), dataset.histories(users[group]), random[group], strict=True
        ):
            size = dataset.train_stop(user)
            window = min(size, len(draw) - 1)
            begin = int(draw[0] * (size - window + 1))
            out = np.argsort(draw[1 : 1 + window], kind="stable")[: min(window - 1, max(1, round(share * window)))]
            stays = np.delete(np.arange(window), out)
            rows = history.rows[begin : begin + window]
            kept.append(rows[stays][-model.short_length :])
            taken.append(rows[out[:targets]])
            request_ms.append(int(history.timestamp_ms[begin + window - 1]))
        requests = np.array(request_ms)
        _fill_pathway(batch.short, group, dataset, codes, kept, requests)
        if model.positive_length:
            positive = [rows[rows.view(EVENT)["positive"]][-model.positive_length :] for rows in kept]
            _fill_pathway(batch.positive, group, dataset, codes, positive, requests)
        _fill_targets(batch, group, dataset, codes, taken, weights)
        batch.visible[group] = np.array([len(rows) for rows in kept])[:, None]
    if least_playtime_s is not None:
        rejected = (batch.playtime_s >= 0) & (batch.playtime_s < least_playtime_s[:, None])
        batch.target_weight[rejected] = 0.0
    return batch


def _unfilled_batch(dataset: Dataset, levels: int, model: ModelConfig, size: int, targets: int) -> Batch:
    labels = len(dataset.labels)

    def features(length: int) -> ItemFeatures:
        return ItemFeatures(
            item=np.empty((size, length), np.int32),
            codes=np.empty((size, length, levels), np.int32),
            author=np.empty((size, length), np.int32),
            tag=np.empty((size, length), np.int32),
            age_s=np.empty((size, length), np.float32),
            playtime_s=np.empty((size, length), np.float32),
            duration_s=np.empty((size, length), np.float32),
            feedback=np.empty((size, length, labels), np.uint8),
        )

    return Batch(
        user=np.empty((size, 1 + dataset.user_features.shape[1]), np.int32),
        short=features(model.short_length),
        positive=features(model.positive_length),
        lifelong=features(model.lifelong_length),
        targets=np.empty((size, targets, levels), np.int32),
        target_item=np.empty((size, targets), np.int32),
        target_weight=np.empty((size, targets), np.float32),
        visible=np.empty((size, targets), np.int32),
        feedback=np.empty((size, targets, labels), np.uint8),
        playtime_s=np.empty((size, targets), np.float32),
    )


def _span(model: ModelConfig, cut: int, start: int, stop: int, frozen: bool) -> _Span:
    window_stop = max(cut, stop - 1) if model.causal and not frozen else cut
    return _Span(cut, start, stop, max(0, window_stop - model.short_length), window_stop)


def window_lengths(model: ModelConfig, examples: np.ndarray, targets: int, *, frozen: bool = False) -> np.ndarray:
    """Events that the short pathway of each example will hold, int64 [B]."""
    _, cut, start, stop = examples.T
    last = cut if frozen or not model.causal else np.maximum(cut, np.minimum(stop, start + targets) - 1)
    return np.minimum(last, model.short_length)


def _visible(history: History, span: _Span, targets: int, rolling: bool) -> np.ndarray:
    """How many events of the window each target may see, int32 [T]."""
    visible = np.full(targets, span.window_stop - span.window_start, np.int32)
    if rolling:
        times = history.timestamp_ms
        request_ms = times[span.start : span.stop]
        visible[: len(request_ms)] = np.searchsorted(times[span.window_start : span.window_stop], request_ms)
    return visible


def _fill_contexts(
    batch: Batch,
    group: slice,
    dataset: Dataset,
    codes: np.ndarray,
    model: ModelConfig,
    histories: list[History],
    spans: list[_Span],
) -> None:
    """Fills the rows `group` of the three pathways."""
    pairs = list(zip(histories, spans, strict=True))
    request_ms = np.array([_request_ms(history, span.start) for history, span in pairs])
    short = [history.rows[span.window_start : span.window_stop] for history, span in pairs]
    before_ms = [_time_before(history, span.window_start) for history, span in pairs] if model.causal else None
    _fill_pathway(batch.short, group, dataset, codes, short, request_ms, before_ms)
    if model.positive_length:
        positive = [positive_run(history, span.cut, model.positive_length) for history, span in pairs]
        _fill_pathway(batch.positive, group, dataset, codes, positive, request_ms)
    if model.lifelong_length:
        refresh = dataset.lifelong_refresh
        lifelong = [lifelong_run(history, span.cut, model.lifelong_length, refresh) for history, span in pairs]
        _fill_pathway(batch.lifelong, group, dataset, codes, lifelong, request_ms)


def _request_ms(history: History, start: int) -> int:
    size = len(history.rows)
    return int(history.timestamp_ms[min(start, size - 1)]) if size else 0


def _time_before(history: History, position: int) -> int:
    """The time of the event before a position, of the first event itself where there is none before."""
    return int(history.timestamp_ms[max(0, position - 1)]) if len(history.rows) else 0


def positive_run(history: History, cut: int, length: int) -> np.ndarray:
    """The last `length` positive events of a context, ROW [n]."""
    return history.rows[history.positive[:cut].nonzero()[0][-length:]]


def lifelong_run(history: History, cut: int, length: int, refresh: int) -> np.ndarray:
    """The clusters of the latest snapshot within a context, then the events after it; the last `length` of them, ROW [n]."""
    snapshot = cut // refresh
    recent = history.rows[max(snapshot * refresh, cut - length) : cut]
    room = length - len(recent)
    if not snapshot or not room:
        return recent
    return np.concatenate((history.snapshot(snapshot)[-room:], recent))


def _fill_pathway(
    features: ItemFeatures,
    group: slice,
    dataset: Dataset,
    codes: np.ndarray,
    runs: list[np.ndarray],
    request_ms: np.ndarray,
    before_ms: list[int] | None = None,
) -> None:
    """Fills rows of a pathway with runs of events `ROW` [n], one per example, looking up what belongs to their items.

    Ages count up to `request_ms` [b]; or, where it is given, from the event before, the first's from `before_ms` [b].
    """
    counts = np.array([len(run) for run in runs])
    filled = np.arange(features.item.shape[1]) < counts[:, None]
    events = np.concatenate(runs).view(EVENT)
    item, time_ms = events["item"], events["timestamp_ms"]
    if before_ms is None:
        age_ms = np.repeat(request_ms, counts) - time_ms
    else:
        begins = np.cumsum(counts) - counts
        previous_ms = np.concatenate((time_ms[:1], time_ms[:-1]))
        previous_ms[begins[counts > 0]] = np.array(before_ms)[counts > 0]
        age_ms = time_ms - previous_ms
    row = item.astype(np.intp)
    columns = {
        "item": item,
        "codes": codes.take(row, axis=0, mode="clip"),
        "author": dataset.items.author.take(row, mode="clip"),
        "tag": dataset.items.tag.take(row, mode="clip"),
        "age_s": age_ms / 1000,
        "playtime_s": events["playtime_s"],
        "duration_s": events["duration_s"],
        "feedback": unpack_feedback(events, len(dataset.labels)),
    }
    for name, column in columns.items():
        _put(getattr(features, name)[group], column, filled, -1 if name == "item" else 0)


def _fill_targets(
    batch: Batch,
    group: slice,
    dataset: Dataset,
    codes: np.ndarray,
    runs: list[np.ndarray],
    weights: TargetWeights,
) -> None:
    """Fills the rows `group` of all that is told of targets from their events `ROW` [n], one run per example."""
    filled = np.arange(batch.targets.shape[1]) < np.array([len(run) for run in runs])[:, None]
    events = np.concatenate(runs).view(EVENT)
    _put(batch.targets[group], codes.take(events["item"], axis=0, mode="clip"), filled)
    _put(batch.target_item[group], events["item"], filled, padding=-1)
    weight = np.where(events["positive"], 1.0, weights.negative)
    if weights.half_life_days:
        age_ms = np.maximum(dataset.train_end_ms - events["timestamp_ms"], 0)
        weight *= np.exp2(-age_ms / (weights.half_life_days * DAY_MS))
    _put(batch.target_weight[group], weight, filled)
    _put(batch.feedback[group], unpack_feedback(events, len(dataset.labels)), filled)
    _put(batch.playtime_s[group], events["playtime_s"], filled)


def _put(column: np.ndarray, flat: np.ndarray, filled: np.ndarray, padding: int = 0) -> None:
    """Puts flat values [N,...] row by row where `filled` [b,L] says into `column` [b,L,...], and padding elsewhere.

    Trailing axes move as one opaque value: NumPy's assignment through a mask takes twenty times as long with them.
    """
    if not column.size:
        return
    column[...] = padding
    if column.ndim > 2:
        value = np.dtype(f"V{column.itemsize * column.shape[2]}")
        flat = np.ascontiguousarray(flat, column.dtype).view(value)[:, 0]
        column = column.view(value)[..., 0]
    column[filled] = flat
