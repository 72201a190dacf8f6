from collections import Counter
from io import StringIO
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from onerec_jax.config import TokenizerConfig
from onerec_jax.errors import InputError
from onerec_jax.tokenizer import versions
from onerec_jax.tokenizer.expansion import (
    Expansion,
    _spread_codes,
    encode_new,
    expand,
    expand_semantic_ids,
)
from onerec_jax.tokenizer.quality import collisions
from onerec_jax.tokenizer.quantizer import codebooks
from onerec_jax.tokenizer.semantic_ids import SemanticIds, fit_semantic_ids
from onerec_jax.tokenizer.versions import version_report

OLD, NEW, WIDTH = 600, 300, 8


def config(**changed):
    return TokenizerConfig(**{"codebook_sizes": (16, 16, 16), "iterations": 6, **changed})


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def clustered(items, clusters, seed, spread=0.25):
    """Vectors around shared centres; those of `clusters` centres from the first."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(40, WIDTH))
    return unit(centres[rng.integers(*clusters, items)] + spread * rng.normal(size=(items, WIDTH)))


@pytest.fixture(scope="module")
def new_vectors():
    """Half from the clusters there were, half from ones that have come up since."""
    return np.concatenate([clustered(NEW // 2, (0, 20), 1), clustered(NEW - NEW // 2, (20, 40), 2)])


def dataset_of(embedding, item_ids, content_hash):
    items = SimpleNamespace(
        embedding=embedding,
        train_count=np.arange(len(embedding)) % 7,
        upload_ms=np.full(len(embedding), -1),
    )
    card = {"content_hash": content_hash}
    return SimpleNamespace(items=items, num_items=len(embedding), item_ids=np.array(item_ids, object), card=card)


@pytest.fixture(scope="module")
def former():
    return dataset_of(clustered(OLD, (0, 20), 0), [f"item {row}" for row in range(OLD)], "before")


@pytest.fixture(scope="module")
def fitted(former):
    return {dedup: fit_semantic_ids(former, config(dedup=dedup), seed=0) for dedup in ("none", "extra_level")}


@pytest.fixture
def ids(fitted):
    return fitted["none"]


def rate_of_new(codes, old_count):
    """The share of items from `old_count` on that share their ID, counted one by one."""
    count = Counter(map(tuple, codes.tolist()))
    return np.mean([count[tuple(code)] > 1 for code in codes[old_count:].tolist()])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["last", "all"]),
    st.sampled_from([None, 0]),
    st.sampled_from([0.0, 0.2, 5.0]),
    st.sampled_from(["none", "extra_level"]),
    st.integers(0, 3),
)
def test_no_existing_id_and_no_codebook_row_moves(fitted, new_vectors, levels, codes, penalty, dedup, seed):
    before = fitted[dedup]
    after = expand(before, new_vectors, Expansion(levels, codes, penalty, iterations=2), seed)
    assert after.codes.dtype == before.codes.dtype and len(after.codes) == OLD + NEW
    assert after.codes[:OLD].tobytes() == before.codes.tobytes()
    for level, (book, grown) in enumerate(zip(codebooks(before.arrays), codebooks(after.arrays), strict=True)):
        assert grown[: len(book)].tobytes() == book.tobytes()
        chosen = levels == "all" or level == 2
        expected = -(-len(book) * NEW // OLD) if codes is None else codes
        assert len(grown) == len(book) + chosen * expected == after.codebook_sizes[level]
    assert (after.codes < after.codebook_sizes).all() and (after.codes >= 0).all()


@pytest.mark.parametrize("levels", ["last", "all"])
def test_new_items_collide_less_than_half_as_often_as_under_the_frozen_tokenizer(ids, new_vectors, levels):
    frozen = rate_of_new(np.concatenate([ids.codes, ids.encode(new_vectors)]), OLD)
    expanded = rate_of_new(expand(ids, new_vectors, Expansion(levels)).codes, OLD)
    assert frozen > 0.4 and expanded < 0.5 * frozen


def test_the_penalty_alone_lowers_collisions_at_a_small_cost_of_content(ids, new_vectors):
    rates, errors = [], []
    for penalty in (0.0, 0.5):
        after = expand(ids, new_vectors, Expansion(codes=0, penalty=penalty))
        rates.append(rate_of_new(after.codes, OLD))
        errors.append(np.mean((after.decode(after.codes[OLD:]) - new_vectors) ** 2))
    assert rates[1] < 0.7 * rates[0] and errors[1] < 1.5 * errors[0]


def test_without_growth_and_penalty_expansion_is_plain_encoding(ids, new_vectors):
    after = expand(ids, new_vectors, Expansion("all", codes=0, penalty=0.0))
    np.testing.assert_array_equal(after.codes[OLD:], ids.encode(new_vectors))


def test_growth_lowers_the_error_of_new_items(ids, new_vectors):
    frozen = np.mean((ids.decode(ids.encode(new_vectors)) - new_vectors) ** 2)
    after = expand(ids, new_vectors, Expansion("all", penalty=0.0))
    assert np.mean((after.decode(after.codes[OLD:]) - new_vectors) ** 2) < 0.8 * frozen


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 1000), st.integers(1, 12), st.integers(1, 20), st.integers(1, 4), st.sampled_from([0.0, 0.3, 2.0])
)
def test_codes_are_chosen_by_distance_and_use_one_item_after_the_other(seed, codes, items, prefixes, penalty):
    rng = np.random.default_rng(seed)
    residual = rng.normal(size=(items, 3)).astype(np.float32)
    book = rng.normal(size=(codes, 3)).astype(np.float32)
    group, former = rng.integers(0, prefixes, items), rng.integers(0, prefixes, 15)
    former_code = rng.integers(0, codes, 15)
    distance = ((residual[:, None].astype(np.float64) - book[None].astype(np.float64)) ** 2).sum(2)
    count, expected = np.zeros((prefixes, codes)), []
    np.add.at(count, (former, former_code), 1)
    for row, prefix in zip(distance, group, strict=True):
        mean = count[prefix].mean()
        use = np.log(1 + count[prefix] / mean) if mean else 0
        expected.append(int((row / distance.mean() + penalty * use).argmin()))
        count[prefix, expected[-1]] += 1
    assert _spread_codes(residual, book, group, former, former_code, penalty).tolist() == expected


def test_items_of_one_prefix_beyond_256_choose_in_256_rounds():
    residual = np.random.default_rng(0).normal(size=(3000, 2)).astype(np.float32)
    book = np.random.default_rng(1).normal(size=(10, 2)).astype(np.float32)
    zeros = np.zeros(3000, np.int64)
    used = [
        np.bincount(_spread_codes(residual, book, zeros, zeros[:0], zeros[:0], penalty), minlength=10)
        for penalty in (0.0, 1.0)
    ]
    assert used[1].sum() == 3000 and used[1].std() < 0.5 * used[0].std()


def test_the_trie_and_the_report_are_those_of_all_items(ids, new_vectors, former):
    after = expand(ids, new_vectors)
    for row, code in enumerate(after.codes):
        items = after.items_of(code).tolist()
        assert row in items and sorted(items) == np.flatnonzero((after.codes == code).all(1)).tolist()
        assert [item for item in items if item < OLD] == [item for item in ids.items_of(code) if item < OLD]
        assert items == sorted(items, key=lambda item: item >= OLD)
    everything = np.concatenate([former.items.embedding, new_vectors])
    error = np.mean((after.decode(after.codes) - everything) ** 2)
    assert after.quality["reconstruction_mse"] == pytest.approx(error, rel=1e-4)
    assert after.quality["items"] == OLD + NEW
    assert after.quality["collision_rate"] == collisions(after.codes)["collision_rate"]
    assert after.origin["expansions"][0]["new_items"] == NEW


def test_the_extra_level_goes_on_counting(fitted, new_vectors):
    ids = fitted["extra_level"]
    for codes in (encode_new(ids, new_vectors), expand(ids, new_vectors).codes[OLD:]):
        count = Counter(map(tuple, ids.codes[:, :3].tolist()))
        for *prefix, number in codes.tolist():
            assert number == count[tuple(prefix)]
            count[tuple(prefix)] += 1
    np.testing.assert_array_equal(encode_new(fitted["none"], new_vectors), fitted["none"].encode(new_vectors))


def test_expansions_follow_one_another_and_are_saved(ids, new_vectors, tmp_path):
    once = expand(ids, new_vectors)
    twice = expand(once, clustered(NEW, (10, 30), 3), seed=1)
    np.testing.assert_array_equal(twice.codes[: OLD + NEW], once.codes)
    twice.save(tmp_path / "ids")
    loaded = SemanticIds.load(tmp_path / "ids")
    np.testing.assert_array_equal(loaded.codes, twice.codes)
    np.testing.assert_array_equal(loaded.encode(new_vectors), twice.encode(new_vectors))


def test_expansion_is_a_function_of_its_input_and_seed(ids, new_vectors):
    first, again, other = (expand(ids, new_vectors, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.codes, again.codes)
    assert first.arrays["codebook_2"].tobytes() != other.arrays["codebook_2"].tobytes()


def test_degenerate_new_items_have_ids(ids):
    assert expand(ids, np.zeros((0, WIDTH), np.float32)) is ids
    one = expand(ids, clustered(1, (0, 20), 5))
    assert len(one.codes) == OLD + 1
    same = expand(ids, np.repeat(clustered(1, (30, 31), 5), 12, axis=0))
    assert len(same.codes) == OLD + 12 and (same.codes < same.codebook_sizes).all()
    zero = expand(ids, np.zeros((12, WIDTH), np.float32))
    assert len(zero.codes) == OLD + 12


def test_what_cannot_be_expanded_is_named(former, ids, new_vectors):
    broken = new_vectors.copy()
    broken[7, 1] = np.nan
    with pytest.raises(InputError, match="item row 7"):
        expand(ids, broken)
    with pytest.raises(InputError, match="width 5 do not fit codebooks of width 8"):
        expand(ids, new_vectors[:, :5])
    random = fit_semantic_ids(former, config(quantizer={"kind": "random"}), seed=0)
    with pytest.raises(InputError, match="kind 'random' cannot be expanded"):
        expand(random, new_vectors)
    for settings_, message in (
        ({"levels": "first"}, "levels of an expansion is 'first'"),
        ({"penalty": -1.0}, "penalty of an expansion is -1.0"),
        ({"codes": -2}, "codes of an expansion is -2"),
        ({"iterations": 0}, "iterations of an expansion is 0"),
    ):
        with pytest.raises(InputError, match=message):
            Expansion(**settings_)


@pytest.fixture
def grown(former, new_vectors):
    """`former` without its first 50 items and with new ones, in another order; and the former row of each, -1 = new."""
    origin = np.random.default_rng(4).permutation(np.append(np.arange(50, OLD), np.full(NEW, -1)))
    embedding = np.empty((len(origin), WIDTH), np.float32)
    embedding[origin >= 0], embedding[origin < 0] = former.items.embedding[origin[origin >= 0]], new_vectors
    names = [f"item {row}" if row >= 0 else f"later {place}" for place, row in enumerate(origin)]
    return dataset_of(embedding, names, "after"), origin


@pytest.mark.parametrize("dedup", ["none", "extra_level"])
def test_a_grown_dataset_keeps_the_ids_of_the_items_it_had(former, fitted, grown, dedup, tmp_path):
    ids, (dataset, origin) = fitted[dedup], grown
    after = expand_semantic_ids(dataset, former, ids, config(dedup=dedup), 0, Expansion(codes=8))
    known = origin >= 0
    np.testing.assert_array_equal(after.codes[known], ids.codes[origin[known]])
    report = version_report(ids, after, former.item_ids, dataset.item_ids)
    assert (report["kept"], report["changed"], report["added"], report["removed"]) == (OLD - 50, 0, NEW, 50)
    assert report["changed_by_level"] == [0.0] * after.codes.shape[1]
    order = [(-dataset.items.train_count[item], item) for item in after.items_of(after.codes[3])]
    assert order == sorted(order)
    after.save(tmp_path / "ids")
    np.testing.assert_array_equal(SemanticIds.load(tmp_path / "ids", dataset).codes, after.codes)


def test_a_dataset_that_has_not_grown_keeps_everything(former, ids):
    after = expand_semantic_ids(former, former, ids, config(), seed=0)
    np.testing.assert_array_equal(after.codes, ids.codes)
    assert after.codebook_sizes == ids.codebook_sizes


def test_computed_content_is_brought_into_the_former_space(make_dataset):
    rng = np.random.default_rng(0)
    words = [f"{kind}{number}" for kind in "abcdefgh" for number in range(6)]
    texts = [" ".join(rng.choice(words[6 * (row % 8) : 6 * (row % 8) + 6], 4)) for row in range(160)]
    before, after = make_dataset(120, text=texts[:120]), make_dataset(160, text=texts)
    settings_ = config(content=("text",), dimensions=8, codebook_sizes=(8,))
    ids = fit_semantic_ids(before, settings_, seed=0)
    expanded = expand_semantic_ids(after, before, ids, settings_, seed=0)
    np.testing.assert_array_equal(expanded.codes[:120], ids.codes)
    first_of_topic = [Counter(ids.codes[topic::8, 0].tolist()).most_common(1)[0][0] for topic in range(8)]
    assert np.mean([expanded.codes[row, 0] == first_of_topic[row % 8] for row in range(120, 160)]) > 0.8


def test_datasets_and_ids_that_do_not_belong_together_are_refused(former, ids, grown):
    dataset, _ = grown
    with pytest.raises(InputError, match="were not made of the former dataset"):
        expand_semantic_ids(former, dataset, ids, config(), seed=0)
    with pytest.raises(InputError, match=r"tokenizer\.content is \['text'\], but the semantic IDs were made of"):
        expand_semantic_ids(dataset, former, ids, config(content=("text",)), seed=0)
    dataset.item_ids = np.arange(len(dataset.item_ids)).astype(str).astype(object)
    with pytest.raises(InputError, match="no item in common"):
        expand_semantic_ids(dataset, former, ids, config(), seed=0)


def test_the_version_report_counts_what_changed(former, ids, new_vectors):
    other = fit_semantic_ids(former, config(), seed=1)
    report = version_report(ids, other)
    differs = ids.codes != other.codes
    assert report["changed"] == sum(any(row) for row in differs.tolist()) > 0
    assert report["kept"] == OLD - report["changed"] and report["added"] == report["removed"] == 0
    assert report["changed_by_level"] == pytest.approx([column.mean() for column in differs.T])
    after = expand(ids, new_vectors)
    report = version_report(ids, after)
    assert report["collision_rate_added"] == pytest.approx(rate_of_new(after.codes, OLD))
    assert report["collision_rate_old"] == ids.quality["collision_rate"]
    assert (report["kept"], report["added"]) == (OLD, NEW)


def test_a_level_that_one_version_lacks_counts_as_changed(fitted):
    report = version_report(fitted["none"], fitted["extra_level"])
    assert report["changed_by_level"] == [0.0, 0.0, 0.0, 1.0] and report["changed"] == OLD


def test_the_version_table_shows_both_versions(ids, new_vectors):
    report = version_report(ids, expand(ids, new_vectors))
    out = StringIO()
    Console(file=out, width=100).print(versions.table(report))
    text = out.getvalue()
    assert "16 × 16 × 16" in text and "16 × 16 × 24" in text and f"{report['collision_rate_added']:.2%}" in text
