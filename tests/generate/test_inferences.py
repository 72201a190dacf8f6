"""Lists of several inferences: contexts with events left out, and the mean of what they give."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_batch, tiny_model

from onerec_jax.generate.inferences import average_lists, leave_out


@pytest.mark.parametrize("share", [0.0, 0.4, 0.99])
def test_events_left_out_keep_the_order_of_others_and_never_the_last_is_gone(share: float):
    batch = random_batch(tiny_model(short_length=12, causal=True, positive_length=0, lifelong_length=0), batch=200)
    shorter = leave_out(batch, share, np.random.default_rng(0))
    left = total = 0
    for b, items in enumerate(batch.short.item):
        before = [(int(i), *batch.short.codes[b, n].tolist()) for n, i in enumerate(items) if i >= 0]
        after = [(int(i), *shorter.short.codes[b, n].tolist()) for n, i in enumerate(shorter.short.item[b]) if i >= 0]
        rest = iter(before)
        assert all(event in rest for event in after)  # a subsequence
        assert after[-1:] == before[-1:]
        assert (shorter.short.item[b, len(after) :] == -1).all() and not shorter.short.author[b, len(after) :].any()
        assert (shorter.visible[b] <= len(after)).all()
        left, total = left + len(before) - len(after), total + max(0, len(before) - 1)
    assert abs(left / total - share) < 0.04
    if not share:
        np.testing.assert_array_equal(shorter.short.item, batch.short.item)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_average_of_lists_is_that_of_their_probabilities(data: st.DataObject):
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    lists, n, length, k = data.draw(st.integers(1, 4)), 3, 4, data.draw(st.integers(1, 9))
    items = np.stack([[rng.permutation(6)[:length] for _ in range(n)] for _ in range(lists)]).astype(np.int32)
    scores = -rng.random((lists, n, length)).astype(np.float32) * 5
    missing = rng.random(items.shape) < 0.2
    items[missing], scores[missing] = -1, -np.inf
    found, mean = average_lists(items, scores, k)
    for row in range(n):
        expected: dict[int, float] = {}
        for item, score in zip(items[:, row].ravel(), scores[:, row].ravel(), strict=True):
            if item >= 0:
                expected[item] = expected.get(item, 0.0) + np.exp(score) / lists
        ranked = sorted(expected, key=lambda item: -expected[item])[:k]
        assert [i for i in found[row].tolist() if i >= 0] == ranked
        np.testing.assert_allclose(np.exp(mean[row, : len(ranked)]), [expected[i] for i in ranked], rtol=1e-5)
        assert (found[row, len(ranked) :] == -1).all() and np.isneginf(mean[row, len(ranked) :]).all()
