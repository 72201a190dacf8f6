from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import PLAIN, random_batch, tiny_model

from onerec_jax.config import RLConfig
from onerec_jax.data.schema import LABELS, Batch, Vocabulary
from onerec_jax.generate.step import make_catalogue
from onerec_jax.model.encoder import Encoder
from onerec_jax.model.onerec import Model, build
from onerec_jax.model.prefixes import device_trie
from onerec_jax.posttrain.rollout import Rollout, candidate_log_p, first_items, make_rollout, make_served
from onerec_jax.tokenizer.trie import Trie

SIZES = (4, 3, 3)
VOCABULARY = Vocabulary(
    users=50, items=9, authors=20, tags=7, user_features=(3, 4), labels=LABELS, codebook_sizes=SIZES
)
CODES = np.array(
    [[0, 0, 0], [0, 0, 2], [0, 2, 1], [1, 1, 1], [3, 0, 1], [3, 0, 2], [3, 1, 0], [3, 1, 0], [3, 2, 2]], np.int32
)
DISTINCT = np.unique(CODES, axis=0)
TRIE = Trie.build(CODES, np.arange(9.0))  # of two items of one ID the later one is served first
GROUP = 40  # more than the 36 IDs that there can be
MODELS = {"causal": {**PLAIN, "heads": 1, "causal": True}, "legal": {**PLAIN, "heads": 1, "softmax": "legal"}}
ROLLOUTS = {
    "causal": {
        "free beams": {"rollout": "beam", "constrained": False},
        "draws along the trie": {"rollout": "sample", "temperature": 0.7},
    },
    "legal": {
        "beams along the trie": {"rollout": "beam"},
        "free draws": {"rollout": "sample", "constrained": False, "temperature": 2.0, "top_k": 3},
    },
}


class Given(NamedTuple):
    model: Model
    parts: tuple
    batch: Batch
    rollouts: dict[str, Rollout]


@pytest.fixture(scope="module", params=list(MODELS))
def given(request: pytest.FixtureRequest) -> Given:
    model = build(tiny_model(**MODELS[request.param]), VOCABULARY)
    params, tables = model.init(0)
    params["decoder"]["heads"] = jax.tree.map(lambda x: 2 * x, params["decoder"]["heads"])
    parts, batch = (params, tables, model.init_bias()), random_batch(model.config, VOCABULARY, batch=3)
    arguments = _arguments(model, parts, batch)
    rollouts = {
        name: jax.device_get(make_rollout(model, RLConfig(group=GROUP, **settings))(*arguments))
        for name, settings in ROLLOUTS[request.param].items()
    }
    return Given(model, parts, batch, rollouts)


def _arguments(model: Model, parts: tuple, batch: Batch) -> tuple:
    return *parts, batch, device_trie(TRIE, model.config), jnp.asarray(first_items(TRIE)), jax.random.key(0)


def _with_targets(batch: Batch, codes_BxGxC: np.ndarray) -> Batch:
    """The batch with every candidate as a target that sees all events."""
    events = (batch.short.item >= 0).sum(1, keepdims=True)
    return dataclasses.replace(
        batch,
        targets=codes_BxGxC,
        target_weight=np.ones(codes_BxGxC.shape[:2], np.float32),
        visible=np.repeat(events, codes_BxGxC.shape[1], axis=1).astype(np.int32),
    )


