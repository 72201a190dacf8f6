from __future__ import annotations

import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import PLAIN as FEW_FEATURES
from tiny import random_batch, tiny_model

from onerec_jax.data.schema import LABELS, Vocabulary
from onerec_jax.generate.sample import conditional_gumbel, make_sampling, sample, sampling_log_p
from onerec_jax.model.encoder import Context
from onerec_jax.model.onerec import Model, build
from onerec_jax.model.prefixes import device_trie
from onerec_jax.tokenizer.trie import Trie

SIZES = (4, 3, 3)
VOCABULARY = Vocabulary(
    users=50, items=10, authors=20, tags=7, user_features=(3, 4), labels=LABELS, codebook_sizes=SIZES
)
CODES = np.array(
    [[0, 0, 0], [0, 0, 2], [0, 2, 1], [1, 1, 1], [3, 0, 0], [3, 0, 1], [3, 0, 2], [3, 1, 0], [3, 1, 0], [3, 2, 2]],
    np.int32,
)
DISTINCT = np.unique(CODES, axis=0)
EVERY = np.array(list(itertools.product(*map(range, SIZES))), np.int32)
PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


class Given(NamedTuple):
    model: Model
    trie: Trie
    parts: tuple
    context: Context
    logits: list[np.ndarray]  # float64 [B,4], [B,4,3], [B,4,3,3]: of every code after every prefix, teacher-forced
    compiled: dict


@pytest.fixture(scope="module")
def given() -> Given:
    model = build(tiny_model(**FEW_FEATURES, heads=1), VOCABULARY)
    params, tables = model.init(0)
    params["decoder"]["heads"] = jax.tree.map(lambda x: 2 * x, params["decoder"]["heads"])
    parts = params, tables, model.init_bias()
    batch = random_batch(model.config, VOCABULARY, batch=3)
    every = dataclasses.replace(
        batch,
        targets=np.tile(EVERY, (3, 1, 1)),
        target_weight=np.ones((3, len(EVERY)), np.float32),
        visible=np.repeat(batch.visible[:, :1], len(EVERY), axis=1),
    )

    @jax.jit
    def teacher_forced(batch):
        local, rows = model.read(parts[1], batch)
        module = model.bind(params)
        return module(local, rows, parts[2], None)[0], module.encode(local, rows, parts[2], None)[0]

    logits, context = teacher_forced(every)
    tree = [np.asarray(level, np.float64).reshape(3, *SIZES, -1) for level in logits]
    by_prefix = [tree[0][:, 0, 0, 0], tree[1][:, :, 0, 0], tree[2][:, :, :, 0]]
    return Given(model, Trie.build(CODES, -np.arange(10.0)), parts, context, by_prefix, {})


def _draw(given: Given, context: Context, width: int, seed: int = 0, free: bool = False, **settings):
    """`sample` from an encoded batch, compiled once for each of its settings."""
    name = (width, free, *settings.items())
    if name not in given.compiled:

        @jax.jit
        def draw(params, bias, context, trie, key):
            module = given.model.bind(params)
            return sample(module, context, bias, trie, width, key, free=free, **(PLAIN | settings))

        given.compiled[name] = draw
    params, _, bias = given.parts
    return given.compiled[name](
        params, bias, context, device_trie(given.trie, given.model.config), jax.random.key(seed)
    )


