import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_jax.config import TokenizerConfig
from onerec_jax.tokenizer import collisions, hierarchical, rq_kmeans
from onerec_jax.tokenizer.collisions import EPSILON, last_level_distances, nearest_free, sinkhorn
from onerec_jax.tokenizer.quantizer import with_codebooks
from onerec_jax.tokenizer.semantic_ids import fit_semantic_ids


def shares_its_id(prefix, last):
    ids = list(zip(np.asarray(prefix).tolist(), np.asarray(last).tolist(), strict=True))
    return np.array([ids.count(one) > 1 for one in ids])


def random_case(seed, items=40, prefixes=4, size=6, width=3):
    """Items whose last code is the nearest of random codes, one book for all prefixes; and all distances."""
    rng = np.random.default_rng(seed)
    points, book = rng.normal(size=(items, width)), rng.normal(size=(size, width))
    distance = ((points[:, None] - book) ** 2).sum(2).astype(np.float32)
    return rng.integers(0, prefixes, items), distance.argmin(1), rng.integers(0, 5, items), distance


# -------------------------------------------------------------------------------------------------------- nearest free


def literal_nearest_free(prefix, last, size, priority, distance):
    """Item by item in order of priority, as the docstring says."""
    result = last.copy()
    queue = sorted(range(len(last)), key=lambda item: (-priority[item], item))
    used, movers, owned = {}, [], set()
    for item in queue:
        used.setdefault(prefix[item], set()).add(last[item])
        if (prefix[item], last[item]) in owned:
            movers.append(item)
        owned.add((prefix[item], last[item]))
    for item in movers:
        free = [code for code in range(size) if code not in used[prefix[item]]]
        if free:
            result[item] = min(free, key=lambda code: distance[item, code])
            used[prefix[item]].add(result[item])
    return result


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    items=st.integers(1, 50),
    prefixes=st.integers(1, 8),
    block=st.sampled_from([1, 7, 500]),
)
def test_nearest_free_equals_a_literal_restatement(seed, items, prefixes, block):
    prefix, last, priority, distance = random_case(seed, items, prefixes)
    moved = nearest_free(prefix, last, 6, priority, lambda rows: distance[rows], block)
    np.testing.assert_array_equal(moved, literal_nearest_free(prefix, last, 6, priority, distance))


def test_nearest_free_makes_ids_unique_wherever_a_prefix_has_room():
    prefix, last, priority, distance = random_case(0, items=60, prefixes=12)
    moved = nearest_free(prefix, last, 6, priority, lambda rows: distance[rows])
    for number in range(12):
        under = moved[prefix == number]
        assert len(np.unique(under)) == min(6, len(under))


# ------------------------------------------------------------------------------------------------------------ sinkhorn


def test_the_transport_equals_a_float64_sinkhorn_and_sends_the_same_to_every_code():
    rng = np.random.default_rng(0)
    distance = (1 + rng.random((1, 4, 5)) / 50).astype(np.float32)
    distance[0, 3] = 9  # no member
    member, held = np.array([[True, True, True, False]]), np.array([[False, True, False, False, False]])
    near = distance[0, :3].astype(np.float64)
    middle = (near.max() + near.min()) / 2
    plan = np.exp((middle - near) / (near.max() - middle + 1e-5) / EPSILON)[:, [0, 2, 3, 4]]
    plan /= plan.sum(0) * 4
    for _ in range(50):
        plan /= plan.sum(1, keepdims=True) * 3
        plan /= plan.sum(0) * 4
    expected = []
    for row, to in zip(plan, near, strict=True):
        most = [code for column, code in enumerate([0, 2, 3, 4]) if row[column] == plan[:, column].max()]
        expected.append(min(most, key=lambda code: to[code]))
    np.testing.assert_allclose(plan.sum(0), 1 / 4)
    assert np.asarray(collisions._transport(distance, member, held))[0, :3].tolist() == expected


@pytest.mark.parametrize("seed", range(2))
def test_sinkhorn_separates_items_and_leaves_those_with_an_id_of_their_own(seed):
    prefix, last, _, distance = random_case(seed, items=60, prefixes=8, size=16)
    moved = sinkhorn(prefix, last, 16, lambda rows: distance[rows], block=16)
    before, after = shares_its_id(prefix, last), shares_its_id(prefix, moved)
    np.testing.assert_array_equal(moved[~before], last[~before])
    assert before.sum() > 12 and after.sum() < 0.3 * before.sum()


def test_two_items_split_the_codes_in_halves_and_take_the_nearest_of_theirs():
    line = np.arange(64)
    distance = np.stack([(line - 20.4) ** 2, (line - 20.1) ** 2]).astype(np.float32)
    moved = sinkhorn(np.zeros(2, int), np.array([20, 20]), 64, lambda rows: distance[rows])
    assert abs(moved[0] - 32) <= 1 and moved[1] == 20


