"""Weights in files: every bit comes back, in shards, in fewer bytes, and to a reader of twenty lines."""

import json
import re
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from made_exports import random_weights
from safetensors.numpy import load_file
from tiny import SHAPES, VOCABULARY, tiny_model

from onerec_jax.config import TablesConfig
from onerec_jax.data.tensor_files import read_tensors, write_tensors
from onerec_jax.export import recommend
from onerec_jax.export.contents import settled
from onerec_jax.export.quantize import stored_as
from onerec_jax.model.onerec import build
from onerec_jax.train.exported import as_trees, named_weights, restored

MOE = {"moe": {"experts": 4, "active": 2, "hidden": 16, "tile": 8, "shared": 1}}
ALL = SHAPES | {"OneRec with experts": MOE}


def weights(**changes) -> dict[str, np.ndarray]:
    return named_weights(*random_weights(build(tiny_model(**changes), VOCABULARY)))


@pytest.mark.parametrize("shape", ALL.values(), ids=ALL)
def test_parameters_of_every_model_come_back_bit_by_bit(shape, tmp_path: Path):
    model = build(tiny_model(**shape), VOCABULARY)
    write_tensors(tmp_path, "model", stored_as(weights(**shape), "float32"))
    back = as_trees(read_tensors(tmp_path, "model"), model.abstract, model.tables)
    expected = random_weights(model)
    assert jax.tree.structure(back) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


def test_files_are_cut_where_they_would_grow_too_large(tmp_path: Path):
    rng = np.random.default_rng(0)
    tensors = {f"part.{i}": rng.random((10, i + 1)).astype(np.float32) for i in range(12)}
    write_tensors(tmp_path, "model", tensors, most_bytes=1000)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(names) > 2
    assert names == [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    for name in names:
        held = load_file(tmp_path / name)
        assert len(held) == 1 or sum(array.nbytes for array in held.values()) <= 1000
        assert all(index["weight_map"][key] == name for key in held)
    for read in (read_tensors, recommend.read_tensors):
        found = read(tmp_path, "model")
        assert found.keys() == tensors.keys()
        assert all((found[name] == tensors[name]).all() for name in tensors)


def test_the_reader_that_stands_alone_reads_every_type_that_is_written(tmp_path: Path):
    rng = np.random.default_rng(1)
    tensors = {
        "b": rng.standard_normal((3, 5)).astype(ml_dtypes.bfloat16),
        "i": rng.integers(-127, 128, (7, 3)).astype(np.int8),
        "n": rng.integers(0, 9, 4).astype(np.int32),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(2.5, np.float32),
        "f": rng.standard_normal((2, 3, 4)).astype(np.float32),
    }
    write_tensors(tmp_path, "mixed", tensors)
    found = recommend.read_tensors(tmp_path, "mixed")
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def test_a_file_that_is_none_is_named(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file"):
        read_tensors(tmp_path, "model")


@pytest.mark.parametrize("shape", ALL.values(), ids=ALL)
def test_fewer_bytes_cost_half_a_step_at_most_and_nothing_in_what_is_small(shape):
    named = weights(**shape)
    exact = {name for name in named if re.search(r"(scale|bias|router|bos|distance_bias|time_bias)$", name)}
    exact |= {name for name in named if name.startswith("bias.")}
    assert exact and exact < named.keys()
    half, byte = stored_as(named, "bfloat16"), stored_as(named, "int8")
    from_half, from_byte = restored(half), restored(byte)
    assert from_half.keys() == from_byte.keys() == named.keys()
    for name, array in named.items():
        for stored, back in ((half, from_half), (byte, from_byte)):
            assert back[name].dtype == np.float32
            assert (stored[name].dtype == np.float32) == (name in exact)
        if name in exact:
            assert (from_half[name] == array).all() and (from_byte[name] == array).all()
            continue
        assert (np.abs(from_half[name] - array) <= np.abs(array) * 2**-8).all()
        axis = -1 if re.search(r"(embedding|rows|position|queries)$", name) else -2
        step = np.abs(array).max(axis=axis, keepdims=True) / 127
        assert byte[name].dtype == np.int8 and byte[f"{name}.scale"].shape == step.shape
        assert (np.abs(from_byte[name] - array) <= 0.501 * step).all()


def test_int8_takes_three_tenths_of_float32_at_most():
    named = weights(d_model=128, heads=4, ffn_hidden=256, author_dim=512, feature_dim=128, static_dim=64, **MOE)
    sizes = [
        sum(array.nbytes for array in stored_as(named, dtype).values()) for dtype in ("float32", "bfloat16", "int8")
    ]
    assert sizes[1] <= 0.51 * sizes[0]
    assert sizes[2] <= 0.3 * sizes[0]


def test_a_channel_of_zeros_stays_zero():
    stored = stored_as({"params.heads.kernel": np.zeros((4, 3), np.float32)}, "int8")
    assert (restored(stored)["params.heads.kernel"] == 0).all()


def test_rows_that_wait_for_admission_are_exported_as_the_zeros_they_are_read_as():
    rows = np.ones((4, 2), np.float32)
    table = {"rows": rows, "accumulator": np.zeros(4), "appearances": np.array([0, 1, 2, 3], np.uint8)}
    found = settled({"author": table}, TablesConfig(admit_after=2))
    assert found["author"]["rows"].tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert (rows == 1).all()
