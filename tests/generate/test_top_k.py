from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_jax.generate.top_k import PART, top_k

_top_k = jax.jit(top_k, static_argnums=1)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31), st.sampled_from([1, 3, 8]), st.sampled_from([5, 33 * PART - 7, 40 * PART]), st.integers(1, 6)
)
def test_both_stages_together_find_what_sorting_finds_also_among_equals(seed, k, n, digits):
    x = np.random.default_rng(seed).integers(0, 10**digits, (2, n)).astype(np.float32)
    values, place = _top_k(jnp.asarray(x), k)
    order = np.argsort(-x, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(place, order)
    np.testing.assert_array_equal(values, np.take_along_axis(x, order, axis=1))


def test_where_fewer_than_k_are_finite_the_rest_is_minus_infinity():
    x = np.full((1, 50 * PART + 3), -np.inf, np.float32)
    x[0, [7, 5000]] = 1.0, 2.0
    values, place = top_k(jnp.asarray(x), 4)
    assert np.asarray(values)[0].tolist() == [2.0, 1.0, -np.inf, -np.inf]
    assert np.asarray(place)[0, :2].tolist() == [5000, 7]
