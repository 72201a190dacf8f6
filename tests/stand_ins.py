"""Stand-ins for what takes XLA long to compile, so that the code around it can run in milliseconds."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.config import ModelConfig, RewardConfig
from onerec_jax.data.schema import Vocabulary
from onerec_jax.model.encoder import Context
from onerec_jax.model.moe.router import Routed
from onerec_jax.model.onerec import Outputs
from onerec_jax.posttrain import loop as rl_loop
from onerec_jax.reward import training as reward_training
from onerec_jax.train import loop
from onerec_jax.train.state import TrainState

WIDTH = 4


def linear_model(config: ModelConfig, vocabulary: Vocabulary) -> Any:
    """A model of one matrix and one table that predicts the first code of every target from the user alone.

    `encode` and `decoder` are the two halves of it. Its experts have a fixed, uneven load. `micro_batches` collects the batch
    sizes it is traced with.
    """
    codes, experts = vocabulary.codebook_sizes[0], max(4, config.moe.experts)
    micro_batches: set[int] = set()

    def init(seed: int):
        keys = jax.random.split(jax.random.key(seed))
        params = {"heads": {"0": {"kernel": jax.random.normal(keys[0], (WIDTH, codes))}}}
        rows = jax.random.normal(keys[1], (vocabulary.authors, WIDTH))
        return params, {"author": {"rows": rows, "accumulator": jnp.zeros(len(rows))}}

    def bind(params):
        load = jnp.arange(1.0, 1 + experts)[None, :]
        routed = Routed(load, jnp.zeros(1), jnp.zeros(1))

        def encode(batch, rows, bias, key):
            micro_batches.add(batch.user.shape[0])
            users = rows["author"][batch.user[:, 0] % vocabulary.authors]
            return Context(users[:, None, :], jnp.ones((len(users), 1), bool), jnp.full(1, -1)), routed

        def decoder(context, targets, visible, valid, bias, key):
            logits = context.tokens @ params["heads"]["0"]["kernel"]
            return (jnp.broadcast_to(logits, (*valid.shape, codes)),), routed

        def forward(batch, rows, bias, key, trie, decoded):
            context, _ = encode(batch, rows, bias, key)
            logits, routed = decoder(context, batch.targets, batch.visible, batch.target_weight > 0, bias, key)
            return Outputs(logits, None, None, {"decoder": routed})

        return SimpleNamespace(outputs=forward, encode=encode, decoder=decoder)

    return SimpleNamespace(
        config=config,
        vocabulary=vocabulary,
        init=init,
        init_bias=lambda: {"decoder": jnp.zeros((1, experts))},
        bind=bind,
        localise=lambda batch, touched_only: (batch, {"author": None}),
        micro_batches=micro_batches,
    )


def _one_more(state: TrainState) -> TrainState:
    """The state after a step that adds one to all parameters."""

    def add(leaf):
        return jax.device_put(np.asarray(leaf) + np.ones((), leaf.dtype), leaf.sharding)

    return dataclasses.replace(state, step=add(state.step), params=jax.tree.map(add, state.params))


def instant_training(monkeypatch: pytest.MonkeyPatch) -> list[TrainState]:
    """Makes every step of `pretrain` add one to all parameters of a linear model; data, logs, checkpoints stay real.

    Returns:
        The state each step will have started from, in order.
    """
    started: list[TrainState] = []

    def compile_step(step, abstract, mesh):
        def stand_in(state, batch, trie):
            started.append(state)
            return _one_more(state), {"loss": (1.0, 1.0), "loss/level1": (1.0, 1.0), "skipped": (0.0, 1.0)}

        return stand_in

    def make_eval_step(model):
        return lambda state, batch, trie: {"loss": (jnp.sum(batch.target_item), 1.0)}

    monkeypatch.setattr(loop, "build", linear_model)
    monkeypatch.setattr(loop, "compile_step", compile_step)
    monkeypatch.setattr(loop, "make_eval_step", make_eval_step)
    return started


def instant_reward_training(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Makes the reward model one matrix, of which every entry has the gradient one; all else of `train_reward` is real.

    Returns:
        The shape [B,L] of the histories of every batch that a step will have been compiled for.
    """
    shapes: list[tuple[int, ...]] = []

    def build_reward(config: RewardConfig, vocabulary: Vocabulary) -> Any:
        def init(seed: int):
            return {"heads": {"0": {"kernel": jax.random.normal(jax.random.key(seed), (WIDTH, WIDTH))}}}

        return SimpleNamespace(config=config, vocabulary=vocabulary, init=init)

    def make_reward_loss(model):
        def loss(params, batch, catalogue, key):
            shapes.append(batch.short.item.shape)
            total = jax.tree.reduce(jnp.add, jax.tree.map(jnp.sum, params))
            return total, {"loss": (total, 1.0), "loss/p_score": (total, 1.0)}

        return loss

    monkeypatch.setattr(reward_training, "build_reward", build_reward)
    monkeypatch.setattr(reward_training, "make_reward_loss", make_reward_loss)
    return shapes


def instant_reinforcement(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Makes every step of `reinforce` add one to all parameters of a linear model, from candidates that nobody generated.

    Returns:
        What each step will have been made from: the policy that generates, the requests that it generates candidates for, and
        logged ones.
    """
    steps: list[dict[str, Any]] = []

    def make_experience(model, recipe, labels, reward):
        def stand_in(behaviour, began, reward_params, catalogue, listed, request, history, key):
            steps.append({"behaviour": behaviour, "request": request})
            return None, {"reward": (1.0, 1.0), "reward/best": (1.0, 1.0)}

        return stand_in

    def compiled(step, abstract, mesh):
        def stand_in(state, logged, seen, trie):
            steps[-1]["logged"] = logged
            metrics = {"rl/loss": (1.0, 1.0), "policy/log_p": (1.0, 1.0), "gradient_norm": (1.0, 1.0)}
            return _one_more(state), metrics | {"skipped": (0.0, 1.0)}

        return stand_in

    monkeypatch.setattr(rl_loop, "make_experience", make_experience)
    monkeypatch.setattr(rl_loop, "make_drift", lambda model, recipe: lambda start, policy, seen, trie: {})
    monkeypatch.setattr(rl_loop, "_compiled", compiled)
    return steps
