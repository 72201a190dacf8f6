"""The divergence over items that were not generated, restated in NumPy."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from onerec_jax.posttrain.objectives import kl_of_rest


def test_what_was_not_generated_is_held_by_its_own_divergence_and_what_was_is_free():
    """Its gradient is zero at candidates; a request of no other item has neither value nor gradient."""
    rng = np.random.default_rng(5)
    items, width = 9, 9
    log_p, reference = rng.normal(size=(2, 4, items)).astype(np.float32)
    reference[0, 3] = -np.inf  # an item that the start does not give
    item = np.stack([rng.permutation(items)[:width] for _ in range(4)])
    valid = np.arange(width) < np.array([3, 5, 0, width])[:, None]
    expected = np.zeros(4)
    for b in range(4):
        rest = np.setdiff1d(np.flatnonzero(np.isfinite(reference[b])), item[b][valid[b]])
        if len(rest):
            now, then = (np.exp(x[b, rest]) / np.exp(x[b, rest]).sum() for x in (log_p, reference))
            expected[b] = (then * np.log(then / now)).sum()
    (found, metrics), gradient = jax.value_and_grad(kl_of_rest, has_aux=True)(log_p, reference, item, valid)
    assert float(found) == pytest.approx(expected.sum(), rel=1e-5) and expected[:3].min() > 0.1
    assert float(metrics["rl/rest_kl"][0]) == float(found) and float(metrics["rl/rest_kl"][1]) == 4
    for b in range(4):
        assert not np.any(gradient[b][item[b][valid[b]]])
    assert np.any(gradient[2]) and not np.any(gradient[3])
