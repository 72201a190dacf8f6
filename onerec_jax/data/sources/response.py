"""How simulated users respond to a video, in closed form.

With affinity a, duration d and sigmoid s:

    P(click)     = s(b_click + 0.9 a)
    P(long_view) = s(b_long + 1.1 a - 0.4 ln(d / 25 s)),  taken within the clicks
    P(label)     = P(click) s(b_label + slope a)          for like, follow, comment, forward, profile_enter
    P(hate)      = (1 - P(click)) s(b_hate - 0.8 a)
    play time    = min(scale x LogNormal, cap), its scale and cap set by: skipped, clicked, long-viewed

The intercepts b are solved so that the stream's marginals are those of KuaiRand-Pure's standard logs of 25 Apr - 8 May
2022.

Axis letter: N (user, item, moment) triples.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, ndtr

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]

MARGINALS = {
    "click": 0.4419,
    "long_view": 0.3108,
    "like": 0.0171,
    "follow": 0.00133,
    "comment": 0.00254,
    "forward": 0.00085,
    "hate": 0.00083,
    "profile_enter": 0.0185,
}
_SLOPES = {
    "click": 0.9,
    "long_view": 1.1,
    "like": 0.8,
    "follow": 0.9,
    "comment": 0.6,
    "forward": 0.7,
    "hate": -0.8,
    "profile_enter": 0.6,
}
_TYPICAL_S = 25.0  # duration at which length neither helps nor hurts a long view


def affinity(interest: Floats, style_match: Floats, quality: Floats) -> Floats:
    """[N]: how much a user is drawn to an item.

    Args:
        interest: [N], share of the user's interest that the item's topic has, relative to an even spread (1 = average).
        style_match: [N], user's taste times item's style, about unit variance.
        quality: [N], what all users agree on.
    """
    return 0.5 * np.clip(np.log(interest), -2.5, 2.5) + 0.7 * style_match + 0.5 * quality


def probabilities(attraction: Floats, duration_s: Floats, intercepts: dict[str, float]) -> dict[str, Floats]:
    """Label -> [N], its marginal probability given the affinity."""
    chances: dict[str, Floats] = {}
    for name in MARGINALS:
        chances[name] = _probability(name, intercepts[name], attraction, duration_s, chances)
    return chances


def _probability(
    name: str, intercept: float, attraction: Floats, duration_s: Floats, chances: dict[str, Floats]
) -> Floats:
    """One label's probability [N]; `chances` holds the click's, unless that is the one asked for."""
    logit = intercept + _SLOPES[name] * attraction
    if name == "click":
        return expit(logit)
    if name == "long_view":
        return np.minimum(chances["click"], expit(logit - 0.4 * np.log(duration_s / _TYPICAL_S)))
    return (1 - chances["click"] if name == "hate" else chances["click"]) * expit(logit)


def calibrate(attraction: Floats, duration_s: Floats) -> dict[str, float]:
    """Intercepts at which the mean probabilities over a sample of exposures [N] equal `MARGINALS`."""
    intercepts: dict[str, float] = {}
    chances: dict[str, Floats] = {}
    for name, target in MARGINALS.items():
        low, high = -20.0, 20.0
        for _ in range(25):  # bisection: each mean rises with its intercept
            middle = (low + high) / 2
            below = _probability(name, middle, attraction, duration_s, chances).mean() < target
            low, high = (middle, high) if below else (low, middle)
        intercepts[name] = (low + high) / 2
        chances[name] = _probability(name, intercepts[name], attraction, duration_s, chances)
    return intercepts


def draw_view(
    rng: np.random.Generator, attraction: Floats, duration_s: Floats, intercepts: dict[str, float]
) -> tuple[Bools, Bools, Floats]:
    """What steers the session: click [N], long view [N], play time in seconds [N]."""
    chances: dict[str, Floats] = {}
    for name in ("click", "long_view"):
        chances[name] = _probability(name, intercepts[name], attraction, duration_s, chances)
    dice = rng.random(len(attraction))
    click, long_view = dice < chances["click"], dice < chances["long_view"]
    scale, spread, cap = (
        np.where(long_view, viewed, np.where(click, clicked, skipped))
        for skipped, clicked, viewed in zip(*_play_time(attraction, duration_s), strict=True)
    )
    return click, long_view, np.minimum(scale * np.exp(spread * rng.standard_normal(len(attraction))), cap)


def draw_feedback(
    rng: np.random.Generator, click: Bools, attraction: Floats, intercepts: dict[str, float]
) -> dict[str, Bools]:
    """The other labels, each bool [N], given the clicks."""
    clicked, skipped = np.flatnonzero(click), np.flatnonzero(~click)
    labels: dict[str, Bools] = {}
    for name in list(MARGINALS)[2:]:
        rows = skipped if name == "hate" else clicked
        given = expit(intercepts[name] + _SLOPES[name] * attraction[rows])
        labels[name] = np.zeros(len(click), dtype=bool)
        labels[name][rows[rng.random(len(rows)) < given]] = True
    return labels


def mean_play_s(attraction: Floats, duration_s: Floats, intercepts: dict[str, float]) -> Floats:
    """[N]: expected play time in seconds."""
    chances = probabilities(attraction, duration_s, intercepts)
    shares = (1 - chances["click"], chances["click"] - chances["long_view"], chances["long_view"])
    total = np.zeros(attraction.shape)
    for share, (scale, spread, cap) in zip(shares, _play_time(attraction, duration_s), strict=True):
        total += share * _capped_log_normal_mean(scale, spread, cap)
    return total


def _play_time(attraction: Floats, duration_s: Floats) -> tuple[tuple[Floats, float, Floats], ...]:
    """(scale, spread, cap) of the log-normal play time of skipped, clicked and long-viewed videos."""
    absorbed = 0.9 * duration_s * np.exp(0.1 * np.clip(attraction, -3.0, 3.0))
    return (
        (np.full_like(duration_s, 2.0), 0.6, duration_s),
        (0.3 * duration_s, 0.5, duration_s),
        (absorbed, 0.4, 3.0 * duration_s),
    )


def _capped_log_normal_mean(scale: Floats, spread: float, cap: Floats) -> Floats:
    """E[min(scale e^(spread Z), cap)] for a standard normal Z."""
    edge = np.log(cap / scale) / spread
    return scale * np.exp(spread**2 / 2) * ndtr(edge - spread) + cap * ndtr(-edge)
