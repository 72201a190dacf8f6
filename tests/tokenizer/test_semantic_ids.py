import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from onerec_jax.config import TokenizerConfig
from onerec_jax.errors import InputError
from onerec_jax.tokenizer import rq_kmeans, semantic_ids
from onerec_jax.tokenizer.semantic_ids import SemanticIds, extra_level, fit_semantic_ids


def config(**settings):
    return TokenizerConfig(**{"codebook_sizes": (4, 4), "iterations": 4, "batch_size": 64, **settings})


@pytest.fixture
def dataset(make_dataset):
    """60 items of which many share a vector, hence an ID."""
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(20, 4))[rng.integers(0, 20, 60)]
    return make_dataset(60, embedding=embedding, train_count=rng.integers(0, 9, 60), upload_ms=rng.integers(-1, 50, 60))


def same_ids(first, second):
    return [item for code in first.codes for item in first.items_of(code)] == [
        item for code in second.codes for item in second.items_of(code)
    ]


def test_every_item_is_found_under_its_id(dataset):
    ids = fit_semantic_ids(dataset, config(), seed=0)
    assert ids.codes.shape == (60, 2) and ids.codebook_sizes == (4, 4)
    for item, code in enumerate(ids.codes):
        expected = np.flatnonzero((ids.codes == code).all(1))
        assert item in expected and sorted(ids.items_of(code).tolist()) == expected.tolist()


def test_an_id_nobody_has_has_no_items_and_a_short_one_is_refused(dataset):
    ids = fit_semantic_ids(dataset, config(), seed=0)
    assert ids.items_of((3, 9)).tolist() == []
    with pytest.raises(InputError, match=r"\[1\] has 1 codes; expected 2"):
        ids.items_of((1,))


def test_popularity_and_recency_order_the_items_of_an_id(dataset):
    for resolve, key in (("popularity", dataset.items.train_count), ("recency", dataset.items.upload_ms)):
        ids = fit_semantic_ids(dataset, config(resolve=resolve), seed=0)
        for code in ids.codes:
            items = ids.items_of(code).tolist()
            assert items == sorted(items, key=lambda item: (-key[item], item))


def test_recency_without_upload_times_is_row_order(make_dataset):
    ids = fit_semantic_ids(make_dataset(60, embedding=np.ones((60, 4))), config(resolve="recency"), seed=0)
    assert ids.items_of(ids.codes[0]).tolist() == list(range(60))


def test_uniform_is_a_seeded_shuffle(make_dataset):
    dataset = make_dataset(60, embedding=np.ones((60, 4)))
    orders = [fit_semantic_ids(dataset, config(resolve="uniform"), seed=seed) for seed in (1, 1, 2)]
    first, again, other = (ids.items_of(ids.codes[0]).tolist() for ids in orders)
    assert first == again != other and sorted(first) == list(range(60)) != first


def test_extra_level_numbers_the_items_of_an_id_in_resolve_order(dataset):
    plain = fit_semantic_ids(dataset, config(), seed=0)
    ids = fit_semantic_ids(dataset, config(dedup="extra_level"), seed=0)
    np.testing.assert_array_equal(ids.codes[:, :2], plain.codes)
    assert len(np.unique(ids.codes, axis=0)) == 60 and ids.quality["collision_rate"] == 0
    assert ids.codebook_sizes[2] == max(Counter(map(tuple, plain.codes.tolist())).values())
    for code in plain.codes:
        items = plain.items_of(code)
        assert ids.codes[items, 2].tolist() == list(range(len(items)))


def test_extra_level_is_zero_where_ids_are_unique():
    assert extra_level(np.arange(12).reshape(6, 2), np.zeros(6)).tolist() == [0] * 6


def test_encode_and_decode_agree_with_the_quantizer(dataset):
    ids = fit_semantic_ids(dataset, config(dedup="extra_level"), seed=0)
    vectors = dataset.items.embedding / np.linalg.norm(dataset.items.embedding, axis=1, keepdims=True)
    np.testing.assert_array_equal(ids.encode(vectors), ids.codes[:, :2])
    np.testing.assert_array_equal(ids.decode(ids.codes), rq_kmeans.decode(ids.arrays, ids.codes[:, :2]))


def test_same_seed_same_ids(dataset):
    first, second = (fit_semantic_ids(dataset, config(), seed=5) for _ in range(2))
    np.testing.assert_array_equal(first.codes, second.codes)


@pytest.mark.parametrize("dedup", ["none", "extra_level"])
def test_save_and_load_give_the_same_object_back(dataset, tmp_path, dedup):
    ids = fit_semantic_ids(dataset, config(dedup=dedup), seed=0)
    ids.save(tmp_path / "deep" / "ids")
    loaded = SemanticIds.load(tmp_path / "deep" / "ids", dataset)
    np.testing.assert_array_equal(loaded.codes, ids.codes)
    assert loaded.arrays.keys() == ids.arrays.keys() and (loaded.kind, loaded.levels) == (ids.kind, ids.levels)
    for name, array in loaded.arrays.items():
        np.testing.assert_array_equal(array, ids.arrays[name])
    assert loaded.codebook_sizes == ids.codebook_sizes and loaded.trie.branching == ids.trie.branching
    assert loaded.quality == ids.quality and loaded.origin == ids.origin and same_ids(loaded, ids)
    assert {file.suffix for file in (tmp_path / "deep" / "ids").iterdir()} == {".npy", ".json"}


