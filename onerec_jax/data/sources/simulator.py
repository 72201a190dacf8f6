"""A seeded short-video platform: its log as tables or as an endless stream, and its true expectations.

`exposure.py` says what is shown and `response.py` how users respond; here users are stepped through the period in
lockstep, one step = one impression of every user of a cohort. Ids are integers: item `i` is row `i` of the catalogue,
and users beyond `source.users` exist too: a stream that has used up its users goes on with new ones.

Axis letters: N users or (user, item, moment) triples, S sessions, D days, K topics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from onerec_jax.config import SimulatorSource
from onerec_jax.data.schema import Tables
from onerec_jax.data.sources import exposure, response
from onerec_jax.data.sources.world import (
    AGE_BANDS,
    DAY_S,
    DEVICES,
    START_MS,
    Floats,
    Ints,
    Users,
    World,
    day_of,
    make_users,
    make_world,
    texts,
)
from onerec_jax.data.validate import validate

Columns = dict[str, NDArray[Any]]

SESSION_LENGTH = 7.0  # mean impressions per session
SEEN_SLOTS = 1 << 13  # a user's seen items are remembered modulo this many

_HOURS = np.array([2, 1, 1, 1, 1, 2, 3, 4, 4, 4, 4, 5, 6, 6, 5, 4, 4, 5, 6, 7, 9, 10, 8, 5], dtype=float)
_PILOT_USERS, _PILOT_EVENTS, _PILOT_FIRST = 512, 256, 1 << 40  # calibrate on users that no stream reaches


@dataclasses.dataclass(frozen=True)
class Platform:
    """A world ready to run: its shelves, and the intercepts of its response model."""

    world: World
    shelves: exposure.Shelves
    intercepts: dict[str, float]


def make_platform(source: SimulatorSource, seed: int) -> Platform:
    """The platform of (source, seed), its responses calibrated to `response.MARGINALS` on a pilot of other users."""
    world = make_world(source, seed)
    guess = dict.fromkeys(response.MARGINALS, 0.0) | {"click": -0.7, "long_view": -1.4}
    platform = Platform(world, exposure.make_shelves(world), guess)
    pilot = make_users(world, _PILOT_FIRST + np.arange(_PILOT_USERS))
    pilot = dataclasses.replace(pilot, events=np.clip(pilot.events, 1, _PILOT_EVENTS))
    for turn in range(2):  # twice, because clicks steer what is shown next
        shown = _simulate(platform, pilot, np.random.default_rng([seed, 3, turn]))
        intercepts = response.calibrate(shown["affinity"], world.duration_s[shown["item_id"]])
        platform = dataclasses.replace(platform, intercepts=intercepts)
    return platform


def tables(source: SimulatorSource, seed: int) -> Tables:
    """The whole log of `source.users` users in time order, with the catalogue and the users."""
    platform = make_platform(source, seed)
    events = _event_table(_cohorts(platform, stop=source.users))
    users = _user_table(platform.world, 0, source.users)
    return validate(Tables(events, _item_table(platform.world), users), "simulator")


def fresh_log(platform: Platform, users: int) -> tuple[pa.Table, pa.Table]:
    """Events in time order and the table of the next `users` users after those of `tables`.

    They are the users that `stream` goes on with, and these are their events there.
    """
    first = platform.world.source.users
    cohorts = _cohorts(platform, first + users, first)
    asked = ((cohort, cohort["user_id"] < first + users) for cohort in cohorts)
    events = _event_table({name: values[kept] for name, values in cohort.items()} for cohort, kept in asked)
    return events, _user_table(platform.world, first, first + users)


def stream(
    source: SimulatorSource, seed: int, events: int, chunk: int, platform: Platform | None = None
) -> Iterator[Columns]:
    """Yields `events` impressions as columns of `chunk` rows (the last may be shorter).

    Users come cohort by cohort, first those of `tables`, then new ones. Each user's events are in time order; those of
    the users of a cohort are interleaved. `platform` is that of (source, seed), for callers who have it already.
    """
    waiting: list[Columns] = []
    rows = 0
    for cohort in _cohorts(platform or make_platform(source, seed), stop=None):
        taken = min(len(cohort["user_id"]), events - rows)
        waiting.append({name: values[:taken] for name, values in cohort.items()})
        rows += taken
        joined = {name: np.concatenate([part[name] for part in waiting]) for name in cohort}
        ready = len(joined["user_id"])
        whole = ready if rows == events else ready - ready % chunk
        for start in range(0, whole, chunk):
            yield {name: values[start : min(start + chunk, whole)] for name, values in joined.items()}
        waiting = [{name: values[whole:] for name, values in joined.items()}]
        if rows == events:
            return


def expected_watch_time(platform: Platform, user_ids: ArrayLike, item_ids: ArrayLike, time_ms: ArrayLike) -> Floats:
    """[N]: true expected seconds user n watches item n when it is shown at that moment.

    Args:
        user_ids, item_ids, time_ms: [N], or anything that broadcasts to one shape, which the result then has.
            Whether the item is uploaded by then or was seen before plays no part.
    """
    drawn_to, duration_s = _attraction(platform, user_ids, item_ids, time_ms)
    return response.mean_play_s(drawn_to, duration_s, platform.intercepts)


def expected_feedback(
    platform: Platform, user_ids: ArrayLike, item_ids: ArrayLike, time_ms: ArrayLike
) -> dict[str, Floats]:
    """Label -> [N]: its true probability; arguments as in `expected_watch_time`."""
    drawn_to, duration_s = _attraction(platform, user_ids, item_ids, time_ms)
    return response.probabilities(drawn_to, duration_s, platform.intercepts)


def respond(
    platform: Platform, user_ids: ArrayLike, item_ids: ArrayLike, time_ms: ArrayLike, rng: np.random.Generator
) -> Columns:
    """What users do with what they are shown: play time, duration and every label as in the log's columns, each [N].

    Whatever is shown, as many numbers are drawn and in the same order: with equal generators two lists for the same
    users meet the same luck, place by place (common random numbers).

    Args:
        user_ids, item_ids, time_ms: as in `expected_watch_time`.
        rng: where the luck comes from.
    """
    drawn_to, duration_s = _attraction(platform, user_ids, item_ids, time_ms)
    shape, drawn_to, duration_s = drawn_to.shape, drawn_to.ravel(), duration_s.ravel()
    click, long_view, played_s = response.draw_view(rng, drawn_to, duration_s, platform.intercepts)
    chances = response.probabilities(drawn_to, duration_s, platform.intercepts)
    columns = {
        "playtime_ms": (played_s * 1000.0).astype(np.int64),
        "duration_ms": (duration_s * 1000.0).astype(np.int64),
        "click": click,
        "long_view": long_view,
    }
    for name in list(response.MARGINALS)[2:]:
        possible, share = (~click, 1 - chances["click"]) if name == "hate" else (click, chances["click"])
        columns[name] = possible & (rng.random(len(share)) * share < chances[name])
    return {name: values.reshape(shape) for name, values in columns.items()}


def _attraction(
    platform: Platform, user_ids: ArrayLike, item_ids: ArrayLike, time_ms: ArrayLike
) -> tuple[Floats, Floats]:
    """Affinity and duration of broadcast triples; users are rebuilt in blocks that bound the memory."""
    world = platform.world
    user, item, day = np.broadcast_arrays(user_ids, item_ids, day_of(world, time_ms))
    known, row = np.unique(user, return_inverse=True)
    row = row.reshape(user.shape)
    share, match = np.empty(user.shape), np.empty(user.shape)
    block = _cohort_size(world)
    for start in range(0, len(known), block):
        latents = make_users(world, known[start : start + block])
        here = (row >= start) & (row < start + block)
        local = row[here] - start
        share[here] = latents.interest[local, day[here], world.topic[item[here]]] * world.topics
        match[here] = exposure.style_match(latents.taste[local], world.style[item[here]])
    return response.affinity(share, match, world.quality[item]), world.duration_s[item]


# ----------------------------------------------------------------------------------------------------------- simulation


def _cohort_size(world: World) -> int:
    """Users stepped together: many make numpy's overhead small, a bound on them keeps the memory small."""
    days_by_topics = world.source.days * world.topics
    return int(np.clip(min(2**19 / world.source.events_per_user, 2**22 / days_by_topics), 16, 2048))


