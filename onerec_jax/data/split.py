"""Which events train, validate and test, and how they are grouped into requests: the example index.

An example is a row `(user, cut, start, stop)` of int64: events `[0, cut)` of the user are its context, events
`[start, stop)` its targets. The cut is the number of events strictly before the first target (rolling), so that an
event with the same timestamp as the request is never in its context, or before the moment of the split (frozen).
"""

from __future__ import annotations

import datetime
from typing import NamedTuple

import numpy as np

from onerec_jax.config import DataConfig, SplitConfig
from onerec_jax.data.histories import Histories
from onerec_jax.errors import InputError

SPLITS = ("train", "valid", "test")


class Moments(NamedTuple):
    """Where valid and test begin, in milliseconds since 1970, UTC."""

    valid_ms: int
    test_ms: int


def split_moments(split: SplitConfig, timestamp_ms: np.ndarray) -> Moments | None:
    """The two moments of a time split over events at `timestamp_ms` int64 [N]; None for leave_one_out.

    Raises:
        InputError: `valid_from` lies after `test_from`, or there are no events.
    """
    if not len(timestamp_ms):
        raise InputError("data.source: the log has no events, so the train split is empty")
    if split.kind == "leave_one_out":
        return None
    moments = Moments(_moment(split.valid_from, timestamp_ms), _moment(split.test_from, timestamp_ms))
    if moments.valid_ms > moments.test_ms:
        raise InputError(
            f"data.split.valid_from {split.valid_from} must not be later than data.split.test_from {split.test_from}"
        )
    return moments


def _moment(value: str | float, timestamp_ms: np.ndarray) -> int:
    if isinstance(value, str):
        moment = datetime.datetime.fromisoformat(value)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
        return round(moment.timestamp() * 1000)
    rank = min(int(value * len(timestamp_ms)), len(timestamp_ms) - 1)
    return int(np.partition(timestamp_ms, rank)[rank])


def split_stops(histories: Histories, moments: Moments | None) -> tuple[np.ndarray, np.ndarray]:
    """Per user, the number of events in train, and in train and valid together; int64 [U] each."""
    lengths = histories.lengths
    if moments is None:
        long_enough = lengths >= 3
        return np.where(long_enough, lengths - 2, lengths), np.where(long_enough, lengths - 1, lengths)
    train, valid = (
        np.bincount(histories.user[histories.timestamp_ms < moment], minlength=len(lengths)) for moment in moments
    )
    return train, valid


def events_before(histories: Histories) -> np.ndarray:
    """For each event, how many events of its user are strictly earlier; int64 [N]."""
    time, user = histories.timestamp_ms, histories.user
    index = np.arange(len(time))
    tied = np.zeros(len(time), bool)
    tied[1:] = (time[1:] == time[:-1]) & (user[1:] == user[:-1])
    return np.maximum.accumulate(np.where(tied, 0, index)) - histories.offsets[user]


def examples(histories: Histories, data: DataConfig, moments: Moments | None) -> dict[str, np.ndarray]:
    """The examples of a run of users by split, int64 [N,4] each, ordered by user and time.

    A train request of n events gives targets `[i, min(i + T, n))` at `i = 0, target_stride, 2 target_stride, ...`;
    those of rolling valid and test do not overlap. Train examples whose context has fewer than `min_history` events
    are left out.
    """
    stops = split_stops(histories, moments)
    before = events_before(histories)
    position = np.arange(len(before)) - histories.offsets[histories.user]
    part = (position >= stops[0][histories.user]).astype(np.int8) + (position >= stops[1][histories.user])
    begins = _request_begins(histories, part, data.request_gap_s)
    index = {}
    for code, name in enumerate(SPLITS):
        if moments is not None and code > 0 and data.split.context == "frozen":
            index[name] = _whole_split(histories, *((stops[0], stops[1]), (stops[1], histories.lengths))[code - 1])
            continue
        stride = data.target_stride if name == "train" else data.targets
        first, stop = _windows(begins, part == code, data.targets, stride)
        user = histories.user[first] + histories.first_user
        rows = np.stack([user, before[first], position[first], position[first] + (stop - first)], axis=1)
        index[name] = rows[rows[:, 1] >= data.min_history] if name == "train" else rows
    return index


def distinct_targets(examples: np.ndarray) -> int:
    """How many events are a target of one of these examples, which are ordered as `examples` orders them."""
    user, _, start, stop = examples.T
    covered = np.zeros(len(examples), np.int64)
    covered[1:] = np.where(user[1:] == user[:-1], stop[:-1], 0)
    return int(np.maximum(0, stop - np.maximum(start, covered)).sum())


def _request_begins(histories: Histories, part: np.ndarray, gap_s: float) -> np.ndarray:
    """True at the first event of each request; bool [N]."""
    begins = np.ones(len(part), bool)
    same_user = histories.user[1:] == histories.user[:-1]
    near = np.diff(histories.timestamp_ms) <= gap_s * 1000
    same_request = histories.request[1:] == histories.request[:-1]
    begins[1:] = ~(same_user & near & same_request & (part[1:] == part[:-1]))
    return begins


def _windows(begins: np.ndarray, chosen: np.ndarray, targets: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows over the requests whose events are `chosen`: flat index of the first event and one past the last."""
    request_start = np.flatnonzero(begins)
    request_stop = np.append(request_start[1:], len(begins))[chosen[request_start]]
    request_start = request_start[chosen[request_start]]
    count = -(-(request_stop - request_start) // stride)
    nth = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    first = np.repeat(request_start, count) + nth * stride
    return first, np.minimum(first + targets, np.repeat(request_stop, count))


def _whole_split(histories: Histories, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """One example for each user with events in `[start, stop)`, all of them targets; int64 [N,4]."""
    user = np.flatnonzero(stop > start)
    return np.stack([user + histories.first_user, start[user], start[user], stop[user]], axis=1)


def check_not_empty(counts: dict[str, int], data: DataConfig) -> None:
    """Checks the number of examples of each split.

    Raises:
        InputError: a split without examples, unless `valid_from == test_from` says that there is no validation.
    """
    split = data.split
    for name, count in counts.items():
        if count or (name == "valid" and split.kind == "time" and split.valid_from == split.test_from):
            continue
        if name == "train":
            moment = f", or move data.split.valid_from {split.valid_from} later" if split.kind == "time" else ""
            raise InputError(
                "empty train split: no train event has the history that "
                f"data.min_history {data.min_history} asks for; lower it{moment}"
            )
        if split.kind == "leave_one_out":
            raise InputError(f"data.split.kind leave_one_out: empty {name} split, no user has the 3 events it takes")
        advice = (
            "move it earlier, or set both moments alike for no validation" if name == "valid" else "move it earlier"
        )
        moment = getattr(split, f"{name}_from")
        raise InputError(f"data.split.{name}_from {moment}: empty {name} split, no event falls into it; {advice}")