def _kept(p: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Probabilities of a level cut to the most probable codes, one after the other."""
    order = np.argsort(-p)[: top_k or None]
    order = order[p[order] > 0]
    within = p[order] / p[order].sum()
    held, kept = 0.0, []
    for code, share in zip(order, within, strict=True):
        if held >= top_p:
            break
        kept.append(code)
        held += share
    cut = np.zeros_like(p)
    cut[kept] = p[kept] / p[kept].sum()
    return cut


def _enumerated(logits: list[np.ndarray], b: int, free: bool, temperature: float, top_k: int, top_p: float):
    """Every semantic ID that sampling can draw, with its probability."""
    found = {(): 1.0}
    for level, of_level in enumerate(logits):
        longer = {}
        for prefix, p_prefix in found.items():
            weights = np.exp(of_level[(b, *prefix)] / temperature)
            if not free:
                goes_on = {tuple(row[: level + 1]) for row in CODES.tolist()}
                weights *= [(*prefix, code) in goes_on for code in range(SIZES[level])]
            shares = _kept(weights / weights.sum(), top_k, top_p)
            longer |= {(*prefix, code): p_prefix * p for code, p in enumerate(shares) if p > 0}
        found = longer
    return found


@pytest.mark.parametrize(
    ("free", "settings"),
    [
        (False, {}),
        (False, {"temperature": 0.6, "top_k": 2}),
        (True, {"temperature": 2.0, "top_k": 3, "top_p": 0.8}),
    ],
)
def test_as_many_draws_as_there_are_ids_give_each_of_them_once_with_its_probability(given: Given, free, settings):
    beams = _draw(given, given.context, len(EVERY), free=free, **settings)
    for b in range(3):
        expected = _enumerated(given.logits, b, free, **(PLAIN | settings))
        exists = np.isfinite(beams.score[b])
        drawn = [tuple(row) for row in np.asarray(beams.codes[b])[exists].tolist()]
        assert sorted(drawn) == sorted(expected)
        np.testing.assert_allclose(beams.score[b][exists], np.log([expected[codes] for codes in drawn]), atol=1e-5)
        assert exists[: len(drawn)].all()
        assert (np.asarray(beams.leaf)[b][exists] == given.trie.find(np.array(drawn))).all()
        assert (np.asarray(beams.leaf)[b][~exists] == -1).all()


@pytest.mark.parametrize("free", [False, True])
def test_probabilities_of_codes_are_the_models_own_whatever_was_sampled_by(given: Given, free: bool):
    settings = {"temperature": 2.0, "top_k": 3, "top_p": 0.8} if free else {"temperature": 0.6, "top_k": 2}
    beams = _draw(given, given.context, len(EVERY), free=free, **settings)
    for b, w in itertools.product(range(3), range(beams.codes.shape[1])):
        codes = np.asarray(beams.codes)[b, w].tolist()
        if not np.isfinite(beams.score[b, w]):
            assert np.isneginf(beams.log_p_all[b, w]).all() and np.isneginf(beams.log_p_legal[b, w]).all()
            continue
        for level, code in enumerate(codes):
            x = given.logits[level][(b, *codes[:level])]
            legal = np.unique(DISTINCT[(DISTINCT[:, :level] == codes[:level]).all(axis=1), level])
            among_legal = x[code] - np.log(np.exp(x[legal]).sum()) if code in legal else -np.inf
            np.testing.assert_allclose(beams.log_p_all[b, w, level], x[code] - np.log(np.exp(x).sum()), atol=1e-5)
            np.testing.assert_allclose(beams.log_p_legal[b, w, level], among_legal, atol=1e-5)


def test_two_draws_are_a_sample_without_replacement(given: Given):
    """First draws, and ordered pairs of both, against P(i) and P(i) P(j) / (1 - P(i)) of every ID."""
    copies, seeds = 4096, 3
    one = dataclasses.replace(
        given.context,
        tokens=jnp.repeat(given.context.tokens[:1], copies, axis=0),
        valid=jnp.repeat(given.context.valid[:1], copies, axis=0),
    )
    p = _enumerated(given.logits, 0, False, **PLAIN)
    p = np.array([p[tuple(codes)] for codes in DISTINCT.tolist()])
    leaves = np.concatenate([np.asarray(_draw(given, one, 2, seed).leaf) for seed in range(seeds)])
    assert (leaves >= 0).all() and (leaves[:, 0] != leaves[:, 1]).all()
    pairs = p[:, None] * p[None, :] / (1 - p[:, None]) * (1 - np.eye(len(p)))
    included = pairs.sum(0) + pairs.sum(1)
    counts = np.zeros_like(pairs)
    np.add.at(counts, (leaves[:, 0], leaves[:, 1]), 1)
    n = copies * seeds
    for seen, expected in (
        (counts.sum(1), p),
        (counts.sum(0) + counts.sum(1), included),
        (counts[pairs > 0], pairs[pairs > 0]),
    ):
        sigma = np.sqrt(expected * (1 - expected) * n)
        assert (np.abs(seen - n * expected) < 4.5 * sigma + 1).all()
    # the odds are far enough from even for all this to tell
    assert included.max() > 2 * included.min()


def test_noise_given_its_largest_has_that_largest_and_no_nan():
    log_p = np.array(
        [[-0.7, -1.2, -1.6, -np.inf], [0.0] + [-np.inf] * 3, [-np.inf] * 4, [-69, -46, -0.7, -0.7]], np.float32
    )
    largest = np.array([-3.0, 2.0, -np.inf, -60.0], np.float32)
    noise = np.asarray(jax.jit(conditional_gumbel)(jax.random.key(0), log_p, largest))
    assert not np.isnan(noise).any()
    np.testing.assert_array_equal(noise.max(axis=1), largest)
    assert (np.isneginf(noise) == np.isneginf(np.asarray(log_p))).all()


def test_noise_given_its_largest_is_the_papers_transformation_of_free_noise():
    rng = np.random.default_rng(0)
    log_p = np.log(rng.dirichlet(np.ones(6), 50)).astype(np.float32)
    largest = rng.normal(size=50).astype(np.float32)
    key = jax.random.key(3)
    free = np.asarray(log_p + jax.random.gumbel(key, log_p.shape), np.float64)
    with np.errstate(divide="ignore"):
        top, most = np.asarray(largest, np.float64)[:, None], free.max(axis=1, keepdims=True)
        expected = -np.log(np.exp(-top) - np.exp(-most) + np.exp(-free))
    np.testing.assert_allclose(jax.jit(conditional_gumbel)(key, log_p, largest), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 0.4), (0.5, 4, 1.0), (2.0, 5, 0.7), (1.0, 0, 1e-9)]
)
def test_codes_to_choose_from_are_those_of_a_loop_over_the_most_probable(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(size=(40, 9)).astype(np.float32) * 2
    logits[:, 7] = -np.inf
    found = np.exp(sampling_log_p(jnp.asarray(logits), temperature, top_k, top_p))
    weights = np.exp(logits.astype(np.float64) / temperature)
    expected = [_kept(p, top_k, top_p) for p in weights / weights.sum(axis=1, keepdims=True)]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (found > 0).any(axis=1).all() and (top_p > 1e-6 or ((found > 0).sum(axis=1) == 1).all())


def test_the_key_decides_what_is_drawn_from_the_encoded_batch(given: Given):
    draw = make_sampling(given.model, len(EVERY))
    batch, trie = random_batch(given.model.config, VOCABULARY, batch=3), device_trie(given.trie, given.model.config)
    first, again, other = (draw(*given.parts, batch, trie, jax.random.key(seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.leaf, again.leaf)
    assert (np.asarray(first.leaf) != np.asarray(other.leaf)).any()
    np.testing.assert_array_equal(first.leaf, _draw(given, given.context, len(EVERY), 5).leaf)
