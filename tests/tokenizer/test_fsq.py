import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_jax.config import FiniteScalarQuantizer
from onerec_jax.errors import InputError
from onerec_jax.tokenizer import fsq
from onerec_jax.tokenizer.quantizer import Items

SMALL = FiniteScalarQuantizer(hidden=(16,), steps=150, batch_size=32, learning_rate=5e-3)


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(0)
    return (rng.normal(size=(150, 3)) @ rng.normal(size=(3, 6)) + 2).astype(np.float32)


def fit(vectors, sizes=(12, 4), settings=SMALL, seed=0):
    return fsq.fit(Items(vectors, sizes, seed, batch_size=64), settings)


@pytest.fixture(scope="module")
def fitted(vectors):
    return fit(vectors)


rounding = jax.jit(fsq.rounded)


def layout(*sizes):
    """The arrays that codes and latents need, without an autoencoder."""
    groups = [fsq.group_values(size) for size in sizes]
    return {
        "sizes": np.array(sizes), "values": np.array([value for group in groups for value in group], int),
        "level": np.repeat(np.arange(len(sizes)), [len(group) for group in groups]),
        "latent_mean": np.zeros(sum(map(len, groups)), np.float32),
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------- values and rounding


@pytest.mark.parametrize(
    ("size", "values"),
    [
        (1, ()), (2, (2,)), (7, (7,)), (8, (8,)), (11, (11,)), (16, (4, 4)), (26, (13, 2)), (100, (5, 5, 4)),
        (256, (8, 8, 4)), (512, (8, 8, 8)), (1024, (8, 8, 4, 4)), (8192, (8, 8, 8, 4, 4)),
    ],
)  # fmt: skip
def test_the_values_of_a_level_multiply_to_its_size(size, values):
    found = fsq.group_values(size)
    assert math.prod(found) == size and len(found) == len(values)
    assert sorted(found) == sorted(values)


@pytest.mark.parametrize(("size", "near"), [(17, "16 or 18"), (257, "256 or 260"), (34, "33 or 35")])
def test_a_size_that_is_no_product_of_small_values_is_refused_with_the_nearest_that_are(vectors, size, near):
    with pytest.raises(InputError, match=rf"codebook_sizes has {size}, .* products of 2 to 16, such as {near}"):
        fit(vectors, (8, size))


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 13, 16])
def test_bounding_and_rounding_equal_a_numpy_restatement(count):
    latent = np.linspace(-6, 6, 2001)[:, None]
    span = (count - 1) / 2 * 1.001 * np.tanh(latent) - (0 if count % 2 else 0.5)
    rounded = np.asarray(rounding(jnp.asarray(latent, jnp.float32), jnp.array([count])))
    clear = np.abs(span - np.floor(span) - 0.5) > 1e-4  # not on the edge between two values
    np.testing.assert_allclose(rounded[clear], np.round(span)[clear], atol=1e-6)
    assert sorted(np.unique(np.round(rounded))) == list(range(-(count // 2), count - count // 2))
    centred = fsq.centred(rounded, np.array([count]))
    assert np.abs(centred).max() < 1.001


def test_rounding_passes_on_the_gradient_of_the_bound():
    latent, values = jnp.array([[0.3, -1.2, 2.0]]), jnp.array([2, 5, 8])
    slope = jax.jit(jax.grad(lambda z: jnp.sum(fsq.rounded(z, values))))(latent)
    np.testing.assert_allclose(slope, (values - 1) / 2 * 1.001 * (1 - np.tanh(latent) ** 2), rtol=1e-5)


@pytest.mark.parametrize("sizes", [(12, 4), (256,), (1, 26, 30)])
def test_every_code_has_its_own_latent_and_comes_back_from_it(sizes):
    arrays = layout(*sizes)
    codes = np.stack([np.arange(max(sizes)) % size for size in sizes], 1)
    integers = fsq.integers_of(arrays, codes)
    assert len(np.unique(integers, axis=0)) == len(np.unique(codes, axis=0))
    np.testing.assert_array_equal(fsq.codes_of(arrays, integers.astype(int)), codes)
    reached = np.arctanh((integers + (arrays["values"] % 2 == 0) / 2) / ((arrays["values"] - 1) / 2 * 1.001))
    np.testing.assert_allclose(rounding(jnp.asarray(reached), jnp.asarray(arrays["values"])), integers, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 6, 35, 64, 121, 256]), min_size=1, max_size=4), st.data())
