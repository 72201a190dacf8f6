import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.config import RQVAE
from onerec_jax.errors import InputError
from onerec_jax.tokenizer import autoencoder, letter, rq_vae
from onerec_jax.tokenizer.quantizer import Items, codebooks

SMALL = RQVAE(hidden=(16,), latent=4, steps=400, batch_size=32, learning_rate=1e-2, dead_after=20)


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(0)
    return (rng.normal(size=(150, 3)) @ rng.normal(size=(3, 6)) + 2).astype(np.float32)


def fit(vectors, sizes=(8, 6), settings=SMALL, seed=0, behaviour=None):
    return rq_vae.fit(Items(vectors, sizes, seed, iterations=4, batch_size=64, behaviour=behaviour), settings)


@pytest.fixture(scope="module")
def fitted(vectors):
    return fit(vectors)


def numpy_mlp(arrays, name, rows):
    count = sum(key.startswith(name) and key.endswith("kernel") for key in arrays)
    for number in range(count):
        rows = rows @ np.float64(arrays[f"{name}_{number}_kernel"]) + arrays[f"{name}_{number}_bias"]
        rows = np.maximum(rows, 0) if number + 1 < count else rows
    return rows


def numpy_quantize(books, latent):
    codes, residuals, chosen = [], [], []
    for book in books:
        residuals.append(latent)
        codes.append(((latent[:, None] - book) ** 2).sum(2).argmin(1))
        chosen.append(np.float64(book)[codes[-1]])
        latent = latent - chosen[-1]
    return codes, residuals, chosen


# -------------------------------------------------------------------------------------------------------------- the step


@pytest.fixture(scope="module")
def problem():
    """Parameters and constants of a tiny step, with what NumPy makes of them: latent, codes, residuals, chosen codes."""
    rng = np.random.default_rng(1)
    widths, vectors = (5, 6, 3), rng.normal(size=(9, 5)).astype(np.float32)
    books = tuple(jnp.asarray(rng.normal(size=(size, 3)), jnp.float32) for size in (4, 6))
    parameters = {
        "encoder": autoencoder.new_layers(widths, rng), "decoder": autoencoder.new_layers(widths[::-1], rng),
        "books": books, "projection": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32),
    }  # fmt: skip
    groups = tuple(letter.group_codes(np.asarray(book), 0) for book in books)
    behaviour = jnp.asarray(rng.normal(size=(9, 2)), jnp.float32)
    constants = rq_vae.Constants(jnp.asarray(vectors), behaviour, groups, jax.random.key(0))
    arrays = autoencoder.as_arrays("encoder", parameters["encoder"])
    arrays |= autoencoder.as_arrays("decoder", parameters["decoder"])
    rows = np.array([0, 2, 3, 5, 8])
    latent = numpy_mlp(arrays, "encoder", np.float64(vectors[rows]))
    return parameters, constants, rows, arrays, numpy_quantize(books, latent)


def loss_of(problem, **changes):
    parameters, constants, rows, *_ = problem
    settings = SMALL.model_copy(update=changes)
    value = jax.jit(rq_vae.objective, static_argnums=1)
    return value(parameters, settings, constants, jnp.asarray(rows), jax.random.key(3))[0]


@pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
def test_the_loss_of_a_step_equals_a_numpy_restatement(problem, estimator):
    _, constants, rows, arrays, (_, residuals, chosen) = problem
    decoded = numpy_mlp(arrays, "decoder", sum(chosen))
    error = ((np.asarray(constants.vectors)[rows] - decoded) ** 2).sum(1)
    distance = sum(((residual - code) ** 2).sum(1) for residual, code in zip(residuals, chosen, strict=True))
    expected = np.mean(error + (1 + 0.7) * distance)
    np.testing.assert_allclose(loss_of(problem, commitment=0.7, estimator=estimator), expected, rtol=1e-5)