def _cohorts(platform: Platform, stop: int | None, start: int = 0) -> Iterator[Columns]:
    """Events of users `start` = 0 or `source.users` on, up to the cohort of user stop-1, or without end.

    A cohort never spans `source.users`, so that all callers get the same events.
    """
    size, edge = _cohort_size(platform.world), platform.world.source.users
    while stop is None or start < stop:
        end = min(start + size, edge) if start < edge else start + size
        cohort = make_users(platform.world, np.arange(start, end))
        columns = _simulate(platform, cohort, np.random.default_rng([platform.world.seed, 4, start]))
        del columns["affinity"]
        yield columns
        start = end


def _simulate(platform: Platform, cohort: Users, rng: np.random.Generator) -> Columns:
    """Every impression of a cohort, each user's in time order; `affinity` comes along for the calibration."""
    world, shelves = platform.world, platform.shelves
    busiest = np.argsort(-cohort.events, kind="stable")
    left, taste, ids = cohort.events[busiest], cohort.taste[busiest], cohort.ids[busiest]
    interest = cohort.interest[busiest].reshape(-1, world.topics)
    cumulative = np.cumsum(interest, axis=1)
    opens, opening_s, pause_s = _sessions(rng, left, world.period_s)
    seen = np.zeros((len(ids), min(world.source.items, SEEN_SLOTS)), dtype=bool)
    free_s = np.full(len(ids), -np.inf)  # when the user is done with the video before
    anchor = np.full(len(ids), -1)
    momentum = np.zeros(len(ids))
    parts: list[tuple[NDArray[Any], ...]] = []
    for step in range(len(opens)):
        n = int(np.searchsorted(-left, -step))  # who has an event left is a prefix, the busiest being first
        rows = np.arange(n)
        next_s = free_s[:n] + 1.0 + 2.0 * rng.random(n)
        now_s = np.where(opens[step, :n], np.maximum(opening_s[step, :n], free_s[:n] + pause_s[:n]), next_s)
        day = np.minimum((now_s / DAY_S).astype(np.int64), world.source.days - 1)
        place = rows * world.source.days + day
        push = np.where(opens[step, :n], exposure.AT_OPENING, momentum[:n])
        topic, explores = exposure.choose_topics(rng, world, cumulative, place, anchor[:n], push)
        item, match = exposure.choose_items(rng, world, shelves, topic, explores, now_s, taste[:n], seen[:n])
        share = interest.ravel().take(place * world.topics + topic) * world.topics
        drawn_to = response.affinity(share, match, world.quality.take(item))
        duration_s = world.duration_s.take(item)
        click, long_view, played_s = response.draw_view(rng, drawn_to, duration_s, platform.intercepts)
        seen[rows, item % seen.shape[1]] = True
        free_s[:n] = now_s + played_s
        anchor[:n] = np.where(click | (anchor[:n] < 0), topic, anchor[:n])
        momentum[:n] = np.where(click, exposure.AFTER_CLICK, exposure.AFTER_SKIP)
        parts.append((ids[:n], item, now_s, played_s, duration_s, click, long_view, drawn_to))
    user, item, now_s, played_s, duration_s, click, long_view, drawn_to = map(np.concatenate, zip(*parts, strict=True))
    return {
        "user_id": user,
        "item_id": item,
        "timestamp_ms": START_MS + (now_s * 1000.0).astype(np.int64),
        "playtime_ms": (played_s * 1000.0).astype(np.int64),
        "duration_ms": (duration_s * 1000.0).astype(np.int64),
        "click": click,
        "long_view": long_view,
        **response.draw_feedback(rng, click, drawn_to, platform.intercepts),
        "affinity": drawn_to,
    }


