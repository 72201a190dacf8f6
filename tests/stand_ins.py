"""Stand-ins for what takes XLA long to compile, so that the code around it can run in milliseconds."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.config import ModelConfig
from onerec_jax.data.schema import Vocabulary
from onerec_jax.model.moe.router import Routed
from onerec_jax.model.onerec import Outputs
from onerec_jax.train import loop
from onerec_jax.train.state import TrainState

WIDTH = 4


def linear_model(config: ModelConfig, vocabulary: Vocabulary) -> Any:
    """A model of one matrix and one table that predicts the first code of every target from the user alone.

    Its experts have a fixed, uneven load. `micro_batches` collects the batch sizes it is traced with.
    """
    codes, experts = vocabulary.codebook_sizes[0], max(4, config.moe.experts)
    micro_batches: set[int] = set()

    def init(seed: int):
        keys = jax.random.split(jax.random.key(seed))
        params = {"heads": {"0": {"kernel": jax.random.normal(keys[0], (WIDTH, codes))}}}
        rows = jax.random.normal(keys[1], (vocabulary.authors, WIDTH))
        return params, {"author": {"rows": rows, "accumulator": jnp.zeros(len(rows))}}

    def bind(params):
        def forward(batch, rows, bias, key, trie, decoded):
            micro_batches.add(batch.user.shape[0])
            logits = rows["author"][batch.user[:, 0] % vocabulary.authors] @ params["heads"]["0"]["kernel"]
            load = jnp.arange(1.0, 1 + experts)[None, :]
            routed = Routed(load, jnp.zeros(1), jnp.zeros(1))
            logits = jnp.broadcast_to(logits[:, None, :], (*batch.target_weight.shape, codes))
            return Outputs((logits,), None, None, {"decoder": routed})

        return SimpleNamespace(outputs=forward)

    return SimpleNamespace(
        config=config,
        vocabulary=vocabulary,
        init=init,
        init_bias=lambda: {"decoder": jnp.zeros((1, experts))},
        bind=bind,
        localise=lambda batch, touched_only: (batch, {"author": None}),
        micro_batches=micro_batches,
    )


def instant_training(monkeypatch: pytest.MonkeyPatch) -> list[TrainState]:
    """Makes every step of `pretrain` add one to all parameters of a linear model; data, logs, checkpoints stay real.

    Returns:
        The state each step will have started from, in order.
    """
    started: list[TrainState] = []

    def compile_step(step, abstract, mesh):
        def one_more(leaf):
            return jax.device_put(np.asarray(leaf) + np.ones((), leaf.dtype), leaf.sharding)

        def stand_in(state, batch, trie):
            started.append(state)
            state = dataclasses.replace(state, step=one_more(state.step), params=jax.tree.map(one_more, state.params))
            return state, {"loss": (1.0, 1.0), "loss/level1": (1.0, 1.0)}

        return stand_in

    def make_eval_step(model):
        return lambda state, batch, trie: {"loss": (jnp.sum(batch.target_item), 1.0)}

    monkeypatch.setattr(loop, "build", linear_model)
    monkeypatch.setattr(loop, "compile_step", compile_step)
    monkeypatch.setattr(loop, "make_eval_step", make_eval_step)
    return started
