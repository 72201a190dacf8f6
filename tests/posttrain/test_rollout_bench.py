"""tools/bench/rollout.py: what it times, what it counts, and what it prints."""

from __future__ import annotations

import collections
import importlib
import itertools
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import PLAIN, VOCABULARY, random_batch, tiny_model

from onerec_jax.data.schema import LABELS, Vocabulary
from onerec_jax.generate.beam import events_seen
from onerec_jax.model.onerec import build
from onerec_jax.recipe import load_recipe
from onerec_jax.tokenizer.trie import Trie

TINY = (
    "model.d_model=16", "model.heads=1", "model.ffn_hidden=16", "model.encoder_layers=1", "model.decoder_layers=1",
    "model.short_length=4", "model.positive_length=0", "model.lifelong_length=0", "model.user_id=false",
    "model.event_features=[]", "model.project_events=false", "model.dtype=float32",
    "tokenizer.codebook_sizes=[8,8,8]",
)  # fmt: skip
REQUESTS, GROUP, ITEMS = 3, 64, 40
Found = collections.namedtuple("Found", "exists")
COMPILING = (1.0, 2.0, 3.0, 4.0, 5.0)  # encoder, beams along the trie, free beams, sampling, decoder
RUNNING = (1.0, 4.0, 5.0, 8.0, 2.0)
REPEATS = (3.0, 1.0, 2.0)  # times RUNNING


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent.parent.parent / "tools" / "bench")
        yield importlib.import_module("rollout")


def _leaves(script: ModuleType) -> int:
    return len(np.unique(script.made_up_codes((8, 8, 8), ITEMS), axis=0))


