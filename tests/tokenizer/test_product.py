import numpy as np
import pytest

from onerec_jax.config import ProductQuantizer
from onerec_jax.errors import InputError
from onerec_jax.tokenizer import product
from onerec_jax.tokenizer.quantizer import Items, codebooks

ROTATE = {"plain": ProductQuantizer(rotate=False), "rotated": ProductQuantizer(rotate=True)}


def fit(vectors, sizes=(8, 8), settings=ROTATE["rotated"], **kwargs):
    return product.fit(Items(vectors, sizes, **{"iterations": 8, "batch_size": 128, **kwargs}), settings)


def loss(vectors, fitted):
    return float(np.mean((vectors - product.decode(fitted.arrays, fitted.codes)) ** 2))


@pytest.fixture(scope="module")
def correlated():
    """Width 6, of which the first two directions of a random basis carry nearly all; the mean is not 0."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    return (3 + (rng.normal(size=(500, 6)) * [9, 6, 0.5, 0.3, 0.2, 0.1]) @ basis).astype(np.float32)


@pytest.mark.parametrize("settings", ROTATE.values(), ids=ROTATE)
def test_encode_equals_a_numpy_restatement_and_the_fitted_codes(correlated, settings):
    fitted = fit(correlated, (8, 8, 4, 4), settings)
    books = codebooks(fitted.arrays)
    assert [book.shape for book in books] == [(8, 2), (8, 2), (4, 1), (4, 1)]
    rotation = fitted.arrays.get("rotation", np.eye(6)).astype(np.float64)
    parts = np.split((correlated - correlated.mean(0, dtype=np.float64)) @ rotation, [2, 4, 5], axis=1)
    expected = [((part[:, None] - book) ** 2).sum(2).argmin(1) for part, book in zip(parts, books, strict=True)]
    codes = product.encode(fitted.arrays, correlated, 64)
    assert codes.dtype == np.int32
    np.testing.assert_array_equal(codes, np.stack(expected, axis=1))
    np.testing.assert_array_equal(codes, fitted.codes)


def test_the_rotation_is_orthogonal(correlated):
    for vectors in (correlated, np.ones((500, 6), np.float32)):
        rotation = fit(vectors, iterations=2).arrays["rotation"]
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(6), atol=1e-5)


def test_a_rotation_loses_less_on_correlated_data(correlated):
    plain, rotated = (loss(correlated, fit(correlated, (8, 8), settings)) for settings in ROTATE.values())
    assert rotated < 0.8 * plain


def test_a_rotation_does_no_harm_where_the_parts_are_right_as_they_are():
    rng = np.random.default_rng(0)
    centres = 10 * rng.normal(size=(2, 8, 3))
    apart = np.concatenate([book[rng.integers(0, 8, 500)] for book in centres], axis=1).astype(np.float32)
    plain, rotated = (loss(apart, fit(apart, (8, 8), settings)) for settings in ROTATE.values())
    assert rotated <= plain + 1e-6


def test_alternating_improves_on_the_eigenvectors_it_starts_from(correlated):
    once, often = (loss(correlated, fit(correlated, (8, 8), iterations=count)) for count in (1, 12))
    assert often < once


def test_eigenvalues_are_spread_so_that_their_products_are_alike():
    covariance = np.diag([64.0, 1, 32, 2, 16, 4])
    order = np.abs(product.balanced_eigenvectors(covariance, 3)).argmax(0)
    products = np.diag(covariance)[order].reshape(3, 2).prod(1)
    assert sorted(order.tolist()) == list(range(6)) and products.tolist() == [64, 64, 64]


@pytest.mark.parametrize("settings", ROTATE.values(), ids=ROTATE)
def test_a_prefix_decodes_to_its_parts_and_the_mean_of_the_rest(correlated, settings):
    fitted = fit(correlated, (8, 8), settings)
    none, one, both = (product.decode(fitted.arrays, fitted.codes[:, :levels]) for levels in (0, 1, 2))
    np.testing.assert_allclose(none, np.tile(correlated.mean(0), (500, 1)), atol=1e-4)
    errors = [np.mean((correlated - decoded) ** 2) for decoded in (none, one, both)]
    assert errors == sorted(errors, reverse=True)
    rotation = fitted.arrays.get("rotation", np.eye(6, dtype=np.float32))
    inside = (one - fitted.arrays["mean"]) @ rotation
    np.testing.assert_allclose(inside[:, :3], codebooks(fitted.arrays)[0][fitted.codes[:, 0]], atol=1e-4)
    np.testing.assert_allclose(inside[:, 3:], 0, atol=1e-4)


def test_same_seed_same_codes(correlated):
    first, again, other = (fit(correlated, seed=seed).codes for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("settings", ROTATE.values(), ids=ROTATE)
@pytest.mark.parametrize("vectors", [np.ones((1, 2)), np.ones((6, 2)), np.repeat(np.eye(2), 3, axis=0)])
def test_constant_and_repeated_vectors_come_back_without_loss(settings, vectors):
    vectors = vectors.astype(np.float32)
    fitted = fit(vectors, (8, 8), settings, iterations=4)
    assert len(np.unique(fitted.codes, axis=0)) == len(np.unique(vectors, axis=0))
    np.testing.assert_allclose(product.decode(fitted.arrays, fitted.codes), vectors, atol=1e-5)


def test_input_of_no_use_is_refused(correlated):
    broken = correlated.copy()
    broken[7, 1] = np.nan
    with pytest.raises(InputError, match="item row 7"):
        fit(broken)
    with pytest.raises(InputError, match=r"codebook_sizes has 7 levels but content vectors have 6 values"):
        fit(correlated, (2,) * 7)
    fitted = fit(correlated, iterations=1)
    with pytest.raises(InputError, match="width 5 do not fit codebooks of width 6"):
        product.encode(fitted.arrays, correlated[:, :5], 64)
    with pytest.raises(InputError, match="level 1 has codes outside 0 to 7"):
        product.decode(fitted.arrays, np.array([[0, 8]]))
