"""The optimizer of the dense parameters; id tables have their own in `model.tables`."""

from __future__ import annotations

from typing import Any

import jax
import optax
from optax import contrib

from onerec_jax.config import TrainConfig
from onerec_jax.parallel.sharding import path_name

_DECAYED = ("kernel", "gate", "up", "down", "router", "embedding")


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up, then cosine to `final_rate` of the peak, or constant."""
    peak, warmup = config.learning_rate, min(config.warmup_steps, config.steps)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(1, config.steps - warmup), alpha=config.final_rate)
    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([optax.linear_schedule(0.0 if warmup else peak, peak, max(1, warmup)), after], [warmup])


def is_matrix(params: Any) -> Any:
    """True for weights that decay: matrices and embeddings, not norms, biases or positions."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path).rsplit("/", 1)[-1] in _DECAYED, params)


def _muon_axes(params: Any) -> Any:
    """The two matrix axes of hidden weights (leading axes are batches of matrices); None means AdamW."""

    def axes(path: Any, leaf: Any) -> Any:
        name = path_name(path)
        hidden = name.endswith(("kernel", "/gate", "/up", "/down")) and "/heads/" not in name and leaf.ndim >= 2
        return contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1) if hidden else None

    return jax.tree_util.tree_map_with_path(axes, params)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Global-norm clip, then AdamW (Loshchilov and Hutter 2019), or Muon for matrices with AdamW for the rest."""
    rate = learning_rate(config)
    if config.optimizer == "muon":
        update = contrib.muon(
            rate, weight_decay=config.weight_decay, weight_decay_mask=is_matrix, adam_b1=config.b1, adam_b2=config.b2,
            adam_weight_decay=config.weight_decay, consistent_rms=0.2, muon_weight_dimension_numbers=_muon_axes,
        )  # fmt: skip
    else:
        update = optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=is_matrix)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, update)
