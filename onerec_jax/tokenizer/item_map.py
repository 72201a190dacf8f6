"""Items laid out on a plane, so that a person sees which of them the first codes put together."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.manifold import TSNE
from sklearn.utils.extmath import randomized_svd

_FEWEST = 50  # items below which neighbourhoods are too small for t-SNE
_WIDTH = 50  # dimensions t-SNE starts from, as in van der Maaten & Hinton 2008
_STEPS = 300


def principal_axes(vectors: np.ndarray, width: int, seed: int) -> np.ndarray:
    """Vectors [N,D] on their first principal axes, float32 [N,width]; axes beyond their rank are zero."""
    centred = vectors - vectors.mean(0, dtype=np.float64)
    left, values, _ = randomized_svd(centred, min(width, *vectors.shape), random_state=seed)
    placed = np.zeros((len(vectors), width), np.float32)
    placed[:, : len(values)] = left * values
    return placed


def plane(vectors: np.ndarray, seed: int) -> tuple[np.ndarray, str]:
    """Places float32 [N,2] of vectors [N,D], each axis within 0 and 1, and the name of the layout.

    t-SNE from the first two principal axes; the axes themselves for fewer than 50 vectors or a single distinct one.
    """
    axes = principal_axes(vectors, _WIDTH, seed)
    spread = float(axes[:, 0].std())
    if len(vectors) < _FEWEST or spread < 1e-6 * (1 + float(np.abs(vectors).max())):
        places, name = axes[:, :2], "the first two principal axes"
    else:
        # Equal vectors start apart by a hair: t-SNE divides by their distance.
        start = axes[:, :2] / spread + np.random.default_rng(seed).normal(size=(len(axes), 2)) * 1e-2
        perplexity = min(30.0, (len(axes) - 1) / 3)
        first: Any = 1e-4 * start
        layout = TSNE(init=first, perplexity=perplexity, max_iter=_STEPS, random_state=seed, n_jobs=1)
        places, name = layout.fit_transform(axes), "t-SNE"
    low, high = places.min(0), places.max(0)
    return ((places - low) / np.where(high > low, high - low, 1)).astype(np.float32), name
