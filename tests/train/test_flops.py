from __future__ import annotations

import jax
import pytest
from tiny import SHAPES, VOCABULARY, random_batch, tiny_model, tiny_trie

from onerec_jax.model.onerec import build
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


def test_targets_past_the_decoder_cost_nothing_of_it():
    config = tiny_model(**SHAPES["OneRec with a memory"])
    given = {"short": 6, "positive": 0, "lifelong": 0}
    few, all_of_few, all_of_many = (
        request_flops(config, VOCABULARY, **given, targets=t, decoded=k) for t, k in ((8, 2), (2, None), (8, None))
    )
    assert few == all_of_few, "targets of one context share the product with all items"
    assert all_of_many.forward > few.forward
