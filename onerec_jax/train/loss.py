"""Next-token prediction over the levels of a semantic ID (REFERENCE 1.4)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from onerec_jax.model.prefixes import DeviceTrie, legal_log_probabilities
from onerec_jax.train.metrics import Metrics


def next_token_loss(
    logits: tuple[Array, ...],
    targets_BxTxC: Array,
    weight_BxT: Array,
    smoothing: float,
    trie: DeviceTrie | None = None,
) -> tuple[Array, Metrics]:
    """L_NTP = -sum_j log P(s^{j+1} | BOS, s^1..s^j), the report's sum over levels.

    Returns the sum over targets of weight * loss (to be divided by the sum of weights) and, as (sum, weight) pairs, the
    plain cross-entropy in nats per level and the top-1 accuracy per level. With a trie each level's softmax (and smoothing)
    is over the codes that go on to an item.
    """
    total = jnp.zeros((), jnp.float32)
    weights = jnp.sum(weight_BxT)
    metrics: Metrics = {}
    target_BxTxC = jnp.where(weight_BxT[..., None] > 0, targets_BxTxC, 0)
    if trie is None:
        levels = [(jax.nn.log_softmax(x), None) for x in logits]
    else:
        levels = legal_log_probabilities(logits, target_BxTxC, trie)
    for level, (log_p, legal) in enumerate(levels):
        target = target_BxTxC[..., level]
        cross_entropy = -jnp.take_along_axis(log_p, target[..., None], axis=-1)[..., 0]
        cross_entropy = jnp.where(weight_BxT > 0, cross_entropy, 0.0)  # what stands for a missing target may be no item
        loss = cross_entropy
        if smoothing:
            loss = (1 - smoothing) * cross_entropy - smoothing * jnp.mean(log_p, axis=-1, where=legal)
        correct = (jnp.argmax(log_p, axis=-1) == target).astype(jnp.float32)
        total = total + jnp.sum(jnp.where(weight_BxT > 0, loss * weight_BxT, 0.0))
        metrics[f"loss/level{level + 1}"] = (jnp.sum(cross_entropy * weight_BxT), weights)
        metrics[f"accuracy/level{level + 1}"] = (jnp.sum(correct * weight_BxT), weights)
    metrics["loss"] = (total, weights)
    return total, metrics
