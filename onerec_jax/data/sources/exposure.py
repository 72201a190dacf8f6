"""What the simulated platform shows next: first a topic, then an item of it.

The topic comes from exploration, from momentum (a sparse chain over topics that starts at the last clicked video's),
or from the user's interests of the day. Candidates of the topic are then retrieved by popularity, halved every two
days after the upload (some of them by popularity alone), and one is shown by the user's taste; items seen before are
left out.

Axis letters: N users, M candidates, I items, K topics, S style dimensions, P (user, day) pairs.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
from numpy.typing import NDArray

from onerec_jax.data.sources.world import HALF_LIFE_S, Floats, Ints, World

Bools = NDArray[np.bool_]

EXPLORATION = 0.05  # share of impressions from a random topic, any age
CANDIDATES = 8  # M
STEADY = 2  # of the candidates, retrieved by popularity alone
AFTER_CLICK, AFTER_SKIP, AT_OPENING = 0.6, 0.25, 0.35  # share of topics by momentum: within a session, at its start
MOMENTUM_TOPICS = (0.55, 0.25, 0.12, 0.08)  # the topic itself, its first, second, third successor
TASTE_PULL = 1.0  # weight of the style match in the ranking of candidates


@dataclasses.dataclass(frozen=True)
class Shelves:
    """Items by topic, ready to be drawn by weight at any moment.

    Shelf 2k holds topic k with weights that decay by age, shelf 2k+1 the same items with weights that do not.
    Exponential decay leaves the ratio of two uploaded items' weights as it is, so one cumulative sum over uploads
    serves every moment.
    """

    order: Ints  # [I], items by topic, then upload
    first: Ints  # [K+1], position in `order` where each topic begins
    upload_key: Floats  # [I], topic * span + upload, ascending
    span: float  # seconds of a topic in `upload_key`
    log_weight: Floats  # [2,I], log of the running sum of weights within the decaying and the steady shelf
    weight_key: Floats  # [2I+1], shelf * width + log_weight, ascending, then infinity
    width: float  # of a shelf in `weight_key`
    guide: NDArray[np.int32]  # [cells], position in `weight_key` where each of as many equal steps of the key begins


def make_shelves(world: World) -> Shelves:
    """Sorts the catalogue once; O(I log I)."""
    order = np.lexsort((world.upload_s, world.topic))
    topic, upload = world.topic[order], world.upload_s[order]
    first = np.searchsorted(topic, np.arange(world.topics + 1))
    steady = np.log(world.popularity[order])
    log_weight = np.stack([steady + np.log(2.0) * upload / HALF_LIFE_S, steady])
    for start, stop in itertools.pairwise(first):
        log_weight[:, start:stop] = np.logaddexp.accumulate(log_weight[:, start:stop], axis=1)
    log_weight -= log_weight.min()
    width, span = float(log_weight.max()) + 1.0, 4.0 * world.period_s
    weight_key = np.sort(log_weight + width * (2 * topic + np.array([[0], [1]])), axis=None)
    edges = np.linspace(0.0, 2 * width * world.topics, min(32 * len(topic), 1 << 22), endpoint=False)
    return Shelves(
        order=order,
        first=first,
        upload_key=topic * span + upload,
        span=span,
        log_weight=log_weight,
        weight_key=np.append(weight_key, np.inf),
        width=width,
        guide=np.searchsorted(weight_key, edges).astype(np.int32),
    )


def choose_topics(
    rng: np.random.Generator, world: World, cumulative: Floats, place: Ints, anchor: Ints, momentum: Floats
) -> tuple[Ints, Bools]:
    """Topic [N] of the next impression, and whether it is exploration [N].

    Args:
        cumulative: [P,K], running sums of interests over the topics.
        place: [N], row of `cumulative` that is the user's interest of the day.
        anchor: [N], the topic that momentum starts from, -1 = none yet.
        momentum: [N], share of the impressions that follow momentum.
    """
    coin, dice = rng.random((2, len(anchor)))
    explores = coin < EXPLORATION
    follows = ~explores & (coin < EXPLORATION + (1 - EXPLORATION) * momentum) & (anchor >= 0)
    step = np.searchsorted(np.cumsum(MOMENTUM_TOPICS)[:-1], dice, side="right")
    topic = np.where(explores, (dice * world.topics).astype(np.int64), world.successors[anchor, step])
    rest = np.flatnonzero(~explores & ~follows)
    running = cumulative.take(place[rest], axis=0)
    topic[rest] = ((dice[rest] * running[:, -1])[:, None] < running).argmax(axis=1)
    return topic, explores


def choose_items(
    rng: np.random.Generator,
    world: World,
    shelves: Shelves,
    topic: Ints,
    explores: Bools,
    now_s: Floats,
    taste: Floats,
    seen: Bools,
) -> tuple[Ints, Floats]:
    """Item shown [N] and its style match [N].

    Args:
        topic, explores: [N], from `choose_topics`; an exploring impression takes any uploaded item of the topic.
        now_s: [N], seconds since the start; nothing uploaded later is shown.
        taste: [N,S].
        seen: [N,slots], True at item modulo slots for the items the user met; they come back only when no other
            candidate is left.
    """
    count = len(topic)
    low = shelves.first.take(topic)
    clock = topic * shelves.span + np.minimum(now_s, 0.5 * shelves.span)
    high = np.searchsorted(shelves.upload_key, clock, side="right")
    # In `weight_key` topic k's decaying shelf begins at 2 first[k], its steady one a topic's length later.
    wanted = -rng.standard_exponential((CANDIDATES, count))
    wanted[STEADY:] += 2 * topic * shelves.width + shelves.log_weight[0].take(high - 1)
    wanted[:STEADY] += (2 * topic + 1) * shelves.width + shelves.log_weight[1].take(high - 1)
    position = _search(shelves, wanted)
    position[STEADY:] -= low
    position[:STEADY] -= shelves.first.take(topic + 1)
    position = np.minimum(np.maximum(position, low), high - 1)
    anything = low + (rng.random(count) * (high - low)).astype(np.int64)
    candidates = shelves.order.take(np.where(explores, anything, position))
    match = style_match(taste, world.style.take(candidates, axis=0))
    met = seen.ravel().take(candidates % seen.shape[1] + seen.shape[1] * np.arange(count))
    running = np.cumsum(np.exp(TASTE_PULL * match) * (np.float32(1e-9) + ~met), axis=0)
    chosen = (rng.random(count) * running[-1] < running).argmax(axis=0) * count + np.arange(count)
    return candidates.take(chosen), match.take(chosen)


def _search(shelves: Shelves, wanted: Floats) -> NDArray[np.int32]:
    """`np.searchsorted(weight_key, wanted)`, many times faster on unordered queries (guide table, Chen & Asau 1974)."""
    cells = np.maximum(wanted, 0.0) * (len(shelves.guide) / (2 * shelves.width * (len(shelves.first) - 1)))
    position = shelves.guide.take(cells.astype(np.int64), mode="clip")
    while (behind := shelves.weight_key.take(position, mode="clip") < wanted).any():
        position += behind
    return position


def style_match(taste: Floats, style: Floats) -> Floats:
    """[...]: product of taste and style over the last axis, unit variance when both are."""
    return np.einsum("...s,...s->...", taste, style) / np.sqrt(style.shape[-1])


def exposure_probability(
    world: World, interest: Floats, taste: Floats, anchor: int, momentum: float, now_s: float
) -> Floats:
    """[I]: chance of every item to be one user's next impression, had the user seen nothing yet.

    The chance of a candidate to win its round is approximated by putting the other M-1 candidates at their mean weight.

    Args:
        interest: [K] of the day; taste: [S]; anchor: topic or -1; momentum: its share; now_s: seconds since the start.
    """
    follow = momentum if anchor >= 0 else 0.0
    topic = (1 - EXPLORATION) * (1 - follow) * interest
    if anchor >= 0:
        np.add.at(topic, world.successors[anchor], (1 - EXPLORATION) * follow * np.array(MOMENTUM_TOPICS))
    uploaded = world.upload_s <= now_s
    steady = world.popularity * uploaded
    fresh = steady * np.exp2((np.minimum(world.upload_s, now_s) - now_s) / HALF_LIFE_S)

    def within_topic(values: Floats) -> Floats:
        return values / np.maximum(np.bincount(world.topic, values, world.topics), 1e-300)[world.topic]

    retrieved = within_topic(fresh) + STEADY / CANDIDATES * (within_topic(steady) - within_topic(fresh))
    pull = np.exp(TASTE_PULL * style_match(taste, world.style))
    mean_pull = np.bincount(world.topic, retrieved * pull, world.topics)[world.topic]
    shown = within_topic(CANDIDATES * retrieved * pull / (pull + (CANDIDATES - 1) * mean_pull))
    explored = within_topic(uploaded.astype(float)) / world.topics
    return topic[world.topic] * shown + EXPLORATION * explored
