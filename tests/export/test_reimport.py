"""Training that goes on from an export, and the command that makes one."""

import dataclasses
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from made_exports import export, random_recommender

from onerec_jax.errors import InputError
from onerec_jax.export import artifact
from onerec_jax.export.artifact import load_artifact
from onerec_jax.export.verb import export_run
from onerec_jax.parallel.mesh import make_mesh
from onerec_jax.train import loop
from onerec_jax.train.checkpoint import Checkpoints
from onerec_jax.train.exported import start_from_export
from onerec_jax.train.optimizer import make_optimizer
from onerec_jax.train.promotion import write_promotion
from onerec_jax.train.state import TrainState, abstract_state


@pytest.fixture(scope="module")
def trained(tiny_recipe, tmp_path_factory):
    """Recipe of a finished run of three steps."""
    train = tiny_recipe.train.model_copy(update={"steps": 3})
    recipe = tiny_recipe.model_copy(
        update={"name": "trained", "runs": str(tmp_path_factory.mktemp("runs")), "train": train}
    )
    loop.pretrain(recipe, lambda _: None)
    return recipe


@pytest.fixture
def without_functions(monkeypatch: pytest.MonkeyPatch):
    """Exports without StableHLO, which other tests look at and which takes longest."""
    monkeypatch.setattr(artifact, "write_functions", lambda *_: None)


def abstract(recipe) -> TrainState:
    model = loop.load_inputs(recipe)[2]
    return abstract_state(model, make_optimizer(recipe.train, recipe.model.width_share), make_mesh(recipe.mesh))


def saved(recipe) -> dict:
    checkpoints = Checkpoints(recipe.run_directory)
    try:
        return checkpoints.restore_model(abstract(recipe), recipe)
    finally:
        checkpoints.close()


def test_training_goes_on_from_an_export_bit_by_bit(trained, tmp_path: Path, without_functions):
    place = export_run(str(trained.run_directory), str(tmp_path / "out"), users=0)
    found, expected = start_from_export(place, abstract(trained), trained), saved(trained)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for name in ("params", "bias"):
        for a, b in zip(jax.tree.leaves(found[name]), jax.tree.leaves(expected[name]), strict=True):
            assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    for name, table in expected["tables"].items():
        assert np.asarray(found["tables"][name]["rows"]).tobytes() == np.asarray(table["rows"]).tobytes()
        assert not np.asarray(found["tables"][name]["accumulator"]).any()

    train = trained.train.model_copy(update={"steps": 2, "init_from": str(place)})
    lines: list[str] = []
    again = trained.model_copy(update={"name": "again", "train": train})
    loop.pretrain(again, lines.append)
    moved = saved(again)
    assert int(json.loads((again.run_directory / "metrics.jsonl").read_text().splitlines()[-1])["step"]) == 2
    pairs = zip(jax.tree.leaves(moved["params"]), jax.tree.leaves(expected["params"]), strict=True)
    distance = [np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in pairs]
    assert 0 < max(distance) < 0.1


def test_bfloat16_starts_from_rounded_weights_and_int8_is_refused(trained, tmp_path: Path, without_functions):
    half = export_run(str(trained.run_directory), str(tmp_path / "half"), dtype="bfloat16", users=0)
    found, expected = start_from_export(half, abstract(trained), trained), saved(trained)
    for a, b in zip(jax.tree.leaves(found["params"]), jax.tree.leaves(expected["params"]), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=2**-8)
    byte = export_run(str(trained.run_directory), str(tmp_path / "byte"), dtype="int8", users=0)
    with pytest.raises(InputError, match="int8 weights, which are too coarse to train on"):
        start_from_export(byte, abstract(trained), trained)


