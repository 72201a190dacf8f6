"""How far a policy has moved from the one that RL started from, and how sure it is: KL and entropy, for the log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from onerec_jax.config import Recipe
from onerec_jax.data.schema import Batch
from onerec_jax.model.onerec import Model
from onerec_jax.model.prefixes import DeviceTrie
from onerec_jax.posttrain.rollout import candidate_distributions, item_distribution, read_request
from onerec_jax.posttrain.step import Experience
from onerec_jax.train.metrics import Metrics

CANDIDATES = 32  # the first of each request, after whose prefixes it is measured


def make_drift(model: Model, recipe: Recipe) -> Callable[..., Metrics]:
    """Jitted: (start, policy, experience, trie) -> `policy/entropy/..` and `policy/kl/..` in nats, by level of the ID.

    Exact sums over all codes of a level, at the prefixes of the first `CANDIDATES` candidates of each request that count:
    H(π) and KL(π ‖ π_start) of the next code. With `rl.item_weight` those of the item head too, over the catalogue.
    """
    settings = recipe.rl

    def distributions(policy: Any, request: Batch, codes: Array, valid: Array, trie: DeviceTrie) -> dict[str, Array]:
        module, context, local = read_request(model, policy, request)
        levels = candidate_distributions(module, context, codes, valid, policy["bias"], trie, settings.distribution)
        found = {f"level{i}": log_p for i, log_p in enumerate(levels, 1)}
        return found | ({"items": item_distribution(module, context, local, trie)} if settings.item_weight else {})

    @jax.jit
    def drift(start: Any, policy: Any, seen: Experience, trie: DeviceTrie) -> Metrics:
        codes = seen.codes[:, :CANDIDATES]
        valid = (seen.group.valid & ~seen.group.logged)[:, :CANDIDATES]
        now, then = (distributions(of, seen.request, codes, valid, trie) for of in (policy, start))
        metrics: Metrics = {}
        for name, log_p in now.items():
            counts = jnp.ones(len(log_p)) if name == "items" else valid
            possible = jnp.isfinite(log_p)
            p, log_p = jnp.exp(log_p), jnp.where(possible, log_p, 0.0)
            apart = log_p - jnp.where(possible, then[name], 0.0)
            for kind, term in (("entropy", -log_p), ("kl", apart)):
                total = jnp.sum(p * term, axis=-1)
                metrics[f"policy/{kind}/{name}"] = (jnp.sum(jnp.where(counts, total, 0.0)), jnp.sum(counts))
        return metrics

    return drift
