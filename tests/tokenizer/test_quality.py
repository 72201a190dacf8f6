import functools
import io
import math

import numpy as np
import pytest
from rich.console import Console

from onerec_jax.tokenizer import rq_kmeans
from onerec_jax.tokenizer.quality import quality, table
from onerec_jax.tokenizer.quantizer import with_codebooks

BOOKS = (np.array([[0, 0], [4, 0], [0, 4], [4, 4]], np.float32), np.array([[0, 0], [1, 1]], np.float32))


def report_of(vectors, codes, batch_size=64):
    decode = functools.partial(rq_kmeans.decode, with_codebooks(BOOKS))
    sizes = (4, 2, *(int(column.max()) + 1 for column in codes.T[2:]))
    return quality(vectors, decode, codes, sizes, 2, batch_size)


def test_report_of_a_set_worked_out_by_hand():
    codes = np.array([[0, 0], [0, 0], [1, 1], [1, 0]], np.int32)
    vectors = np.array([[0, 0], [0, 2], [5, 1], [4, 0]], np.float32)
    report = report_of(vectors, codes)
    assert report["items"] == 4 and report["distinct_ids"] == 3
    assert report["collision_rate"] == report["quantized_collision_rate"] == 0.5
    assert report["items_per_id_largest"] == 2 and report["items_per_id_mean"] == pytest.approx(4 / 3)
    assert report["reconstruction_mse"] == pytest.approx(4 / 8)
    assert report["reconstruction_relative"] == pytest.approx(2 / 2.0001 / 8)
    first, second = report["levels"]
    assert first == {"codes": 4, "utilisation": 0.5, "entropy": pytest.approx(math.log(2))}
    assert second["utilisation"] == 1
    assert second["entropy"] == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_vectors_are_read_and_decoded_in_batches_that_do_not_change_the_result(batch_size):
    rng = np.random.default_rng(0)
    codes, vectors = rng.integers(0, (4, 2), (7, 2)).astype(np.int32), rng.normal(size=(7, 2)).astype(np.float32)
    report, whole = report_of(vectors, codes, batch_size), report_of(vectors, codes)
    for name, value in whole.items():
        assert report[name] == (pytest.approx(value, rel=1e-6) if name.startswith("reconstruction") else value)


def test_even_use_reaches_the_ceiling_and_one_code_has_no_entropy():
    codes = np.array([[code, 0] for code in range(4)], np.int32)
    even, single = report_of(np.zeros((4, 2), np.float32), codes)["levels"]
    assert even["entropy"] == pytest.approx(math.log(4)) and even["utilisation"] == 1
    assert single == {"codes": 2, "utilisation": 0.5, "entropy": 0.0}


def test_extra_level_counts_in_the_ids_but_not_in_the_quantized_ones():
    codes = np.array([[0, 0, 0], [0, 0, 1], [1, 1, 0]], np.int32)
    report = report_of(np.zeros((3, 2), np.float32), codes)
    assert report["collision_rate"] == 0 and report["quantized_collision_rate"] == pytest.approx(2 / 3)
    assert report["distinct_ids"] == 3 and report["levels"][2]["codes"] == 2


def test_table_prints_every_level_and_the_collisions():
    codes = np.array([[0, 0, 0], [0, 0, 1], [1, 1, 0]], np.int32)
    printed = io.StringIO()
    Console(width=100, file=printed).print(table(report_of(np.zeros((3, 2), np.float32), codes)))
    text = printed.getvalue()
    assert all(f"level {level}" in text for level in (1, 2, 3))
    assert "0.00%" in text and "66.67%" in text
