"""Speed of the rollouts that reinforcement learning learns from: candidates a second, and where the time goes.

    python tools/bench/rollout.py                                         onerec_0.015b, groups of 128 and 512
    python tools/bench/rollout.py onerec_0.121b model.dtype=float32 --groups 512 --requests 4 --repeats 3

Parameters are random, and so are the catalogue and the requests, whose contexts are full: 20 + 256 + 2000 events in the
report's sizes. Measured in turn on the first device: the encoder alone; the decoder alone, which is what a search along the
trie asks of it at given candidates; and rollouts as RL makes them, by beams along the trie, by free beams and by sampling
along the trie. The search is what such a rollout takes beyond encoder and decoder: softmax, walking the trie, choosing
beams, and moving their caches. Compiling is timed apart, and every program has run before the clock starts.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.console import Console
from rich.progress import track
from rich.table import Table
from train_step import made_up_batch  # puts the repository on the path

from onerec_jax.config import ModelConfig, Recipe
from onerec_jax.data.schema import Batch, Vocabulary
from onerec_jax.errors import InputError
from onerec_jax.generate.beam import events_seen
from onerec_jax.model.encoder import Context, Encoder
from onerec_jax.model.onerec import Model, build, planned_vocabulary
from onerec_jax.model.prefixes import device_trie
from onerec_jax.posttrain.rollout import first_items, make_rollout
from onerec_jax.recipe import load_recipe
from onerec_jax.tokenizer.trie import Trie
from onerec_jax.train.flops import request_flops

BEAMS, FREE, DRAWS = "beams along the trie", "free beams", "sampling along the trie"
ROLLOUTS = {BEAMS: ("beam", False), FREE: ("beam", True), DRAWS: ("sample", False)}
ENCODER, DECODER = "encoder alone", "decoder alone"


@dataclasses.dataclass
class Contestant:
    """A compiled program and what was measured of it."""

    name: str
    group: int  # G; 0 for the encoder
    run: Callable[[int], Any]  # the number of a batch -> its result
    compile_s: float
    encoded: list[int]  # rows of each call of the encoder, as traced
    candidates: float = 0.0  # of one batch, those that exist
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclasses.dataclass(frozen=True)
class Measured:
    recipe: Recipe
    vocabulary: Vocabulary
    trie: Trie
    requests: int
    tokens: int  # N, of a context
    contestants: dict[tuple[str, int], Contestant]


def made_up_codes(sizes: tuple[int, ...], items: int, seed: int = 0) -> np.ndarray:
    """Semantic IDs int32 [I,C]; clusters of a level differ in size (log-normal, sigma 1) as those of k-means do."""
    rng = np.random.default_rng(seed)
    weights = [rng.lognormal(0.0, 1.0, size) for size in sizes]
    columns = [rng.choice(len(weight), items, p=weight / weight.sum()) for weight in weights]
    return np.stack(columns, axis=1).astype(np.int32)


def beams_of_levels(branching: tuple[int, ...], group: int) -> tuple[int, ...]:
    """How many beams the decoder runs on at each level: one BOS, then at most G continuations of all beams before."""
    beams = [1]
    for most in branching[:-1]:
        beams.append(min(group, beams[-1] * most))
    return tuple(beams)


def rollout_flops(config: ModelConfig, vocabulary: Vocabulary, beams: tuple[int, ...]) -> dict[str, float]:
    """Matmul FLOPs of one request of full length by part, counted as `train/flops.py` does.

    A decoder that keeps a cache has the tokens that were beams of a level, where teacher forcing has C for each candidate.
    """

    def of_tokens(tokens: float):
        return request_flops(
            config, vocabulary, short=config.short_length, positive=config.positive_length,
            lifelong=config.lifelong_length, targets=tokens / vocabulary.levels,
        )  # fmt: skip

    found, fixed = of_tokens(sum(beams)), of_tokens(0).decoder
    sizes = zip(beams, vocabulary.codebook_sizes, strict=True)
    return {
        "encoder": found.pathways + found.lifelong + found.encoder,
        "blocks": found.decoder - fixed,
        "heads": sum(2.0 * config.d_model * width * size for width, size in sizes),
        "cross-attention keys and values": fixed,
    }


def make_decoder(model: Model, beams: tuple[int, ...]) -> Callable[..., list[Array]]:
    """Jitted: (params, bias, context, codes int32 [B,G,C]) -> the largest logit of every beam, float32 [B,W] by level.

    The decoder's part of a search whose beams are the candidates themselves, so that nothing is chosen. A beam inherits its
    cache from the beam of its own number.
    """

    @jax.jit
    def decode(params: Any, bias: dict[str, Array], context: Context, codes_BxGxC: Array) -> list[Array]:
        decoder = model.bind(params).decoder
        assert decoder is not None, "a model with an item head has no codes to decode"
        dtype, mask = context.tokens.dtype, context.valid[:, None, :]
        past: tuple[tuple[Array, Array], ...] = ()
        cross, latest = decoder.cross_keys_values(context), decoder.latest(context, events_seen(context))
        largest = []
        for level, width in enumerate(beams):
            if past and width != past[0][0].shape[3]:
                own = jnp.arange(width) % past[0][0].shape[3]
                past = jax.tree.map(lambda cache, own=own: jnp.take(cache, own, axis=3), past)
            last_BxW = codes_BxGxC[:, :width, max(0, level - 1)]
            x = decoder.embed_level(level, last_BxW, latest, dtype)[:, :, None, :]
            x, _, of_level = decoder.decode(x, past, cross, mask, jnp.ones(last_BxW.shape, bool), bias["decoder"])
            past = (*past, of_level)
            largest.append(jnp.max(decoder.heads[level](x[:, :, 0]).astype(jnp.float32), axis=-1))
        return largest

    return decode


def prepared(name: str, group: int, program: Callable, arguments: Callable[[int], tuple], batches: int) -> Contestant:
    """Compiles a jitted program, watching the encoder, and runs it once on every batch."""
    encoded: list[int] = []
    encode = Encoder.__call__

    def watched(self: Encoder, batch: Batch, *rest: Any):
        encoded.append(batch.user.shape[0])
        return encode(self, batch, *rest)

    with mock.patch.object(Encoder, "__call__", watched):
        started = time.perf_counter()
        compiled = program.lower(*arguments(0)).compile()
        seconds = time.perf_counter() - started
    found = Contestant(name, group, lambda i: compiled(*arguments(i)), seconds, encoded)
    if name in ROLLOUTS:
        found.candidates = float(np.mean([np.sum(found.run(i).exists) for i in range(batches)]))
    else:
        jax.block_until_ready([found.run(i) for i in range(batches)])
    return found


def measure(recipe: Recipe, items: int, requests: int, groups: list[int], repeats: int) -> Measured:
    """Times all contestants in turn.

    Raises:
        InputError: the model has no decoder.
        RuntimeError: a rollout encodes anything but every request once.
    """
    if recipe.model.head == "items":
        raise InputError(f"model.head of {recipe.name} is items: rollouts are of models that generate codes")
    vocabulary = dataclasses.replace(planned_vocabulary(recipe), items=items, authors=items)
    codes = made_up_codes(vocabulary.codebook_sizes, items)
    trie = Trie.build(codes, np.zeros(items))
    model = build(recipe.model, vocabulary)
    params, tables = jax.jit(lambda: model.init(0))()
    bias = model.init_bias()
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch_size": requests})})
    batches = [jax.device_put(made_up_batch(recipe, vocabulary, codes, seed)) for seed in range(2)]
    on_device, leaf_item = device_trie(trie, recipe.model), jnp.asarray(first_items(trie))

    def prepare(name: str, group: int, program: Callable, arguments: Callable[[int], tuple]) -> Contestant:
        made[name, group] = prepared(name, group, program, arguments, len(batches))
        return made[name, group]

    made: dict[tuple[str, int], Contestant] = {}
    encoder = prepare(
        ENCODER, 0, jax.jit(lambda *given: model.encode(*given)), lambda i: (params, tables, bias, batches[i])
    )
    contexts = [encoder.run(i) for i in range(len(batches))]
    for group in groups:
        for name, (kind, free) in ROLLOUTS.items():
            rollout = make_rollout(model, recipe.rl.model_copy(update={"rollout": kind}), free=free, width=group)
            found = prepare(
                name, group, rollout,
                lambda i: (params, tables, bias, batches[i], on_device, leaf_item, jax.random.key(i)),
            )  # fmt: skip
            if found.encoded != [requests]:
                raise RuntimeError(f"{name}, G = {group}: encoded rows {found.encoded}, not {requests} once")
        given = [made[BEAMS, group].run(i).codes for i in range(len(batches))]
        decoder = make_decoder(model, beams_of_levels(trie.branching, group))
        prepare(DECODER, group, decoder, lambda i, given=given: (params, bias, contexts[i], given[i]))
    for i in track(range(repeats), "measuring", console=Console(stderr=True)):
        for contestant in made.values():
            started = time.perf_counter()
            jax.block_until_ready(contestant.run(i % len(batches)))
            contestant.seconds.append(time.perf_counter() - started)
    return Measured(recipe, vocabulary, trie, requests, contexts[0].tokens.shape[1], made)


def table(found: Measured) -> Table:
    columns = (
        "", "G", "candidates/s", "ms: median", "least", "most", "GFLOP/s", "beyond the encoder", "us a candidate",
        "compile s",
    )  # fmt: skip
    shown = Table(*columns)
    shown.columns[0].no_wrap = True
    encoder_s = found.contestants[ENCODER, 0].median
    for (name, group), contestant in found.contestants.items():
        branching = found.vocabulary.codebook_sizes if name == FREE else found.trie.branching
        flops = rollout_flops(found.recipe.model, found.vocabulary, beams_of_levels(branching, group or 1))
        counted = {ENCODER: flops["encoder"], DECODER: sum(flops.values()) - flops["encoder"]}
        rate = found.requests * counted.get(name, sum(flops.values())) / contestant.median / 1e9
        speed = share = beyond = ""
        if contestant.candidates:
            speed = f"{contestant.candidates / contestant.median:,.0f}"
            share = f"{1 - encoder_s / contestant.median:.1%}"
            beyond = f"{1e6 * (contestant.median - encoder_s) / contestant.candidates:.2f}"
        ms = [f"{1000 * s:.1f}" for s in (contestant.median, min(contestant.seconds), max(contestant.seconds))]
        shown.add_row(
            name, str(group or ""), speed, *ms, f"{rate:.1f}", share, beyond, f"{contestant.compile_s:.1f}"
        )  # fmt: skip
    return shown


def dominance(found: Measured, group: int) -> str:
    """Where the time of beams along the trie goes."""
    whole, encoder, decoder = (
        found.contestants[key].median for key in ((BEAMS, group), (ENCODER, 0), (DECODER, group))
    )
    parts = {"encoder": encoder, "decoder": decoder, "search": whole - encoder - decoder}
    shares = ", ".join(f"{part} {seconds / whole:.0%}" for part, seconds in parts.items())
    return f"G = {group}, time of {BEAMS}: {shares}; the {max(parts, key=lambda part: parts[part])} dominates"


def lines(found: Measured) -> list[str]:
    """What the table does not say."""
    config, sizes, device = found.recipe.model, found.trie.branching, jax.devices()[0]
    rollouts = [c for c in found.contestants.values() if c.name in ROLLOUTS]
    groups = list(dict.fromkeys(c.group for c in rollouts))
    said = [
        f"{found.recipe.name}, {config.dtype}, {found.requests} requests of {config.short_length} + "
        f"{config.positive_length} + {config.lifelong_length} events, contexts of {found.tokens} tokens",
        f"{device.platform}: {device.device_kind}, jax {jax.__version__}",
        f"{found.vocabulary.items:,} items of {found.trie.leaves:,} semantic IDs; most children of a node, by depth: "
        f"{', '.join(f'{size:,}' for size in sizes)}",
        f"the encoder runs once a request: each of {len(rollouts)} rollouts calls it once, on {found.requests} rows "
        f"(one a candidate would be {', '.join(f'{found.requests * group:,}' for group in groups)})",
    ]
    missing = [
        f"{c.name}, G = {c.group}: {c.candidates:,.1f}" for c in rollouts if c.candidates < found.requests * c.group
    ]
    if missing:
        said.append(f"candidates that exist, where groups are not full: {'; '.join(missing)}")
    for group in groups:
        flops = rollout_flops(config, found.vocabulary, beams_of_levels(sizes, group))
        encoder = flops.pop("encoder")
        total, parts = sum(flops.values()), [f"{part} {count / group / 1e6:.3f}" for part, count in flops.items()]
        said.append(
            f"G = {group}, MFLOP a candidate: encoder {encoder / group / 1e6:.3f} ({encoder / 1e6:,.1f} a request), "
            f"decoder {total / group / 1e6:.3f} ({', '.join(parts)}); decoder {total / (total + encoder):.0%} of all"
        )
    return said + [dominance(found, group) for group in groups]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="onerec_0.015b")
    parser.add_argument("overrides", nargs="*", help="settings of the recipe, as key.path=value")
    parser.add_argument("--groups", type=int, nargs="+", default=[128, 512], help="candidates per request")
    parser.add_argument("--items", type=int, default=100_000, help="of the catalogue")
    parser.add_argument("--requests", type=int, default=16, help="of a batch")
    parser.add_argument("--repeats", type=int, default=10)
    given = parser.parse_intermixed_args()
    try:
        recipe = load_recipe(given.recipe, given.overrides)
        found = measure(recipe, given.items, given.requests, given.groups, given.repeats)
    except InputError as error:
        print(f"rollout: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    Console(width=132).print(table(found))
    print("\n".join(lines(found)))


if __name__ == "__main__":
    main()
