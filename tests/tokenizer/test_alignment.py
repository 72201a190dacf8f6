import jax
import numpy as np
import pytest

from onerec_jax.config import AlignmentConfig, TokenizerConfig
from onerec_jax.errors import InputError
from onerec_jax.tokenizer import alignment
from onerec_jax.tokenizer.alignment import align, fit, info_nce, project
from onerec_jax.tokenizer.pairs import Pairs, mine_pairs
from onerec_jax.tokenizer.semantic_ids import SemanticIds, fit_semantic_ids


def settings(**changes):
    return AlignmentConfig.model_validate({"steps": 49, "batch_size": 16, "width": 12, "learning_rate": 0.02} | changes)


def world(shape=(12,), seed=0, items=40):
    """Content [I,D] or [I,M,D] drawn apart for every item, and pairs (0, 1), (2, 3), ... of most of them."""
    content = np.random.default_rng(seed).normal(size=(items, *shape)).astype(np.float32)
    rows = np.arange(items - 10, dtype=np.int32).reshape(-1, 2)
    return content, Pairs(rows, np.full(len(rows), 1 / len(rows), np.float32))


def cosines(vectors, pairs):
    """Of paired items, and of all others."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    score, paired = unit @ unit.T, np.eye(len(vectors), dtype=bool)
    paired[pairs.items[:, 0], pairs.items[:, 1]] = paired[pairs.items[:, 1], pairs.items[:, 0]] = True
    return score[tuple(pairs.items.T)], score[~paired]


def kept(content, vectors):
    """R^2 of content [I,D] given vectors by least squares."""
    x, z = (values - values.mean(0) for values in (content, vectors))
    return 1 - np.sum((x - z @ np.linalg.lstsq(z, x, rcond=None)[0]) ** 2) / np.sum(x**2)


def test_info_nce_equals_a_restatement_with_loops():
    rng = np.random.default_rng(0)
    left, right = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in rng.normal(size=(2, 6, 3)))
    left_item, right_item = np.array([0, 1, 0, 2, 3, 4]), np.array([5, 2, 5, 1, 0, 6])
    total = 0.0
    for anchors, candidates, a, c in ((left, right, left_item, right_item), (right, left, right_item, left_item)):
        for b in range(6):
            others = [o for o in range(6) if o == b or c[o] not in (a[b], c[b])]
            score = np.array([anchors[b] @ candidates[o] / 0.2 for o in others])
            total += np.log(np.exp(score).sum()) - score[others.index(b)]
    loss = jax.jit(info_nce)(left, right, left_item, right_item, 0.2)
    assert float(loss) == pytest.approx(total / 12, rel=1e-5)


def test_a_batch_of_one_pair_over_and_over_has_no_negatives():
    left, right = np.eye(2)[[0, 0]], np.eye(2)[[1, 1]]
    assert jax.jit(info_nce)(left, right, np.array([3, 3]), np.array([4, 4]), 0.1) == 0


@pytest.mark.parametrize("shape", [(12,), (3, 12)], ids=["vectors", "tokens"])
def test_the_loss_falls_and_pairs_come_closer_than_others(shape):
    content, pairs = world(shape)
    fitted = fit(content, pairs, settings(), 0)
    assert fitted.loss.shape == (49,) and fitted.loss[-5:].mean() < 0.8 * fitted.loss[:5].mean()
    vectors = project(fitted.arrays, content)
    assert vectors.shape == (40, 12) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    paired, others = cosines(vectors, pairs)
    assert paired.mean() > 0.7 and np.mean(paired[:, None] > others) > 0.9


def test_the_reconstruction_term_keeps_content():
    content, pairs = world()
    without, with_it = (align(content, pairs, settings(reconstruction_weight=w), 0) for w in (0.0, 20.0))
    assert kept(content, with_it) > kept(content, without) + 0.03


def test_the_same_seed_gives_the_same_vectors_and_another_other_ones():
    content, pairs = world()
    first, again, other = (align(content, pairs, settings(), seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01


def test_steps_that_fill_no_whole_call_end_where_the_rate_does(monkeypatch):
    content, pairs = world()
    whole = fit(content, pairs, settings(), 0)
    monkeypatch.setattr(alignment, "_STEPS_AT_ONCE", 25)  # two calls: the 50th step moves nothing
    parts = fit(content, pairs, settings(), 0)
    np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-3)
    for name, array in whole.arrays.items():
        np.testing.assert_allclose(parts.arrays[name], array, atol=1e-3)


def test_a_row_is_projected_alike_in_any_batch(monkeypatch):
    content, pairs = world()
    arrays = fit(content, pairs, settings(), 0).arrays
    whole = project(arrays, content)
    monkeypatch.setattr(alignment, "_ROWS_AT_ONCE", 16)
    np.testing.assert_allclose(project(arrays, content), whole, atol=1e-6)
    np.testing.assert_allclose(project(arrays, content[7:9]), whole[7:9], atol=1e-6)


def test_pairs_are_drawn_by_weight():
    content, pairs = world()
    weight = np.zeros(len(pairs.items), np.float32)
    weight[3] = 1
    loss = fit(content, Pairs(pairs.items, weight), settings(reconstruction_weight=0.0), 0).loss
    np.testing.assert_allclose(loss, 0, atol=1e-5)  # one pair has no negatives


def test_without_steps_content_stays_as_it_is():
    content, pairs = world()
    assert align(content, pairs, settings(steps=0), 0) is content
    assert project({"codebook_0": np.zeros((2, 3))}, content) is content


def test_bad_input_is_refused():
    content, pairs = world()
    nothing = Pairs(np.zeros((0, 2), np.int32), np.zeros(0, np.float32))
    with pytest.raises(InputError, match="no item pairs"):
        fit(content, nothing, settings(), 0)
    tokens = np.zeros((40, 3, 2), np.float32)
    with pytest.raises(InputError, match=r"tokenizer\.alignment\.width 6 cannot be split among 4 queries"):
        fit(tokens, pairs, settings(width=6), 0)
    tokens[5, 1, 1] = content[4, 2] = np.nan
    for values, row in ((content, 4), (tokens, 5)):
        with pytest.raises(InputError, match=f"item row {row} "):
            fit(values, pairs, settings(), 0)


def test_content_that_does_not_fit_the_alignment_is_refused():
    content, pairs = world()
    arrays = fit(content, pairs, settings(), 0).arrays
    with pytest.raises(InputError, match=r"shape \[40, 11\] does not fit .* fitted on \[items, 12\]"):
        project(arrays, content[:, :11])
    content[2, 3] = np.inf
    with pytest.raises(InputError, match="item row 2 "):
        project(arrays, content)


@pytest.mark.parametrize("shape", [(12,), (3, 12)], ids=["vectors", "tokens"])
def test_constant_content_gives_finite_vectors(shape):
    _, pairs = world()
    vectors = align(np.ones((40, *shape), np.float32), pairs, settings(), 0)
    assert np.isfinite(vectors).all() and np.ptp(vectors, axis=0).max() < 1e-5


def tokenizer(**changes):
    return TokenizerConfig.model_validate({"codebook_sizes": (4, 4), "iterations": 4, "batch_size": 64} | changes)


def test_semantic_ids_are_those_of_aligned_content_and_new_items_go_the_same_way(make_dataset, tmp_path):
    content, _ = world()
    dataset = make_dataset(40, [[i, i + 1] for i in range(0, 30, 2)] * 2, embedding=content)
    config = tokenizer(alignment=settings())
    fit_semantic_ids(dataset, config, seed=3).save(tmp_path / "ids")
    ids = SemanticIds.load(tmp_path / "ids", dataset)
    unit = content / np.linalg.norm(content, axis=1, keepdims=True)
    np.testing.assert_array_equal(ids.encode(unit), ids.codes)
    vectors = align(unit, mine_pairs(dataset, config.alignment), config.alignment, 3)
    decoded = ids.decode(ids.codes)
    assert decoded.shape == vectors.shape
    assert np.mean((decoded - vectors) ** 2) < 0.5 * np.mean((vectors - vectors.mean(0)) ** 2)
    assert (ids.codes != fit_semantic_ids(dataset, tokenizer(), seed=3).codes).any()


def test_token_vectors_of_a_file_become_semantic_ids(make_dataset, tmp_path):
    tokens, _ = world((3, 12))
    np.save(tmp_path / "tokens.npy", tokens)
    dataset = make_dataset(40, [[i, i + 1] for i in range(0, 30, 2)] * 2)
    config = tokenizer(alignment=settings(), embedding_path=str(tmp_path / "tokens.npy"))
    ids = fit_semantic_ids(dataset, config, seed=0)
    unit = tokens / np.linalg.norm(tokens, axis=2, keepdims=True)
    np.testing.assert_array_equal(ids.encode(unit), ids.codes)
