"""The latent state of the simulated short-video platform: its catalogue and its users.

Everything here is a function of (`SimulatorSource`, seed). Users have no stored state: each quantity of user `u` is a
hash of (seed, purpose, u, ...), so that any user, those beyond `source.users` included, can be rebuilt alone and in
any order.

Axis letters: I items, K topics, D days, S style dimensions, N users asked for.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from onerec_jax.config import SimulatorSource
from onerec_jax.data.sources.titles import CATEGORIES, title, topic_name

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]

START_MS = 1_704_067_200_000  # 2024-01-01 00:00 UTC, the first moment of the simulated period
DAY_S = 86_400.0
BEFORE = 3 / 7  # the catalogue begins this share of the period before its start, at the same rate of uploads
HALF_LIFE_S = 2.0 * DAY_S  # of an item's exposure
STYLE = 4  # dimensions of style, the part of an item's latent that varies within a topic
CENTRE = 8  # dimensions that tell topics apart
SUCCESSORS = 4  # topics reachable by momentum: the topic itself and three others
AGE_BANDS = ("12-17", "18-24", "25-30", "31-40", "41-50", "51+")
DEVICES = ("android_low", "android_high", "ios", "tablet")

_AGE, _DEVICE, _TASTE, _ACTIVITY, _ACTIVITY_ROUNDING, _INTEREST, _DRIFT = range(7)


@dataclasses.dataclass(frozen=True)
class World:
    """The catalogue and the constants of the population. Times are seconds since `START_MS`."""

    source: SimulatorSource
    seed: int
    topic: Ints  # [I]
    author: Ints  # [I]
    style: Floats  # [I,S], unit variance
    quality: Floats  # [I]
    popularity: Floats  # [I], exposure weight of a fresh item
    duration_s: Floats  # [I]
    upload_s: Floats  # [I], negative = before the period
    embedding: Floats  # [I,E], float32
    successors: Ints  # [K,SUCCESSORS], first the topic itself
    age_interest: Floats  # [ages,K]
    device_interest: Floats  # [devices,K]

    @property
    def topics(self) -> int:
        return len(self.successors)

    @property
    def period_s(self) -> float:
        return self.source.days * DAY_S


@dataclasses.dataclass(frozen=True)
class Users:
    """Latents of some users."""

    ids: Ints  # [N]
    age_band: Ints  # [N], index into AGE_BANDS
    device: Ints  # [N], index into DEVICES
    taste: Floats  # [N,S]
    events: Ints  # [N], impressions over the whole period
    interest: Floats  # [N,D,K], probability of each topic on each day


def make_world(source: SimulatorSource, seed: int) -> World:
    """Draws the catalogue and the population's constants."""
    rng = np.random.default_rng([seed, 1])
    items, topics = source.items, min(source.topics, source.items)
    topic = rng.choice(topics, size=items, p=_weights(rng, topics))
    topic[:topics] = np.arange(topics)
    upload = rng.uniform(-BEFORE, 1.0, items) * source.days * DAY_S
    upload[:topics] = -BEFORE * source.days * DAY_S  # every topic has something to show from the first moment
    author = _authors(rng, topic, topics, items)
    style = rng.normal(size=(items, STYLE))
    quality = 0.6 * rng.normal(size=items) + 0.5 * rng.normal(size=author.max() + 1)[author]
    return World(
        source=source,
        seed=seed,
        topic=topic,
        author=author,
        style=style.astype(np.float32),
        quality=quality,
        popularity=np.exp(0.8 * rng.normal(size=items) + 0.4 * quality),
        duration_s=np.clip(np.exp(np.log(25.0) + 0.7 * rng.normal(size=items)), 5.0, 300.0),
        upload_s=upload,
        embedding=_embedding(rng, topic, style, topics, source.embedding_dim),
        successors=_successors(rng, topics),
        age_interest=0.9 * rng.normal(size=(len(AGE_BANDS), topics)),
        device_interest=0.5 * rng.normal(size=(len(DEVICES), topics)),
    )


def _weights(rng: np.random.Generator, topics: int) -> Floats:
    weights = np.exp(0.4 * rng.normal(size=topics))
    return weights / weights.sum()