def test_a_code_is_the_mixed_radix_number_of_its_digits(sizes, data):
    arrays = layout(*sizes)
    digits = np.array([data.draw(st.integers(0, int(value) - 1)) for value in arrays["values"]], int)
    expected = []
    for level in range(len(sizes)):
        code = 0
        for digit, value in zip(*(part[arrays["level"] == level] for part in (digits, arrays["values"])), strict=True):
            code = code * value + digit
        expected.append(code)
    assert fsq.codes_of(arrays, digits[None] - arrays["values"] // 2)[0].tolist() == expected


def test_normalised_latents_are_centred_and_spread_and_a_constant_one_is_0():
    latent = np.random.default_rng(0).normal(5, 3, size=(400, 2)).astype(np.float32)
    latent[:, 1] = 7
    out = np.asarray(jax.jit(fsq.normalised)(latent))
    np.testing.assert_allclose(out.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(out.std(0), [0.9, 0], atol=1e-4)


# ------------------------------------------------------------------------------------------------- fit, encode and decode


def numpy_mlp(arrays, name, rows):
    for number in range(2):
        rows = rows @ np.float64(arrays[f"{name}_{number}_kernel"]) + arrays[f"{name}_{number}_bias"]
        rows = np.maximum(rows, 0) if number == 0 else rows
    return rows


def test_encoding_the_fitted_vectors_gives_the_fitted_codes(vectors, fitted):
    assert fitted.codes.dtype == np.int32 and fitted.codes.shape == (150, 2)
    for batch_size in (1000, 50, 7):
        np.testing.assert_array_equal(fsq.encode(fitted.arrays, vectors, batch_size), fitted.codes)


def test_encode_and_decode_equal_a_numpy_restatement(vectors, fitted):
    arrays, values = fitted.arrays, fitted.arrays["values"]
    assert values.tolist() == [4, 3, 4]
    latent = numpy_mlp(arrays, "encoder", (vectors - arrays["mean"]) / arrays["scale"])
    span = (values - 1) / 2 * 1.001 * np.tanh(latent) - (values % 2 == 0) / 2
    clear = (np.abs(span - np.floor(span) - 0.5) > 1e-4).all(1)
    integers = np.round(span)
    digits = integers + values // 2
    codes = np.stack([digits[:, 0] * 3 + digits[:, 1], digits[:, 2]], 1)
    np.testing.assert_array_equal(fitted.codes[clear], codes[clear])
    decoded = numpy_mlp(arrays, "decoder", integers / (values // 2)) * arrays["scale"] + arrays["mean"]
    np.testing.assert_allclose(fsq.decode(arrays, codes.astype(int)), decoded, rtol=1e-4, atol=1e-4)


def test_a_prefix_is_decoded_with_the_mean_latents_of_the_levels_that_miss(vectors, fitted):
    arrays = fitted.arrays
    integers = fsq.integers_of(arrays, fitted.codes)
    np.testing.assert_allclose(arrays["latent_mean"], integers.mean(0), atol=1e-5)
    integers[:, 2] = integers[:, 2].mean()
    expected = numpy_mlp(arrays, "decoder", integers / (arrays["values"] // 2)) * arrays["scale"] + arrays["mean"]
    np.testing.assert_allclose(fsq.decode(arrays, fitted.codes[:, :1]), expected, rtol=1e-4, atol=1e-4)
    assert len(np.unique(fsq.decode(arrays, fitted.codes[:, :0]), axis=0)) == 1


def test_training_brings_decoded_vectors_near_and_each_level_nearer(vectors, fitted):
    nothing, first, both = (
        np.mean((vectors - fsq.decode(fitted.arrays, fitted.codes[:, :levels])) ** 2) for levels in range(3)
    )
    assert both < first < nothing and both < 0.5 * vectors.var(0).mean()


def test_nearly_every_code_is_used(fitted):
    assert [len(np.unique(column)) for column in fitted.codes.T] >= [10, 4]


def test_the_same_seed_gives_the_same_arrays_and_another_seed_others(vectors, fitted):
    again, other = fit(vectors), fit(vectors, seed=1)
    for name, array in fitted.arrays.items():
        np.testing.assert_array_equal(array, again.arrays[name])
    assert (fitted.arrays["encoder_0_kernel"] != other.arrays["encoder_0_kernel"]).any()


@pytest.mark.parametrize("items", [1, 150])
def test_vectors_that_are_all_alike_share_one_id_without_loss(items):
    constant = np.full((items, 6), 0.7, np.float32)
    fitted = fit(constant)
    assert len(np.unique(fitted.codes, axis=0)) == 1
    np.testing.assert_allclose(fsq.decode(fitted.arrays, fitted.codes), constant, atol=0.1)


def test_fewer_items_than_codes_get_ids_of_their_own_and_duplicates_share():
    vectors = np.repeat(np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32), 2, axis=0)
    fitted = fit(vectors, (64, 16))
    np.testing.assert_array_equal(fitted.codes[::2], fitted.codes[1::2])
    assert len(np.unique(fitted.codes, axis=0)) == 4


def test_levels_of_one_code_carry_nothing(vectors):
    fitted = fit(vectors, (1, 1))
    assert not fitted.codes.any()
    assert len(np.unique(fsq.decode(fitted.arrays, fitted.codes), axis=0)) == 1


def test_values_widths_and_codes_that_do_not_fit_are_refused(vectors, fitted):
    broken = vectors.copy()
    broken[17, 2] = np.nan
    for use in (fit, lambda rows: fsq.encode(fitted.arrays, rows)):
        with pytest.raises(InputError, match="item row 17"):
            use(broken)
    with pytest.raises(InputError, match="width 5 do not fit an encoder of vectors of width 6"):
        fsq.encode(fitted.arrays, np.zeros((2, 5), np.float32))
    with pytest.raises(InputError, match="level 1 has codes outside 0 to 3"):
        fsq.decode(fitted.arrays, np.array([[0, 4]]))