def _rows(printed: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    return {name: rest for name, *rest in cells}


def test_it_prints_medians_of_waited_for_runs_in_turn_apart_from_compiling(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    events: list[str] = []
    took = itertools.chain(COMPILING, (factor * s for factor in REPEATS for s in RUNNING))
    now = itertools.accumulate(s for pair in ((1000.0, s) for s in took) for s in pair)
    wait = jax.block_until_ready

    def clock() -> float:
        events.append("clock")
        return next(now)

    def waited(result):
        events.append("wait")
        return wait(result)

    monkeypatch.setattr(script, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(jax, "block_until_ready", waited)
    options = {"--groups": GROUP, "--items": ITEMS, "--requests": REQUESTS, "--repeats": len(REPEATS)}
    arguments = [str(x) for option in options.items() for x in option]
    monkeypatch.setattr(sys, "argv", ["rollout.py", "onerec_0.015b", *TINY, *arguments])
    script.main()
    assert next(now, None) is None
    timed = len(REPEATS) * len(RUNNING)
    assert events[-3 * timed :] == ["clock", "wait", "clock"] * timed
    printed, leaves = capsys.readouterr().out, _leaves(script)
    rows = _rows(printed)
    assert [row[2:5] for row in rows.values()] == [[f"{x * s:.1f}" for x in (2000, 1000, 3000)] for s in RUNNING]
    assert [row[-1] for row in rows.values()] == [f"{s:.1f}" for s in COMPILING]
    assert [row[0] for row in rows.values()] == ["", *["64"] * 4] and leaves < GROUP
    for (name, seconds), count in zip(
        {"beams along the trie": 8, "free beams": 10, "sampling along the trie": 16}.items(),
        (REQUESTS * leaves, REQUESTS * GROUP, REQUESTS * leaves),
        strict=True,
    ):
        assert rows[name][1] == f"{count / seconds:,.0f}"
        assert rows[name][6:8] == [f"{1 - 2 / seconds:.1%}", f"{1e6 * (seconds - 2) / count:.2f}"]
    assert f"{REQUESTS} requests of 4 + 0 + 0 events, contexts of 5 tokens" in printed
    assert f"cpu: cpu, jax {jax.__version__}" in printed
    assert f"{ITEMS} items of {leaves} semantic IDs" in printed
    assert "each of 3 rollouts calls it once, on 3 rows (one a candidate would be 192)" in printed
    few = f"{REQUESTS * leaves}.0"
    assert f"beams along the trie, G = 64: {few}; sampling along the trie, G = 64: {few}" in printed
    assert "encoder 25%, decoder 50%, search 25%; the decoder dominates" in printed


def test_a_rollout_that_encodes_each_candidate_is_an_error(script: ModuleType, monkeypatch: pytest.MonkeyPatch):
    def wasteful(model, config, *, free, width):
        def rollout(params, tables, bias, batch, *_):
            each = jax.tree.map(lambda x: jnp.repeat(x, width, axis=0), batch)
            return Found(model.encode(params, tables, bias, each).valid)

        return jax.jit(rollout)

    monkeypatch.setattr(script, "make_rollout", wasteful)
    with pytest.raises(RuntimeError, match=r"G = 5: encoded rows \[15\], not 3 once"):
        script.measure(load_recipe("onerec_0.015b", list(TINY)), ITEMS, REQUESTS, [5], 1)


def test_the_count_of_a_rollouts_matmuls_agrees_with_the_compilers(script: ModuleType):
    """The decoder's parts together, and the encoder; with as many beams as the widths of levels make a difference."""
    wide = {"d_model": 256, "ffn_hidden": 512, "author_dim": 64, "feature_dim": 64, "static_dim": 64}
    config = tiny_model(**{**wide, "lifelong_length": 64})
    vocabulary = Vocabulary(50, 100, 20, 7, (3, 4), LABELS, codebook_sizes=(2048, 512, 4096))
    model, beams = build(config, vocabulary), (1, 6, 16)
    batch, bias = random_batch(config, vocabulary), model.init_bias()
    params, tables = jax.eval_shape(lambda: model.init(0))
    context = jax.eval_shape(lambda *given: model.encode(*given), params, tables, bias, batch)
    codes = jax.ShapeDtypeStruct((4, 16, 3), jnp.int32)

    def encode(params, tables, batch):
        rows = {name: table["rows"] for name, table in tables.items()}  # finding rows is sorting, no matmul
        return model.bind(params).encode(batch, rows, bias, None)[0]

    def compilers(program, *given) -> float:
        return program.lower(*given).cost_analysis()["flops"] / 4

    flops = script.rollout_flops(config, vocabulary, beams)
    encoder = flops.pop("encoder")
    assert abs(encoder / compilers(jax.jit(encode), params, tables, batch) - 1) < 0.02
    decoder = compilers(script.make_decoder(model, beams), params, bias, context, codes)
    assert abs(sum(flops.values()) / decoder - 1) < 0.02
    assert flops["heads"] == 2 * 256 * (2048 + 6 * 512 + 16 * 4096)
    keys_and_values = context.tokens.shape[1] * 2 * 2 * 256 * 256  # of the one block, for every token of the context
    assert flops["cross-attention keys and values"] == keys_and_values


def test_the_decoder_alone_computes_the_logits_of_the_teacher_forced_pass(script: ModuleType):
    model = build(tiny_model(**PLAIN, heads=1, causal=True), VOCABULARY)
    params, tables = jax.jit(lambda: model.init(0))()
    bias, batch = model.init_bias(), random_batch(model.config, batch=3)
    codes = np.random.default_rng(0).integers(0, 16, (3, 5, 3)).astype(np.int32)

    @jax.jit
    def forced(params):
        context = model.encode(params, tables, bias, batch)
        valid, seen = jnp.ones((3, 5), bool), jnp.broadcast_to(events_seen(context), (3, 5))
        decoder = model.bind(params).decoder
        assert decoder is not None
        logits, _ = decoder(context, codes, seen, valid, bias["decoder"], None)
        return context, [jnp.max(level, axis=-1) for level in logits]

    context, expected = forced(params)
    found = script.make_decoder(model, (1, 5, 5))(params, bias, context, codes)
    for level, width in enumerate((1, 5, 5)):
        np.testing.assert_allclose(found[level], expected[level][:, :width], atol=1e-5)


def test_beams_of_a_level_are_as_many_as_a_trie_lets_a_search_have(script: ModuleType):
    """Against the numbers of prefixes of a full trie, which are all distinct."""
    full = np.array(list(itertools.product(range(3), range(4), range(2))), np.int32)
    branching = Trie.build(full, np.zeros(len(full))).branching
    for group in (2, 3, 7, 12, 30):
        prefixes = [len(np.unique(full[:, :level], axis=0)) if level else 1 for level in range(3)]
        assert script.beams_of_levels(branching, group) == (1, *(min(group, n) for n in prefixes[1:]))


def test_a_model_without_a_decoder_is_one_sentence(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["rollout.py", "onerec_0.015b", "model.head=items"])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and len(said.splitlines()) == 1 and "model.head of onerec_0.015b is items" in said
