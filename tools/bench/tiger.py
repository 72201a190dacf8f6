"""Training speed of the TIGER shape against the same shape in PyTorch, and of OneRec's one token an item.

    pip install torch transformers
    python tools/bench/tiger.py                 float32, all cores, Hugging Face T5 eager and compiled

TIGER: a user token and 20 items of 4 codes in, 4 codes out; 4 + 4 layers, width 128, 6 heads of 64, feed-forward 1024, ReLU,
dropout .1, AdamW. A step is forward, backward and update of a batch of full histories made up at random, the same ids for
all. Contestants take turns; an example is one target item with its context. OneRec runs the recipe `beauty_small`: one target
a context, and as it trains, every position of a causal encoder a target (6 a context, of which 74 % are filled on Beauty).
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from onerec_jax.config import ModelConfig, Recipe
from onerec_jax.data.schema import Batch, ItemFeatures, Vocabulary
from onerec_jax.evaluate.board import load_board
from onerec_jax.model.onerec import build
from onerec_jax.model.prefixes import training_trie
from onerec_jax.recipe import load_recipe
from onerec_jax.tokenizer.trie import Trie
from onerec_jax.train.optimizer import make_optimizer
from onerec_jax.train.state import init_state
from onerec_jax.train.step import make_train_step

ITEMS, CODES, LEVELS, EVENTS, USERS = 12_101, 256, 4, 20, 2_000
FILLED = 0.74  # of a context's six targets, on Beauty


def made_up_codes() -> np.ndarray:
    """Semantic IDs of all items, int32 [I,C]."""
    return np.random.default_rng(0).integers(0, CODES, (ITEMS, LEVELS)).astype(np.int32)


def made_up_batch(size: int, targets: int, causal: bool, seed: int = 0) -> Batch:
    """Full histories and targets of random items, NumPy arrays."""
    rng = np.random.default_rng(seed)
    codes = made_up_codes()

    def events(length: int) -> ItemFeatures:
        item = rng.integers(0, ITEMS, (size, length)).astype(np.int32)
        zeros = np.zeros((size, length), np.int32)
        seconds = np.zeros((size, length), np.float32)
        return ItemFeatures(
            item, codes[item], zeros, zeros, seconds, seconds, seconds, np.zeros((size, length, 0), np.uint8)
        )

    target = rng.integers(0, ITEMS, (size, targets)).astype(np.int32)
    visible = np.arange(EVENTS - targets + 1, EVENTS + 1) if causal else np.full(targets, EVENTS)
    return Batch(
        user=rng.integers(0, USERS, (size, 1)).astype(np.int32),
        short=events(EVENTS), positive=events(0), lifelong=events(0),
        targets=codes[target], target_item=target, target_weight=np.ones((size, targets), np.float32),
        visible=np.broadcast_to(visible, (size, targets)).astype(np.int32),
        feedback=np.zeros((size, targets, 0), np.uint8), playtime_s=np.zeros((size, targets), np.float32),
    )  # fmt: skip


def ours(recipe: Recipe, size: int, targets: int) -> Callable[[], None]:
    """A train step, compiled."""
    config: ModelConfig = recipe.model
    vocabulary = Vocabulary(USERS, ITEMS, 1, 221, (), (), (CODES,) * LEVELS)
    model, optimizer = build(config, vocabulary), make_optimizer(recipe.train)
    state = [init_state(model, optimizer, 0)]
    batch = jax.device_put(made_up_batch(size, targets, config.causal))
    trie = training_trie(config, Trie.build(made_up_codes(), np.zeros(ITEMS)))
    step = jax.jit(make_train_step(model, recipe, optimizer), donate_argnums=0).lower(state[0], batch, trie).compile()

    def run() -> None:
        state[0] = jax.block_until_ready(step(state[0], batch, trie)[0])

    return run


def t5_config(*, use_cache: bool):
    """Of Hugging Face's T5 in the TIGER shape; its tokens are 0 = start and padding, then codes level by level, then users."""
    return importlib.import_module("transformers").T5Config(
        vocab_size=1 + LEVELS * CODES + USERS, d_model=128, d_kv=64, d_ff=1024, num_layers=4, num_heads=6,
        dropout_rate=0.1, feed_forward_proj="relu", decoder_start_token_id=0, pad_token_id=0, use_cache=use_cache,
    )  # fmt: skip


def t5_codes(codes: np.ndarray) -> np.ndarray:
    """Tokens of codes [..., C], int64."""
    return (codes + 1 + CODES * np.arange(LEVELS)).astype(np.int64)


def t5_context(batch: Batch) -> np.ndarray:
    """What T5's encoder reads: the user's token, then every code of the history; int64 [B,1+L*C]."""
    items = t5_codes(batch.short.codes).reshape(len(batch.user), -1)
    return np.concatenate([1 + LEVELS * CODES + batch.user.astype(np.int64), items], axis=1)


def torch_t5(size: int, *, compiled: bool) -> Callable[[], None]:
    """A train step of Hugging Face's T5."""
    torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(t5_config(use_cache=False)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    batch = made_up_batch(size, 1, causal=False)
    tokens, labels = torch.from_numpy(t5_context(batch)), torch.from_numpy(t5_codes(batch.targets[:, 0]))
    mask = torch.ones_like(tokens)
    forward = torch.compile(model) if compiled else model

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward(input_ids=tokens, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=9, help="steps of each, in turn")
    given = parser.parse_args()
    tiger = load_recipe("beauty_small", load_board("beauty").rows["TIGER"])
    onerec = load_recipe("beauty_small")
    single = load_recipe("beauty_small", ["model.causal=false"])
    contestants: dict[str, tuple[float, Callable[[], None]]] = {}
    makers: dict[str, tuple[float, Callable[[], Callable[[], None]]]] = {
        "T5, PyTorch eager": (1, lambda: torch_t5(given.batch, compiled=False)),
        "T5, PyTorch compiled": (1, lambda: torch_t5(given.batch, compiled=True)),
        "TIGER shape, onerec_jax": (1, lambda: ours(tiger, given.batch, 1)),
        "OneRec, one target a context": (1, lambda: ours(single, given.batch, 1)),
        "OneRec, every position a target": (6 * FILLED, lambda: ours(onerec, given.batch, 6)),
    }
    for name, (targets, make) in makers.items():
        contestants[name] = targets, make()
        contestants[name][1]()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in track(range(given.repeats), "rounds"):
        for name, (_, step) in contestants.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    rates = {name: contestants[name][0] * given.batch / statistics.median(s) for name, s in seconds.items()}
    table = Table(
        "", "step, ms: median", "least", "most", "examples/s", "x eager", "x compiled", title="training, float32"
    )
    for name, rate in rates.items():
        ms = [1000 * s for s in seconds[name]]
        table.add_row(
            name, f"{statistics.median(ms):.0f}", f"{min(ms):.0f}", f"{max(ms):.0f}", f"{rate:.0f}",
            f"{rate / rates['T5, PyTorch eager']:.2f}", f"{rate / rates['T5, PyTorch compiled']:.2f}",
        )  # fmt: skip
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
