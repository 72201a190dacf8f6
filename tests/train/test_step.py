from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SHAPES, VOCABULARY, random_batch, tiny_model, tiny_trie, tiny_values

from onerec_jax.config import Recipe
from onerec_jax.model.onerec import build
from onerec_jax.model.prefixes import device_trie
from onerec_jax.recipe import make_recipe
from onerec_jax.tokenizer.trie import Trie
from onerec_jax.train.loss import next_token_loss
from onerec_jax.train.metrics import ratios
from onerec_jax.train.optimizer import learning_rate, make_optimizer
from onerec_jax.train.state import init_state
from onerec_jax.train.step import make_loss, make_train_step


def _recipe(tmp_path, **train) -> Recipe:
    values = tiny_values(tmp_path)
    values["train"] |= {"steps": 400, "warmup_steps": 10, "learning_rate": 5e-3, "batch_size": 8, **train}
    return make_recipe(values)


def _stepper(recipe: Recipe, config):
    model = build(config, VOCABULARY)
    optimizer = make_optimizer(recipe.train)
    return init_state(model, optimizer, recipe.seed), jax.jit(make_train_step(model, recipe, optimizer))


def test_the_loss_is_the_weighted_sum_over_levels_of_the_cross_entropy():
    rng = np.random.default_rng(0)
    logits = tuple(jnp.asarray(rng.normal(size=(2, 3, v)).astype(np.float32)) for v in (5, 4))
    targets = np.stack([rng.integers(0, 5, (2, 3)), rng.integers(0, 4, (2, 3))], -1)
    weight = np.array([[1.0, 0.5, 0.0], [2.0, 0.0, 1.0]], np.float32)
    for smoothing in (0.0, 0.1):
        expected = plain = 0.0
        for b, t in np.ndindex(2, 3):
            for level in range(2):
                x = np.asarray(logits[level][b, t], np.float64)
                log_p = x - np.log(np.exp(x).sum())
                nll = -log_p[targets[b, t, level]]
                expected += weight[b, t] * ((1 - smoothing) * nll - smoothing * log_p.mean())
                plain += weight[b, t] * nll
        total, metrics = next_token_loss(logits, jnp.asarray(targets), jnp.asarray(weight), smoothing)
        assert abs(float(total) - expected) < 1e-5
        values = ratios(metrics)
        assert abs(values["loss/level1"] + values["loss/level2"] - plain / weight.sum()) < 1e-5


def test_a_softmax_over_legal_codes_knows_no_others():
    """Against the codes that share each prefix, written out; a missing target is of no item and changes nothing."""
    rng = np.random.default_rng(0)
    catalogue = np.unique(rng.integers(1, (5, 4, 6), (30, 3)), axis=0).astype(np.int32)
    trie = device_trie(Trie.build(catalogue, np.zeros(len(catalogue))), tiny_model())
    logits = tuple(jnp.asarray(rng.normal(size=(2, 3, v)).astype(np.float32)) for v in (5, 4, 6))
    targets = catalogue[rng.integers(0, len(catalogue), (2, 3))]
    targets[1, 2] = 0
    weight = np.array([[1.0, 0.5, 2.0], [2.0, 1.0, 0.0]], np.float32)
    for smoothing in (0.0, 0.1):
        expected, plain = 0.0, np.zeros(3)
        for b, t in zip(*np.nonzero(weight), strict=True):
            for level in range(3):
                alike = (catalogue[:, :level] == targets[b, t, :level]).all(axis=1)
                legal = np.unique(catalogue[alike, level])
                x = np.asarray(logits[level][b, t], np.float64)
                log_p = x - np.log(np.exp(x[legal]).sum())
                nll = -log_p[targets[b, t, level]]
                plain[level] += weight[b, t] * nll
                expected += weight[b, t] * ((1 - smoothing) * nll - smoothing * log_p[legal].mean())

        def loss(logits):
            return next_token_loss(logits, jnp.asarray(targets), jnp.asarray(weight), smoothing, trie)  # noqa: B023

        (total, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(logits)
        np.testing.assert_allclose(total, expected, rtol=1e-5)
        found = ratios(metrics)
        np.testing.assert_allclose([found[f"loss/level{i}"] for i in (1, 2, 3)], plain / weight.sum(), rtol=1e-5)
        for level in gradient:
            assert np.isfinite(level).all() and not np.asarray(level[1, 2]).any()


def test_codes_are_learnt_of_the_first_targets_and_items_of_all():
    model = build(tiny_model(**SHAPES["OneRec with both heads"]), VOCABULARY)
    trie, batch = tiny_trie(model.config), random_batch(model.config, batch=5, targets=6)
    params, tables = model.init(0)
    batch = model.localise(batch, touched_only=False)[0]

    def value(batch, **settings):
        loss = make_loss(model, 0.1, **settings)
        rows = {name: table["rows"] for name, table in tables.items()}
        total, (metrics, _) = loss(params, rows, model.init_bias(), batch, None, trie)
        return float(total), ratios(metrics)

    shorter = np.where(np.arange(6) < 2, batch.target_weight, 0)
    codes_of_two = value(dataclasses.replace(batch, target_weight=shorter), item_weight=0.0)[0]
    items_of_all = value(batch, item_weight=1.0)[0] - value(batch, item_weight=0.0)[0]
    total, metrics = value(batch, item_weight=0.5, code_targets=2)
    np.testing.assert_allclose(total, codes_of_two + 0.5 * items_of_all, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], total / batch.target_weight.sum(), rtol=1e-5)


