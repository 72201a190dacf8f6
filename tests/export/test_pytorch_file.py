"""The standalone file as an export directory has it: its weights, id tables, requests and script."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from onerec_jax.data.tensor_files import write_tensors
from onerec_jax.export import pytorch_model, recommend
from onerec_jax.export.quantize import DType, stored_as
from onerec_jax.generate.recommender import Recommender
from onerec_jax.model.tables import bucket_rows, stored_rows, stripe
from onerec_jax.train.exported import named_weights, restored


@pytest.mark.parametrize("rows", [500, 70_000, 300_000])
def test_an_id_table_is_read_where_its_rows_are_stored(rows: int):
    table = pytorch_model.IdTable(rows, 300_000, 1)
    table.rows = torch.nn.Parameter(torch.arange(stored_rows(rows), dtype=torch.float32)[:, None])
    ids = np.random.default_rng(0).integers(0, 300_000, 1000).astype(np.int32)
    expected = stripe(bucket_rows(jnp.asarray(ids), rows, 300_000), rows)
    np.testing.assert_array_equal(table(torch.from_numpy(ids))[:, 0].detach().numpy(), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_weights_are_read_from_shards_as_what_their_type_stands_for(
    dtype: DType, random_tiny: Recommender, exported: Path, tmp_path: Path
):
    for name in ("config.json", "catalogue.safetensors"):
        shutil.copyfile(exported / name, tmp_path / name)
    state = random_tiny.state
    stored = stored_as(named_weights(state.params, state.tables, state.bias), dtype)
    write_tensors(tmp_path, "model", stored, sum(array.nbytes for array in stored.values()) // 3)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    own = pytorch_model.load(tmp_path).state_dict()
    expected = {name: np.asarray(array) for name, array in restored(stored).items()}
    for name in ("encoder.position", "decoder.codes.embedding", "decoder.heads.1.kernel"):
        np.testing.assert_array_equal(own[name], expected[f"params.{name}"])
    np.testing.assert_array_equal(own["tables.author.rows"], expected["tables.author.rows"])
    for part in ("self_attention.out.kernel", "ffn.moe.down", "ffn.moe.router"):
        stacked = expected[f"params.decoder.stack.groups.blocks.0.{part}"]
        np.testing.assert_array_equal(own[f"decoder.stack.0.{part}"], stacked[0])
    np.testing.assert_array_equal(own["decoder.stack.0.ffn.moe.bias"], expected["bias.decoder"][0])


def test_the_script_prints_the_list_that_the_stablehlo_gives_a_user(exported: Path, tmp_path: Path):
    served = recommend.load(exported)
    user = served.users()[0]
    items, scores = served.recommend(served.features(user), served.seen(user))
    command = [sys.executable, str(exported / "pytorch_model.py"), str(exported), "--user", str(user["id"])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert [line[1] for line in printed] == [str(served.ids[item]) for item in items[0]]
    np.testing.assert_allclose([float(line[0]) for line in printed], scores[0], atol=1e-3)
    done = subprocess.run([*command[:-1], "nobody"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert "no user 'nobody' in users.jsonl" in done.stderr


def test_a_request_of_a_line_of_users_is_what_recommend_makes_of_it(exported: Path):
    served = recommend.load(exported)
    for causal in (False, True):
        config = {**served.config, "model": {**served.config["model"], "causal": causal}}
        for user in [*served.users(), {"row": 3, "features": served.users()[0]["features"], "events": []}]:
            expected = dataclasses.replace(served, config=config).features(user)
            found = pytorch_model.request_of(user, config)
            assert found.keys() == expected.keys()
            for name, array in found.items():
                size = array.shape[1]
                np.testing.assert_array_equal(array, expected[name][:, :size], err_msg=name)
                assert name == "user" or (expected[name.split(".")[0] + ".item"][:, size:] == -1).all()
