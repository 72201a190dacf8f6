"""Rewards by rule against loops over candidates and targets."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest
from tiny import poison, random_batch, tiny_model

from onerec_jax.model.batch import Batch
from onerec_jax.reward import rules
from onerec_jax.reward.candidates import Candidates

B, G, T, C = 6, 9, 4, 3
LABELS = (1, 3)


def _request(seed: int) -> Batch:
    """Few items and codes, so that candidates often meet a target; some targets are missing, some repeat."""
    rng = np.random.default_rng(seed)
    batch = random_batch(tiny_model(), batch=B, targets=T, seed=seed)
    return dataclasses.replace(
        batch,
        targets=rng.integers(0, 3, (B, T, C)).astype(np.int32),
        target_item=rng.integers(-1, 12, (B, T)).astype(np.int32),
        target_weight=rng.choice([0.0, 0.3, 1.0], (B, T)).astype(np.float32),
        feedback=(rng.random(batch.feedback.shape) < 0.3).astype(np.uint8),
    )


def _candidates(seed: int) -> Candidates:
    rng = np.random.default_rng(seed + 100)
    return Candidates(
        codes=rng.integers(0, 3, (B, G, C)).astype(np.int32),
        item=rng.integers(-1, 12, (B, G)).astype(np.int32),
        score=rng.choice([-np.inf, -3.0, -2.0, -1.5, -1.0], (B, G)).astype(np.float32),
    )


def _looped(name: str, request: Batch, candidates: Candidates, labels: tuple[int, ...]) -> np.ndarray:
    found = np.zeros((B, G))
    for b in range(B):
        relevant = [
            t
            for t in range(T)
            if request.target_weight[b, t] > 0 and (not labels or any(request.feedback[b, t, y] for y in labels))
        ]
        items = {int(request.target_item[b, t]) for t in relevant}
        ranking = sorted(range(G), key=lambda g: (-candidates.score[b, g], g))
        for g in range(G):
            item = int(candidates.item[b, g])
            if item < 0:
                continue
            if name == "hit":
                found[b, g] = item in items
            elif name == "ndcg_rank":
                found[b, g] = (item in items) / math.log2(2 + ranking.index(g))
            for t in relevant if name == "prefix_match" else []:
                length = 0
                while length < C and candidates.codes[b, g, length] == request.targets[b, t, length]:
                    length += 1
                found[b, g] = max(found[b, g], length / C)
    return found


@pytest.mark.parametrize("labels", [(), LABELS])
@pytest.mark.parametrize("name", ["hit", "prefix_match", "ndcg_rank"])
def test_a_rule_equals_a_loop_over_candidates_and_targets(name: str, labels: tuple[int, ...]):
    reward = jax.jit(getattr(rules, name)(labels))
    for seed in range(5):
        request, candidates = _request(seed), _candidates(seed)
        expected = _looped(name, request, candidates, labels)
        found = reward(request, candidates)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert 0 < (expected > 0).mean() < 0.9  # both outcomes were seen


@pytest.mark.parametrize("name", ["hit", "prefix_match", "ndcg_rank"])
def test_what_stands_for_a_missing_target_changes_no_rule(name: str):
    request, candidates = _request(0), _candidates(0)
    missing = request.target_weight == 0
    changed = dataclasses.replace(
        poison(request),
        target_item=np.where(missing, candidates.item[:, :1], request.target_item),
        feedback=np.where(missing[..., None], 1, request.feedback).astype(np.uint8),
    )
    reward = getattr(rules, name)(LABELS)
    np.testing.assert_array_equal(reward(changed, candidates), reward(request, candidates))


def test_a_code_behind_a_different_one_earns_nothing():
    request = dataclasses.replace(
        _request(0), targets=np.full((B, T, C), 1, np.int32), target_weight=np.ones((B, T), np.float32)
    )
    codes = np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0], [1, 1, 1]], np.int32)
    candidates = Candidates(np.tile(codes, (B, 1, 1)), np.zeros((B, 4), np.int32), np.zeros((B, 4), np.float32))
    found = rules.prefix_match()(request, candidates)
    np.testing.assert_allclose(found, np.tile([0, 1 / 3, 2 / 3, 1], (B, 1)), rtol=1e-6)
