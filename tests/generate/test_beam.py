from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_batch, tiny_model

from onerec_jax.data.schema import LABELS, Vocabulary
from onerec_jax.generate.beam import make_beam_search, resolve_items
from onerec_jax.model.onerec import Model, build
from onerec_jax.model.prefixes import device_trie
from onerec_jax.tokenizer.trie import Trie

SIZES = (12, 9, 7)
VOCABULARY = Vocabulary(
    users=50, items=500, authors=20, tags=7, user_features=(3, 4), labels=LABELS, codebook_sizes=SIZES
)


@pytest.fixture(scope="module")
def catalogue() -> np.ndarray:
    """Semantic IDs of 500 items, some shared."""
    rng = np.random.default_rng(0)
    return np.stack([rng.integers(0, size, 500) for size in SIZES], axis=1).astype(np.int32)


@pytest.fixture(scope="module")
def trie(catalogue: np.ndarray) -> Trie:
    return Trie.build(catalogue, -np.arange(500.0))


@pytest.fixture(scope="module", params=["dense", "experts, causal"])
def model(request: pytest.FixtureRequest) -> Model:
    if request.param == "dense":
        return build(tiny_model(decoder_layers=2), VOCABULARY)
    moe = {"experts": 4, "active": 2, "hidden": 16, "tile": 8}
    return build(tiny_model(causal=True, positive_length=0, lifelong_length=0, moe=moe), VOCABULARY)


def _parts(model: Model):
    """Random parameters, with heads and embeddings large enough for distributions that are far from uniform."""
    params, tables = model.init(0)
    params["decoder"]["heads"] = jax.tree.map(lambda x: 3 * x, params["decoder"]["heads"])
    return params, tables, model.init_bias()


def _all_logits(model: Model, batch, codes_SxC: np.ndarray) -> tuple[jax.Array, ...]:
    """Logits [B,S,V] of each level for every ID by the teacher-forced forward pass."""
    import dataclasses

    b, s = batch.user.shape[0], len(codes_SxC)
    tiled = dataclasses.replace(
        batch,
        targets=np.tile(codes_SxC[None], (b, 1, 1)),
        target_weight=np.ones((b, s), np.float32),
        visible=np.repeat((batch.short.item >= 0).sum(1, keepdims=True), s, axis=1).astype(np.int32),
    )
    params, tables, bias = _parts(model)
    logits, _ = jax.jit(lambda batch: model.bind(params)(*model.read(tables, batch), bias, None))(tiled)
    return logits


def _all_scores(model: Model, batch, codes_SxC: np.ndarray) -> np.ndarray:
    """Log-probability [B,S] of every ID."""
    return np.asarray(
        sum(
            jnp.take_along_axis(jax.nn.log_softmax(level), codes_SxC[None, :, i : i + 1], axis=-1)[..., 0]
            for i, level in enumerate(_all_logits(model, batch, codes_SxC))
        )
    )


def test_constrained_beams_equal_brute_force_over_the_catalogue(model: Model, trie: Trie, catalogue: np.ndarray):
    batch = random_batch(model.config, VOCABULARY)
    distinct = np.unique(catalogue, axis=0)
    brute = _all_scores(model, batch, distinct)
    beams = make_beam_search(model, 600)(*_parts(model), batch, device_trie(trie, model.config))
    for b in range(len(brute)):
        order = np.argsort(-brute[b], kind="stable")
        found = np.asarray(beams.leaf[b])
        assert (found[: len(distinct)] == order).all()
        np.testing.assert_allclose(beams.score[b, : len(distinct)], brute[b][order], atol=1e-5)
        assert (found[len(distinct) :] == -1).all()
        np.testing.assert_array_equal(beams.codes[b, : len(distinct)], distinct[order])


def test_a_narrow_beam_equals_a_step_by_step_search_in_numpy(model: Model, trie: Trie, catalogue: np.ndarray):
    """Prefix scores come from brute force: P(prefix) = sum over every possible completion."""
    width = 5
    batch = random_batch(model.config, VOCABULARY)
    everything = np.array(list(itertools.product(*map(range, SIZES))), np.int32)
    log_p = _all_scores(model, batch, everything).reshape(-1, *SIZES).astype(np.float64)
    legal = {tuple(row[:n]) for row in catalogue.tolist() for n in (1, 2, 3)}
    beams = make_beam_search(model, width)(*_parts(model), batch, device_trie(trie, model.config))
    for b in range(len(log_p)):
        prefix = [np.log(np.exp(log_p[b]).sum((1, 2))), np.log(np.exp(log_p[b]).sum(2)), log_p[b]]
        kept: list[tuple[int, ...]] = [()]
        for level in range(3):
            grown = [(*p, c) for p in kept for c in range(SIZES[level]) if (*p, c) in legal]
            kept = sorted(grown, key=lambda p: -prefix[level][p])[:width]
        assert np.asarray(beams.codes[b]).tolist() == [list(p) for p in kept]


