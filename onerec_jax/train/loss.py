"""Next-token prediction over the levels of a semantic ID (REFERENCE 1.4)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from onerec_jax.train.metrics import Metrics


def next_token_loss(
    logits: tuple[Array, ...], targets_BxTxC: Array, weight_BxT: Array, smoothing: float
) -> tuple[Array, Metrics]:
    """L_NTP = -sum_j log P(s^{j+1} | BOS, s^1..s^j), the report's sum over levels.

    Returns the sum over targets of weight * loss (to be divided by the sum of weights) and, as (sum, weight) pairs, the
    plain cross-entropy in nats per level and the top-1 accuracy per level.
    """
    total = jnp.zeros((), jnp.float32)
    weights = jnp.sum(weight_BxT)
    metrics: Metrics = {}
    for level, logits_BxTxV in enumerate(logits):
        target = jnp.where(weight_BxT > 0, targets_BxTxC[..., level], 0)
        log_p = jax.nn.log_softmax(logits_BxTxV)
        cross_entropy = -jnp.take_along_axis(log_p, target[..., None], axis=-1)[..., 0]
        loss = cross_entropy
        if smoothing:
            loss = (1 - smoothing) * cross_entropy - smoothing * jnp.mean(log_p, axis=-1)
        correct = (jnp.argmax(logits_BxTxV, axis=-1) == target).astype(jnp.float32)
        total = total + jnp.sum(jnp.where(weight_BxT > 0, loss * weight_BxT, 0.0))
        metrics[f"loss/level{level + 1}"] = (jnp.sum(cross_entropy * weight_BxT), weights)
        metrics[f"accuracy/level{level + 1}"] = (jnp.sum(correct * weight_BxT), weights)
    metrics["loss"] = (total, weights)
    return total, metrics
