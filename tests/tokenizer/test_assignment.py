import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.tokenizer import assignment
from onerec_jax.tokenizer.assignment import assign

ROWS, CODES, WIDTH, TILE = 512, 1100, 16, 64


@pytest.fixture(scope="module")
def compiled():
    return jax.jit(assign, static_argnums=(2, 3))


def brute_force(rows, centroids):
    return ((rows.astype(np.float64)[:, None] - centroids.astype(np.float64)) ** 2).sum(2)


def clustered(rng):
    """Codes in bunches that bfloat16 cannot tell apart: 10 codes within .01 of each other."""
    centroids = np.repeat(rng.normal(size=(CODES // 10, WIDTH)), 10, axis=0) + 1e-2 * rng.normal(size=(CODES, WIDTH))
    return centroids[rng.integers(0, CODES, ROWS)] + 1e-3 * rng.normal(size=(ROWS, WIDTH)), centroids


def spread(rng):
    return rng.normal(size=(ROWS, WIDTH)), rng.normal(size=(CODES, WIDTH))


def one_far_code(rng):
    rows, centroids = spread(rng)
    centroids[7] = 100
    return rows, centroids


def on_a_grid(rng):
    """Many ties: rows and codes are points of a small grid."""
    return rng.integers(0, 2, (ROWS, WIDTH)), rng.integers(0, 2, (CODES, WIDTH))


CASES = {case.__name__: case for case in (spread, clustered, one_far_code, on_a_grid)}


@pytest.mark.parametrize("case", CASES)
def test_float32_assignment_is_the_nearest_code_whatever_bfloat16_can_tell(case, compiled):
    rows, centroids = (np.float32(array) for array in CASES[case](np.random.default_rng(0)))
    codes = np.asarray(compiled(rows, centroids, "float32", TILE))
    distances = brute_force(rows, centroids)
    scale = (np.abs(centroids).max() ** 2 + 1) * WIDTH
    np.testing.assert_allclose(distances[np.arange(ROWS), codes], distances.min(1), atol=4e-7 * scale)


def test_the_error_bound_holds_and_is_not_idle():
    for case in CASES.values():
        rows, centroids = (np.float32(array) for array in case(np.random.default_rng(2)))
        book = assignment._book(jnp.asarray(centroids))
        near = rows - np.asarray(book.origin_D)
        codes = np.asarray(book.codes_KxD, np.float64)[:CODES]
        exact = 0.5 * (codes**2).sum(1) - near.astype(np.float64) @ codes.T
        low = [
            assignment._value(assignment._ordered(part) & -book.members)
            for part in assignment._scores(near, book, "bfloat16")
        ]
        scores = np.stack(low, axis=2).reshape(ROWS, -1)[:, :CODES]
        error, bound = np.abs(scores - exact).max(1), np.asarray(assignment._error(jnp.asarray(near), book))
        assert (error <= bound).all()
        assert (error > bound / 100).any()


def test_rows_that_bfloat16_cannot_tell_are_doubted_and_others_are_not():
    for case, least, most in ((spread, 0.5, 1), (clustered, 0, 0.01)):
        rows, centroids = (jnp.asarray(array, jnp.float32) for array in case(np.random.default_rng(3)))
        book = assignment._book(centroids)
        proved = np.asarray(assignment._screened(rows - book.origin_D, book, prove=True)[1])
        assert least <= proved.mean() <= most, case


@pytest.mark.parametrize("count", [1, 63, 130])
def test_numbers_of_rows_that_no_tile_divides(count, compiled):
    rows, centroids = (np.float32(array) for array in spread(np.random.default_rng(4)))
    expected = np.asarray(compiled(rows, centroids, "float32", TILE))[:count]
    np.testing.assert_array_equal(compiled(rows[:count], centroids, "float32", TILE), expected)


def test_bfloat16_assignment_is_nearly_the_nearest(compiled):
    rows, centroids = (np.float32(array) for array in spread(np.random.default_rng(5)))
    distances = brute_force(rows, centroids)
    codes = np.asarray(compiled(rows, centroids, "bfloat16", TILE))
    assert distances[np.arange(ROWS), codes].sum() < 1.001 * distances.min(1).sum()