def test_rows_of_tables_that_age_begin_as_touched_and_admitted(tiny_recipe, tmp_path: Path, without_functions):
    """bfloat16 rows, eviction and admission: the rows are those of the run, all else is as of a run that begins."""
    tables = {"dtype": "bfloat16", "evict_after": 50, "admit_after": 2}
    recommender = random_recommender(tiny_recipe, tmp_path, tables=tables)
    waits = {}
    for name, table in recommender.state.tables.items():
        waits[name] = np.arange(len(table["rows"])) % 3 == 0
        table |= {"rows": table["rows"].astype(ml_dtypes.bfloat16), "appearances": np.where(waits[name], 1, 2)}
    place, recipe = export(recommender, tmp_path / "out"), recommender.recipe
    found = start_from_export(place, abstract(recipe), recipe)["tables"]
    for name, table in recommender.state.tables.items():
        assert found[name]["rows"].dtype == ml_dtypes.bfloat16
        assert (np.asarray(found[name]["rows"]) == np.where(waits[name][:, None], 0, table["rows"])).all()
        assert (np.asarray(found[name]["last_step"]) == 0).all()
        assert (np.asarray(found[name]["appearances"]) == 2).all()
        assert not np.asarray(found[name]["accumulator"]).any()


def test_another_model_another_dataset_and_a_damaged_export_are_refused(trained, tmp_path: Path, without_functions):
    place = export_run(str(trained.run_directory), str(tmp_path / "out"), users=0)
    other = trained.model_copy(update={"model": trained.model.model_copy(update={"dropout": 0.5})})
    with pytest.raises(InputError, match=r"is of another model: model\.dropout is 0\.5 but 0\.0 in the export"):
        start_from_export(place, abstract(trained), other)
    grown = abstract(trained)
    user = grown.tables["user"]["rows"]
    larger = jax.ShapeDtypeStruct((user.shape[0] + 1, user.shape[1]), user.dtype, sharding=user.sharding)
    grown = dataclasses.replace(grown, tables={**grown.tables, "user": {"rows": larger}})
    with pytest.raises(InputError, match=r"does not fit this dataset: tables\.user\.rows"):
        start_from_export(place, grown, trained)
    (place / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"model\.safetensors has 0 bytes"):
        start_from_export(place, abstract(trained), trained)


def test_a_run_that_was_not_promoted_exports_the_one_that_is_served(trained, tmp_path: Path, without_functions):
    train = trained.train.model_copy(update={"init_from": str(trained.run_directory)})
    later = trained.model_copy(update={"name": "later", "train": train})
    later.run_directory.mkdir()
    loop.write_config(later.run_directory, later)
    write_promotion(later.run_directory, 3, trained.run_directory, 3, False, {})
    params = load_artifact(export_run(str(later.run_directory), str(tmp_path / "served"), users=0)).parameters[0]
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(saved(trained)["params"]), strict=True):
        assert a.tobytes() == np.asarray(b).tobytes()


def test_the_command_writes_a_directory_with_its_options(trained, tmp_path: Path, onerec, without_functions):
    answer = onerec("export", str(trained.run_directory), "--to", "out", "--dtype", "bfloat16", "--top", "7", "--beams", "9",
                    "--users", "2", "--shard-gb", "0.00005", "evaluate.item_weight=0.5")  # fmt: skip
    assert (answer.code, answer.err) == (0, "") and "export: out" in answer.out
    loaded = load_artifact(tmp_path / "out")
    assert loaded.config["lists"] == {"k": 7, "width": 9, "item_weight": 0.5}
    assert (loaded.config["dtype"], len(loaded.users)) == ("bfloat16", 2)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no-such-run", "--to", "out"], "no run 'no-such-run'"),
        (["RUN", "--to", "out", "--dtype", "int4"], "--dtype int4 must be one of float32, bfloat16, int8"),
        (["RUN", "--to", "s3://bucket/out"], "--to s3://bucket/out must be a folder of this machine"),
        (["RUN", "--to", "."], "--to . holds other files than an export"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(trained, tmp_path: Path, onerec, words: list[str], said: str):
    (tmp_path / "notes.txt").write_text("")
    answer = onerec("export", *(str(trained.run_directory) if word == "RUN" else word for word in words))
    assert answer.code == 2
    assert answer.err.startswith(f"onerec: {said}") and answer.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