def _log_p(given: Given, codes_BxGxC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log P of codes among all and among legal ones, in NumPy from the logits of the model's own forward pass."""
    params, tables, bias = given.parts

    @jax.jit
    def forward(batch):
        return given.model.bind(params)(*given.model.read(tables, batch), bias, None)[0]

    logits = [np.asarray(level, np.float64) for level in forward(_with_targets(given.batch, codes_BxGxC))]
    among_all, among_legal = np.zeros(codes_BxGxC.shape), np.full(codes_BxGxC.shape, -np.inf)
    for b, g, level in np.ndindex(*codes_BxGxC.shape):
        codes, x = codes_BxGxC[b, g], logits[level][b, g]
        legal = np.unique(DISTINCT[(DISTINCT[:, :level] == codes[:level]).all(axis=1), level])
        among_all[b, g, level] = x[codes[level]] - np.log(np.exp(x).sum())
        if codes[level] in legal:
            among_legal[b, g, level] = x[codes[level]] - np.log(np.exp(x[legal]).sum())
    return among_all, among_legal


def _candidate_log_p(given: Given, distribution):
    """(params, codes, valid) -> `candidate_log_p` of a batch, and the gradient of the sum of squares of it."""
    _, tables, bias = given.parts
    trie = device_trie(TRIE, given.model.config)

    def total(params, codes, valid):
        module = given.model.bind(params)
        context, _ = module.encode(*given.model.read(tables, given.batch), bias, None)
        log_p = candidate_log_p(module, context, codes, valid, bias, trie, distribution)
        return jnp.sum(log_p**2), log_p

    run = jax.jit(jax.value_and_grad(total, has_aux=True))

    def both(codes, valid):
        (_, log_p), gradient = jax.device_get(run(given.parts[0], codes, valid))
        return log_p, jax.tree.leaves(gradient)

    return both


def test_probabilities_that_a_rollout_leaves_are_those_of_the_teacher_forced_pass(given: Given):
    codes = np.concatenate([rollout.codes for rollout in given.rollouts.values()], axis=1)
    among_all, among_legal = _log_p(given, codes)
    for i, rollout in enumerate(given.rollouts.values()):
        part = np.s_[:, i * GROUP : (i + 1) * GROUP]
        exists = rollout.exists
        np.testing.assert_allclose(rollout.log_p_all[exists], among_all[part][exists], atol=1e-5)
        np.testing.assert_allclose(rollout.log_p_legal[exists], among_legal[part][exists], atol=1e-5)
        assert (np.isneginf(rollout.log_p_legal[exists][:, -1]) == (rollout.leaf[exists] < 0)).all()
        assert np.isneginf(rollout.log_p_all[~exists]).all() and np.isneginf(rollout.log_p_legal[~exists]).all()


def test_beams_score_by_the_distribution_that_the_model_is_trained_with(given: Given):
    for name, rollout in given.rollouts.items():
        if "beams" not in name:
            continue
        legal = given.model.config.softmax == "legal" and "free" not in name
        own = (rollout.log_p_legal if legal else rollout.log_p_all).sum(axis=-1)
        np.testing.assert_allclose(rollout.score[rollout.exists], own[rollout.exists], atol=1e-5)
        assert (np.diff(np.where(rollout.exists, rollout.score, -1e9)) <= 0).all()


def test_a_candidate_is_the_leaf_of_its_codes_and_the_item_served_first_there(given: Given):
    for rollout in given.rollouts.values():
        for b, g in np.ndindex(*rollout.exists.shape):
            leaf = TRIE.find(np.asarray(rollout.codes)[b, g][None])[0] if rollout.exists[b, g] else -1
            assert rollout.leaf[b, g] == leaf
            assert rollout.item[b, g] == (TRIE.leaf_items(leaf)[0] if leaf >= 0 else -1)


def test_a_group_larger_than_the_catalogue_is_filled_up_with_candidates_that_do_not_exist(given: Given):
    for name, rollout in given.rollouts.items():
        count = {"free beams": 36, "free draws": 27}.get(name, len(DISTINCT))
        assert rollout.exists.shape == (3, GROUP)
        assert (rollout.exists == (np.arange(GROUP) < count)).all()
        assert np.isfinite(rollout.score[rollout.exists]).all() and np.isneginf(rollout.score[~rollout.exists]).all()
        assert (rollout.codes[~rollout.exists] == 0).all() and (rollout.item[~rollout.exists] == -1).all()
        for b in range(3):
            assert len(np.unique(rollout.codes[b][rollout.exists[b]], axis=0)) == count


def test_log_probabilities_of_given_candidates_equal_those_of_their_rollout_and_junk_has_no_gradient(given: Given):
    rollout = next(iter(given.rollouts.values()))
    legal = given.model.config.softmax == "legal"
    run = _candidate_log_p(given, "legal" if legal else "all")
    valid = rollout.exists & (np.arange(GROUP) % 3 > 0)
    junk = np.where(np.arange(GROUP) % 2, 1 << 30, -7).astype(np.int32)[:, None]
    codes = np.where(valid[..., None], rollout.codes, junk)
    found, gradient = run(codes, valid)
    np.testing.assert_allclose(found[valid], (rollout.log_p_legal if legal else rollout.log_p_all)[valid], atol=1e-5)
    assert (found[~valid] == 0).all()
    assert all(np.isfinite(leaf).all() for leaf in gradient) and max(np.abs(leaf).max() for leaf in gradient) > 0.01
    for leaf, again in zip(gradient, run(np.where(valid[..., None], rollout.codes, 1), valid)[1], strict=True):
        np.testing.assert_array_equal(leaf, again)
    assert all((leaf == 0).all() for leaf in run(codes, np.zeros_like(valid))[1])


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The requests of every batch that is encoded while the test traces."""
    seen, encode = [], Encoder.__call__

    def watched(self, batch, *rest):
        seen.append(batch.user.shape[0])
        return encode(self, batch, *rest)

    monkeypatch.setattr(Encoder, "__call__", watched)
    return seen


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_served_candidates_are_the_head_of_the_list_by_both_heads(tiny_recipe, encoded, exclude_seen: bool):
    """Against the scores of all items: 1.5 times those of the item head, moved by a shift, and those of the codes."""
    model = build(tiny_model(**{**MODELS["legal"], "head": "both"}), VOCABULARY)
    params, tables = model.init(0)
    params["decoder"]["heads"] = jax.tree.map(lambda x: 2 * x, params["decoder"]["heads"])
    parts, batch = (params, tables, model.init_bias()), random_batch(model.config, VOCABULARY, batch=3)
    none, shift = np.zeros(9, np.int64), np.linspace(-1, 1, 9)[::-1]
    catalogue = make_catalogue(TRIE, model.config, none, none, shift)
    changes = {"beam_width": 9, "item_weight": 1.5, "exclude_seen": exclude_seen}
    evaluate = tiny_recipe.evaluate.model_copy(update=changes)
    recipe = tiny_recipe.model_copy(update={"evaluate": evaluate, "rl": RLConfig(rollout="served", group=7)})
    found = jax.device_get(make_served(model, recipe)(*parts, batch, catalogue))
    assert encoded == [3]

    every = np.broadcast_to(CODES, (3, 9, 3))
    among_all, among_legal = _log_p(Given(model, parts, batch, {}), every)
    own = np.asarray(model.item_scores(params, batch, model.encode(*parts, batch), catalogue.trie)) + shift
    score = among_legal.sum(-1) + 1.5 * (own - np.log(np.exp(own).sum(-1, keepdims=True)))
    for b in range(3):
        met = set(batch.short.item[b].tolist()) if exclude_seen else set()
        expected = [item for item in np.argsort(-score[b]).tolist() if item not in met][:7]
        n = len(expected)
        assert n == 7 or exclude_seen
        assert found.item[b].tolist() == expected + [-1] * (7 - n)
        assert (found.exists[b] == (np.arange(7) < n)).all()
        np.testing.assert_allclose(found.score[b, :n], score[b, expected], atol=1e-4)
        np.testing.assert_array_equal(found.codes[b, :n], CODES[expected])
        np.testing.assert_array_equal(TRIE.find(CODES[expected]), found.leaf[b, :n])
        np.testing.assert_allclose(found.log_p_legal[b, :n], among_legal[b, expected], atol=1e-4)
        np.testing.assert_allclose(found.log_p_all[b, :n], among_all[b, expected], atol=1e-4)
        assert (found.leaf[b, n:] == -1).all() and np.isneginf(found.score[b, n:]).all()


def test_a_request_is_encoded_once_whatever_the_number_of_its_candidates(encoded: list[int]):
    model = build(tiny_model(**PLAIN), VOCABULARY)
    batch, codes = random_batch(model.config, VOCABULARY, batch=3), jnp.zeros((3, 64, 3), jnp.int32)
    arguments = _arguments(model, (*model.init(0), model.init_bias()), batch)
    for rollout in ("beam", "sample"):
        made = jax.eval_shape(make_rollout(model, RLConfig(rollout=rollout, group=64)), *arguments)
        assert made.codes.shape == codes.shape
        narrow = make_rollout(model, RLConfig(rollout=rollout, group=64), free=True, width=5)
        assert jax.eval_shape(narrow, *arguments).codes.shape == (3, 5, 3)

    def scored(params, tables, bias, batch, trie):
        module = model.bind(params)
        context, _ = module.encode(*model.read(tables, batch), bias, None)
        return candidate_log_p(module, context, codes, jnp.ones((3, 64), bool), bias, trie, "legal")

    assert jax.eval_shape(scored, *arguments[:5]).shape == codes.shape
    assert encoded == [3] * 5


def test_the_legal_distribution_without_a_trie_is_an_error():
    model = build(tiny_model(**PLAIN), VOCABULARY)
    batch, bias = random_batch(model.config, VOCABULARY, batch=3), model.init_bias()
    params, tables = model.init(0)

    def scored(params, tables):
        module = model.bind(params)
        context, _ = module.encode(*model.read(tables, batch), bias, None)
        return candidate_log_p(module, context, jnp.zeros((3, 2, 3), int), jnp.ones((3, 2), bool), bias, None, "legal")

    with pytest.raises(ValueError, match=r"rl\.distribution legal needs the trie"):
        jax.eval_shape(scored, params, tables)