def test_letters_terms_are_added_to_the_loss_with_their_weights(problem):
    parameters, constants, rows, _, (codes, _, chosen) = problem
    plain = loss_of(problem)
    projected = jnp.asarray(sum(chosen), jnp.float32) @ parameters["projection"]
    infonce = jax.jit(letter.collaborative)(projected, constants.behaviour[rows])
    np.testing.assert_allclose(loss_of(problem, collaborative_weight=0.3), plain + 0.3 * infonce, rtol=1e-5)
    spread = sum(
        jax.jit(letter.diversity)(book, jnp.asarray(code), group, jax.random.fold_in(jax.random.key(3), level))
        for level, (book, code, group) in enumerate(zip(parameters["books"], codes, constants.groups, strict=True))
    )
    np.testing.assert_allclose(loss_of(problem, diversity_weight=0.2), plain + 0.2 * spread, rtol=1e-5)


def test_codes_move_towards_the_residuals_of_their_items_and_by_nothing_else(problem):
    parameters, constants, rows, _, (codes, residuals, chosen) = problem
    gradient = jax.jit(jax.grad(rq_vae.objective, has_aux=True), static_argnums=1)
    slope = gradient(parameters, SMALL, constants, jnp.asarray(rows), jax.random.key(0))[0]["books"]
    for book, found, code, residual, own in zip(parameters["books"], slope, codes, residuals, chosen, strict=True):
        expected = np.zeros(book.shape)
        np.add.at(expected, code, 2 * (own - residual) / len(rows))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def value_and_slopes(estimator, latent, quantized, weight):
    """What the estimator gives, and the gradients of its weighted sum with respect to the latent and the codes."""
    slopes = jax.grad(lambda z, q: jnp.sum(weight * estimator(z, q)), (0, 1))(latent, quantized)
    return estimator(latent, quantized), slopes


def test_straight_through_gives_the_codes_and_passes_their_gradient_on_unchanged():
    rng = np.random.default_rng(0)
    latent, quantized, weight = (jnp.asarray(rng.normal(size=(4, 3)), jnp.float32) for _ in range(3))
    value, slopes = value_and_slopes(rq_vae.straight_through, latent, quantized, weight)
    np.testing.assert_array_equal(value, quantized)
    np.testing.assert_array_equal(slopes[0], weight)
    assert not slopes[1].any()


def test_the_rotation_trick_gives_the_codes_exactly_and_turns_their_gradient_back():
    rng = np.random.default_rng(0)
    latent, quantized, weight = (rng.normal(size=(7, 4)).astype(np.float32) for _ in range(3))
    value, slopes = value_and_slopes(rq_vae.rotated, latent, quantized, weight)
    np.testing.assert_array_equal(value, quantized)
    assert not slopes[1].any()
    for z, q, w, slope in zip(latent, quantized, weight, slopes[0], strict=True):
        start, end = z / np.linalg.norm(z), q / np.linalg.norm(q)
        middle = (start + end) / np.linalg.norm(start + end)
        turn = np.eye(4) - 2 * np.outer(middle, middle) + 2 * np.outer(end, start)
        np.testing.assert_allclose(turn @ turn.T, np.eye(4), atol=1e-5)  # a rotation that takes z to q
        np.testing.assert_allclose(np.linalg.norm(q) * turn @ start, q, atol=1e-5)
        np.testing.assert_allclose(slope, np.linalg.norm(q) / np.linalg.norm(z) * turn.T @ w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("latent", "quantized"), [([0, 0], [1, 2]), ([1, 2], [0, 0]), ([1, 2], [-1, -2])])
def test_the_rotation_trick_stands_zeros_and_opposites(latent, quantized):
    latent, quantized = np.array([latent], np.float32), np.array([quantized], np.float32)
    value, slopes = value_and_slopes(rq_vae.rotated, latent, quantized, np.ones_like(latent))
    np.testing.assert_array_equal(value, quantized)
    assert np.isfinite(slopes[0]).all()


