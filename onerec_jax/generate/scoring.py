"""Log-probabilities of given items by their codes, in one teacher-forced pass that shares each request's context."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from onerec_jax.generate.beam import events_seen
from onerec_jax.model.encoder import Context
from onerec_jax.model.onerec import OneRec
from onerec_jax.model.prefixes import DeviceTrie, children


def code_log_p(module: OneRec, context: Context, bias: dict[str, Array], trie: DeviceTrie, codes_BxJxC: Array) -> Array:
    """log P of each code of J given semantic IDs after the codes before it, float32 [B,J,C].

    Under the distribution that beams are scored by (`generate/beam.py`). Not for training: the gradient of what it gathers is
    slow on a CPU; `posttrain/rollout.py` has one with a gradient.
    """
    assert module.decoder is not None, "a model with only an item head has no codes to score"
    listed = codes_BxJxC.shape[:2]
    visible = jnp.broadcast_to(events_seen(context), listed)
    logits, _ = module.decoder(context, codes_BxJxC, visible, jnp.ones(listed, bool), bias["decoder"], None)
    node, found = jnp.zeros(listed, jnp.int32), []
    for level, level_logits in enumerate(logits):
        own = jnp.take_along_axis(level_logits, codes_BxJxC[..., level, None], axis=-1)[..., 0]
        if module.decoder.config.softmax == "all":
            found.append(own - jax.nn.logsumexp(level_logits, axis=-1))
            continue
        child, token, exists = children(trie, level, node)
        legal = jnp.take_along_axis(level_logits, token, axis=-1)
        found.append(own - jax.nn.logsumexp(legal, axis=-1, where=exists))
        node = jnp.max(jnp.where((token == codes_BxJxC[..., level, None]) & exists, child, 0), axis=-1)
    return jnp.stack(found, axis=-1)
