from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_model

from onerec_jax.model import prefixes
from onerec_jax.model.prefixes import device_trie, legal_log_probabilities
from onerec_jax.tokenizer.trie import Trie

SIZES = (40, 9, 5)


def test_a_legal_softmax_and_its_gradient_are_the_same_by_bits_and_by_children(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(0, size, 200) for size in SIZES], axis=1).astype(np.int32)
    trie = Trie.build(codes, np.zeros(200))
    by_bits = device_trie(trie, tiny_model())
    monkeypatch.setattr(prefixes, "DENSE_SHARE", 0)
    by_children = device_trie(trie, tiny_model())
    assert by_bits.is_dense(0) and not by_children.is_dense(0)
    targets = codes[rng.integers(0, 200, (4, 3))]
    logits = [jnp.asarray(rng.normal(size=(4, 3, size)), jnp.float32) for size in SIZES]

    def value(logits, trie):
        found = legal_log_probabilities(tuple(logits), jnp.asarray(targets), trie)
        own = [jnp.take_along_axis(p, targets[..., i, None], axis=-1) for i, (p, _) in enumerate(found)]
        return sum(jnp.sum(x) for x in own), [legal for _, legal in found]

    run = jax.jit(jax.value_and_grad(value, has_aux=True))
    ours, theirs = run(logits, by_bits), run(logits, by_children)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
    for level, legal in enumerate(ours[0][1]):
        rows = np.broadcast_to(legal, (4, 3, SIZES[level])).reshape(12, -1)  # at the root one for all
        for path, row in zip(targets.reshape(-1, 3), rows, strict=True):
            same = (codes[:, :level] == path[:level]).all(axis=1)
            assert sorted(set(codes[same, level].tolist())) == np.flatnonzero(row).tolist()
