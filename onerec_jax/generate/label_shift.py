"""Scores corrected to what is liked now, where training reached further back than that.

A model's probabilities are right for the items' frequencies that it was trained on. Where those have moved since, they are right
again once multiplied by new over old frequency (Saerens, Latinne and Decaestecker 2002), with nothing trained anew.
Axis letters: I items, N requests.
"""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp


def label_shift(own_I: np.ndarray, recent_I: np.ndarray, prior: float) -> np.ndarray:
    """log(new / old frequency) of every item, float32 [I].

    Args:
        own_I: the old frequencies, as the model has them: the mean of its probabilities, all above 0.
        recent_I: events of every item of late.
        prior: how many events the old frequencies count as beside those (the posterior mean under a Dirichlet prior).
    """
    own = own_I.astype(np.float64) / own_I.sum(dtype=np.float64)
    new = (recent_I + prior * own) / (recent_I.sum() + prior)
    return np.log(new / own).astype(np.float32)


def shifted(log_p_NxI: np.ndarray, shift_I: np.ndarray) -> np.ndarray:
    """The corrected log-probabilities of all items, float32 [N,I]."""
    moved = log_p_NxI + shift_I
    return moved - logsumexp(moved, axis=1, keepdims=True)
