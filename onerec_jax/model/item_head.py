"""Items predicted directly: a softmax over the catalogue from the encoder's state, as in SASRec and HSTU."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array

from onerec_jax.config import ModelConfig
from onerec_jax.data.schema import Vocabulary
from onerec_jax.model.encoder import Context
from onerec_jax.model.layers import CodeEmbedding, Embedding


class ItemHead(nnx.Module):
    """One vector per item, shared by the encoder's input and the output (Kang and McAuley 2018)."""

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary, rngs: nnx.Rngs):
        self.items = Embedding(vocabulary.items, config.d_model, rngs)
        in_codes = config.head == "items" and config.item_input in ("sid", "both")  # a decoder has its own
        self.codes = CodeEmbedding(vocabulary.codebook_sizes, config.d_model, rngs) if in_codes else None

    def states(self, context: Context, visible_BxT: Array) -> Array:
        """What each target is predicted from [B,T,D]: the last token it may see, the static one where it sees no event."""
        return context.last_seen(visible_BxT)

    def logits(self, states_xD: Array) -> Array:
        """float32 [..., I]."""
        return (states_xD @ self.items.embedding[...].astype(states_xD.dtype).T).astype(jnp.float32)
