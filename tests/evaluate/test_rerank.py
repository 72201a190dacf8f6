from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from onerec_jax.errors import InputError
from onerec_jax.evaluate.rerank import Reranker, by_expected_score, ranked


def test_lists_are_ordered_by_probability_times_reward_to_the_power_of_the_weight():
    rng = np.random.default_rng(0)
    items = rng.permuted(np.tile(np.arange(30), (6, 1)), axis=1)[:, :12]
    p, reward = rng.random((6, 12)), rng.random((6, 12))
    for weight in (0.0, 0.5, 1.0, 3.0):
        found, scores = by_expected_score(items, np.log(p), reward, weight, 5)
        for row in range(6):
            order = sorted(range(12), key=lambda j, r=row: -p[r, j] * reward[r, j] ** weight)[:5]
            assert found[row].tolist() == items[row, order].tolist()
            np.testing.assert_allclose(np.exp(scores[row]), p[row, order] * reward[row, order] ** weight, rtol=1e-5)


def test_places_that_hold_nothing_stay_last_and_a_reward_of_nothing_is_no_error():
    items, scores = np.array([[4, -1, 7]]), np.array([[-5.0, -np.inf, -1.0]])
    found, expected = by_expected_score(items, scores, np.array([[0.9, 0.0, 0.0]]), 1.0, 3)
    assert found.tolist() == [[4, 7, -1]] and expected[0, 2] == -np.inf and np.isfinite(expected[0, :2]).all()


def test_a_list_is_taken_from_a_longer_one_of_the_run():
    settings = SimpleNamespace(rerank=4, rerank_weight=1.0)
    asked = []

    class Run:
        recipe = SimpleNamespace(evaluate=settings)

        def recommend(self, examples, seen, k, *, progress=False):
            asked.append(k)
            return np.array([[1, 2, 3, 4]]), np.log([[0.4, 0.3, 0.2, 0.1]])

    def scorer(examples, items):
        return {"p_score": np.array([[0.1, 0.2, 0.9, 0.9]])}

    items, _ = Reranker(Run(), scorer).recommend(np.zeros((1, 4)), None, 2)  # type: ignore[arg-type]
    assert asked == [4] and items.tolist() == [[3, 4]]


def test_without_a_reward_model_there_is_nothing_to_rank_by(tiny_recipe):
    evaluate = tiny_recipe.evaluate.model_copy(update={"rerank": 5})
    run = SimpleNamespace(recipe=tiny_recipe.model_copy(update={"evaluate": evaluate}))
    with pytest.raises(InputError, match=r"evaluate\.reward_run"):
        ranked(run)  # type: ignore[arg-type]
    plain = SimpleNamespace(recipe=tiny_recipe)
    assert ranked(plain) is plain  # type: ignore[arg-type]