def test_micro_batches_give_the_step_of_the_whole_batch_however_uneven_their_targets(tmp_path):
    config = tiny_model(moe={"experts": 4, "active": 2, "hidden": 16, "tile": 8})
    batch = random_batch(config, batch=8)
    weight = np.array(batch.target_weight)
    weight[:5, 1] = 0
    batch = dataclasses.replace(batch, target_weight=weight)
    results = []
    for accumulation in (1, 4):
        state, step = _stepper(_recipe(tmp_path, accumulation=accumulation), config)
        for _ in range(2):
            state, metrics = step(state, batch)
        results.append((state.params, state.tables, state.bias, {k: v for k, v in metrics.items() if "loss" in k}))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), *results)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_batch_can_be_learned_by_heart(tmp_path, optimizer: str):
    config = tiny_model()
    state, step = _stepper(_recipe(tmp_path, optimizer=optimizer, weight_decay=0.0), config)
    batch = random_batch(config, batch=8, targets=2)  # one target a context, so that nothing is left to chance
    first = None
    for _ in range(150):
        state, metrics = step(state, batch)
        first = first or ratios(metrics)["loss"]
    assert first > 7.5
    assert ratios(metrics)["loss"] < 0.2


def test_the_rate_warms_up_to_its_peak_and_ends_at_its_final_share(tmp_path):
    train = _recipe(tmp_path, learning_rate=1.0, warmup_steps=10, steps=110, final_rate=0.1).train
    rate = learning_rate(train)
    assert float(rate(0)) == 0.0
    assert abs(float(rate(5)) - 0.5) < 1e-6
    assert abs(float(rate(10)) - 1.0) < 1e-6
    assert abs(float(rate(60)) - 0.55) < 1e-6
    assert abs(float(rate(110)) - 0.1) < 1e-6
    constant = learning_rate(train.model_copy(update={"schedule": "constant"}))
    assert float(constant(109)) == 1.0


def _load_after_300_steps(tmp_path, balance_rate: float) -> float:
    """Maximum over mean expert load at the end of a run."""
    config = tiny_model(
        d_model=16, positive_length=0, lifelong_length=0,
        moe={"experts": 8, "active": 2, "hidden": 8, "tile": 8, "router": "sigmoid", "balance_rate": balance_rate},
    )  # fmt: skip
    state, step = _stepper(_recipe(tmp_path, batch_size=64), config)
    loads = []
    for i in range(300):
        state, metrics = step(state, random_batch(config, batch=64, targets=5, seed=i % 64))
        loads.append(ratios(metrics)["experts/decoder_max_over_mean"])
    return float(np.mean(loads[-20:]))


def test_loss_free_balancing_evens_out_the_experts_that_would_otherwise_be_overloaded(tmp_path):
    assert _load_after_300_steps(tmp_path, 0.003) < 1.5
    assert _load_after_300_steps(tmp_path, 0.0) > 2.0
