"""SASRec, HSTU and TIGER shapes: item heads, gated attention, one token per code."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pydantic import ValidationError
from tiny import SHAPES, VOCABULARY, poison, random_batch, tiny_model, tiny_trie

from onerec_jax.errors import InputError
from onerec_jax.model.hstu import HSTUBlock
from onerec_jax.model.onerec import Model, build, count_parameters
from onerec_jax.model.pathways import bucket
from onerec_jax.recipe import load_recipe
from onerec_jax.train.step import make_loss


def _parts(model: Model):
    params, tables = model.init(0)
    return params, {name: t["rows"] for name, t in tables.items()}, model.init_bias()


def _value(model: Model, sampled_items: int = 0):
    loss = make_loss(model, 0.0, sampled_items)

    @jax.jit
    def value(params, rows, bias, batch):
        local, _ = model.localise(batch, touched_only=False)
        return jax.value_and_grad(
            lambda p, r: loss(p, r, bias, local, None, tiny_trie(model.config))[0], argnums=(0, 1)
        )(params, rows)

    return value


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_poisoned_padding_changes_nothing_and_gradients_reach_every_parameter(shape: dict):
    model = build(tiny_model(**shape), VOCABULARY)
    batch = random_batch(model.config, batch=16, targets=5)
    value = _value(model)
    clean, poisoned = (value(*_parts(model), b) for b in (batch, poison(batch)))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), clean, poisoned)
    still = [
        jax.tree_util.keystr(p) for p, g in jax.tree_util.tree_leaves_with_path(clean[1]) if not np.asarray(g).any()
    ]
    assert not still


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape.get("causal")])
def test_a_causal_encoder_hides_every_later_event(name: str):
    model = build(tiny_model(**SHAPES[name]), VOCABULARY)
    batch = random_batch(model.config, batch=3, targets=6)
    item = np.where(batch.short.item < 0, 5, batch.short.item)
    visible = np.tile(np.arange(6, dtype=np.int32), (3, 1))
    batch = dataclasses.replace(
        batch, short=dataclasses.replace(batch.short, item=item), visible=visible,
        target_weight=np.ones((3, 6), np.float32),
    )  # fmt: skip
    later = dataclasses.replace(
        batch.short,
        item=np.concatenate([item[:, :3], (item[:, 3:] + 7) % 100], axis=1),
        codes=np.concatenate([batch.short.codes[:, :3], (batch.short.codes[:, 3:] + 1) % 16], axis=1),
        age_s=np.concatenate([batch.short.age_s[:, :3], batch.short.age_s[:, 3:] * 9], axis=1),
    )
    params, rows, bias = _parts(model)

    @jax.jit
    def logits(batch):
        return model.bind(params)(
            model.localise(batch, touched_only=False)[0], rows, bias, None, tiny_trie(model.config)
        )[0]

    for a, b in zip(logits(batch), logits(dataclasses.replace(batch, short=later)), strict=True):
        np.testing.assert_allclose(a[:, :4], b[:, :4], atol=1e-5)
        assert np.abs(np.asarray(a[:, 4:] - b[:, 4:])).max() > 1e-4


def test_the_loss_of_an_item_head_is_the_cross_entropy_of_its_logits():
    model = build(tiny_model(**SHAPES["SASRec"]), VOCABULARY)
    batch = random_batch(model.config, batch=5, targets=4)
    params, rows, bias = _parts(model)
    (logits,), _ = model.bind(params)(model.localise(batch, touched_only=False)[0], rows, bias, None)
    log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), batch.target_item[..., None], axis=-1)[..., 0]
    value, _ = _value(model)(params, rows, bias, batch)
    np.testing.assert_allclose(value, -(log_p * batch.target_weight).sum(), rtol=1e-5)


@pytest.mark.parametrize("name", ["OneRec with a memory", "SASRec with a memory"])
def test_a_memory_adds_up_what_every_event_in_sight_says_of_an_item(name: str):
    model = build(tiny_model(**SHAPES[name]), VOCABULARY)
    batch = random_batch(model.config, batch=5, targets=4)
    params, rows, bias = _parts(model)
    trie = tiny_trie(model.config)
    scores = model.bind(params).outputs(model.localise(batch, touched_only=False)[0], rows, bias, None, trie)
    assert scores.states is not None and scores.items is not None
    got = np.asarray(scores.states @ scores.items.T)
    inputs, outputs = (np.asarray(params["head"][name]["embedding"]) for name in ("memory_in", "memory_out"))
    d = model.config.d_model
    for b in range(5):
        for t in range(got.shape[1]):
            seen = batch.short.item[b, : batch.visible[b, t]]
            by_encoder = np.asarray(scores.states)[b, t, :d] @ np.asarray(scores.items)[:, :d].T
            by_memory = sum((inputs[item] @ outputs.T for item in seen), start=np.zeros(100)) / max(1, len(seen)) ** 0.5
            np.testing.assert_allclose(got[b, t], by_encoder + by_memory, atol=1e-5)


def test_an_hstu_block_equals_its_equations_written_out():
    config = tiny_model(**SHAPES["HSTU"], encoder_layers=2)
    model = build(config, VOCABULARY)
    params = model.init(0)[0]
    block = jax.tree.map(lambda a: np.asarray(a[0], np.float64), params["encoder"]["stack"]["groups"]["blocks"][0])
    rng = np.random.default_rng(0)
    n, d, heads = 1 + config.short_length, config.d_model, config.heads
    z, time = rng.normal(size=(n, d)), np.cumsum(rng.random(n) * 1e4)
    valid = np.arange(n) < n - 2
    mask = np.tril(np.ones((n, n), bool)) & valid

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale

    def silu(x):
        return x / (1 + np.exp(-x))

    gate, values, queries, keys = np.split(
        silu(norm(z, block["input_norm"]["scale"]) @ block["mix"]["kernel"]), 4, axis=-1
    )
    out = np.zeros((n, d))
    width = d // heads
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        for i in range(n):
            for j in range(n):
                gap = int(bucket(jnp.float32(abs(time[i] - time[j]))))
                bias = block["distance_bias"][i - j + n - 1] + block["time_bias"][gap]
                out[i, part] += mask[i, j] * silu(queries[i, part] @ keys[j, part] + bias) / n * values[j, part]
    expected = z + (norm(out, block["gate_norm"]["scale"]) * gate) @ block["out"]["kernel"]
    module = HSTUBlock(config, n, nnx.Rngs(params=0))
    nnx.update(module, jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), block))
    got, _ = module(
        jnp.asarray(z, jnp.float32)[None], jnp.asarray(mask)[None], jnp.asarray(valid)[None],
        jnp.asarray(time, jnp.float32)[None], jnp.zeros(1), None,
    )  # fmt: skip
    np.testing.assert_allclose(got[0], expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("shape", [{}, *SHAPES.values()], ids=["OneRec", *SHAPES])
def test_a_batch_without_room_that_nobody_needs_gives_the_same_logits(shape: dict):
    model = build(tiny_model(**shape), VOCABULARY)
    batch = random_batch(model.config, batch=5)
    fits = int((batch.short.item >= 0).sum(1).max()) - 1
    last = (batch.short.item >= 0) & (np.arange(model.config.short_length) < fits)
    full = dataclasses.replace(batch.short, item=np.where(last, batch.short.item, -1))
    batch = dataclasses.replace(batch, short=full, visible=np.minimum(batch.visible, fits))
    cut = dataclasses.replace(batch, short=jax.tree.map(lambda x: x[:, :fits], full))
    params, rows, bias = _parts(model)
    logits = [
        model.bind(params)(model.localise(b, touched_only=False)[0], rows, bias, None, tiny_trie(model.config))[0]
        for b in (batch, cut)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *logits)


def test_hstu_has_a_bias_for_every_distance_between_tokens():
    for shape, tokens in ((SHAPES["HSTU"], 1 + 6), (SHAPES["HSTU of codes"], 1 + 3 * 6)):
        bias = build(tiny_model(**shape), VOCABULARY).abstract["encoder"]["stack"]["groups"]["blocks"][0][
            "distance_bias"
        ]
        assert bias.shape[-1] == 2 * tokens - 1


def test_the_item_vectors_are_counted_as_a_table():
    counts = count_parameters(build(tiny_model(**SHAPES["SASRec"]), VOCABULARY))
    assert counts["tables"] == 100 * 32


@pytest.mark.parametrize(
    "bad",
    [
        {"project_events": False},
        {"event_tokens": "codes"},
        {"block": "hstu"},
        {"head": "items", "moe": {"experts": 4}},
        {"head": "items", "item_rows": 10},
    ],
)
def test_shapes_that_do_not_fit_together_are_refused(bad: dict):
    with pytest.raises(ValidationError):
        tiny_model(**bad)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.head=codes", "train.sampled_items=5", "train.label_smoothing=0"],
            "train.sampled_items is of model.head items",
        ),
        (["model.head=items", "model.softmax=all", "train.sampled_items=5"], "train.label_smoothing"),
    ],
)
def test_samples_of_items_that_would_be_ignored_or_would_ignore_are_refused(overrides: list[str], message: str):
    with pytest.raises(InputError, match=message):
        load_recipe("beauty_small", overrides)
