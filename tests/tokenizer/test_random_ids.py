import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_jax.config import RandomIds, SequentialIds
from onerec_jax.errors import InputError
from onerec_jax.tokenizer import random_ids
from onerec_jax.tokenizer.quantizer import Items
from onerec_jax.tokenizer.random_ids import random_codes, sequential_codes

KINDS = {"random": RandomIds(), "sequential": SequentialIds()}
SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


def fit(items, sizes, kind, seed=0):
    vectors = np.random.default_rng(9).normal(size=(items, 3)).astype(np.float32)
    return vectors, random_ids.fit(Items(vectors, sizes, seed=seed), KINDS[kind])


@settings(max_examples=40, deadline=None)
@given(items=st.integers(1, 300), sizes=SIZES)
def test_no_two_items_are_alike_while_ids_last(items, sizes):
    capacity = int(np.prod(sizes))
    for codes in (random_codes(items, sizes, 0), sequential_codes(items, sizes)):
        assert codes.dtype == np.int32 and codes.shape == (items, len(sizes))
        assert (codes >= 0).all() and (codes < sizes).all()
        if items <= capacity:
            assert len(np.unique(codes, axis=0)) == items


@settings(max_examples=40, deadline=None)
@given(items=st.integers(1, 300), sizes=SIZES)
def test_sequential_ids_are_the_row_scaled_to_the_id_space_in_mixed_radix(items, sizes):
    capacity = int(np.prod(sizes))
    numbers = [row * capacity // items for row in range(items)]
    np.testing.assert_array_equal(sequential_codes(items, sizes), np.stack(np.unravel_index(numbers, sizes), axis=1))


def test_leading_codes_of_sequential_ids_are_runs_of_equal_length():
    column = sequential_codes(1003, (10, 256, 256))[:, 0]
    runs = np.bincount(column, minlength=10)
    assert (np.diff(column) >= 0).all() and runs.max() - runs.min() <= 1


def test_random_ids_are_uniform_and_seeded():
    codes = random_codes(20_000, (4, 8, 1000), 0)
    share = np.bincount(codes[:, 1], minlength=8) / 20_000
    assert np.abs(share - 1 / 8).max() < 0.01
    np.testing.assert_array_equal(codes, random_codes(20_000, (4, 8, 1000), 0))
    assert (codes != random_codes(20_000, (4, 8, 1000), 1)).any()


def test_more_ids_than_int64_counts_are_no_obstacle():
    codes = random_codes(2000, (1_000_000,) * 5, 0)
    assert len(np.unique(codes, axis=0)) == 2000 and codes.max() > 900_000
    assert len(np.unique(sequential_codes(2000, (1_000_000,) * 5), axis=0)) == 2000


def test_with_more_items_than_ids_the_items_are_spread_over_them():
    codes = random_codes(8000, (4, 4), 0)
    count = np.bincount(codes[:, 0] * 4 + codes[:, 1], minlength=16)
    assert count.min() > 400 and count.max() < 600
    assert np.bincount(sequential_codes(8000, (4, 4)) @ [4, 1]).tolist() == [500] * 16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(3, 5, 7), (2, 3)])
def test_a_prefix_decodes_to_the_mean_of_the_items_under_it(kind, sizes):
    vectors, fitted = fit(40, sizes, kind)
    for length in range(len(sizes) + 1):
        prefixes = np.unique(fitted.codes[:, :length], axis=0) if length else np.zeros((1, 0), int)
        expected = [vectors[(fitted.codes[:, :length] == prefix).all(1)].mean(0) for prefix in prefixes]
        np.testing.assert_allclose(random_ids.decode(fitted.arrays, prefixes), expected, atol=1e-5)


def test_an_id_nobody_has_decodes_to_its_longest_prefix_that_somebody_has():
    vectors, fitted = fit(3, (4, 50), "sequential")
    assert fitted.codes[:, 0].tolist() == [0, 1, 2]
    np.testing.assert_allclose(random_ids.decode(fitted.arrays, np.array([[2, 7]]))[0], vectors[2], atol=1e-6)
    np.testing.assert_allclose(random_ids.decode(fitted.arrays, np.array([[3, 7]]))[0], vectors.mean(0), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_new_vectors_cannot_be_encoded(kind):
    vectors, fitted = fit(1, (2, 2), kind)
    with pytest.raises(InputError, match=r"cannot encode .*use another tokenizer\.quantizer\.kind"):
        random_ids.encode(fitted.arrays, vectors, 8)
    with pytest.raises(InputError, match="level 1 has codes outside 0 to 1"):
        random_ids.decode(fitted.arrays, np.array([[0, 2]]))


def test_a_nan_is_refused_with_its_row():
    with pytest.raises(InputError, match="item row 1"):
        random_ids.fit(Items(np.array([[0.0], [np.nan]]), (4,)), RandomIds())
