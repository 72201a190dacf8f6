"""muP-style transfer: what is the best rate at one width is the best rate at eight times the width."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
import optax
import pytest
from tiny import VOCABULARY, tiny_model

from onerec_jax.config import ModelConfig, Recipe, TrainConfig
from onerec_jax.data.pipeline import Pipeline
from onerec_jax.model.onerec import build
from onerec_jax.parallel.sharding import path_name
from onerec_jax.train.loop import load_inputs
from onerec_jax.train.metrics import ratios
from onerec_jax.train.optimizer import is_matrix, make_optimizer, width_shares
from onerec_jax.train.state import init_state
from onerec_jax.train.step import make_train_step

BASE, STEPS = 64, 20
RATES = [2.0**power for power in (-10.5, -9, -7.5, -6)]


def _wide(width: int, base_width: int, **changes) -> ModelConfig:
    shape = {
        "d_model": width,
        "heads": width // 16,
        "ffn_hidden": width,
        "pathway_hidden": 64,
        "base_width": base_width,
    }
    return tiny_model(positive_length=0, lifelong_length=0, item_input="sid", user_id=False, **shape, **changes)


def _losses(recipe: Recipe, config: ModelConfig, rates: Sequence[float]) -> dict[float, float]:
    """The mean loss of the last quarter of a short training, by rate."""
    recipe = recipe.model_copy(update={"model": config})
    dataset, ids, model = load_inputs(recipe)
    optimizer = make_optimizer(recipe.train, config.width_share)
    at_rate = optax.GradientTransformation(
        lambda params: (np.float32(1.0), optimizer.init(params)),
        lambda updates, state, params=None: _scaled(optimizer.update(updates, state[1], params), state[0]),
    )
    step = jax.jit(make_train_step(model, recipe, at_rate), donate_argnums=0)
    found = {}
    for rate in rates:
        state = init_state(model, at_rate, 0)
        state = dataclasses.replace(state, optimizer=(np.float32(rate), state.optimizer[1]))
        pipeline, last = Pipeline(dataset, ids.codes, recipe), []
        for at in range(STEPS):
            state, metrics = step(state, next(pipeline))
            if at >= 0.75 * STEPS:
                last.append(ratios(metrics)["loss"])
        pipeline.close()
        found[rate] = float(np.mean(last))
    return found


def _scaled(result, rate):
    updates, inner = result
    return jax.tree.map(lambda update: update * rate, updates), (rate, inner)


def _best(losses: dict[float, float]) -> float:
    """log2 of the best rate, by a parabola through the least loss and its neighbours."""
    rates, values = np.log2(list(losses)), np.array(list(losses.values()))
    at = int(np.clip(np.argmin(values), 1, len(values) - 2))
    square, slope, _ = np.polyfit(rates[at - 1 : at + 2], values[at - 1 : at + 2], 2)
    return float(-slope / (2 * square))


def test_the_best_rate_stays_where_it_is_from_width_64_to_512_and_without_transfer_does_not(tiny_recipe: Recipe):
    train = tiny_recipe.train.model_copy(
        update={"learning_rate": 1.0, "schedule": "constant", "warmup_steps": 4, "batch_size": 8}
    )
    recipe = tiny_recipe.model_copy(update={"train": train})
    narrow, wide = (_losses(recipe, _wide(width, BASE), RATES) for width in (BASE, 8 * BASE))
    assert abs(_best(wide) - _best(narrow)) < 1, f"factors of two between {narrow} and {wide}"
    best = min(narrow, key=narrow.__getitem__)
    assert wide[best] < narrow[best], "wider is better at the rate of the narrow one"
    plain = _losses(recipe, _wide(8 * BASE, 0), [best / 8, best])
    assert plain[best] > plain[best / 8] + 0.2, "as it is, the wide model wants a smaller rate"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_reads_the_width_follows_it_and_nothing_else_does(optimizer: str):
    config = _wide(128, BASE, moe={"experts": 4, "active": 2, "hidden": 16, "tile": 8})
    model = build(config, VOCABULARY)
    shares = jax.tree_util.tree_leaves_with_path(width_shares(model.abstract, config.width_share, optimizer == "muon"))
    by_name = {path_name(path): share for path, share in shares}
    hidden = 0.5 if optimizer == "adamw" else 0.5**0.5
    for name, share in by_name.items():
        if "/heads/" in name or name.endswith("/router"):
            assert share == 0.5, name
        elif name.endswith(("kernel", "/gate", "/up", "/down")):
            assert share == (1 if name == "encoder/static/mlp/up/kernel" else hidden), name
        else:
            assert share == 1, name
    assert {"decoder/codes/embedding", "encoder/norm/scale", "encoder/static/mlp/up/kernel"} <= set(by_name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_is_the_plain_one_with_each_leafs_direction_times_its_share_and_decay_as_it_was(optimizer: str):
    """Against the plain optimizer without decay, leaf by leaf, over three steps."""
    train = TrainConfig.model_validate(
        {"optimizer": optimizer, "clip_norm": 0.0, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.1}
    )
    params = build(_wide(64, 0), VOCABULARY).init(0)[0]
    plain, follows = make_optimizer(train.model_copy(update={"weight_decay": 0.0})), make_optimizer(train, 0.25)
    states = plain.init(params), follows.init(params)
    shares = width_shares(params, 0.25, optimizer == "muon")
    for seed in range(3):
        rng = np.random.default_rng(seed)
        grads = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)  # noqa: B023
        direction, first = plain.update(grads, states[0], params)
        update, second = follows.update(grads, states[1], params)
        states = first, second
        decay = jax.tree.map(lambda leaf, matrix: -train.learning_rate * 0.1 * leaf * matrix, params, is_matrix(params))
        wanted = jax.tree.map(lambda d, share, less: d * share + less, direction, shares, decay)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8), update, wanted)
