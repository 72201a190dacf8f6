"""An export directory: what it tells, that it is whole or refused, and what it may replace."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from made_exports import LISTS, export

from onerec_jax.errors import InputError
from onerec_jax.export import artifact, recommend
from onerec_jax.export.artifact import load_artifact
from onerec_jax.export.card import model_card
from onerec_jax.export.contents import contents_of, facts, sample_users


def test_what_is_loaded_is_what_was_exported(exported: Path, random_tiny):
    loaded, state = load_artifact(exported), random_tiny.state
    params, tables, bias = loaded.parameters
    for a, b in zip(jax.tree.leaves((params, bias)), jax.tree.leaves((state.params, state.bias)), strict=True):
        assert a.tobytes() == np.asarray(b).tobytes()
    assert {name: table["rows"].tobytes() for name, table in tables.items()} == {
        name: np.asarray(table["rows"]).tobytes() for name, table in state.tables.items()
    }
    assert (loaded.model.config, loaded.vocabulary) == (random_tiny.model.config, random_tiny.model.vocabulary)
    assert (loaded.trie.codes == random_tiny.ids.codes).all()
    assert (loaded.trie.items == random_tiny.ids.trie.items).all()
    assert loaded.item_ids == random_tiny.dataset.item_ids.tolist()
    assert loaded.titles == random_tiny.dataset.items.text
    assert (loaded.catalogue["duration_s"] == random_tiny.dataset.items.duration_s).all()
    assert (loaded.catalogue["embedding"] == random_tiny.dataset.items.embedding).all()
    on_device = loaded.on_device
    assert (np.asarray(on_device.author) == random_tiny.dataset.items.author).all()
    assert (np.asarray(on_device.leaf) == loaded.catalogue["leaf"]).all()


def test_the_config_tells_what_a_server_needs(exported: Path, random_tiny):
    config = json.loads((exported / "config.json").read_text())
    assert (config["format_version"], config["dtype"], config["step"]) == (1, "float32", 6)
    assert config["lists"] == {**LISTS, "item_weight": 1.0}
    assert config["labels"] == list(random_tiny.dataset.labels)
    assert config["positive_labels"] == ["long_view", "like", "follow", "comment", "forward"]
    assert config["lifelong"] == {"refresh": 12, "cluster_size": 4, "content": "embedding"}
    assert config["excluded"] >= max(len(random_tiny.dataset.history(user).item) for user in range(60))
    assert config["items_per_id"] == max(len(group) for group in by_id(random_tiny.ids.codes).values())
    assert config["recipe_digest"] == random_tiny.recipe.digest()


def by_id(codes: np.ndarray) -> dict[tuple[int, ...], list[int]]:
    found: dict[tuple[int, ...], list[int]] = {}
    for row, code in enumerate(codes.tolist()):
        found.setdefault(tuple(code), []).append(row)
    return found


def test_the_tokenizer_encodes_content_as_it_did(exported: Path, random_tiny):
    about = json.loads((exported / "tokenizer.json").read_text())
    arrays = recommend.read_tensors(exported, "tokenizer")
    ids = random_tiny.ids
    assert (about["kind"], about["levels"], about["codebook_sizes"]) == (ids.kind, ids.levels, list(ids.codebook_sizes))
    assert arrays.keys() == ids.arrays.keys()
    assert all((arrays[name] == ids.arrays[name]).all() for name in arrays)


def test_sample_users_come_with_their_latest_events(exported: Path, random_tiny):
    users, dataset = load_artifact(exported).users, random_tiny.dataset
    assert len(users) == 5
    for user in users:
        history = dataset.history(user["row"])
        assert user["id"] == dataset.user_ids[user["row"]]
        assert user["features"] == dataset.user_features[user["row"]].tolist()
        assert [event["item"] for event in user["events"]] == history.item.tolist()
        assert [event["timestamp_ms"] for event in user["events"]] == history.timestamp_ms.tolist()
        for event, playtime, feedback in zip(user["events"], history.playtime_s, history.feedback, strict=True):
            assert event["playtime_s"] == (None if playtime < 0 else playtime)
            assert event["feedback"] == [name for name, on in zip(dataset.labels, feedback, strict=True) if on]


def test_longer_histories_are_cut_and_what_was_before_is_only_named(random_tiny, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("onerec_jax.export.contents.EVENTS", 8)
    users, dataset = sample_users(random_tiny.dataset, random_tiny.model.config, 60), random_tiny.dataset
    assert any(user["seen"] for user in users)
    for user in users:
        item = dataset.history(user["row"]).item
        assert [event["item"] for event in user["events"]] == item[-8:].tolist()
        assert user["seen"] == sorted(set(item[:-8].tolist()))


def test_without_sample_users_no_history_leaves_the_machine(
    random_tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(artifact, "write_functions", lambda *_: None)
    place = export(random_tiny, tmp_path / "out", users=0)
    assert (place / "users.jsonl").read_text() == ""
    assert "holds no history of anyone" in (place / "MODEL_CARD.md").read_text()


FILES = (
    "config.json", "model.safetensors", "catalogue.safetensors", "tokenizer.json", "tokenizer.safetensors", "items.jsonl",
    "users.jsonl", "recommend.stablehlo", "score.stablehlo", "signature.json", "recommend.py", "pytorch_model.py",
    "MODEL_CARD.md", "hashes.json",
)  # fmt: skip


def test_these_are_all_files(exported: Path):
    assert sorted(path.name for path in exported.iterdir() if path.is_file()) == sorted(FILES)


@pytest.fixture(scope="module")
def own_copy(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(exported, tmp_path_factory.mktemp("copies") / "tiny"))


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_in_any_file_is_refused_and_named(own_copy: Path, name: str):
    path = own_copy / name
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    try:
        with pytest.raises(InputError, match=name.replace(".", r"\.")) as refused:
            load_artifact(own_copy)
        assert "\n" not in str(refused.value) and "onerec export" in str(refused.value)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            recommend.load(own_copy)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused_and_named(own_copy: Path, name: str):
    (own_copy / name).rename(own_copy.parent / name)
    try:
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            load_artifact(own_copy)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            recommend.load(own_copy)
    finally:
        (own_copy.parent / name).rename(own_copy / name)


def test_a_file_that_was_added_is_refused_and_named(own_copy: Path):
    (own_copy / "model-00002-of-00002.safetensors").write_bytes(b"")
    try:
        for load in (load_artifact, recommend.load):
            with pytest.raises(ValueError, match="model-00002-of-00002"):
                load(own_copy)
    finally:
        (own_copy / "model-00002-of-00002.safetensors").unlink()
    load_artifact(own_copy)


def test_what_python_compiles_beside_a_module_is_no_addition(own_copy: Path):
    (own_copy / "__pycache__").mkdir()
    (own_copy / "__pycache__" / "recommend.cpython-311.pyc").write_bytes(b"")
    load_artifact(own_copy)
    recommend.check(own_copy)


def test_a_folder_that_is_no_export_is_not_replaced(random_tiny, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds other files than an export"):
        export(random_tiny, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError, match="is a file"):
        export(random_tiny, tmp_path / "thesis.txt")


def test_a_failure_leaves_the_older_export_as_it_was(own_copy: Path, random_tiny, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = sorted(path.name for path in own_copy.parent.iterdir())
    monkeypatch.setattr(artifact, "write_functions", fail)
    with pytest.raises(InputError, match="No space left"):
        export(random_tiny, own_copy)
    load_artifact(own_copy)
    assert sorted(path.name for path in own_copy.parent.iterdir()) == before


def test_no_export_is_refused_with_the_command_that_makes_one(tmp_path: Path):
    with pytest.raises(InputError, match="onerec export RUN --to DIR"):
        load_artifact(tmp_path)


def test_the_card_has_the_metrics_of_an_evaluation_and_the_licence_of_the_data(random_tiny):
    config = facts(random_tiny) | {"lists": LISTS}
    assert "Not evaluated" in model_card(random_tiny, config, "int8", 5)
    rows = {"model": {"R@10": 0.1234, "watch s": 3.0, "watch ±": 0.1}, "popularity": {"R@10": 0.05}}
    (random_tiny.run / "evaluation.json").write_text(json.dumps({"protocol": "test: 20 requests", "rows": rows}))
    text = model_card(random_tiny, config, "float32", 5)
    assert "|model|0.1234|3.0000|" in text and "|popularity|0.0500||" in text and "test: 20 requests" in text
    assert "of a simulator" in text and random_tiny.recipe.digest() in text
    source = random_tiny.dataset.card["source"]
    for kind, sentence in (("kuairand", "CC BY-SA 4.0"), ("amazon", "for research")):
        random_tiny.dataset.card["source"] = {"kind": kind}
        text = model_card(random_tiny, config, "float32", 5)
        assert sentence in text and "personal data" in text
    random_tiny.dataset.card["source"] = source


def test_contents_of_two_calls_are_the_same(random_tiny):
    """Sample users too: an export is a function of the run and the options."""
    first, second = (contents_of(random_tiny, "float32", users=3, **LISTS) for _ in range(2))
    assert (first.config, first.users, first.card) == (second.config, second.users, second.card)