def test_no_beam_of_a_hundred_thousand_is_illegal(model: Model, trie: Trie, catalogue: np.ndarray):
    search = make_beam_search(model, 64)
    known = {tuple(row) for row in catalogue.tolist()}
    count = 0
    batch = random_batch(model.config, VOCABULARY, batch=400)
    for seed in range(4):
        params, tables = model.init(seed)
        beams = search(params, tables, model.init_bias(), batch, device_trie(trie, model.config))
        codes, leaf = np.asarray(beams.codes).reshape(-1, 3), np.asarray(beams.leaf).reshape(-1)
        assert (leaf >= 0).all()
        assert set(map(tuple, np.unique(codes, axis=0).tolist())) <= known
        assert (trie.find(codes) == leaf).all()
        count += len(codes)
    assert count >= 100_000


def test_free_beams_rank_every_combination(model: Model, trie: Trie):
    batch = random_batch(model.config, VOCABULARY)
    everything = np.array(list(itertools.product(*map(range, SIZES))), np.int32)
    brute = _all_scores(model, batch, everything)
    beams = make_beam_search(model, len(everything), free=True)(*_parts(model), batch, device_trie(trie, model.config))
    np.testing.assert_allclose(beams.score, -np.sort(-brute, axis=1), atol=1e-4)


def test_beams_of_a_legal_softmax_share_all_of_the_probability_among_items(trie: Trie, catalogue: np.ndarray):
    """The chain rule over legal codes, written out from the logits of the teacher-forced pass."""
    model = build(tiny_model(decoder_layers=2, softmax="legal"), VOCABULARY)
    batch = random_batch(model.config, VOCABULARY)
    distinct = np.unique(catalogue, axis=0)
    logits = _all_logits(model, batch, distinct)
    brute = np.zeros(logits[0].shape[:2])
    for s, codes in enumerate(distinct):
        for level in range(3):
            legal = np.unique(distinct[(distinct[:, :level] == codes[:level]).all(axis=1), level])
            x = np.asarray(logits[level][:, s], np.float64)
            brute[:, s] += x[:, codes[level]] - np.log(np.exp(x[:, legal]).sum(axis=1))
    beams = make_beam_search(model, 600)(*_parts(model), batch, device_trie(trie, model.config))
    assert (np.asarray(beams.leaf)[:, : len(distinct)] == np.argsort(-brute, axis=1, kind="stable")).all()
    np.testing.assert_allclose(beams.score[:, : len(distinct)], -np.sort(-brute, axis=1), atol=1e-4)
    np.testing.assert_allclose(np.exp(beams.score).sum(axis=1), 1.0, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_items_come_in_the_order_of_beams_then_of_the_trie_without_those_seen(data: st.DataObject):
    items = data.draw(st.integers(1, 30))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    codes = rng.integers(0, 3, (items, 2)).astype(np.int32)
    trie = Trie.build(codes, rng.random(items))
    n, width, k = 3, 4, data.draw(st.integers(1, 8))
    leaf = np.stack([rng.permutation(np.r_[np.arange(trie.leaves), -np.ones(width)])[:width] for _ in range(n)])
    leaf = leaf.astype(np.int32)
    score = -np.sort(rng.random((n, width))).astype(np.float32)
    seen = [np.unique(rng.integers(0, items, rng.integers(0, 5))) for _ in range(n)]
    flat = np.concatenate(seen).astype(np.int32), np.cumsum([0] + [len(s) for s in seen])
    found, scores = resolve_items(trie, leaf, score, k, flat)
    for row in range(n):
        expected = [
            (int(i), s)
            for node, s in zip(leaf[row], score[row], strict=True)
            if node >= 0
            for i in trie.leaf_items(int(node))
            if i not in seen[row]
        ][:k]
        padded = [i for i, _ in expected] + [-1] * (k - len(expected))
        assert found[row].tolist() == padded
        np.testing.assert_array_equal(scores[row, : len(expected)], [s for _, s in expected])
