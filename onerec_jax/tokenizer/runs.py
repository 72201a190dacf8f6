"""Runs of equal values in a sorted array: how groups of unequal size are handled without loops."""

from __future__ import annotations

import numpy as np


def place_in_run(group: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... inside every run of equal values of group [N], int64 [N]."""
    start = np.flatnonzero(np.append(True, group[1:] != group[:-1])[: len(group)])
    return np.arange(len(group)) - np.repeat(start, np.diff(start, append=len(group)))
