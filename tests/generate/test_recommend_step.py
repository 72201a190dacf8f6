"""The recommend step against brute force: every item scored by the training forward pass, then filtered and sorted in NumPy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_batch, tiny_model

from onerec_jax.data.schema import LABELS, Vocabulary
from onerec_jax.generate.beam import better_of_group
from onerec_jax.generate.label_shift import shifted
from onerec_jax.generate.step import ListOptions, make_catalogue, make_recommend_step
from onerec_jax.generate.trie_mask import contains, paths
from onerec_jax.model import prefixes
from onerec_jax.model.onerec import Model, build
from onerec_jax.model.prefixes import device_trie, legal_codes, step_down, training_trie
from onerec_jax.tokenizer.trie import Trie

SIZES = (5, 4, 6)
ITEMS = 90
VOCABULARY = Vocabulary(
    users=50, items=ITEMS, authors=12, tags=7, user_features=(3, 4), labels=LABELS, codebook_sizes=SIZES
)
RNG = np.random.default_rng(3)
CODES = np.stack([RNG.integers(0, size, ITEMS) for size in SIZES], axis=1).astype(np.int32)
AUTHOR = RNG.integers(0, 12, ITEMS)
TRIE = Trie.build(CODES, -np.arange(float(ITEMS)))
ALONE = {"positive_length": 0, "lifelong_length": 0}
KINDS = {
    "codes": {"decoder_layers": 2},
    "codes of a legal softmax, causal": {**ALONE, "softmax": "legal", "causal": True},
    "both": {**ALONE, "head": "both", "item_input": "both"},
    "items": {**ALONE, "head": "items", "item_memory": 3},
}


_step_down = jax.jit(step_down, static_argnums=1)
_contains, _better_of_group = jax.jit(contains), jax.jit(better_of_group)


class World:
    """A model with weights far from uniform, a batch, and what brute force says of all items."""

    def __init__(self, changes: dict, shift: np.ndarray | None = None):
        self.model = build(tiny_model(**changes), VOCABULARY)
        params, tables = self.model.init(0)
        params = jax.tree.map(lambda x: 2.5 * x, params)
        self.weights = params, tables, self.model.init_bias()
        self.batch = random_batch(self.model.config, VOCABULARY, batch=3)
        self.catalogue = make_catalogue(TRIE, self.model.config, AUTHOR, np.zeros(ITEMS), shift)
        self.by_codes, self.by_item = _brute_force(self.model, self.weights, self.batch)
        if shift is not None and self.by_item is not None:
            self.by_item = shifted(self.by_item, shift)

    def scores(self, item_weight: float) -> np.ndarray:
        """float64 [B,I]."""
        weight = item_weight if self.by_codes is not None else 1.0
        parts = [self.by_codes, None if self.by_item is None else weight * self.by_item]
        return sum(np.asarray(part, np.float64) for part in parts if part is not None)  # type: ignore[return-value]

    def lists(self, options: ListOptions, exclude: np.ndarray | None = None, allow: np.ndarray | None = None):
        exclude = np.zeros((3, 0), np.int32) if exclude is None else exclude
        return make_recommend_step(self.model, options)(*self.weights, self.catalogue, self.batch, exclude, allow)


def _brute_force(model: Model, weights, batch) -> tuple[np.ndarray | None, np.ndarray | None]:
    """log P of every item [B,I] by its codes and by the item head, from the teacher-forced pass of training."""
    params, tables, bias = weights
    count = batch.user.shape[0]
    seen = (batch.short.item >= 0).sum(1, keepdims=True)
    asked = dataclasses.replace(
        batch,
        targets=np.tile(CODES[None], (count, 1, 1)),
        target_item=np.tile(np.arange(ITEMS, dtype=np.int32), (count, 1)),
        target_weight=np.ones((count, ITEMS), np.float32),
        visible=np.repeat(seen, ITEMS, axis=1).astype(np.int32),
    )
    trie = training_trie(model.config, TRIE)
    local, rows = model.read(tables, asked)
    module = model.bind(params)
    found = module.outputs(local, rows, bias, None, trie)
    by_codes = by_item = None
    if found.logits is not None:
        by_codes = np.zeros((count, ITEMS))
        for level, logits in enumerate(np.asarray(x, np.float64) for x in found.logits):
            for item, codes in enumerate(CODES):
                x = logits[:, item]
                same = (CODES[:, :level] == codes[:level]).all(axis=1)
                among = np.unique(CODES[same, level]) if model.config.softmax == "legal" else np.arange(x.shape[1])
                by_codes[:, item] += x[:, codes[level]] - np.log(np.exp(x[:, among]).sum(axis=1))
    if found.states is not None:
        logits = np.asarray(found.states @ found.items.T, np.float64)[:, 0]
        by_item = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return by_codes, by_item


def _expected(scores: np.ndarray, listed: np.ndarray, k: int, penalty: float = 0.0, group: np.ndarray | None = None):
    """Items one after the other: each time the best one that may be listed, once what its group has had is paid for."""
    chosen: list[int] = []
    left = [int(i) for i in np.flatnonzero(listed)]
    had: dict[int, int] = {}
    while left and len(chosen) < k:
        best = max(left, key=lambda i: scores[i] - (penalty * had.get(int(group[i]), 0) if group is not None else 0.0))
        chosen.append(best)
        left.remove(best)
        if group is not None:
            had[int(group[best])] = had.get(int(group[best]), 0) + 1
    return chosen


def _check(lists, scores: np.ndarray, expected: list[list[int]]):
    """The same items, up to the order of items of one semantic ID, which score alike."""
    for b, wanted in enumerate(expected):
        items, found = np.asarray(lists.items[b]), np.asarray(lists.scores[b])
        there = items >= 0
        assert there.sum() == len(wanted) and there[: len(wanted)].all()
        np.testing.assert_allclose(found[there], scores[b][wanted], atol=2e-4)
        np.testing.assert_allclose(scores[b][items[there]], scores[b][wanted], atol=2e-4)
        assert len(set(items[there].tolist())) == len(wanted)
        assert (found[~there] == -np.inf).all()


# Two kinds with levels as lists of children, the others with levels as bits, which is what so small codebooks are.
@pytest.fixture(scope="module", params=[*KINDS, "codes, children", "codes of a legal softmax, causal, children"])
def world(request: pytest.FixtureRequest) -> World:
    kind = request.param.removesuffix(", children")
    with pytest.MonkeyPatch.context() as patch:
        if kind != request.param:
            patch.setattr(prefixes, "DENSE_SHARE", 0)
        made = World(KINDS[kind])
    assert made.catalogue.trie.is_dense(1) == (kind == request.param)
    return made


def _lists_of_ids(seed: int, size: int) -> np.ndarray:
    """Random item rows with repeats and gaps, int32 [3,size]."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random((3, size)) < 0.2, -1, rng.integers(0, ITEMS, (3, size))).astype(np.int32)


