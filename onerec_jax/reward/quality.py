"""How good a reward model is: AUC, AUC within users, and calibration, of every label. N impressions."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata


def auc(score_N: np.ndarray, label_N: np.ndarray) -> float:
    """Chance that a positive scores above a negative, ties half (Mann-Whitney); NaN where one of them is missing."""
    positive = label_N > 0.5
    count = int(positive.sum())
    if count in (0, len(label_N)):
        return float("nan")
    ranks = rankdata(score_N)
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(label_N) - count)))


def grouped_auc(score_N: np.ndarray, label_N: np.ndarray, user_N: np.ndarray) -> float:
    """GAUC: the AUC of every user who has both, weighted by impressions (Zhu et al. 2017); NaN where nobody has."""
    order = np.argsort(user_N, kind="stable")
    starts = np.flatnonzero(np.diff(user_N[order], prepend=-1))
    total = weight = 0.0
    for rows in np.split(order, starts[1:]):
        value = auc(score_N[rows], label_N[rows])
        if not np.isnan(value):
            total, weight = total + value * len(rows), weight + len(rows)
    return total / weight if weight else float("nan")


def calibration(probability_N: np.ndarray, label_N: np.ndarray, bins: int = 20) -> tuple[float, float]:
    """Predicted over observed mean, and the expected calibration error over bins of equal counts (Naeini et al. 2015).

    NaN where nothing, or no positive, is there to compare with.
    """
    if not len(label_N):
        return float("nan"), float("nan")
    order = np.argsort(probability_N, kind="stable")
    parts = [rows for rows in np.array_split(order, bins) if len(rows)]
    gaps = [abs(probability_N[rows].mean() - label_N[rows].mean()) * len(rows) for rows in parts]
    observed = label_N.mean()
    return float(probability_N.mean() / observed) if observed else float("nan"), float(sum(gaps) / len(label_N))


def quality(probability_N: np.ndarray, label_N: np.ndarray, user_N: np.ndarray) -> dict[str, float]:
    """All of it for one label; AUC and GAUC of a label that is a share are of whether it is above its mean."""
    binary = label_N if set(np.unique(label_N)) <= {0.0, 1.0} else (label_N > label_N.mean()).astype(float)
    ratio, error = calibration(probability_N, label_N)
    return {
        "rate": float(label_N.mean()) if len(label_N) else float("nan"),
        "AUC": auc(probability_N, binary),
        "GAUC": grouped_auc(probability_N, binary, user_N),
        "predicted/observed": ratio,
        "ECE": error,
        "impressions": float(len(label_N)),
    }
