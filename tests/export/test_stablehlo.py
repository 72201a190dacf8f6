"""The exported functions against the step they were made of, and `recommend.py` where there is nothing but jax and NumPy."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import numpy as np
import pytest
from made_exports import LISTS, random_recommender
from tiny import ALONE, COMPILED, SHAPES, VOCABULARY, random_batch, tiny_model

from onerec_jax.data.batch import make_batch
from onerec_jax.export import recommend
from onerec_jax.export.artifact import Artifact, load_artifact, write_artifact
from onerec_jax.export.contents import contents_of
from onerec_jax.generate.recommender import Recommender, scores_of_items
from onerec_jax.generate.step import ListOptions, Lists, make_recommend_step
from onerec_jax.model.onerec import build
from onerec_jax.model.tables import lookup, stored_rows

CAUSAL = {**ALONE, "head": "both", "softmax": "legal", "causal": True}
MEMORY = {**SHAPES["OneRec with a memory"], "item_memory": 5}


def examples_of(loaded: Artifact, recommender: Recommender) -> np.ndarray:
    """The sample users after all of their events."""
    ends = [(user["row"], len(recommender.dataset.history(user["row"]).item)) for user in loaded.users]
    return np.array([(row, end, end, end) for row, end in ends])


def excluded(served: recommend.Served) -> np.ndarray:
    rows = [served.seen(user)[0] for user in served.users()]
    found = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for n, row in enumerate(rows):
        found[n, : len(row)] = row
    return found


def features_of_all(served: recommend.Served) -> recommend.Features:
    parts = [served.features(user) for user in served.users()]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def offline(loaded: Artifact, recommender: Recommender, exclude: np.ndarray) -> Lists:
    """Lists of the sample users by the step with the stored parameters."""
    batch = make_batch(
        recommender.dataset,
        recommender.ids.codes,
        recommender.model.config,
        examples_of(loaded, recommender),
        1,
        frozen=True,
    )
    step = make_recommend_step(recommender.model, ListOptions(**LISTS))
    return Lists(*map(np.asarray, step(*loaded.parameters, loaded.on_device, batch, exclude, None)))


def assert_same_lists(place: Path, recommender: Recommender) -> None:
    loaded, served = load_artifact(place), recommend.load(place)
    features, exclude = features_of_all(served), excluded(served)
    expected = offline(loaded, recommender, exclude)
    items, scores = served.recommend(features, exclude)
    assert (expected.items >= 0).sum() > len(items)
    np.testing.assert_array_equal(items, expected.items)
    np.testing.assert_allclose(scores, expected.scores, atol=1e-5, rtol=1e-5)
    assert not any(set(row) & set(seen) - {-1} for row, seen in zip(items.tolist(), exclude.tolist(), strict=True))


def test_features_of_a_sample_user_are_those_of_a_batch(exported: Path, random_tiny):
    loaded, served = load_artifact(exported), recommend.load(exported)
    examples = examples_of(loaded, random_tiny)
    batch = make_batch(random_tiny.dataset, random_tiny.ids.codes, random_tiny.model.config, examples, 1, frozen=True)
    found = features_of_all(served)
    assert (found.pop("user") == batch.user).all()
    assert len(found) == 3 * 5
    for name, values in found.items():
        pathway, field = name.split(".")
        expected = getattr(getattr(batch, pathway), field)
        assert values.dtype == expected.dtype, name
        np.testing.assert_array_equal(values, expected, err_msg=name)


def test_every_pathway_with_experts_gives_the_lists_of_the_step(exported: Path, random_tiny):
    assert_same_lists(exported, random_tiny)


def test_lists_of_one_request_are_those_it_has_among_others(exported: Path):
    served = recommend.load(exported)
    features, exclude = features_of_all(served), excluded(served)
    several = served.recommend(features, exclude)[0]
    one = served.recommend({name: value[2:3] for name, value in features.items()}, exclude[2:3])[0]
    np.testing.assert_array_equal(one, several[2:3])


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(CAUSAL, "int8"), (MEMORY, "bfloat16"), (SHAPES["HSTU"], "float32")],
    ids=["both heads, legal, causal, int8", "memory, with a shift, bfloat16", "items alone"],
)
def test_other_models_give_the_lists_of_the_step_with_the_stored_weights(tiny_recipe, tmp_path: Path, shape, dtype):
    recommender = random_recommender(tiny_recipe, tmp_path, **shape)
    contents = contents_of(recommender, dtype, users=4, **LISTS)
    if shape is MEMORY:
        shift = np.random.default_rng(0).standard_normal(recommender.dataset.num_items).astype(np.float32)
        contents = dataclasses.replace(contents, catalogue={**contents.catalogue, "shift": shift})
    write_artifact(contents, tmp_path / "out", dtype)
    assert_same_lists(tmp_path / "out", recommender)
    stored = recommend.read_tensors(tmp_path / "out", "model")
    signature = json.loads((tmp_path / "out" / "signature.json").read_text())
    inputs = signature["functions"]["recommend"]["inputs"]
    taken = {array["name"]: array["dtype"] for array in inputs if array["argument"] == "weights"}
    assert taken == {name: array.dtype.name for name, array in stored.items()}
    assert dtype in taken.values()


def test_scores_are_those_of_a_teacher_forced_pass(exported: Path, random_tiny):
    served, items = recommend.load(exported), np.random.default_rng(0).integers(0, 150, (5, 7)).astype(np.int32)
    found = served.score(features_of_all(served), items)
    assert found.shape == (5, 7, 3)
    expected = scores_of_items(random_tiny, examples_of(load_artifact(exported), random_tiny), items)
    np.testing.assert_allclose(found.sum(axis=-1), expected, atol=1e-5, rtol=1e-5)


def test_a_table_of_many_rows_is_read_for_any_number_of_requests():
    """Rows in stripes, as such a table is stored; how many requests there will be is not known when it is exported."""
    model = build(tiny_model(**ALONE), dataclasses.replace(VOCABULARY, users=70_000))
    stored = stored_rows(70_000)
    tables = {name: {"rows": np.zeros(shape, np.float32)} for name, shape in model.tables.items()}
    rows = np.random.default_rng(0).random((stored, model.tables["user"][1]), np.float32)
    tables["user"] = {"rows": rows}
    batch = random_batch(model.config, model.vocabulary, batch=4)

    def read(tables, batch):
        local, found = model.read(tables, batch)
        return lookup(found["user"], local.user[:, 0], np.float32)

    (b,) = jax.export.symbolic_shape("b")
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype), batch)
    exported = jax.export.export(jax.jit(read))(jax.tree.map(jax.typeof, tables), spec)
    user = batch.user[:, 0]
    np.testing.assert_array_equal(exported.call(tables, batch), rows[user % 3_072 * (stored // 3_072) + user // 3_072])


def test_more_items_to_leave_out_than_there_is_room_for_are_refused(exported: Path):
    served = recommend.load(exported)
    user = served.users()[0]
    with pytest.raises(ValueError, match="has room for"):
        served.recommend(served.features(user), np.zeros((1, served.config["excluded"] + 1), np.int32))


def test_a_long_history_needs_its_clusters(exported: Path):
    served = recommend.load(exported)
    user = next(user for user in served.users() if len(user["events"]) >= 12)
    alone = {name: value for name, value in user.items() if name != "lifelong"}
    with pytest.raises(ValueError, match="needs `lifelong`"):
        served.features(alone)
    short = {**alone, "events": user["events"][-11:]}
    assert (served.features(short)["lifelong.item"] >= 0).sum() == 9


def test_the_signature_names_every_input_with_shape_type_and_unit(exported: Path):
    signature = json.loads((exported / "signature.json").read_text())
    for function in signature["functions"].values():
        assert function["platforms"] == ["cpu", "cuda", "tpu"]
        request = {array["name"]: array for array in function["inputs"] if array["argument"] == "request"}
        assert request["short.age_s"]["shape"] == ["b", 6] and "seconds" in request["short.age_s"]["about"]
        assert request["lifelong.feedback"] | {"about": ""} == {
            "argument": "request", "name": "lifelong.feedback", "shape": ["b", 9, 8], "dtype": "uint8", "type": "U8", "about": "",
        }  # fmt: skip
        assert all(array["about"] for array in request.values())
        weights = {array["name"] for array in function["inputs"] if array["argument"] == "weights"}
        assert weights == recommend.read_tensors(exported, "model").keys()
        assert all(array["about"] for array in function["outputs"])
    assert signature["functions"]["score"]["outputs"][0]["shape"] == ["b", "j", 3]


HIDING = """
import sys
KNOWN = {"jax", "jaxlib", "numpy", "ml_dtypes", "scipy", "opt_einsum", "recommend"}

