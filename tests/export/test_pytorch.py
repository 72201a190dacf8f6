"""The plain PyTorch model against the JAX one, over every structure that a recipe or a test names."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from scaled_recipes import distinct, recipes
from tiny import PLAIN, SHAPES, TINY, VOCABULARY, poison, random_batch

from onerec_jax.config import ModelConfig
from onerec_jax.data.schema import Batch, ItemFeatures
from onerec_jax.export import pytorch_model
from onerec_jax.generate.step import Catalogue, ListOptions, Lists, make_catalogue, make_recommend_step
from onerec_jax.model.onerec import Model, build
from onerec_jax.model.tables import stored_rows
from onerec_jax.parallel.sharding import path_name
from onerec_jax.tokenizer.trie import Trie

K, WIDTH, ITEM_WEIGHT = 50, 12, 2.0
REQUESTS, TARGETS = 6, 4
MOE = {"experts": 4, "active": 2, "hidden": 16, "tile": 8}

# Structures that neither a recipe nor `SHAPES` has.
OTHERS = {
    "experts in both stacks, every second block": {
        "encoder_layers": 4, "decoder_layers": 2, "moe": {**MOE, "location": "both", "every": 2},
    },
    "sigmoid router and shared experts": {"moe": {**MOE, "router": "sigmoid", "shared": 2, "active": 3}},
    "legal softmax, normalised queries and keys": {"softmax": "legal", "qk_norm": True, "head_dim": 12},
    "items by id, hashed tables": {
        "item_input": "id", "item_rows": 30, "author_rows": 9, "user_rows": 11,
    },
    "carried from another width": {**PLAIN, "base_width": 16, "head": "both", "causal": True, "softmax": "legal"},
}  # fmt: skip
# Those whose whole lists are compared: codes alone, both heads, a memory, an item head.
LISTED = ("onerec_0.015b", "beauty_small", "kuairand_small", "HSTU")


CONFIGURATIONS = distinct(recipes() | {name: {**TINY, **changes} for name, changes in (SHAPES | OTHERS).items()})


class Pair(NamedTuple):
    """What both models say of one batch."""

    config: ModelConfig
    torch: pytorch_model.OneRec
    catalogue: Catalogue
    batch: Batch
    request: dict[str, torch.Tensor]
    exclude: np.ndarray
    logits: tuple[np.ndarray, ...] | None  # of the JAX model, [B,T,V] per level
    items: np.ndarray | None  # of the JAX model, log P of every item [B,I]
    lists: Lists | None  # of the recommend step, without what `exclude` names


def _trie(rng: np.random.Generator) -> Trie:
    """Semantic IDs of the catalogue, many of them of two or three items."""
    codes = np.stack([rng.integers(0, min(size, 6), VOCABULARY.items) for size in VOCABULARY.codebook_sizes], 1)
    codes[::4] = codes[1::4]
    return Trie.build(codes.astype(np.int32), rng.random(VOCABULARY.items))


def _values(model: Model, rng: np.random.Generator) -> dict[str, Any]:
    """Random params, tables and biases, large enough that no part of the model is lost beside another."""
    rows = {name: (stored_rows(count), width) for name, (count, width) in model.tables.items()}
    tables = {name: {"rows": jax.ShapeDtypeStruct(shape, np.float32)} for name, shape in rows.items()}
    shapes = {"params": model.abstract, "tables": tables, "bias": jax.eval_shape(model.init_bias)}

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path_name(path)
        if name.endswith("norm/scale") or "_norm/" in name:
            return rng.uniform(0.6, 1.5, leaf.shape).astype(np.float32)
        matrix = name.endswith(("kernel", "moe/gate", "moe/up", "moe/down", "moe/router")) or "/shared/" in name
        return (rng.standard_normal(leaf.shape) * (leaf.shape[-2] ** -0.5 if matrix else 0.3)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _write(folder: Path, config: ModelConfig, values: dict[str, Any], trie: Trie, catalogue: Catalogue) -> None:
    """What of an export directory the PyTorch model reads."""
    leaves = jax.tree_util.tree_leaves_with_path(values)
    save_file({path_name(path).replace("/", "."): leaf for path, leaf in leaves}, folder / "model.safetensors")
    known = {name: getattr(catalogue, name) for name in ("codes", "author", "tag", "item_start", "items", "shift")}
    known |= {f"child_start.{level}": array for level, array in enumerate(trie.child_start)}
    known |= {f"token.{level}": array for level, array in enumerate(trie.token)}
    save_file({n: np.ascontiguousarray(a) for n, a in known.items() if a is not None}, folder / "catalogue.safetensors")
    described = {
        "model": config.model_dump(mode="json"),
        "vocabulary": dataclasses.asdict(VOCABULARY),
        "lists": {"k": K, "width": WIDTH, "item_weight": ITEM_WEIGHT},
    }
    (folder / "config.json").write_text(json.dumps(described))


def _batch(config: ModelConfig, catalogue: Catalogue) -> Batch:
    """Random requests of items of the catalogue, the first without any event, NaN and nonsense in the padding.

    All targets but two see every event; the last is missing.
    """
    batch = random_batch(config, batch=REQUESTS, targets=TARGETS + 2)

    def own(events: ItemFeatures) -> ItemFeatures:
        item = np.where(np.arange(REQUESTS)[:, None] == 0, -1, events.item)
        known = {name: np.asarray(getattr(catalogue, name))[np.maximum(item, 0)] for name in ("codes", "author", "tag")}
        return dataclasses.replace(events, item=item, **known)

    pathways = {name: own(getattr(batch, name)) for name in pytorch_model.PATHWAYS}
    visible = np.repeat((pathways["short"].item >= 0).sum(1, keepdims=True), TARGETS + 2, axis=1).astype(np.int32)
    if config.causal:
        visible[:, TARGETS] = np.minimum(visible[:, TARGETS], 2)
    return poison(dataclasses.replace(batch, **pathways, visible=visible))


def _request(batch: Batch) -> dict[str, torch.Tensor]:
    named = {"user": batch.user}
    for pathway in pytorch_model.PATHWAYS:
        events = getattr(batch, pathway)
        for name in ("item", "age_s", "playtime_s", "duration_s", "feedback"):
            named[f"{pathway}.{name}"] = getattr(events, name)
    return {name: torch.from_numpy(np.array(array)) for name, array in named.items()}


def _exclude(rng: np.random.Generator, catalogue: Catalogue) -> np.ndarray:
    """Items to leave out: nothing, a whole branch of the trie, single ones, nearly all, all."""
    exclude = np.full((REQUESTS, VOCABULARY.items), -1, np.int32)
    first = np.asarray(catalogue.codes)[:, 0]
    branch, shuffled = np.flatnonzero(first == first[0]), rng.permutation(VOCABULARY.items)
    exclude[1, : len(branch)], exclude[2, :20], exclude[3, :93], exclude[4] = (
        branch,
        shuffled[:20],
        shuffled[:93],
        shuffled,
    )
    return exclude


def _best_items(model: pytorch_model.OneRec, request: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The first items of each list and their log P by codes."""
    items, scores = model.recommend(request, k=TARGETS)
    if model.head is not None:
        scores = scores - ITEM_WEIGHT * model.item_log_p(request).gather(1, items)
    return items, scores


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    config, rng = CONFIGURATIONS[request.param], np.random.default_rng(3)
    model, trie = build(config, VOCABULARY), _trie(rng)
    author, tag = (rng.integers(0, size, VOCABULARY.items) for size in (VOCABULARY.authors, VOCABULARY.tags))
    shift = rng.normal(0, 1, VOCABULARY.items).astype(np.float32) if config.head != "codes" else None
    catalogue = make_catalogue(trie, config, author, tag, shift)
    folder, values = tmp_path_factory.mktemp("export"), _values(model, rng)
    _write(folder, config, values, trie, catalogue)
    read = pytorch_model.load(folder)

    batch, exclude = _batch(config, catalogue), _exclude(rng, catalogue)
    if config.head != "items":
        targets = batch.targets.copy()
        targets[:, :TARGETS] = np.asarray(catalogue.codes)[_best_items(read, _request(batch))[0].numpy()]
        batch = dataclasses.replace(batch, targets=targets)
    step = make_recommend_step(model, ListOptions(K, WIDTH, ITEM_WEIGHT)) if request.param in LISTED else None

    @jax.jit
    def run(params: Any, tables: Any, bias: Any, batch: Batch):
        module, (local, rows) = model.bind(params), model.read(tables, batch)
        found = module.outputs(local, rows, bias, None, catalogue.trie)
        items = None
        if found.states is not None:
            items = jax.nn.log_softmax(module.item_logits(found.states[:, 0], catalogue.trie))
            items = jax.nn.log_softmax(items + shift)
        return found.logits, items, step and step(params, tables, bias, catalogue, batch, exclude, None)

    found = jax.tree.map(np.asarray, run(values["params"], values["tables"], values["bias"], batch))
    return Pair(config, read, catalogue, batch, _request(batch), exclude, *found)