def test_without_options_the_list_is_the_best_of_all_items(world: World):
    scores = world.scores(2.0)
    lists = world.lists(ListOptions(k=20, width=ITEMS, item_weight=2.0))
    _check(lists, scores, [_expected(row, np.ones(ITEMS, bool), 20) for row in scores])


def test_items_to_leave_out_are_never_listed_and_their_places_go_to_others(world: World):
    scores, exclude = world.scores(2.0), _lists_of_ids(0, 40)
    listed = [~np.isin(np.arange(ITEMS), row) for row in exclude]
    lists = world.lists(ListOptions(k=70, width=ITEMS, item_weight=2.0), exclude)
    _check(lists, scores, [_expected(row, keep, 70) for row, keep in zip(scores, listed, strict=True)])


def test_only_items_to_keep_to_are_listed_and_of_them_none_to_leave_out(world: World):
    scores, exclude, allow = world.scores(2.0), _lists_of_ids(1, 30), _lists_of_ids(2, 25)
    listed = [np.isin(np.arange(ITEMS), a) & ~np.isin(np.arange(ITEMS), e) for a, e in zip(allow, exclude, strict=True)]
    lists = world.lists(ListOptions(k=30, width=ITEMS, item_weight=2.0), exclude, allow)
    _check(lists, scores, [_expected(row, keep, 30) for row, keep in zip(scores, listed, strict=True)])


@pytest.mark.parametrize("by", ["code", "author"])
def test_diverse_lists_are_taken_one_by_one_with_a_price_on_the_group(world: World, by: str):
    scores = world.scores(2.0)
    group = CODES[:, 0] if by == "code" else AUTHOR
    options = ListOptions(k=15, width=ITEMS, item_weight=2.0, diversity=0.7, diverse_by=by)  # type: ignore[arg-type]
    expected = [_expected(row, np.ones(ITEMS, bool), 15, 0.7, group) for row in scores]
    _check(world.lists(options), scores, expected)
    spread = [len({int(group[i]) for i in items}) for items in expected]
    plain = [len({int(group[i]) for i in _expected(row, np.ones(ITEMS, bool), 15)}) for row in scores]
    assert sum(spread) >= sum(plain)