def _sessions(rng: np.random.Generator, events: Ints, period_s: float) -> tuple[NDArray[np.bool_], Floats, Floats]:
    """When sessions open: events [N] -> opens [steps,N], opening time [steps,N], least pause between sessions [N].

    Openings follow the rhythm of the day and lie an hour apart wherever the period has room for that.
    """
    steps = max(1, int(events.max(initial=0)))
    opens = rng.random((steps, len(events))) < 1.0 / SESSION_LENGTH
    opens[0] = True
    session = np.cumsum(opens, axis=0) - 1
    sessions = np.take_along_axis(session, np.maximum(events - 1, 0)[None], axis=0)[0] + 1
    gaps = np.cumsum(rng.standard_exponential((int(session.max()) + 2, len(events))), axis=0)
    apart = np.minimum(3600.0, 0.3 * period_s / sessions)
    even = gaps[:-1] / np.take_along_axis(gaps, sessions[None], axis=0) * (period_s - sessions * apart)
    even += apart * np.arange(len(even))[:, None]
    day, within = np.divmod(even / DAY_S, 1.0)
    rhythm = np.concatenate([[0.0], np.cumsum(_HOURS) / _HOURS.sum()])
    opening_s = DAY_S * (day + np.interp(within, rhythm, np.linspace(0.0, 1.0, 25)))
    return opens, np.take_along_axis(opening_s, session, axis=0), np.minimum(2_000.0, 0.5 * apart)


# --------------------------------------------------------------------------------------------------------------- tables


def _event_table(cohorts: Iterable[Columns]) -> pa.Table:
    """The events of some cohorts, joined and put in time order."""
    parts = list(cohorts)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    by_time = np.argsort(columns["timestamp_ms"], kind="stable")
    return pa.table({name: values[by_time] for name, values in columns.items()})


def _item_table(world: World) -> pa.Table:
    titles, tags = texts(world)
    flat = pa.array(world.embedding.ravel())
    return pa.table(
        {
            "item_id": np.arange(len(world.topic)),
            "author_id": world.author,
            "tags": pa.array(tags, pa.list_(pa.string())),
            "duration_ms": (world.duration_s * 1000.0).astype(np.int64),
            "upload_time_ms": START_MS + (world.upload_s * 1000.0).astype(np.int64),
            "text": titles,
            "embedding": pa.FixedSizeListArray.from_arrays(flat, world.embedding.shape[1]),
        }
    )


def _user_table(world: World, first: int, stop: int) -> pa.Table:
    block = _cohort_size(world)
    blocks = [make_users(world, np.arange(start, min(start + block, stop))) for start in range(first, stop, block)]
    return pa.table(
        {
            "user_id": np.concatenate([part.ids for part in blocks]),
            "age_band": [AGE_BANDS[row] for part in blocks for row in part.age_band],
            "device": [DEVICES[row] for part in blocks for row in part.device],
        }
    )