def test_sinkhorn_leaves_a_full_prefix_and_items_of_equal_content_as_they_are():
    distance = np.array([[0, 1], [1, 0], [1, 0]], np.float32)
    full = sinkhorn(np.zeros(3, int), np.array([0, 1, 1]), 2, lambda rows: distance[rows])
    assert full.tolist() == [0, 1, 1]
    same = sinkhorn(np.zeros(2, int), np.array([1, 1]), 4, lambda rows: np.ones((len(rows), 4), np.float32))
    assert same.tolist() == [1, 1]


def test_without_collisions_nothing_moves():
    prefix, last = np.array([0, 0, 1]), np.array([0, 1, 0])

    def never(rows):
        raise AssertionError("no distance is needed")

    assert (
        sinkhorn(prefix, last, 2, never).tolist() == nearest_free(prefix, last, 2, prefix, never).tolist() == [0, 1, 0]
    )


# ----------------------------------------------------------------------------------------------------------- distances


@pytest.mark.parametrize("levels", [1, 3])
def test_distances_to_residual_codebooks_and_to_decoded_candidates_are_those_of_brute_force(levels, monkeypatch):
    rng = np.random.default_rng(0)
    arrays = with_codebooks([rng.normal(size=(5, 4)).astype(np.float32) for _ in range(levels)])
    vectors = rng.normal(size=(30, 4)).astype(np.float32)
    codes = rng.integers(0, 5, (30, levels))
    rows = np.array([3, 3, 29, 0, 8])
    expected = np.empty((5, 5))
    for place, row in enumerate(rows):
        for code in range(5):
            decoded = rq_kmeans.decode(arrays, np.array([[*codes[row, :-1], code]]))[0]
            expected[place, code] = ((vectors[row] - decoded) ** 2).sum()
    for additive in (("residual_kmeans",), ()):
        monkeypatch.setattr(collisions, "_ADDITIVE", additive)
        found = last_level_distances("residual_kmeans", arrays, vectors, codes, 5)(rows)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- whole path


@pytest.fixture(scope="module")
def embedding():
    return np.random.default_rng(0).normal(size=(60, 4))


def fit(make_dataset, embedding, dedup, **values):
    dataset = make_dataset(60, embedding=embedding, train_count=np.random.default_rng(1).integers(0, 9, 60))
    config = TokenizerConfig(**{"codebook_sizes": (4, 8), "iterations": 4, "dedup": dedup, **values})
    return fit_semantic_ids(dataset, config, 0)


@pytest.mark.parametrize("kind", ["residual_kmeans", "product", "hierarchical"])
def test_reassigned_items_keep_their_prefix_and_the_report_tells_both_rates(make_dataset, embedding, kind):
    wide = {"codebook_sizes": (4, 8), "quantizer": {"kind": kind}}
    twice = embedding[:30].repeat(2, axis=0)
    plain = fit(make_dataset, twice, "none", **wide)
    shared = shares_its_id(plain.codes[:, 0], plain.codes[:, 1])
    for dedup in ("nearest_free", "sinkhorn"):
        ids = fit(make_dataset, twice, dedup, **wide)
        np.testing.assert_array_equal(ids.codes[:, 0], plain.codes[:, 0])
        np.testing.assert_array_equal(ids.codes[~shared], plain.codes[~shared])
        assert ids.quality["quantized_collision_rate"] == plain.quality["collision_rate"] == shared.mean()
        assert ids.codebook_sizes == (4, 8) and ids.levels == 2
        if dedup == "nearest_free":
            assert ids.quality["collision_rate"] < 0.9 * shared.mean()
            assert ids.quality["reconstruction_mse"] > plain.quality["reconstruction_mse"]
            for code in ids.codes:
                assert len(ids.items_of(code)) == (ids.codes == code).all(1).sum()


def test_a_single_level_is_reassigned_among_all_items(make_dataset, embedding):
    twice = embedding[:30].repeat(2, axis=0)
    ids = fit(make_dataset, twice, "nearest_free", codebook_sizes=(64,), iterations=1)
    assert len(np.unique(ids.codes)) == 60 and ids.quality["quantized_collision_rate"] == 1


def test_of_the_items_of_one_id_the_most_popular_keeps_it(make_dataset, embedding):
    plain, ids = (fit(make_dataset, embedding, dedup) for dedup in ("none", "nearest_free"))
    for code in np.unique(plain.codes, axis=0):
        first = plain.items_of(code)[0]
        np.testing.assert_array_equal(ids.codes[first], code)


def test_a_code_that_a_tree_does_not_have_costs_the_distance_to_the_parent():
    tree = {
        "sizes": np.array([1, 3]),
        "vector_0": np.array([[0.5]], np.float32),
        "child_start_0": np.array([0, 1]),
        "vector_1": np.array([[0.5]], np.float32),
        "child_start_1": np.array([0, 2]),
        "vector_2": np.array([[0.0], [1]], np.float32),
    }
    assert hierarchical.decode(tree, np.array([[0, 2]])).tolist() == [[0.5]]
    found = last_level_distances("hierarchical", tree, np.ones((1, 1), np.float32), np.array([[0, 1]]), 3)
    assert found(np.array([0])).tolist() == [[1, 0, 0.25]]