class Seeing:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in KNOWN or top in sys.stdlib_module_names or top.startswith("_sysconfigdata"):
            return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Seeing(finder) for finder in sys.meta_path]
sys.dont_write_bytecode = True
sys.path.insert(0, sys.argv[1])
import recommend
recommend.main(["--user", sys.argv[2]])
assert not {"onerec_jax", "safetensors", "flax", "flatbuffers"} & set(sys.modules)
"""


def test_the_script_lists_the_same_with_jax_and_numpy_alone(exported: Path, random_tiny):
    loaded, served = load_artifact(exported), recommend.load(exported)
    user = loaded.users[1]
    run = [sys.executable, "-c", HIDING, str(exported), str(user["id"])]
    kept = {"JAX_COMPILATION_CACHE_DIR": str(COMPILED), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
    result = subprocess.run(
        run, capture_output=True, text=True, check=False, cwd=exported.parent, env={**os.environ, **kept}
    )
    assert result.returncode == 0, result.stderr
    expected = offline(loaded, random_tiny, excluded(served))
    lines = [line.split(maxsplit=2) for line in result.stdout.splitlines()]
    assert [line[1] for line in lines] == [str(loaded.item_ids[item]) for item in expected.items[1] if item >= 0]
    np.testing.assert_allclose([float(line[0]) for line in lines], expected.scores[1][: len(lines)], atol=1e-3)
    assert all(line[2] == loaded.titles[item] for line, item in zip(lines, expected.items[1], strict=False))


def test_an_unknown_user_is_refused_in_a_sentence(exported: Path):
    run = [sys.executable, str(exported / "recommend.py"), "--user", "nobody"]
    result = subprocess.run(run, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("recommend.py: no user 'nobody' in users.jsonl") and result.stderr.count("\n") == 1
