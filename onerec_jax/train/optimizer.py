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


def width_shares(params: Any, share: float, muon: bool = False) -> Any:
    """What the rate of each leaf is multiplied by where the model is 1 / `share` times as wide as the one it was found for.

    muP (Yang et al. 2022, table 3): Adam's step on a matrix whose inputs grow with the width shrinks as they do; vectors,
    embeddings and what reads features of a fixed width keep theirs. Muon's step is orthogonal, not of low rank, and shrinks as
    the root.
    """
    by_muon = _muon_axes(params) if muon else jax.tree.map(lambda _: None, params)

    def one(path: Any, _: Any, axes: Any) -> float:
        name = path_name(path)
        if not name.endswith(("kernel", "/gate", "/up", "/down", "/router")) or name.endswith("static/mlp/up/kernel"):
            return 1.0
        return share if axes is None else share**0.5

    return jax.tree_util.tree_map_with_path(one, params, by_muon)


def make_optimizer(config: TrainConfig, width_share: float = 1.0) -> optax.GradientTransformation:
    """Global-norm clip, then AdamW (Loshchilov and Hutter 2019), or Muon for matrices with AdamW for the rest.

    Args:
        config: rates, decays and the schedule.
        width_share: `ModelConfig.width_share`. Weight decay does not follow it: a step takes the same share of all matrices,
            which is what keeps them in proportion (Wang and Aitchison 2024).
    """
    rate, decay, muon = learning_rate(config), config.weight_decay, config.optimizer == "muon"
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    follows = width_share != 1.0
    if muon:
        decay_here = 0.0 if follows else decay
        update = contrib.muon(
            -1.0 if follows else rate, weight_decay=decay_here, weight_decay_mask=is_matrix, adam_b1=config.b1,
            adam_b2=config.b2, adam_weight_decay=decay_here, consistent_rms=0.2, muon_weight_dimension_numbers=_muon_axes,
        )  # fmt: skip
    elif follows:
        update = optax.scale_by_adam(b1=config.b1, b2=config.b2)
    else:
        update = optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=decay, mask=is_matrix)
    if not follows:
        return optax.chain(clip, update)

    def by_width(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda u, share: u * share, updates, width_shares(params, width_share, muon))

    return optax.chain(
        clip, update, optax.stateless(by_width), optax.add_decayed_weights(decay, is_matrix),
        optax.scale_by_learning_rate(rate),
    )  # fmt: skip