def test_card_tells_settings_seed_and_dataset(dataset, tmp_path):
    fit_semantic_ids(dataset, config(), seed=7).save(tmp_path / "ids")
    card = json.loads((tmp_path / "ids" / "card.json").read_text())
    assert card["seed"] == 7 and card["dataset"] == "abc123"
    assert card["tokenizer"]["codebook_sizes"] == [4, 4] and "directory" not in card["tokenizer"]


def test_saving_again_replaces_and_leaves_nothing_beside(dataset, tmp_path):
    fit_semantic_ids(dataset, config(dedup="extra_level"), seed=0).save(tmp_path / "ids")
    fit_semantic_ids(dataset, config(), seed=0).save(tmp_path / "ids")
    assert SemanticIds.load(tmp_path / "ids").codes.shape == (60, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["ids"]


def test_a_full_disk_leaves_the_former_ids_whole_and_nothing_else(dataset, tmp_path, monkeypatch):
    before = fit_semantic_ids(dataset, config(), seed=0)
    before.save(tmp_path / "ids")

    def full(path, array, **options):
        if path.name.startswith("quantizer"):
            raise OSError(28, "No space left on device")
        path.write_bytes(b"x")

    monkeypatch.setattr(semantic_ids.np, "save", full)
    with pytest.raises(InputError, match=r"cannot write semantic IDs to .*ids: No space left on device"):
        before.save(tmp_path / "ids")
    assert [path.name for path in tmp_path.iterdir()] == ["ids"]
    assert same_ids(SemanticIds.load(tmp_path / "ids"), before)


def test_a_failed_replacement_puts_the_former_ids_back(dataset, tmp_path, monkeypatch):
    before = fit_semantic_ids(dataset, config(), seed=0)
    before.save(tmp_path / "ids")
    rename = Path.rename

    def refuse_partial(path, target):
        if ".partial-" in path.name:
            raise OSError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_partial)
    with pytest.raises(InputError, match="Permission denied"):
        before.save(tmp_path / "ids")
    assert [path.name for path in tmp_path.iterdir()] == ["ids"]
    assert same_ids(SemanticIds.load(tmp_path / "ids"), before)


def test_a_folder_of_other_files_is_not_replaced(dataset, tmp_path):
    (tmp_path / "card.json").write_text("{}")
    with pytest.raises(InputError, match="holds other files than semantic IDs"):
        fit_semantic_ids(dataset, config(), seed=0).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["card.json"]


def test_missing_ids_name_the_command_that_makes_them(dataset, tmp_path):
    with pytest.raises(InputError, match=r"card\.json is missing; make them with `onerec tokenize RECIPE`"):
        SemanticIds.load(tmp_path / "nowhere")
    fit_semantic_ids(dataset, config(), seed=0).save(tmp_path / "ids")
    (tmp_path / "ids" / "items.npy").unlink()
    with pytest.raises(InputError, match=r"items\.npy is missing"):
        SemanticIds.load(tmp_path / "ids")


def test_damaged_ids_are_refused(dataset, tmp_path):
    fit_semantic_ids(dataset, config(), seed=0).save(tmp_path / "good")

    def copy_with(name, content):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        (tmp_path / "bad" / name).write_bytes(content)
        return tmp_path / "bad"

    card = json.loads((tmp_path / "good" / "card.json").read_text())
    pickled = tmp_path / "pickled.npy"
    np.save(pickled, np.array([{}], dtype=object), allow_pickle=True)
    for name, damage in (
        ("card.json", b"{"),
        ("card.json", b"[]"),
        ("card.json", b"[" * 100_000),
        ("card.json", json.dumps({**card, "seed": 9}).encode()),
        (
            "items.npy",
            (lambda content: content[:-1] + bytes([content[-1] ^ 1]))((tmp_path / "good" / "items.npy").read_bytes()),
        ),
        ("card.json", json.dumps({**card, "format_version": 99}).encode()),
        ("card.json", json.dumps({**card, "codebook_sizes": [2, 4]}).encode()),
        ("codes.npy", b"not an array"),
        ("codes.npy", b""),
        ("codes.npy", (tmp_path / "good" / "items.npy").read_bytes()),
        ("items.npy", pickled.read_bytes()),
    ):
        with pytest.raises(InputError, match=r"are damaged .* `onerec tokenize RECIPE`"):
            SemanticIds.load(copy_with(name, damage))


def test_ids_of_another_dataset_are_refused(dataset, make_dataset, tmp_path):
    fit_semantic_ids(dataset, config(), seed=0).save(tmp_path / "ids")
    dataset.card["content_hash"] = "other"
    with pytest.raises(InputError, match="another state of the dataset"):
        SemanticIds.load(tmp_path / "ids", dataset)


def test_one_item_has_an_id(make_dataset):
    ids = fit_semantic_ids(make_dataset(1, embedding=np.ones((1, 4))), config(dedup="extra_level"), seed=0)
    assert ids.codes.shape == (1, 3) and ids.codebook_sizes == (4, 4, 1)
    assert ids.items_of(ids.codes[0]).tolist() == [0]


def test_a_nan_embedding_is_refused_with_its_item_row(dataset):
    dataset.items.embedding[9, 1] = np.nan
    with pytest.raises(InputError, match="item row 9"):
        fit_semantic_ids(dataset, config(), seed=0)