def _authors(rng: np.random.Generator, topic: Ints, topics: int, items: int) -> Ints:
    """About one author per twelve items; author `a` leans to topic `a mod K`, a topic's first authors post most."""
    authors = max(1, items // 12)
    of_topic = np.maximum(1, -(-(authors - topic) // topics))
    leaning = topic + topics * (of_topic * rng.random(items) ** 2).astype(np.int64)
    strays = rng.random(items) < 0.1
    return np.where(strays, rng.integers(authors, size=items), leaning % authors)


def _embedding(rng: np.random.Generator, topic: Ints, style: Floats, topics: int, width: int) -> NDArray[np.float32]:
    """A noisy rotation of [topic centre, style] into `width` dimensions (a projection where `width` is smaller)."""
    category = rng.normal(size=(-(-topics // len(CATEGORIES[0].topics)), CENTRE))
    centre = category[_category(np.arange(topics))] + 0.8 * rng.normal(size=(topics, CENTRE))
    latent = np.concatenate([centre[topic] + 0.3 * rng.normal(size=(len(topic), CENTRE)), 0.6 * style], axis=1)
    size = max(width, latent.shape[1])
    rotation = np.linalg.qr(rng.normal(size=(size, size)))[0][: latent.shape[1], :width]
    return (latent @ rotation + 0.1 * rng.normal(size=(len(topic), width))).astype(np.float32)


def _category(topic: Ints) -> Ints:
    return topic // len(CATEGORIES[0].topics)


def _successors(rng: np.random.Generator, topics: int) -> Ints:
    """[K,SUCCESSORS]: where attention wanders from each topic, more often within its category."""
    preference = rng.random((topics, topics))
    category = _category(np.arange(topics))
    preference += 0.5 * (category[:, None] == category[None, :])
    np.fill_diagonal(preference, 9.0)
    ranked = np.argsort(-preference, axis=1)
    return ranked[:, np.arange(SUCCESSORS) % topics]


def texts(world: World) -> tuple[list[str], list[list[str]]]:
    """Title and tags of every item; one item in seven is filed under a neighbouring topic."""
    rng = np.random.default_rng([world.seed, 2])
    items = len(world.topic)
    words = rng.integers(1 << 30, size=(items, 2))
    filed = np.where(rng.random(items) < 1 / 7, world.successors[world.topic, 1], world.topic)
    strongest = np.argsort(-np.abs(world.style), axis=1)[:, :2]
    signs = np.take_along_axis(world.style, strongest, axis=1) > 0
    moods = 2 * strongest + signs
    titles = [title(k, tuple(mood), tuple(word)) for k, mood, word in zip(world.topic, moods, words, strict=True)]
    tags = [[topic_name(k), CATEGORIES[_category(k) % len(CATEGORIES)].name] for k in filed]
    return titles, tags


def make_users(world: World, ids: Ints) -> Users:
    """Latents of users `ids` [N]; memory is N x days x topics."""
    seed, source = world.seed, world.source
    column = ids[:, None]
    age = (_uniform(_hash(seed, _AGE, ids)) * len(AGE_BANDS)).astype(np.int64)
    # Older users keep to fewer kinds of devices, so that the two features are correlated.
    device = (_uniform(_hash(seed, _DEVICE, ids)) ** (0.6 + 0.2 * age) * len(DEVICES)).astype(np.int64)
    logits = 1.4 * _normal(_hash(seed, _INTEREST, column, np.arange(world.topics)))
    logits = logits + world.age_interest[age] + world.device_interest[device]
    days = np.arange(source.days)[None, :, None]
    steps = _normal(_hash(seed, _DRIFT, column[:, :, None], days, np.arange(world.topics)))
    logits = logits[:, None, :] + source.drift * np.cumsum(steps, axis=1)
    interest = np.exp(logits - logits.max(axis=2, keepdims=True))
    interest /= interest.sum(axis=2, keepdims=True)
    return Users(
        ids=ids,
        age_band=age,
        device=device,
        taste=_normal(_hash(seed, _TASTE, column, np.arange(STYLE))).astype(np.float32),
        events=_activity(seed, ids, source.events_per_user),
        interest=interest.astype(np.float32),
    )


def _activity(seed: int, ids: Ints, mean: float) -> Ints:
    """Impressions per user: log-normal-like around `mean`, rounded at random so that the mean is kept."""
    spread = 0.5
    half = spread * np.sqrt(3.0) / 2
    normaliser = (np.sinh(half) / half) ** 4  # mean of exp(spread * _normal)
    expected = mean * np.exp(spread * _normal(_hash(seed, _ACTIVITY, ids))) / normaliser
    return np.floor(expected + _uniform(_hash(seed, _ACTIVITY_ROUNDING, ids))).astype(np.int64)


def day_of(world: World, time_ms: ArrayLike) -> Ints:
    """Day of the period, moments outside it taken to its nearest end."""
    return np.clip((np.asarray(time_ms) - START_MS) // int(DAY_S * 1000), 0, world.source.days - 1)


def _hash(seed: int, purpose: int, *indices: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A 64-bit hash per broadcast index tuple (splitmix64's finaliser, Steele et al. 2014, chained)."""
    state = np.atleast_1d(np.uint64(seed & (2**64 - 1)))
    for index in (np.int64(purpose), *indices):
        state = state + (np.atleast_1d(index).astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def _uniform(bits: NDArray[np.uint64]) -> Floats:
    return (bits >> np.uint64(11)) * 2.0**-53


def _normal(bits: NDArray[np.uint64]) -> Floats:
    """Zero mean, unit variance, bounded at 3.46: the sum of four 16-bit uniforms, cheaper than a true normal."""
    parts = np.zeros(bits.shape)
    for shift in (0, 16, 32, 48):
        parts += (bits >> np.uint64(shift)) & np.uint64(0xFFFF)
    return np.sqrt(3.0) * (parts / 65_536.0 - 2.0 + 2.0 / 65_536.0)
