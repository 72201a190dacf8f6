import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.tokenizer import letter

collaborative, diversity = jax.jit(letter.collaborative), jax.jit(letter.diversity)


def softmax_loss(scores, own):
    return np.log(np.exp(scores).sum()) - own


def test_the_collaborative_loss_equals_infonce_among_items_with_behaviour():
    rng = np.random.default_rng(0)
    projected, behaviour = rng.normal(size=(6, 3)), rng.normal(size=(6, 3))
    behaviour[[1, 4]] = 0
    known = [0, 2, 3, 5]
    expected = [softmax_loss(projected[i] @ behaviour[known].T, projected[i] @ behaviour[i]) for i in known]
    loss = collaborative(jnp.asarray(projected, jnp.float32), jnp.asarray(behaviour, jnp.float32))
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)


def test_the_collaborative_loss_falls_when_an_item_moves_to_its_own_behaviour():
    behaviour = jnp.eye(4)
    assert collaborative(behaviour, behaviour) < collaborative(behaviour[::-1], behaviour)


def test_a_batch_without_behaviour_has_no_collaborative_loss_and_no_gradient():
    value, slope = jax.value_and_grad(collaborative)(jnp.ones((3, 2)), jnp.zeros((3, 2)))
    assert value == 0 and not slope.any()


@pytest.mark.parametrize("codes", [1, 2, 3, 20, 47, 256])
def test_groups_are_a_partition_of_the_codes_into_about_equal_parts(codes):
    groups = letter.group_codes(np.random.default_rng(0).normal(size=(codes, 3)).astype(np.float32), 0)
    order, first, count, position = map(np.asarray, groups)
    assert sorted(order) == list(range(codes))
    np.testing.assert_array_equal(order[first + position], np.arange(codes))
    assert (position < count).all()
    assert count.max() <= -(-codes // len(np.unique(first)))
    assert len(np.unique(first)) == max(1, min(10, codes // 2))


def test_codes_that_lie_together_are_of_one_group():
    corners = np.repeat(np.eye(10, dtype=np.float32) * 9, 4, axis=0)
    book = corners + np.random.default_rng(0).normal(size=corners.shape).astype(np.float32) * 0.01
    first = np.asarray(letter.group_codes(book, 0).first).reshape(10, 4)
    assert (first == first[:, :1]).all() and len(np.unique(first)) == 10


def pairs(codes):
    """Groups {0, 1}, {2, 3}, ...: each code has one other."""
    order = jnp.arange(codes)
    return letter.Groups(order, order // 2 * 2, jnp.full(codes, 2), order % 2)


def test_the_diversity_loss_equals_its_equation():
    book = np.random.default_rng(0).normal(size=(6, 3))
    codes = np.array([0, 3, 3, 4])
    expected = []
    for code in codes:
        others = [other for other in range(6) if other != code]
        expected.append(softmax_loss(book[others] @ book[code], book[code] @ book[code ^ 1]))
    loss = diversity(jnp.asarray(book, jnp.float32), jnp.asarray(codes), pairs(6), jax.random.key(0))
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)


def test_descending_the_diversity_loss_brings_a_group_together_and_apart_from_the_others():
    book = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)
    slope = jax.grad(diversity)(book, jnp.arange(6), pairs(6), jax.random.key(0))
    before, after = (np.asarray(book @ book.T), np.asarray((book - 0.1 * slope) @ (book - 0.1 * slope).T))
    together = np.kron(np.eye(3), 1 - np.eye(2)).astype(bool)
    apart = ~together & ~np.eye(6, dtype=bool)
    assert (after - before)[together].mean() > 0 > (after - before)[apart].mean()


def test_the_positive_is_any_other_code_of_the_group():
    book = jnp.asarray(np.random.default_rng(1).normal(size=(5, 2)), jnp.float32)
    groups = letter.Groups(*map(jnp.asarray, ([4, 1, 3, 0, 2], [3, 0, 3, 0, 0], [2, 3, 2, 3, 3], [0, 1, 1, 2, 0])))
    seen = {round(float(diversity(book, jnp.array([1]), groups, jax.random.key(n))), 4) for n in range(20)}
    dense = np.asarray(book, np.float64)
    possible = {round(softmax_loss(dense[[0, 2, 3, 4]] @ dense[1], dense[1] @ dense[other]), 4) for other in (3, 4)}
    np.testing.assert_allclose(sorted(seen), sorted(possible), atol=2e-4)


def test_a_code_alone_in_its_group_has_no_diversity_loss():
    groups = letter.group_codes(np.ones((1, 2), np.float32), 0)
    value, slope = jax.value_and_grad(diversity)(jnp.ones((1, 2)), jnp.zeros(3, int), groups, jax.random.key(0))
    assert value == 0 and not slope.any()
