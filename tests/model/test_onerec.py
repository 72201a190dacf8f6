from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import VOCABULARY, poison, random_batch, tiny_model

from onerec_jax.model.onerec import Model, build, count_parameters, planned_vocabulary
from onerec_jax.recipe import load_recipe
from onerec_jax.train.step import make_loss


def _parts(model: Model, seed: int = 0):
    params, tables = model.init(seed)
    return params, {name: t["rows"] for name, t in tables.items()}, model.init_bias()


def _gradient(model: Model):
    loss = make_loss(model, 0.0)

    @jax.jit
    def value(params, rows, bias, batch):
        local, _ = model.localise(batch, touched_only=False)
        return jax.value_and_grad(lambda p, r: loss(p, r, bias, local, None)[0], argnums=(0, 1))(params, rows)

    return value


@pytest.fixture(scope="module", params=["four pathways", "causal"])
def model(request: pytest.FixtureRequest) -> Model:
    if request.param == "causal":
        config = tiny_model(causal=True, positive_length=0, lifelong_length=0)
    else:
        config = tiny_model(moe={"experts": 4, "active": 2, "hidden": 16, "tile": 8, "location": "both"})
    return build(config, VOCABULARY)


def test_poisoned_padding_changes_neither_loss_nor_gradient(model: Model):
    batch = random_batch(model.config)
    value = _gradient(model)
    clean, poisoned = (value(*_parts(model), b) for b in (batch, poison(batch)))
    assert np.isfinite(clean[0])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), clean, poisoned)


def test_gradients_reach_every_parameter_of_all_four_pathways():
    model = build(tiny_model(), VOCABULARY)
    _, (gradient, rows) = _gradient(model)(*_parts(model), random_batch(model.config, batch=16))
    still = [
        jax.tree_util.keystr(p) for p, g in jax.tree_util.tree_leaves_with_path(gradient) if not np.asarray(g).any()
    ]
    assert not still
    assert all(np.asarray(g).any() for g in rows.values())


def test_a_causal_encoder_hides_every_later_event_from_a_target(model: Model):
    if not model.config.causal:
        model = build(tiny_model(causal=True, positive_length=0, lifelong_length=0), VOCABULARY)
    batch = random_batch(model.config, batch=3, targets=6)
    item = np.where(batch.short.item < 0, 5, batch.short.item)
    visible = np.tile(np.arange(6, dtype=np.int32), (3, 1))
    weight = np.ones((3, 6), np.float32)
    batch = dataclasses.replace(
        batch, short=dataclasses.replace(batch.short, item=item), visible=visible, target_weight=weight
    )
    changed = dataclasses.replace(
        batch.short,
        item=np.concatenate([item[:, :3], (item[:, 3:] + 7) % 100], axis=1),
        codes=np.concatenate([batch.short.codes[:, :3], (batch.short.codes[:, 3:] + 1) % 16], axis=1),
    )
    params, rows, bias = _parts(model)

    def logits(batch):
        return model.bind(params)(model.localise(batch, touched_only=False)[0], rows, bias, None)[0]

    one, other = jax.jit(logits)(batch), jax.jit(logits)(dataclasses.replace(batch, short=changed))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a[:, :4], b[:, :4])  # targets that see at most three events
        assert np.abs(np.asarray(a[:, 4:]) - np.asarray(b[:, 4:])).max() > 1e-6


def test_targets_that_share_a_context_score_as_they_would_alone():
    model = build(tiny_model(), VOCABULARY)
    batch = random_batch(model.config, targets=3)
    params, rows, bias = _parts(model)

    @jax.jit
    def logits(batch):
        return model.bind(params)(model.localise(batch, touched_only=False)[0], rows, bias, None)[0]

    together = logits(batch)
    for t in range(2):
        alone = logits(
            dataclasses.replace(
                batch,
                targets=batch.targets[:, t : t + 1],
                target_weight=batch.target_weight[:, t : t + 1],
                target_item=batch.target_item[:, t : t + 1],
                visible=batch.visible[:, t : t + 1],
                feedback=batch.feedback[:, t : t + 1],
                playtime_s=batch.playtime_s[:, t : t + 1],
            )
        )
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[:, t], b[:, 0], rtol=1e-4, atol=1e-5)


def test_the_encoder_of_the_report_has_405_tokens():
    config = load_recipe("onerec_0.121b").model
    model = build(config, VOCABULARY)
    assert model.abstract["encoder"]["position"].shape == (405, 1024)


def test_the_reports_sizes_are_counted_within_five_percent_and_their_difference_is_814_million():
    counts = {}
    for name in ("0.121b", "0.935b", "2.633b"):
        recipe = load_recipe(f"onerec_{name}")
        counts[name] = count_parameters(build(recipe.model, planned_vocabulary(recipe)))["model"]
    for name, count in counts.items():
        assert abs(count / (float(name[:-1]) * 1e9) - 1) < 0.05
    assert abs((counts["0.935b"] - counts["0.121b"]) / 1e6 - 814) < 1


def test_attention_by_heads_fused_and_tokamax_equal_the_plain_einsums():
    batch = random_batch(tiny_model())
    results = []
    for attention in ("xla", "heads", "fused", "tokamax"):
        model = build(tiny_model(attention=attention), VOCABULARY)
        results.append(_gradient(model)(*_parts(model), batch))
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4), results[0], other)


def test_recomputing_in_the_backward_pass_changes_no_gradient():
    batch = random_batch(tiny_model())
    results = []
    for remat in ("none", "dots", "block"):
        model = build(tiny_model(remat=remat), VOCABULARY)
        results.append(_gradient(model)(*_parts(model), batch))
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), results[0], other)


def test_bfloat16_compute_stays_close_to_float32_and_keeps_float32_parameters():
    batch = random_batch(tiny_model())
    losses = []
    for dtype in ("float32", "bfloat16"):
        model = build(tiny_model(dtype=dtype), VOCABULARY)
        value, (gradient, _) = _gradient(model)(*_parts(model), batch)
        assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(gradient))
        losses.append(float(value))
    assert abs(losses[0] - losses[1]) < 0.02 * losses[0]


def test_of_an_event_the_model_reads_the_item_and_the_chosen_features_only():
    chosen = ("tag", "duration", "feedback")
    model = build(tiny_model(item_input="sid", event_features=chosen), VOCABULARY)
    assert model.tables.keys() == {"user"}
    parts, batch = _parts(model), random_batch(model.config)

    @jax.jit
    def first_logits(batch):
        return model.bind(parts[0])(model.localise(batch, touched_only=False)[0], *parts[1:], None)[0][0]

    unchanged = np.asarray(first_logits(batch))
    columns = {"author": "author", "age": "age_s", "playtime": "playtime_s", "tag": "tag", "duration": "duration_s"}
    for feature, column in (columns | {"feedback": "feedback"}).items():
        values = getattr(batch.short, column)
        other = {column: 1 - values if feature == "feedback" else values[:, ::-1].copy()}
        logits = np.asarray(first_logits(dataclasses.replace(batch, short=dataclasses.replace(batch.short, **other))))
        assert np.array_equal(logits, unchanged) == (feature not in chosen), feature
