"""Semantic IDs drawn at random, all of them different: stochastic beam search.

Sampling without replacement of whole sequences, one level after the other and without their enumeration (Kool, van Hoof and
Welling 2019, "Stochastic Beams and Where to Find Them"): every sequence has its log-probability plus Gumbel noise, the largest
of which are such a sample, and of the noise of a prefix's sequences only the largest needs to be known to go on.

Axis letters as in `generate/beam.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from onerec_jax.generate.beam import Generated, grow_beams
from onerec_jax.model.batch import Batch
from onerec_jax.model.encoder import Context
from onerec_jax.model.onerec import Model, OneRec
from onerec_jax.model.prefixes import DeviceTrie
from onerec_jax.model.table_rows import Table


def sampling_log_p(logits_xJ: Array, temperature: float, top_k: int, top_p: float) -> Array:
    """log P [..., J] of softmax(logits / temperature) among the codes that sampling chooses from, -inf elsewhere.

    These are the `top_k` most probable (0 = all), and of them the fewest that hold `top_p` of their probability together:
    always the most probable one. Codes as probable as the last of them belong to them.
    """
    scaled = logits_xJ / temperature
    if 0 < top_k < scaled.shape[-1]:
        last = jax.lax.top_k(scaled, top_k)[0][..., -1:]
        scaled = jnp.where(scaled >= last, scaled, -jnp.inf)
    log_p = jax.nn.log_softmax(scaled)
    if top_p < 1:
        ordered = jnp.sort(log_p, axis=-1, descending=True)
        before = jnp.cumsum(jnp.exp(ordered), axis=-1) - jnp.exp(ordered)
        last = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        # The running sum of one code alone is not always its probability to the last bit.
        last = jnp.minimum(last, ordered[..., :1])
        log_p = jax.nn.log_softmax(jnp.where(log_p >= last, log_p, -jnp.inf))
    return log_p


def _log_one_minus_exp(x: Array) -> Array:
    """log(1 - exp(x)) of x <= 0, each half of its range by the form that is exact there (Mächler 2012)."""
    return jnp.where(x > -0.693, jnp.log(-jnp.expm1(x)), jnp.log1p(-jnp.exp(x)))


def conditional_gumbel(key: Array, log_p_xJ: Array, largest_x: Array) -> Array:
    """log P plus Gumbel noise of each child of a node [..., J], given that the largest of them is `largest` [...].

    G~ = -log(exp(-G) - exp(-Z) + exp(-G')), with G' = log P + noise, Z the largest G' of the node and G `largest`; computed as
    v = G - G' + log(1 - exp(G' - Z)), G~ = G - max(0, v) - log(1 + exp(-|v|)) (Kool et al. 2019, algorithm 1 and appendix B.3).
    Children that do not exist, of log P -inf, have -inf; a node may have none.
    """
    drawn = log_p_xJ + jax.random.gumbel(key, log_p_xJ.shape, log_p_xJ.dtype)
    most = jnp.max(drawn, axis=-1, keepdims=True)
    most, largest = (jnp.where(jnp.isfinite(x), x, 0.0) for x in (most, largest_x[..., None]))
    v = largest - drawn + _log_one_minus_exp(drawn - most)
    return largest - jnp.maximum(v, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(v)))


def sample(
    module: OneRec,
    context: Context,
    bias: dict[str, Array],
    trie: DeviceTrie,
    width: int,
    key: Array,
    *,
    free: bool,
    temperature: float,
    top_k: int,
    top_p: float,
) -> Generated:
    """`width` different semantic IDs of each encoded request, in the order in which sampling without replacement draws them.

    At every prefix the codes that go on to an item (all, where `free`) share the probability, as `sampling_log_p` has it. The
    `score` of an ID is its log-probability under that; the log-probabilities of its codes are the model's own.
    """

    def log_p(logits_BxWxV: Array, own_BxWxJ: Array, exists: Array | None) -> Array:
        legal = own_BxWxJ if exists is None else jnp.where(exists, own_BxWxJ, -jnp.inf)
        return sampling_log_p(legal, temperature, top_k, top_p)

    def perturb(level: int, total_BxWxJ: Array, rank_BxW: Array, codes: Array) -> Array:
        return conditional_gumbel(jax.random.fold_in(key, level), total_BxWxJ, rank_BxW)

    return grow_beams(module, context, bias, trie, width, log_p, perturb, free=free)


def make_sampling(
    model: Model, width: int, *, free: bool = False, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Callable[..., Generated]:
    """Jitted `sample`: (params, tables, bias, batch, trie, key) -> `width` IDs per request in the order drawn.

    Fewer come back where fewer exist.
    """

    @jax.jit
    def draw(
        params: Any, tables: dict[str, Table], bias: dict[str, Array], batch: Batch, trie: DeviceTrie, key: Array
    ) -> Generated:
        context = model.encode(params, tables, bias, batch)
        return sample(
            model.bind(params), context, bias, trie, width, key,
            free=free, temperature=temperature, top_k=top_k, top_p=top_p,
        )  # fmt: skip

    return draw