# ------------------------------------------------------------------------------------------------------------ dead codes


def test_a_code_without_items_for_long_moves_to_a_residual_of_the_step():
    book = np.arange(8, dtype=np.float32).reshape(4, 2)
    codes, residuals = np.array([1, 1, 1]), 100 + np.arange(6, dtype=np.float32).reshape(3, 2)
    found = rq_vae.Quantized((jnp.asarray(codes),), (jnp.asarray(residuals),), (jnp.asarray(book[codes]),))
    idle = (jnp.array([9, 9, 3, 8]),)
    books, idle = jax.jit(rq_vae.revive, static_argnums=3)((jnp.asarray(book),), idle, found, 10, 5)
    np.testing.assert_array_equal(idle[0], [0, 0, 4, 9])  # 0: revived, 1: taken, 2 and 3: still waiting
    np.testing.assert_array_equal(books[0][1:], book[1:])
    assert any((np.asarray(books[0][0]) == residual).all() for residual in residuals)


def test_a_codebook_of_which_one_code_is_alive_comes_to_life(vectors):
    data = Items(vectors, (8, 6), iterations=4, batch_size=64)
    state = rq_vae._start(vectors, np.zeros((150, 0), np.float32), data, SMALL)
    books = tuple(jnp.asarray(np.concatenate([book[:1], book[1:] + 1e3])) for book in state.parameters["books"])
    state = state._replace(parameters=state.parameters | {"books": books})
    constants = rq_vae.Constants(jnp.asarray(vectors), jnp.zeros((150, 0)), (), jax.random.key(0))
    for rows in autoencoder.batches(150, SMALL, np.random.default_rng(0)):
        state = autoencoder.run(rq_vae.train_step, SMALL, state, constants, rows)
    parameters = state.parameters
    codes, _, _ = numpy_quantize(parameters["books"], autoencoder.outputs(parameters["encoder"], vectors, 64))
    assert [len(np.unique(code)) for code in codes] >= [7, 5]


def test_codes_that_no_item_has_move_to_items_far_from_their_codes_and_the_others_stay():
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(60, 2)).astype(np.float32)
    books = [np.concatenate([latent[:3], np.full((5, 2), 99)]).astype(np.float32), np.full((6, 2), 50, np.float32)]
    filled = rq_vae.use_all(latent, books, 16)
    codes, residuals, _ = numpy_quantize(filled, latent)
    assert [len(np.unique(code)) for code in codes] == [8, 6]
    np.testing.assert_array_equal(filled[0][:3], books[0][:3])
    before = ((latent[:, None] - books[0]) ** 2).sum(2).min(1)
    assert any((filled[0][3:] == latent[before.argmax()]).all(1))
    assert (residuals[1] ** 2).sum() < before.sum()


# ------------------------------------------------------------------------------------------------- fit, encode and decode


def test_every_code_is_used_and_encoding_the_fitted_vectors_gives_the_fitted_codes(vectors, fitted):
    assert fitted.codes.dtype == np.int32
    assert [len(np.unique(column)) for column in fitted.codes.T] == [8, 6]
    for batch_size in (1000, 50, 7):
        np.testing.assert_array_equal(rq_vae.encode(fitted.arrays, vectors, batch_size), fitted.codes)


def test_encode_and_decode_equal_a_numpy_restatement_for_every_prefix(vectors, fitted):
    mean, scale = fitted.arrays["mean"], fitted.arrays["scale"]
    latent = numpy_mlp(fitted.arrays, "encoder", (vectors - mean) / scale)
    codes, _, chosen = numpy_quantize(codebooks(fitted.arrays), latent)
    np.testing.assert_array_equal(fitted.codes, np.stack(codes, 1))
    for levels in range(3):
        expected = numpy_mlp(fitted.arrays, "decoder", sum(chosen[:levels], np.zeros_like(latent))) * scale + mean
        decoded = rq_vae.decode(fitted.arrays, fitted.codes[:, :levels])
        assert decoded.dtype == np.float32
        np.testing.assert_allclose(decoded, expected, rtol=1e-4, atol=1e-4)


