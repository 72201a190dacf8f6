"""Useful GFLOP/s of the expert backends against one dense matmul of the same active FLOPs, forward and backward.

    python tools/bench/moe.py                       float32: 24 experts, 2 active, 1024 -> 2816, 4096 tokens

Dense: the same SwiGLU with one expert's weights over all tokens x active rows. Useful FLOPs are 3 x 3 matmuls of the chosen
rows. Contestants take turns, random routing; `--hot SHARE` sends that share of the choices to one expert.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from onerec_jax.config import MoEConfig
from onerec_jax.model.moe.backends import experts_of


def choices(tokens: int, experts: int, active: int, hot: float, seed: int = 0) -> np.ndarray:
    """Distinct random experts of every token, int32 [tokens, active]; a share `hot` of the tokens begins with expert 0."""
    rng = np.random.default_rng(seed)
    chosen = np.argsort(rng.random((tokens, experts)), axis=1)[:, :active]
    given = rng.random(tokens) < hot
    chosen[given] = np.concatenate([np.zeros((tokens, 1)), 1 + (chosen[:, 1:] - 1) % (experts - 1)], axis=1)[given]
    return chosen.astype(np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"experts": 24, "active": 2, "width": 1024, "hidden": 2816, "tokens": 4096, "tile": 64, "repeats": 3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--hot", type=float, default=0.0)
    parser.add_argument("--backends", nargs="+", default=["tiles", "ragged"])
    given = parser.parse_args()
    rng = np.random.default_rng(0)

    def weights(experts: int) -> list[jax.Array]:
        shapes = [(experts, given.width, given.hidden)] * 2 + [(experts, given.hidden, given.width)]
        drawn = [rng.standard_normal(s, np.float32) * s[1] ** -0.5 for s in shapes]
        return [jnp.asarray(w, given.dtype) for w in drawn]

    x = jnp.asarray(rng.standard_normal((given.tokens, given.width), np.float32), given.dtype)
    chosen = jnp.asarray(choices(given.tokens, given.experts, given.active, given.hot))
    gates = jnp.full(chosen.shape, 1 / given.active)
    routed = weights(given.experts)

    def contestant(name: str) -> Callable[[], object]:
        if name == "dense":
            one = [w[0] for w in weights(1)]
            rows = jnp.repeat(x, given.active, axis=0)

            def total(rows: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
                return jnp.sum(jnp.square((jax.nn.silu(rows @ gate) * (rows @ up)) @ down).astype(jnp.float32))

            step = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3)))
            return lambda: jax.block_until_ready(step(rows, *one))
        config = MoEConfig(experts=given.experts, active=given.active, backend=name, tile=given.tile)  # pyright: ignore
        experts = experts_of(config)

        def loss(x: jax.Array, gates: jax.Array, *weights: jax.Array) -> jax.Array:
            return jnp.sum(jnp.square(experts(x, chosen, gates, *weights)).astype(jnp.float32))

        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4)))
        return lambda: jax.block_until_ready(step(x, gates, *routed))

    runs = {name: contestant(name) for name in ("dense", *given.backends)}
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in track(range(given.repeats), "rounds"):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    flops = 3 * 3 * 2 * given.tokens * given.active * given.width * given.hidden
    rates = {name: flops / statistics.median(s) / 1e9 for name, s in seconds.items()}
    device = jax.devices()[0].device_kind
    table = Table("", "GFLOP/s: median", "least", "most", "x dense", "x ragged", title=f"{given.dtype}, {device}")
    for name, rate in rates.items():
        against = f"{rate / rates['ragged']:.1f}" if "ragged" in rates else ""
        s = seconds[name]
        low, high = flops / max(s) / 1e9, flops / min(s) / 1e9
        table.add_row(name, f"{rate:.1f}", f"{low:.1f}", f"{high:.1f}", f"{rate / rates['dense']:.2f}", against)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
