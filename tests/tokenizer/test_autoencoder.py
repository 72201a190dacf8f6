import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.config import FiniteScalarQuantizer
from onerec_jax.errors import InputError
from onerec_jax.tokenizer import autoencoder


def step_rows(items, **settings):
    rng = np.random.default_rng(0)
    return np.concatenate(list(autoencoder.batches(items, FiniteScalarQuantizer(**settings), rng)))


def test_every_item_comes_once_before_any_comes_again():
    drawn = step_rows(12, batch_size=5, steps=24).ravel()
    for epoch in drawn.reshape(10, 12):
        assert sorted(epoch) == list(range(12))


def test_a_step_takes_no_more_items_than_there_are():
    assert step_rows(3, batch_size=8, steps=4).shape == (4, 3)


def test_the_rows_of_the_steps_do_not_depend_on_the_chunks_they_come_in(monkeypatch):
    whole = step_rows(7, batch_size=4, steps=11)
    monkeypatch.setattr(autoencoder, "CHUNK", 3)
    np.testing.assert_array_equal(step_rows(7, batch_size=4, steps=11), whole)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_outputs_equal_a_numpy_mlp_in_batches_of_any_size(batch_size):
    rng = np.random.default_rng(0)
    layers, rows = autoencoder.new_layers((3, 5, 2), rng), rng.normal(size=(9, 3)).astype(np.float32)
    (first, _), (last, _) = layers
    expected = np.maximum(rows @ np.asarray(first), 0) @ np.asarray(last)
    np.testing.assert_allclose(autoencoder.outputs(layers, rows, batch_size), expected, rtol=1e-4, atol=1e-5)


def test_layers_survive_being_arrays():
    rng = np.random.default_rng(0)
    layers = tuple((kernel, bias + 1) for kernel, bias in autoencoder.new_layers((3, 4, 5, 2), rng))
    arrays = autoencoder.as_arrays("decoder", layers)
    assert sorted(arrays)[:2] == ["decoder_0_bias", "decoder_0_kernel"] and len(arrays) == 6
    for pair, again in zip(layers, autoencoder.as_layers("decoder", arrays), strict=True):
        for array, same in zip(pair, again, strict=True):
            np.testing.assert_array_equal(array, same)


def test_standardised_vectors_have_mean_0_and_one_common_scale():
    vectors = (np.random.default_rng(0).normal(size=(50, 3)) * [1, 2, 3] + 7).astype(np.float32)
    rows = autoencoder.standardised(autoencoder.standard(vectors), vectors)
    np.testing.assert_allclose(rows.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(np.mean(rows**2), 1, rtol=1e-5)
    np.testing.assert_allclose(rows.std(0) / rows.std(0)[0], vectors.std(0) / vectors.std(0)[0], rtol=1e-4)


def test_vectors_that_are_all_alike_keep_their_scale():
    vectors = np.full((20, 3), 0.7, np.float32)
    arrays = autoencoder.standard(vectors)
    assert arrays["scale"] == 1 and arrays["scale"].shape == ()
    np.testing.assert_allclose(autoencoder.standardised(arrays, vectors), 0, atol=1e-6)


def append(settings, state, constants, rows):
    """A step that shows which rows it was given, in which order."""
    return 7 * state + constants * rows.sum()


def test_steps_run_in_order_and_no_more_of_them_than_there_are(monkeypatch):
    monkeypatch.setattr(autoencoder, "CHUNK", 4)
    settings, state, expected = FiniteScalarQuantizer(batch_size=2, steps=6), jnp.array(1), 1
    for rows in autoencoder.batches(3, settings, np.random.default_rng(0)):
        state = autoencoder.run(append, settings, state, jnp.array(2), rows)
        for row in rows:
            expected = 7 * expected + 2 * row.sum()
    assert state == expected


def test_training_that_diverged_is_an_error_that_names_the_learning_rate():
    with pytest.raises(InputError, match=r"fsq diverged with tokenizer\.quantizer\.learning_rate 9\.0"):
        autoencoder.check_trained({"encoder": np.array([1.0, np.nan])}, FiniteScalarQuantizer(learning_rate=9))
