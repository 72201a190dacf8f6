"""Sessions of simulated users with one arm of an A/B test: it shows lists, they watch, and it sees what they did.

The users' responses are drawn from generators that depend on (seed, session) alone, so that the same user has the same
luck in the same place of the same session with every arm.

Axis letters: S sessions, N users, K places of a list.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, cast

import numpy as np
from rich.progress import track

from onerec_jax.data.sources.simulator import Platform, expected_feedback, expected_watch_time, respond
from onerec_jax.data.store import Dataset
from onerec_jax.evaluate.simulated_users import SimulatedUsers
from onerec_jax.generate.recommender import Recommender

SESSION_GAP_MS = 8 * 3_600_000  # from the end of train to the first session, and from each to the next

Policy = Callable[[int], np.ndarray]  # K -> item rows int32 [N,K] for the users' requests, best first, -1 = nothing


class Served(NamedTuple):
    """What one arm showed, and what the platform expects of it at the moment of the request; 0 where there is nothing."""

    item: np.ndarray  # int32 [S,N,K], item rows, -1 = nothing
    request_ms: np.ndarray  # int64 [S,N]
    watch_s: np.ndarray  # float64 [S,N,K], true expected seconds of watching
    chance: dict[str, np.ndarray]  # label -> float64 [S,N,K], its true probability


def recommending(recommender: Recommender, users: SimulatedUsers) -> Policy:
    """What a run recommends to these users, from what it may know of them."""
    here = dataclasses.replace(recommender, dataset=cast(Dataset, users))
    return lambda k: here.recommend(users.examples, users.not_to_show, k)[0]


def truly_best(policy: Policy, users: SimulatedUsers, platform: Platform, candidates: int) -> Policy:
    """The items that will truly be watched longest among the `candidates` first of another policy.

    No reward model can choose better from those candidates, as far as watch time goes.
    """

    def choose(k: int) -> np.ndarray:
        found = policy(candidates)
        items, moments = users.item_ids[np.maximum(found, 0)], users.request_ms[:, None]
        seconds = expected_watch_time(platform, users.user_ids[:, None], items, moments)
        order = np.argsort(np.where(found < 0, np.inf, -seconds), axis=1, kind="stable")
        return np.take_along_axis(found, order[:, :k], axis=1)

    return choose


def serve(
    policy: Policy,
    users: SimulatedUsers,
    platform: Platform,
    sessions: int,
    impressions: int,
    seed: int,
    description: str | None = None,
) -> Served:
    """Lets users have S sessions of K impressions, and keeps the truth about what was shown.

    Args:
        policy: chooses what is shown; `users` have their requests open when it is called, and grow between its calls.
        users: put back to where train ends first.
        platform: theirs; nothing else judges.
        sessions, impressions: S, K.
        seed: of the users' luck.
        description: words beside a progress bar, None = no bar.
    """
    users.begin()
    start_ms, parts = int(users.request_ms.max()), []
    for session in track(range(sessions), description or "", disable=description is None, transient=True):
        users.ask(start_ms + (session + 1) * SESSION_GAP_MS)
        shown = policy(impressions)
        filled = shown >= 0
        impression = users.user_ids[:, None], users.item_ids[np.maximum(shown, 0)], users.request_ms[:, None]
        watch_s = expected_watch_time(platform, *impression) * filled
        chance = {name: value * filled for name, value in expected_feedback(platform, *impression).items()}
        parts.append(Served(shown, users.request_ms, watch_s, chance))
        users.watch(shown, respond(platform, *impression, np.random.default_rng([seed, session])))
    return Served(
        np.stack([part.item for part in parts]),
        np.stack([part.request_ms for part in parts]),
        np.stack([part.watch_s for part in parts]),
        {name: np.stack([part.chance[name] for part in parts]) for name in parts[0].chance},
    )
