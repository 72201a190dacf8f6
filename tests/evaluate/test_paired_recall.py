"""tools/paired_recall.py against leaving out each user by hand."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent.parent
LISTS = {"a": [[0, 1, 2], [3, 4, 5], [1, 2, 0], [6, 7, 8]], "b": [[1, 0, 2], [5, 4, 3], [0, 4, 2], [8, 7, 1]]}
RELEVANT, USER = [[1, 2], [3], [0], [7, 8, 2]], np.array([4, 9, 4, 6])


@pytest.mark.parametrize("recall", ["pair", "user"])
def test_differences_and_their_intervals_are_those_of_leaving_users_out_by_hand(recall, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    script = importlib.import_module("paired_recall")
    settings = SimpleNamespace(exclude_seen=False, ks=(1, 3), recall=recall)

    def load(name: str):
        def recommend(examples, seen, k, progress):
            assert seen is None and k == 3
            return np.array(LISTS[name]), None

        return SimpleNamespace(recipe=SimpleNamespace(evaluate=settings), dataset=None, recommend=recommend)

    relevant = np.concatenate(RELEVANT), np.cumsum([0, *map(len, RELEVANT)])
    requests = SimpleNamespace(examples=None, context=None, relevant=relevant, user=USER)
    monkeypatch.setattr(script, "load_recommender", load)
    monkeypatch.setattr(script, "collect_requests", lambda dataset, recipe: requests)

    def by_hand(name: str, k: int, kept: list[int]) -> float:
        hit = [len(set(LISTS[name][n][:k]) & set(RELEVANT[n])) for n in kept]
        of = [len(RELEVANT[n]) for n in kept]
        return sum(hit) / sum(of) if recall == "pair" else float(np.mean(np.divide(hit, of)))

    for k, (a, b, gain) in script.differences("a", "b").items():
        assert (a, b) == pytest.approx((by_hand("a", k, [0, 1, 2, 3]), by_hand("b", k, [0, 1, 2, 3])))
        without = [[n for n in range(4) if USER[n] != user] for user in (4, 6, 9)]
        moved = [by_hand("b", k, kept) - by_hand("a", k, kept) for kept in without]
        half = 1.96 * np.sqrt(2 / 3 * np.sum((moved - np.mean(moved)) ** 2))
        assert gain == pytest.approx((b - a, b - a - half, b - a + half))
