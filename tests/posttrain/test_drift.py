"""Entropy and KL of a policy against sums over every code, each scored by itself."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import PLAIN, random_batch, tiny_model

from onerec_jax.config import RLConfig
from onerec_jax.data.schema import LABELS, Vocabulary
from onerec_jax.model.onerec import build
from onerec_jax.model.prefixes import device_trie
from onerec_jax.posttrain.drift import CANDIDATES, make_drift
from onerec_jax.posttrain.group import Group
from onerec_jax.posttrain.rollout import candidate_log_p, item_distribution, item_log_p
from onerec_jax.posttrain.step import Experience
from onerec_jax.tokenizer.trie import Trie
from onerec_jax.train.metrics import ratios

SIZES = (4, 3)
VOCABULARY = Vocabulary(users=9, items=6, authors=20, tags=7, user_features=(3, 4), labels=LABELS, codebook_sizes=SIZES)
CODES = np.array([[0, 0], [0, 2], [1, 1], [3, 0], [3, 1], [3, 2]], np.int32)
TRIE = Trie.build(CODES, np.arange(6.0))


@pytest.mark.parametrize("distribution", ["all", "legal"])
def test_entropy_and_kl_are_sums_over_every_code(distribution: Any):
    model = build(tiny_model(**{**PLAIN, "heads": 1, "head": "both", "item_input": "both"}), VOCABULARY)
    request = random_batch(model.config, VOCABULARY, batch=2)
    policies = []
    for seed in (0, 1):
        params, tables = model.init(seed)
        policies.append({"params": jax.tree.map(lambda x: 2 * x, params), "tables": tables, "bias": model.init_bias()})
    chosen = np.array([[0, 2, 3, 5], [4, 1, 2, 2]])
    codes, valid = CODES[chosen], np.array([[True, True, True, False], [True, True, False, False]])
    logged = np.zeros_like(valid)
    logged[0, 1] = True  # what was not generated is left out
    nothing = jnp.zeros(valid.shape)
    group = Group(nothing[..., None], nothing[..., None], nothing[..., None], nothing, valid, logged, nothing)  # type: ignore[arg-type]
    trie = device_trie(TRIE, model.config)
    seen = Experience(request, codes, group, codes, nothing, valid)  # type: ignore[arg-type]
    recipe: Any = SimpleNamespace(rl=RLConfig(distribution=distribution, item_weight=1.0, constrained=True))
    found = ratios(make_drift(model, recipe)(policies[1], policies[0], seen, trie))

    def parts(policy: Any):
        local, rows = model.read(policy["tables"], request)
        module = model.bind(policy["params"])
        return module, module.encode(local, rows, policy["bias"], None)[0], local

    @jax.jit
    def score(policy: Any, codes: jax.Array) -> jax.Array:
        module, context, _ = parts(policy)
        return candidate_log_p(
            module, context, codes, jnp.ones(codes.shape[:2], bool), policy["bias"], trie, distribution
        )

    def codes_after(policy: Any, b: int, g: int, level: int) -> np.ndarray:
        """P of every code of a level, -inf where it leads to no item and only those that do are asked for."""
        log_p = np.full(SIZES[level], -np.inf)
        for code in range(SIZES[level]):
            item = [i for i in CODES.tolist() if i[:level] == codes[b, g, :level].tolist() and i[level] == code]
            if distribution == "legal" and not item:
                continue
            other = item[0] if item else [*codes[b, g, :level].tolist(), code, *[0] * (len(SIZES) - level - 1)]
            asked = np.broadcast_to(np.array(other, np.int32), codes.shape)
            log_p[code] = score(policy, asked)[b, g, level]
        return log_p

    def expected(now: np.ndarray, then: np.ndarray) -> tuple[float, float]:
        on = np.isfinite(now)
        p = np.exp(now[on])
        assert p.sum() == pytest.approx(1, abs=1e-5)
        return float(-(p * now[on]).sum()), float((p * (now[on] - then[on])).sum())

    assert valid.shape[1] <= CANDIDATES
    counted = np.argwhere(valid & ~logged).tolist()
    for level in range(2):
        each = [expected(*(codes_after(policy, b, g, level) for policy in policies)) for b, g in counted]
        told = found[f"policy/entropy/level{level + 1}"], found[f"policy/kl/level{level + 1}"]
        np.testing.assert_allclose(told, np.mean(each, axis=0), rtol=1e-4, atol=1e-6)
    everything, every = np.tile(np.arange(6, dtype=np.int32), (2, 1)), np.ones((2, 6), bool)
    scored = []
    for policy in policies:
        module, context, local = parts(policy)
        scored.append(
            np.asarray(item_log_p(item_distribution(module, context, local, trie), everything, every))[..., 0]
        )
    each = [expected(now, then) for now, then in zip(*scored, strict=True)]
    told = found["policy/entropy/items"], found["policy/kl/items"]
    np.testing.assert_allclose(told, np.mean(each, axis=0), rtol=1e-4, atol=1e-6)
    assert min(found[f"policy/kl/{name}"] for name in ("level1", "level2", "items")) > 1e-3
