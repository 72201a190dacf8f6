"""What an objective is given: the candidates of a batch of requests, with their probabilities and what they earned."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jax import Array

from onerec_jax.config import RLConfig
from onerec_jax.train.metrics import Metrics


class Group(NamedTuple):
    """G candidates for each of B requests. Gradients flow through `log_p` alone; all else is data.

    What stands where `valid` is false can be anything, infinities and NaN included, and changes nothing.
    """

    log_p: Array  # float32 [B,G,C], log-probability of every code after those before it, under the policy being trained
    old: Array  # float32 [B,G,C], the same under the policy that generated the candidates
    reference: Array  # float32 [B,G,C], the same under the run that RL started from
    reward: Array  # float32 [B,G]
    valid: Array  # bool [B,G], candidates that count
    logged: Array  # bool [B,G], items of the log that the user liked, put beside the generated ones
    chance: Array  # float32 [B,G], uniform in [0, 1), for objectives that draw among candidates


Objective = Callable[[Group, RLConfig], tuple[Array, Metrics]]