def test_logits_and_item_probabilities_are_those_of_the_jax_model(pair: Pair):
    there = pair.batch.target_weight > 0
    if pair.logits is not None:
        targets = torch.from_numpy(np.where(there[..., None], pair.batch.targets, 0))
        found = pair.torch.logits(pair.request, targets, torch.from_numpy(np.array(pair.batch.visible)))
        for own, expected in zip(found, pair.logits, strict=True):
            assert np.ptp(expected[there], axis=0).min() > 0.1  # requests differ
            np.testing.assert_allclose(own.numpy()[there], expected[there], atol=1e-4)
    if pair.items is not None:
        assert np.ptp(pair.items, axis=0).min() > 0.1
        np.testing.assert_allclose(pair.torch.item_log_p(pair.request).numpy(), pair.items, atol=1e-4)


def test_beams_score_what_the_training_forward_gives_their_codes(pair: Pair):
    if pair.logits is None:
        listed, scores = pair.torch.recommend(pair.request, k=TARGETS)
        np.testing.assert_allclose(scores, np.take_along_axis(pair.items, listed.numpy(), axis=1), atol=1e-4)
        return
    known = np.asarray(pair.catalogue.codes)
    _, scores = _best_items(pair.torch, pair.request)
    for b, t in np.ndindex(scores.shape):
        total, codes = 0.0, pair.batch.targets[b, t]
        for level, logits in enumerate(pair.logits):
            x = logits[b, t].astype(np.float64)
            same = (known[:, :level] == codes[:level]).all(axis=1)
            legal = np.unique(known[same, level]) if pair.config.softmax == "legal" else np.arange(len(x))
            total += x[codes[level]] - np.logaddexp.reduce(x[legal])
        assert abs(total - float(scores[b, t])) < 1e-4


