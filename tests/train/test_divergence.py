"""Steps that are not finite change nothing; a loss that leaps is noticed."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.config import FaultsConfig
from onerec_jax.errors import StoppedError
from onerec_jax.train.divergence import Divergence, counted, stop_if_lost, where_finite
from onerec_jax.train.metrics import add, ratios


def _line(loss: float, skipped: float = 0.0) -> dict[str, float]:
    return {"loss": loss, "skipped": skipped}


def test_a_loss_is_a_leap_beyond_so_many_medians_of_the_last_ten_lines():
    divergence = Divergence(FaultsConfig(spike_factor=3.0))
    assert divergence.found(_line(100.0)) is None
    assert divergence.found(_line(1000.0)) is None  # no median yet
    for loss in np.linspace(10, 6, 20):
        assert divergence.found(_line(float(loss))) is None
    usual = np.median(np.linspace(10, 6, 20)[-10:])
    assert divergence.found(_line(3 * usual - 0.01)) is None
    found = divergence.found(_line(25.0))
    assert found is not None and "25.000" in found and "spike_factor 3" in found
    assert divergence.found(_line(25.0)) is not None  # a leap is no part of what is usual


def test_a_factor_of_zero_lets_any_finite_loss_pass():
    divergence = Divergence(FaultsConfig(spike_factor=0.0))
    for loss in (1.0, 1.0, 1.0, 1.0, 1e6):
        assert divergence.found(_line(loss)) is None
    assert divergence.found(_line(float("nan"))) and divergence.found(_line(float("inf")))
    assert divergence.found(_line(0.0, skipped=1.0)) and divergence.found(_line(1.0, skipped=0.9)) is None


def test_skipped_steps_have_no_weight_in_a_log_line_and_are_counted():
    bad = {"loss": (jnp.float32("nan"), jnp.float32(4.0)), "targets": (jnp.float32(7.0), jnp.float32(1.0))}
    good = {"loss": (jnp.float32(8.0), jnp.float32(4.0)), "targets": (jnp.float32(5.0), jnp.float32(1.0))}
    line = ratios(
        add(add(counted(jnp.asarray(False), bad), counted(jnp.asarray(True), good)), counted(jnp.asarray(True), good))
    )
    assert line == pytest.approx({"loss": 2.0, "targets": 5.0, "skipped": 1 / 3})


def test_what_is_not_finite_leaves_every_bit_of_the_old():
    old = {"a": jnp.asarray([-0.0, 1.0]), "b": [jnp.asarray([2], jnp.int32)]}
    new = {"a": jnp.asarray([jnp.nan, 2.0]), "b": [jnp.asarray([3], jnp.int32)]}
    kept = where_finite(jnp.asarray(False), new, old)
    assert kept["a"].tobytes() == old["a"].tobytes() and kept["b"][0] == 2
    assert where_finite(jnp.asarray(True), new, old)["b"][0] == 3


def test_a_loop_that_cannot_go_back_stops_when_nothing_is_learnt():
    stop_if_lost(5, {"skipped": 0.99})
    with pytest.raises(StoppedError, match=r"step 5.*finite"):
        stop_if_lost(5, {"skipped": 1.0})
