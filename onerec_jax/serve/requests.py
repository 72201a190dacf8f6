"""What may be asked of the server: JSON bodies, checked, and turned into item rows and events."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onerec_jax.data.records import event_rows
from onerec_jax.serve.released import Released, SampleUser

MAX_EVENTS = 5_000  # of a history
MAX_IDS = 1_024  # of `exclude`, and of `allow`
MAX_LEFT_OUT = 8_192  # items, those that were seen included
DIVERSITIES = (0.0, 0.25, 0.5, 1.0, 2.0)  # each is a program of its own
_LATEST_MS = 1 << 53  # the last millisecond that every reader of JSON can tell from the next

ItemId = int | str


class Refused(Exception):
    """A request that is not answered: an HTTP status below 500, and one sentence that names the field."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Event(_Body):
    """One event of a history."""

    item: ItemId
    timestamp_ms: int = Field(ge=0, le=_LATEST_MS)
    playtime_s: float | None = Field(None, ge=0, le=1e9)
    duration_s: float | None = Field(None, ge=0, le=1e9)
    feedback: list[str] = Field(default_factory=list, max_length=64)


class Recommend(_Body):
    """The body of POST /recommend: a sample user, or a history in any order."""

    user: ItemId | None = None
    history: list[Event] | None = Field(None, max_length=MAX_EVENTS)
    user_features: list[int] | None = Field(None, max_length=1_000)
    request_ms: int | None = Field(None, ge=0, le=_LATEST_MS)
    k: int | None = Field(None, ge=1)
    beams: int | None = Field(None, ge=1)
    exclude_seen: bool | None = None
    exclude: list[ItemId] = Field(default_factory=list, max_length=MAX_IDS)
    allow: list[ItemId] | None = Field(None, max_length=MAX_IDS)
    diversity: float = 0.0


@dataclasses.dataclass(frozen=True)
class Query:
    """A request in rows of the catalogue; n events, F user features."""

    user: int  # user row
    user_features: np.ndarray  # int32 [F]
    events: np.ndarray  # EVENT [n], oldest first
    lifelong: np.ndarray | None  # EVENT, what stands in the lifelong pathway; None = to be made of `events`
    request_ms: int | None  # None = the time of the last event
    exclude: np.ndarray  # int32, distinct item rows
    allow: np.ndarray | None  # int32, distinct item rows; None = all
    k: int
    beams: int
    diversity: float


@dataclasses.dataclass(frozen=True)
class Limits:
    """What this server makes lists with: numbers of beams, the first of which is the default, and items of a list."""

    beams: tuple[int, ...]
    k: int


