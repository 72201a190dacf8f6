"""Recommendations a person can read: a user's recent history and the list, with titles."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.table import Table

from onerec_jax.errors import InputError
from onerec_jax.generate.recommender import Recommender


def user_row(recommender: Recommender, user: str) -> int:
    """The row of a caller's user id.

    Raises:
        InputError: no such user in the dataset.
    """
    found = np.flatnonzero(recommender.dataset.user_ids.astype(str) == user)
    if not len(found):
        ids = ", ".join(map(str, recommender.dataset.user_ids[:3]))
        raise InputError(f"no user '{user}' in {recommender.dataset.directory}; ids look like {ids}")
    return int(found[0])


def sample_user(recommender: Recommender) -> Any:
    """The id of a test user with a history worth looking at."""
    examples = recommender.dataset.examples("test")
    return recommender.dataset.user_ids[examples[np.argsort(-examples[:, 1], kind="stable")[len(examples) // 4], 0]]


def _title(recommender: Recommender, item: int) -> str:
    return recommender.dataset.items.text[item] or "(no title)"


def recommend_to(recommender: Recommender, user: str, top: int) -> list[Table]:
    """Two tables: what the user did last, and the best `top` unseen items after the whole history."""
    dataset = recommender.dataset
    row = user_row(recommender, user)
    history = dataset.history(row)
    n = len(history.item)
    seen = history.item.astype(np.int32), np.array([0, n])
    exclude = seen if recommender.recipe.evaluate.exclude_seen else None
    items, scores = recommender.recommend(np.array([[row, n, n, n]]), exclude, top)

    past = Table("item", "title", "feedback", title=f"user {user}: last of {n} events", title_justify="left")
    for i in range(max(0, n - 8), n):
        labels = [label for label, on in zip(dataset.labels, history.feedback[i], strict=True) if on]
        past.add_row(str(dataset.item_ids[history.item[i]]), _title(recommender, history.item[i]), " ".join(labels))
    best = Table("item", "title", "semantic ID", "log p", title="recommended next", title_justify="left")
    for item, score in zip(items[0], scores[0], strict=True):
        if item >= 0:
            code = "-".join(map(str, recommender.ids.codes[item]))
            best.add_row(str(dataset.item_ids[item]), _title(recommender, item), code, f"{score:.2f}")
    return [past, best]
