"""Speed of generation: trie-constrained beam search of the TIGER shape against the same shape and width in Hugging Face's T5.

    pip install torch transformers
    python tools/bench/generate.py                      float32, all cores, 50 beams, batches of 1 and more
    python tools/bench/generate.py --dtype bfloat16     ours in bfloat16, scores in float32, for processors with AMX or AVX512-BF16
    python tools/bench/generate.py --dtype bfloat16 --torch-dtype bfloat16

TIGER: a user token and 20 items of 4 codes in, 4 codes out; 4 + 4 layers, width 128, 6 heads of 64, feed-forward 1024; 12,101
items whose IDs are random. OneRec: the recipe `beauty_small`, one token an item, 2 + 1 layers, 4 heads of 32, feed-forward 256,
and an item head that scores every item besides, which its T5 of as many blocks of that size is spared. T5 generates as public
code of TIGER does: `generate` with 50 beams, all of them returned, and `prefix_allowed_tokens_fn` that looks prefixes up in a
dict. Contestants take turns on the same made-up full histories, with parameters of their own at random; whatever compiles has
done so before. `GFLOP/s` beside what one large matmul of the machine does, which is printed first, says how much room there is.

What comes out is checked: every ID of either exists, and ours are the beams that NumPy finds over the teacher-forced scores of
every item of the catalogue.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tiger import CODES, ITEMS, LEVELS, USERS, made_up_batch, made_up_codes, t5_codes, t5_config, t5_context

from onerec_jax.config import Recipe
from onerec_jax.data.schema import Vocabulary
from onerec_jax.evaluate.board import load_board
from onerec_jax.generate.beam import make_beam_search
from onerec_jax.generate.scoring import code_log_p
from onerec_jax.model.onerec import Model, build
from onerec_jax.model.prefixes import device_trie
from onerec_jax.recipe import load_recipe
from onerec_jax.tokenizer.trie import Trie

T5, OURS = "T5, Hugging Face", "onerec_jax"
AT_ONCE = 1024  # items that one teacher-forced pass of the check scores


@dataclasses.dataclass
class Contestant:
    """A search of one batch, which returns its IDs int [B,W,C], and what was measured of it."""

    shape: str
    name: str
    batch: int
    run: Callable[[], np.ndarray]
    gflop: float  # of one request, as its own framework counts
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def rate(self) -> float:
        """Requests a second, at the median."""
        return self.batch / statistics.median(self.seconds)


@dataclasses.dataclass(frozen=True)
class Ours:
    """A model with random parameters."""

    model: Model
    params: dict
    tables: dict
    bias: dict

    @classmethod
    def make(cls, recipe: Recipe) -> Ours:
        model = build(recipe.model, Vocabulary(USERS, ITEMS, 1, 221, (), (), (CODES,) * LEVELS))
        return cls(model, *model.init(0), model.init_bias())

    @property
    def given(self) -> tuple[dict, dict, dict]:
        return self.params, self.tables, self.bias

    def contestant(self, name: str, trie: Trie, size: int, width: int) -> Contestant:
        search = make_beam_search(self.model, width)
        batch = jax.device_put(made_up_batch(size, 1, self.model.config.causal))
        on_device = device_trie(trie, self.model.config)
        compiled = search.lower(*self.given, batch, on_device).compile()  # type: ignore[attr-defined]  # jitted

        def run() -> np.ndarray:
            beams = jax.block_until_ready(compiled(*self.given, batch, on_device))
            return np.asarray(beams.codes)

        return Contestant(name, OURS, size, run, compiled.cost_analysis()["flops"] / size / 1e9)


def next_codes(codes_IxC: np.ndarray) -> dict[tuple[int, ...], list[int]]:
    """The tokens that may follow each prefix of tokens, as a dict."""
    found: dict[tuple[int, ...], set[int]] = {}
    for tokens in t5_codes(codes_IxC).tolist():
        for level, token in enumerate(tokens):
            found.setdefault(tuple(tokens[:level]), set()).add(token)
    return {prefix: sorted(tokens) for prefix, tokens in found.items()}


def t5_of(recipe: Recipe) -> Any:
    """T5's configuration with blocks of a recipe's number and size; tokens as `t5_config` has them."""
    model, config = recipe.model, t5_config(use_cache=True)
    config.update({
        "d_model": model.d_model, "d_kv": model.width_of_head, "num_heads": model.heads, "d_ff": model.ffn_hidden,
        "num_layers": model.encoder_layers, "num_decoder_layers": model.decoder_layers,
    })  # fmt: skip
    return config


def torch_t5(shape: str, config: Any, per_item: int, codes_IxC: np.ndarray, sizes: list[int], width: int, dtype: str):
    """Hugging Face's `generate`, one contestant a batch size, all with the same parameters.

    Args:
        shape: the name of what is compared.
        config: T5's.
        per_item: how many tokens of an item's codes its encoder reads, the first ones.
        codes_IxC: semantic IDs of all items.
        sizes: requests of a batch.
        width: beams.
        dtype: of parameters and activations.
    """
    torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).to(getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None  # an ID ends by its length, and token 1 is a code
    following = next_codes(codes_IxC)

    def contestant(size: int) -> Contestant:
        context = t5_context(made_up_batch(size, 1, causal=False))
        items = context[:, 1:].reshape(size, -1, LEVELS)[:, :, :per_item].reshape(size, -1)
        tokens = torch.from_numpy(np.concatenate([context[:, :1], items], axis=1))
        mask = torch.ones_like(tokens)

        def run() -> np.ndarray:
            with torch.inference_mode():
                found = model.generate(
                    input_ids=tokens, attention_mask=mask, num_beams=width, num_return_sequences=width,
                    max_new_tokens=LEVELS, min_new_tokens=LEVELS, do_sample=False,
                    prefix_allowed_tokens_fn=lambda _, prefix: following[tuple(prefix[1:].tolist())],
                )  # fmt: skip
            return found[:, 1:].numpy().reshape(size, width, LEVELS) - t5_codes(np.zeros(LEVELS, np.int64))

        with importlib.import_module("torch.utils.flop_counter").FlopCounterMode(display=False) as counter:
            run()
        return Contestant(shape, T5, size, run, counter.get_total_flops() / size / 1e9)

    return [contestant(size) for size in sizes]


def beams_by_hand(log_p_IxC: np.ndarray, codes_IxC: np.ndarray, width: int) -> list[tuple[int, ...]]:
    """The IDs that a beam search ends with, best first, from log P of every code of every item of one request."""
    total = np.cumsum(log_p_IxC.astype(np.float64), axis=1)
    alive = np.ones(len(codes_IxC), bool)
    best: list[tuple[int, ...]] = []
    for level in range(codes_IxC.shape[1]):
        prefixes = {tuple(codes_IxC[i, : level + 1].tolist()): total[i, level] for i in np.flatnonzero(alive)}
        best = sorted(prefixes, key=lambda prefix: -prefixes[prefix])[:width]
        kept = set(best)
        alive &= np.array([tuple(codes) in kept for codes in codes_IxC[:, : level + 1].tolist()])
    return best


def check_ours(ours: Ours, trie: Trie, codes_IxC: np.ndarray, found_BxWxC: np.ndarray) -> None:
    """Asserts that the first request's beams are those of `beams_by_hand`, but for what float32 cannot tell apart."""
    width, on_device = found_BxWxC.shape[1], device_trie(trie, ours.model.config)
    batch = made_up_batch(len(found_BxWxC), 1, ours.model.config.causal)

    @jax.jit
    def score(params, tables, bias, codes_BxJxC):
        context = ours.model.encode(params, tables, bias, batch)
        return code_log_p(ours.model.bind(params), context, bias, on_device, codes_BxJxC)[0]

    parts = []
    for first in range(0, len(codes_IxC), AT_ONCE):
        part = np.resize(codes_IxC[first : first + AT_ONCE], (AT_ONCE, LEVELS))
        parts.append(np.asarray(score(*ours.given, jnp.broadcast_to(part, (len(found_BxWxC), *part.shape)))))
    log_p_IxC = np.concatenate(parts)[: len(codes_IxC)]
    by_hand = beams_by_hand(log_p_IxC, codes_IxC, width)
    score_of = {tuple(c): s for c, s in zip(codes_IxC.tolist(), log_p_IxC.sum(1).tolist(), strict=True)}
    mine = [tuple(codes) for codes in found_BxWxC[0].tolist()]
    assert len(set(mine)) == width, "an ID came twice"
    gaps = [abs(score_of[a] - score_of[b]) for a, b in zip(mine, by_hand, strict=True)]
    assert max(gaps) < 1e-4, f"beams differ from those by hand by {max(gaps)} in log P"