def test_a_shift_corrects_the_item_head():
    shift = np.random.default_rng(5).normal(0, 2, ITEMS).astype(np.float32)
    for kind in ("both", "items"):
        world = World(KINDS[kind], shift)
        scores = world.scores(3.0)
        lists = world.lists(ListOptions(k=20, width=ITEMS, item_weight=3.0))
        _check(lists, scores, [_expected(row, np.ones(ITEMS, bool), 20) for row in scores])


def test_a_mask_leaves_beams_to_what_may_be_listed():
    """Five beams, all of whose items would be left out afterwards, still fill a list of five."""
    world = World(KINDS["codes"])
    best = np.asarray(world.lists(ListOptions(k=20, width=ITEMS)).items).astype(np.int32)
    lists = world.lists(ListOptions(k=5, width=5), best)
    assert (np.asarray(lists.items) >= 0).all()
    assert not any(np.isin(a, b).any() for a, b in zip(np.asarray(lists.items), best, strict=True))


def test_where_nothing_may_be_listed_the_list_is_empty(world: World):
    nothing = np.full((3, 4), -1, np.int32)
    lists = world.lists(ListOptions(k=5, width=8), allow=nothing)
    assert (np.asarray(lists.items) == -1).all() and (np.asarray(lists.scores) == -np.inf).all()


def test_paths_lead_from_the_root_to_the_leaf():
    leaf = np.concatenate([np.arange(TRIE.leaves), [-1]]).astype(np.int32)[None]
    config = tiny_model()
    way = paths(device_trie(TRIE, config), jnp.asarray(leaf))
    codes = CODES[TRIE.items[TRIE.item_start[:-1]]]
    for level in range(3):
        np.testing.assert_array_equal(way.after[level][0, :-1], TRIE.find(codes[:, : level + 1]))
        assert way.after[level][0, -1] == -1
    assert (np.asarray(way.before[0])[0, :-1] == 0).all()


def test_bits_and_steps_say_which_codes_go_on_and_where_to():
    trie = device_trie(TRIE, tiny_model())
    for level, size in enumerate(SIZES):
        prefixes_of = np.unique(CODES[:, :level], axis=0)
        known = {tuple(row) for row in CODES[:, : level + 1].tolist()}
        node = jnp.arange(len(prefixes_of), dtype=jnp.int32)
        found = np.asarray(legal_codes(trie, level, node, size))
        expected = [[(*prefix, code) in known for code in range(size)] for prefix in prefixes_of.tolist()]
        np.testing.assert_array_equal(found, expected)
        nodes, codes = np.meshgrid(np.arange(-1, len(prefixes_of)), np.arange(size), indexing="ij")
        reached = np.asarray(_step_down(trie, level, jnp.asarray(nodes), jnp.asarray(codes)))
        for n, code, child in zip(nodes.flat, codes.flat, reached.flat, strict=True):
            path = [*prefixes_of[n].tolist(), code]
            assert child == (TRIE.find(np.array([path]))[0] if n >= 0 else -1)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-1, 9), min_size=6, max_size=6), st.lists(st.integers(-1, 9), min_size=5, max_size=5))
def test_contains_is_membership_of_items(listed: list[int], asked: list[int]):
    found = _contains(jnp.asarray([listed], jnp.int32), jnp.asarray([asked], jnp.int32))
    assert np.asarray(found)[0].tolist() == [i in listed and i >= 0 for i in asked]


def test_an_empty_list_contains_nothing():
    assert not np.asarray(contains(jnp.zeros((2, 0), jnp.int32), jnp.zeros((2, 3), jnp.int32))).any()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-3, 3)), min_size=12, max_size=12))
def test_better_of_group_counts_those_that_come_before(pairs: list[tuple[int, int]]):
    group, score = (np.array(x) for x in zip(*pairs, strict=True))
    found = np.asarray(_better_of_group(jnp.asarray(score, jnp.float32)[None], jnp.asarray(group)[None]))[0]
    for i, (g, s) in enumerate(pairs):
        before = [j for j, (h, t) in enumerate(pairs) if h == g and (t > s or (t == s and j < i))]
        assert found[i] == len(before)
