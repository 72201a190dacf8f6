"""Recommendations a person can read: a user's recent history and the list, with titles."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np
from rich.table import Table

from onerec_jax.errors import InputError
from onerec_jax.generate.ranking import Ragged
from onerec_jax.generate.recommender import Recommender
from onerec_jax.generate.step import ListOptions


class Ranks(Protocol):
    """What makes lists: a `Recommender`, or one whose lists something else ranks anew."""

    def recommend(
        self, examples: np.ndarray, seen: Ragged | None, k: int, *, progress: bool = False
    ) -> tuple[np.ndarray, np.ndarray]: ...


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


def item_rows(recommender: Recommender, ids: str) -> np.ndarray:
    """Rows int32 of the caller's item ids, ID,ID,..

    Raises:
        InputError: no such item in the dataset.
    """
    known = recommender.dataset.item_ids.astype(str)
    asked = [name.strip() for name in ids.split(",") if name.strip()]
    missing = [name for name in asked if name not in set(known)]
    if missing:
        examples = ", ".join(known[:3])
        raise InputError(f"no item '{missing[0]}' in {recommender.dataset.directory}; ids look like {examples}")
    row = {name: i for i, name in enumerate(known)}
    return np.array([row[name] for name in asked], np.int32)


def recommend_to(
    recommender: Recommender,
    user: str,
    top: int,
    *,
    leave_out: str = "",
    only: str = "",
    diversity: float = 0.0,
    diverse_by: Literal["code", "author"] = "code",
    ranks: Ranks | None = None,
) -> list[Table]:
    """Two tables: what the user did last, and the best `top` items after the whole history.

    Items of the history are left out where `evaluate.exclude_seen` says so.

    Args:
        recommender: the run.
        user: the caller's id of a user.
        top: items of the list.
        leave_out: further items not to list, ID,ID,..
        only: the only items to list, ID,ID,..; empty: all.
        diversity: what every better item of its group costs an item, see `generate.step.ListOptions`.
        diverse_by: the group.
        ranks: who makes the list instead of the run alone, which then knows none of these options.

    Raises:
        InputError: no such user or item, or options that do not go together.
    """
    dataset, settings = recommender.dataset, recommender.recipe.evaluate
    row = user_row(recommender, user)
    history = dataset.history(row)
    n = len(history.item)
    request, seen = np.array([[row, n, n, n]]), history.item.astype(np.int32)
    if ranks is not None or settings.inferences > 1:
        if leave_out or only or diversity:
            raise InputError(
                "evaluate.rerank and evaluate.inferences know no items to leave out, no others, no diversity"
            )
        exclude = (seen, np.array([0, n])) if settings.exclude_seen else None
        items, scores = (ranks or recommender).recommend(request, exclude, top)
    else:
        options = ListOptions(top, max(top, settings.beam_width), settings.item_weight, diversity, diverse_by)
        out = np.concatenate([seen if settings.exclude_seen else seen[:0], item_rows(recommender, leave_out)])
        items, scores = recommender.lists(request, [out], [item_rows(recommender, only)] if only else None, options)
    return [_history(recommender, user, history), _list(recommender, items[0], scores[0])]


def _history(recommender: Recommender, user: str, history: Any) -> Table:
    labels, n = recommender.dataset.labels, len(history.item)
    past = Table("item", "title", "feedback", title=f"user {user}: last of {n} events", title_justify="left")
    for i in range(max(0, n - 8), n):
        given = [label for label, on in zip(labels, history.feedback[i], strict=True) if on]
        item = history.item[i]
        past.add_row(str(recommender.dataset.item_ids[item]), _title(recommender, item), " ".join(given))
    return past


def _list(recommender: Recommender, items: np.ndarray, scores: np.ndarray) -> Table:
    best = Table("item", "title", "semantic ID", "log p", title="recommended next", title_justify="left")
    for item, score in zip(items, scores, strict=True):
        if item >= 0:
            code = "-".join(map(str, recommender.ids.codes[item]))
            best.add_row(str(recommender.dataset.item_ids[item]), _title(recommender, item), code, f"{score:.2f}")
    return best