def report(contestants: list[Contestant], width: int, dtype: str, torch_dtype: str) -> Table:
    """Medians, spread and ratios: to T5 of the same shape at its best batch, and at the same batch."""
    theirs = [c for c in contestants if c.name == T5]
    best = {c.shape: max(t.rate for t in theirs if t.shape == c.shape) for c in contestants}
    same = {(c.shape, c.batch): c.rate for c in theirs}
    title = f"generation, {width} beams, T5 in {torch_dtype}, ours in {dtype}"
    table = Table(
        "shape", "", "batch", "ms: median", "least", "most", "GFLOP each", "GFLOP/s", "requests/s", "x T5 at its best",
        "x T5, same batch", title=title,
    )  # fmt: skip
    for c in contestants:
        ms = [1000 * s for s in c.seconds]
        table.add_row(
            c.shape, c.name, str(c.batch), f"{statistics.median(ms):.1f}", f"{min(ms):.1f}", f"{max(ms):.1f}", f"{c.gflop:.2f}",
            f"{c.gflop * c.rate:.0f}", f"{c.rate:.1f}", f"{c.rate / best[c.shape]:.1f}",
            f"{c.rate / same[c.shape, c.batch]:.1f}" if (c.shape, c.batch) in same else "",
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=50, help="beams")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="of ours")
    parser.add_argument("--torch-batches", type=int, nargs="+", default=[1, 8, 32], help="of T5")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of ours")
    parser.add_argument("--torch-dtype", choices=("float32", "bfloat16"), default="float32", help="of T5")
    parser.add_argument("--repeats", type=int, default=7, help="searches of each, in turn")
    given = parser.parse_args()
    codes = made_up_codes()
    trie = Trie.build(codes, np.zeros(ITEMS))
    dtype = f"model.dtype={given.dtype}"
    recipes = {
        "TIGER": load_recipe("beauty_small", [*load_board("beauty").rows["TIGER"], dtype]),
        "OneRec": load_recipe("beauty_small", [dtype]),
    }
    made = {shape: Ours.make(recipe) for shape, recipe in recipes.items()}
    contestants = []
    for shape, recipe in recipes.items():
        per_item = recipe.model.tokens_per_event(LEVELS)
        contestants += torch_t5(
            shape, t5_of(recipe), per_item, codes, given.torch_batches, given.width, given.torch_dtype
        )
        contestants += [made[shape].contestant(shape, trie, size, given.width) for size in given.batches]
    for contestant in contestants:
        found = contestant.run()
        assert (trie.find(found.reshape(-1, LEVELS)) >= 0).all(), f"{contestant}: an ID is no item's"
        # in bfloat16 another order of the same sums moves log P by more than the check allows
        if (
            given.dtype == "float32"
            and contestant.batch == given.batches[0]
            and contestant.name == OURS
            and contestant.shape == "TIGER"
        ):
            check_ours(made["TIGER"], trie, codes, found)
    square = jnp.ones((2048, 2048))
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(square, square))
    started = time.perf_counter()
    jax.block_until_ready([product(square, square) for _ in range(5)])
    print(f"one dense matmul in float32: {5 * 2 * 2048**3 / (time.perf_counter() - started) / 1e9:.0f} GFLOP/s")
    for _ in track(range(given.repeats), "rounds"):
        for contestant in contestants:
            started = time.perf_counter()
            contestant.run()
            contestant.seconds.append(time.perf_counter() - started)
    Console(width=130).print(report(contestants, given.width, given.dtype, given.torch_dtype))


if __name__ == "__main__":
    main()