def parse(body: bytes) -> Recommend:
    """A body as it was meant.

    Raises:
        Refused: 400 where it is not JSON, 422 where it is other JSON than is asked for.
    """
    try:
        values = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {_line(error)}") from None
    if not isinstance(values, dict):
        raise Refused(422, 'the body must be a JSON object such as {"user": 7}')
    try:
        return Recommend.model_validate(values)
    except ValidationError as error:
        raise Refused(422, _sentence(error)) from None


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _sentence(error: ValidationError) -> str:
    """The first problem, with the path of its field as one would write it."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    parts, kind = first["loc"], first["type"]
    if of_id := kind in ("int_type", "string_type") and parts[-1] in ("int", "str"):
        parts = parts[:-1]  # which of the types of an id was tried
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")[:200]
    if kind == "extra_forbidden":
        return f"{path}: there is no such field"
    return f"{path}: {'an id is an integer or a string' if of_id else _line_of_problem(first['msg'])}"


def _line_of_problem(message: str) -> str:
    return message[:1].lower() + message[1:].rstrip(".")


def resolve(body: Recommend, released: Released, limits: Limits) -> Query:
    """The rows that a body speaks of.

    Raises:
        Refused: 404 for an unknown user, 422 for an unknown item or label, or a setting that this server does not offer.
    """
    beams = body.beams or limits.beams[0]
    if beams not in limits.beams:
        raise Refused(422, f"beams: this server searches with {_alternatives(limits.beams)} beams, not {beams}")
    if body.diversity not in DIVERSITIES:
        raise Refused(422, f"diversity: choose one of {_alternatives(DIVERSITIES)}, not {body.diversity:g}")
    k = min(limits.k, beams) if body.k is None else body.k
    if k > beams:
        raise Refused(422, f"k: {beams} beams lead to lists of {beams} items at most, not {k}")
    sample = _asked_for(body, released)
    if body.request_ms is not None and len(sample.events) and body.request_ms < sample.events["timestamp_ms"][-1]:
        raise Refused(422, "request_ms: the history holds an event after it")
    exclude = _rows(body.exclude, "exclude", released)
    if released.exclude_seen if body.exclude_seen is None else body.exclude_seen:
        exclude = np.concatenate([exclude, sample.seen])
    exclude = np.unique(exclude)
    if len(exclude) > MAX_LEFT_OUT:
        raise Refused(
            422, f"exclude_seen: {len(exclude)} items were seen, and {MAX_LEFT_OUT} can be left out; send false"
        )
    return Query(
        user=sample.row,
        user_features=sample.features,
        events=np.concatenate([sample.older, sample.events]),
        lifelong=sample.lifelong,
        request_ms=body.request_ms,
        exclude=exclude,
        allow=None if body.allow is None else np.unique(_rows(body.allow, "allow", released)),
        k=k,
        beams=beams,
        diversity=body.diversity,
    )


def _alternatives(values: tuple[float, ...]) -> str:
    words = [f"{value:g}" for value in values]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _asked_for(body: Recommend, released: Released) -> SampleUser:
    """The sample user of a body, or the stranger that it tells of."""
    if (body.user is None) == (body.history is None):
        raise Refused(422, "user: give either the id of a sample user or a history")
    if body.history is None:
        assert body.user is not None
        if body.user_features is not None:
            raise Refused(422, "user_features: a sample user has features already; leave them out")
        return sample_user(body.user, released)
    features, events = _features(body.user_features, released), _events(body.history, released)
    return SampleUser("", released.stranger, features, events, events[:0], None, events["item"])


def sample_user(user: ItemId, released: Released) -> SampleUser:
    """A sample user by id, which may be written as a string.

    Raises:
        Refused: 404 where there is none of that id.
    """
    found = released.users.get(str(user))
    if found is None:
        raise Refused(404, f"user: no sample user '{str(user)[:100]}'; GET /users lists them")
    return found


def _features(given: list[int] | None, released: Released) -> np.ndarray:
    sizes = released.vocabulary.user_features
    if given is None:
        return np.zeros(len(sizes), np.int32)
    if len(given) != len(sizes):
        raise Refused(422, f"user_features: the model reads {len(sizes)} features, not {len(given)}")
    for place, (value, size) in enumerate(zip(given, sizes, strict=True)):
        if not 0 <= value < size:
            raise Refused(422, f"user_features[{place}]: must be from 0, which is unknown, to {size - 1}")
    return np.array(given, np.int32)


def _rows(ids: list[ItemId], field: str, released: Released) -> np.ndarray:
    """Item rows int32 of ids."""
    return np.array([_row(item, f"{field}[{place}]", released) for place, item in enumerate(ids)], np.int32)


def _row(item: ItemId, field: str, released: Released) -> int:
    row = released.item_row.get(str(item))
    if row is None:
        raise Refused(422, f"{field}: no item '{str(item)[:100]}' in the catalogue")
    return row


def _events(history: list[Event], released: Released) -> np.ndarray:
    """Rows EVENT [n], oldest first, events of one moment in the order given; as `data` makes them of a log."""
    labels = {label: y for y, label in enumerate(released.labels)}
    feedback = np.zeros((len(history), len(labels)), np.uint8)
    item = np.zeros(len(history), np.int32)
    for n, event in enumerate(history):
        item[n] = _row(event.item, f"history[{n}].item", released)
        for label in event.feedback:
            if label not in labels:
                known = ", ".join(labels) or "none"
                raise Refused(422, f"history[{n}].feedback: no label '{label[:100]}'; the model knows {known}")
            feedback[n, labels[label]] = 1
    duration_s = np.array([-1 if e.duration_s is None else e.duration_s for e in history], np.float32)
    events = event_rows(
        item,
        np.array([e.timestamp_ms for e in history], np.int64),
        np.array([-1 if e.playtime_s is None else e.playtime_s for e in history], np.float32),
        np.where(duration_s < 0, released.duration_s[item], duration_s),
        feedback,
        released.positive(feedback),
    )
    return events[np.argsort(events["timestamp_ms"], kind="stable")]


def describe(user: SampleUser, released: Released) -> dict[str, Any]:
    """A sample user as JSON, with a history that POST /recommend takes once its titles are left out."""
    events = user.events
    return {
        "id": user.id,
        "user_features": user.features.tolist(),
        "history": [
            {
                "item": released.item_ids[event["item"]],
                "title": released.titles[event["item"]],
                "timestamp_ms": int(event["timestamp_ms"]),
                "playtime_s": _known(event["playtime_s"]),
                "duration_s": _known(event["duration_s"]),
                "feedback": [released.labels[y] for y in np.flatnonzero(on)],
            }
            for event, on in zip(events, released.feedback(events), strict=True)
        ],
    }


def _known(seconds: np.float32) -> float | None:
    return None if seconds < 0 else float(seconds)