def test_training_brings_decoded_vectors_near_and_each_level_nearer(vectors, fitted):
    first, both = (np.mean((vectors - rq_vae.decode(fitted.arrays, fitted.codes[:, :n])) ** 2) for n in (1, 2))
    assert both < first < vectors.var(0).mean() and both < 0.5 * vectors.var(0).mean()


def test_the_same_seed_gives_the_same_arrays_and_another_seed_others(vectors, fitted):
    again, other = fit(vectors), fit(vectors, seed=1)
    for name, array in fitted.arrays.items():
        np.testing.assert_array_equal(array, again.arrays[name])
    assert (fitted.arrays["codebook_0"] != other.arrays["codebook_0"]).any()


def test_behaviour_draws_items_that_are_met_together_to_one_code():
    rng = np.random.default_rng(0)
    vectors, kind = rng.normal(size=(150, 6)).astype(np.float32), np.repeat([0, 1], 75)
    vectors[:, 0] += kind  # there to be found, but not what reconstruction is about
    behaviour = np.eye(2, dtype=np.float32)[kind]

    def purity(weight):
        settings = SMALL.model_copy(update={"collaborative_weight": weight})
        codes = fit(vectors, settings=settings, behaviour=lambda: behaviour).codes[:, 0]
        return sum(max(np.bincount(kind[codes == code])) for code in np.unique(codes)) / 150

    assert purity(100.0) > purity(0.0) + 0.1


def test_diversity_changes_the_codes_that_are_learned(vectors, fitted):
    diverse = fit(vectors, settings=SMALL.model_copy(update={"diversity_weight": 1.0}))
    assert np.abs(diverse.arrays["codebook_0"] - fitted.arrays["codebook_0"]).max() > 1e-3


def test_behaviour_is_asked_for_only_with_a_collaborative_weight(vectors):
    def refuse():
        raise AssertionError("not needed")

    fit(vectors, behaviour=refuse)
    with pytest.raises(InputError, match=r"collaborative_weight is 0\.5 but these items come without behaviour"):
        fit(vectors, settings=SMALL.model_copy(update={"collaborative_weight": 0.5}))


# ------------------------------------------------------------------------------------------------------ degenerate input


@pytest.mark.parametrize("items", [1, 150])
def test_vectors_that_are_all_alike_share_one_id_without_loss(items):
    constant = np.full((items, 6), 0.7, np.float32)
    fitted = fit(constant)
    assert len(np.unique(fitted.codes, axis=0)) == 1
    np.testing.assert_allclose(rq_vae.decode(fitted.arrays, fitted.codes), constant, atol=1e-3)


def test_fewer_items_than_codes_get_codes_of_their_own_and_duplicates_share():
    vectors = np.repeat(np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32), 2, axis=0)
    fitted = fit(vectors, (16, 6))
    np.testing.assert_array_equal(fitted.codes[::2], fitted.codes[1::2])
    assert len(np.unique(fitted.codes[:, 0])) == 4


def test_values_widths_and_codes_that_do_not_fit_are_refused(vectors, fitted):
    broken = vectors.copy()
    broken[17, 2] = np.nan
    for use in (fit, lambda rows: rq_vae.encode(fitted.arrays, rows)):
        with pytest.raises(InputError, match="item row 17"):
            use(broken)
    with pytest.raises(InputError, match="width 5 do not fit an encoder of vectors of width 6"):
        rq_vae.encode(fitted.arrays, np.zeros((2, 5), np.float32))
    with pytest.raises(InputError, match="level 1 has codes outside 0 to 5"):
        rq_vae.decode(fitted.arrays, np.array([[0, 6]]))