def test_lists_are_those_of_the_recommend_step_without_the_items_left_out(pair: Pair):
    items, scores = (found.numpy() for found in pair.torch.recommend(pair.request, torch.from_numpy(pair.exclude)))
    for row, left_out in zip(items, pair.exclude, strict=True):
        assert not np.intersect1d(row[row >= 0], left_out).size
        assert len(np.unique(row[row >= 0])) == (row >= 0).sum()
    assert ((items >= 0).any(axis=1) == [True] * 4 + [False, True]).all()
    if pair.lists is not None:
        np.testing.assert_array_equal(items, pair.lists.items)
        np.testing.assert_allclose(scores, pair.lists.scores, atol=1e-4)
    kept = [np.setdiff1d(np.arange(VOCABULARY.items), left_out) for left_out in pair.exclude]
    allow = np.stack([np.pad(rows, (0, VOCABULARY.items - len(rows)), constant_values=-1) for rows in kept])
    np.testing.assert_array_equal(pair.torch.recommend(pair.request, allow=torch.from_numpy(allow))[0], items)


def test_a_request_with_less_padding_means_the_same(pair: Pair):
    longest = int((pair.request["short.item"] >= 0).sum(1).max())
    assert longest < pair.config.short_length
    cut = {name: x[:, :longest] if name.startswith("short.") else x for name, x in pair.request.items()}
    for own, expected in zip(pair.torch.recommend(cut), pair.torch.recommend(pair.request), strict=True):
        np.testing.assert_allclose(own, expected, atol=1e-4)
