"""The chunked and the sampled softmax over items against their definitions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.train import item_loss as module
from onerec_jax.train.item_loss import full_softmax, item_loss, sampled_softmax


def _arguments(targets: int = 23, width: int = 8, items: int = 31, seed: int = 0, shared: int = 1):
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(targets, width)).astype(np.float32)
    table = rng.normal(size=(items, width)).astype(np.float32)
    weight = rng.choice([0.0, 0.5, 1.0], (targets, shared)).astype(np.float32)
    return states, table, rng.integers(0, items, (targets, shared)).astype(np.int32), weight


def _of_one(arguments):
    """The same with targets [N] of one state each."""
    states, items, target, weight = arguments
    return states, items, target[:, 0], weight[:, 0]


def _by_definition(states, items, target, weight, smoothing):
    log_p = jax.nn.log_softmax(states @ items.T)
    own = jnp.take_along_axis(log_p, target, axis=-1)
    return jnp.sum(weight * (-(1 - smoothing) * own - smoothing * jnp.mean(log_p, axis=-1, keepdims=True)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [4, 23, 100])
@pytest.mark.parametrize("shared", [1, 5])
def test_the_chunked_softmax_and_its_gradients_equal_the_definition(smoothing, chunk, shared, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    arguments = _arguments(shared=shared)
    ours = jax.jit(
        jax.value_and_grad(lambda s, i: 3 * full_softmax(s, i, *arguments[2:], smoothing)[0], argnums=(0, 1))
    )
    oracle = jax.value_and_grad(lambda s, i: 3 * _by_definition(s, i, *arguments[2:], smoothing), argnums=(0, 1))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        ours(*arguments[:2]),
        oracle(*arguments[:2]),
    )


def test_metrics_of_the_full_softmax_leave_smoothing_and_missing_targets_out():
    states, items, target, weight = _arguments(shared=3)
    target = np.where(weight > 0, target, -1)
    total, metrics = item_loss(states[:, None], items, target, weight, 0.1)
    cross_entropy = _by_definition(states, items, np.maximum(target, 0), weight, 0.0)
    top = np.argmax(states @ items.T, axis=-1)[:, None]
    np.testing.assert_allclose(metrics["loss"], (total, weight.sum()), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/item"][0], cross_entropy, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy/item"][0], weight[top == target].sum(), rtol=1e-5)
    assert total != metrics["loss/item"][0]


def test_without_any_weight_the_loss_and_its_gradient_are_zero():
    states, items, target, weight = _arguments()
    value, gradient = jax.value_and_grad(lambda s: full_softmax(s, items, target, 0 * weight, 0.0)[0])(states)
    assert value == 0 and not np.asarray(gradient).any()


def test_the_sampled_softmax_equals_its_definition_with_hits_left_out():
    states, items, target, weight = _of_one(_arguments(items=6))
    key, samples = jax.random.key(3), 9
    drawn = np.asarray(jax.random.randint(key, (samples,), 0, len(items)))
    expected = 0.0
    for h, y, w in zip(states, target, weight, strict=True):
        others = [h @ items[j] + np.log((len(items) - 1) / samples) for j in drawn if j != y]
        expected += w * (np.logaddexp.reduce([h @ items[y], *others]) - h @ items[y])
    np.testing.assert_allclose(sampled_softmax(states, items, target, weight, samples, key), expected, rtol=1e-5)


def test_the_sampled_softmax_approaches_the_full_one_as_samples_grow():
    states, items, target, weight = _arguments()
    full = float(full_softmax(states, items, target, weight, 0.0)[0])
    states, items, target, weight = _of_one((states, items, target, weight))
    sampled = float(sampled_softmax(states, items, target, weight, 200_000, jax.random.key(0)))
    assert abs(sampled / full - 1) < 0.01


def test_a_sample_of_nothing_but_the_target_costs_nothing_and_has_a_finite_gradient():
    states, items, *_ = _arguments(targets=2, items=1)
    arguments = np.zeros(2, np.int32), np.ones(2, np.float32), 1, jax.random.key(0)
    loss, gradient = jax.value_and_grad(sampled_softmax)(states, items, *arguments)
    assert loss == 0 and not np.asarray(gradient).any()


def test_targets_that_share_a_state_cost_what_each_would_with_a_copy_of_it():
    states, items, target, weight = _arguments(shared=4)
    copies = np.repeat(states[:, None], 4, axis=1)
    for arguments in ((0.1,), (0.0, 7, jax.random.key(1))):
        one = item_loss(states[:, None], items, target, weight, *arguments)
        each = item_loss(copies, items, target, weight, *arguments)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, each)
