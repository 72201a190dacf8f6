from __future__ import annotations

import jax
import pytest
from tiny import SHAPES, VOCABULARY, random_batch, tiny_model, tiny_trie

from onerec_jax.model.onerec import build, planned_vocabulary
from onerec_jax.recipe import load_recipe
from onerec_jax.train.flops import request_flops

WIDE = {"d_model": 256, "ffn_hidden": 512, "heads": 4, "author_dim": 64, "feature_dim": 64, "static_dim": 64}
OTHERS = {name: SHAPES[name] for name in ("SASRec", "HSTU", "TIGER")}
OTHERS["SASRec with a memory"] = {**SHAPES["SASRec with a memory"], "item_memory": 128}


@pytest.mark.parametrize(
    "shape",
    [{"lifelong_length": 64}, {"causal": True, "positive_length": 0, "lifelong_length": 0}, *OTHERS.values()],
    ids=["four pathways", "causal", *OTHERS],
)
def test_the_analytic_count_agrees_with_the_compilers_on_a_dense_model(shape: dict):
    """Wide enough that matmuls dominate; one block a stack, because the compiler counts a scanned body once."""
    config = tiny_model(**{**shape, **WIDE})
    model = build(config, VOCABULARY)
    params, tables = jax.eval_shape(lambda: model.init(0))

    def forward(params, tables, batch):
        rows = {name: t["rows"] for name, t in tables.items()}
        return model.bind(params)(
            model.localise(batch, touched_only=False)[0], rows, model.init_bias(), None, tiny_trie(config)
        )[0]

    batch = random_batch(config, batch=4, targets=8)
    counted = jax.jit(forward).lower(params, tables, batch).compile().cost_analysis()["flops"] / 4
    ours = request_flops(
        config, VOCABULARY, short=config.short_length, positive=config.positive_length, lifelong=config.lifelong_length,
        targets=8,
    )  # fmt: skip
    assert abs(ours.forward / counted - 1) < 0.02
    assert ours.training == 3 * ours.forward


@pytest.mark.parametrize("name", ["onerec_0.015b", "onerec_0.121b"])
def test_the_analytic_count_of_the_dense_recipes_is_the_compilers_to_one_percent(name: str):
    """Of the whole recipe, whose few blocks are unrolled, in float32: XLA counts every conversion to bfloat16 as a FLOP."""
    recipe = load_recipe(name, ["model.remat=none", "model.dtype=float32"])
    config, vocabulary = recipe.model, planned_vocabulary(recipe)
    model = build(config, vocabulary)
    params, tables = jax.eval_shape(lambda: model.init(0))

    def forward(params, tables, batch):
        rows = {name: table["rows"] for name, table in tables.items()}  # finding rows is sorting, no matmul
        return model.bind(params)(batch, rows, model.init_bias(), None, None)[0]

    lowered = jax.jit(forward).lower(params, tables, random_batch(config, vocabulary, batch=4, targets=5))
    ours = request_flops(
        config, vocabulary, short=config.short_length, positive=config.positive_length, lifelong=config.lifelong_length,
        targets=5,
    )  # fmt: skip
    assert abs(4 * ours.forward / lowered.cost_analysis()["flops"] - 1) < 0.01


def test_targets_past_the_decoder_cost_nothing_of_it():
    config = tiny_model(**SHAPES["OneRec with a memory"])
    given = {"short": 6, "positive": 0, "lifelong": 0}
    few, all_of_few, all_of_many = (
        request_flops(config, VOCABULARY, **given, targets=t, decoded=k) for t, k in ((8, 2), (2, None), (8, None))
    )
    assert few == all_of_few, "targets of one context share the product with all items"
    assert all_of_many.forward > few.forward
