"""Items predicted directly: a softmax over the catalogue from the encoder's state, as in SASRec and HSTU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from onerec_jax.config import ModelConfig
from onerec_jax.data.schema import Vocabulary
from onerec_jax.model.encoder import Context
from onerec_jax.model.layers import CodeEmbedding, Embedding
from onerec_jax.model.prefixes import DeviceTrie


class ItemHead(nnx.Module):
    """One vector per item, shared by the encoder's input and the output (Kang and McAuley 2018).

    Where the input is an item's id and its codes, so is the output: items of like content are predicted alike.

    With `model.item_memory` M every item has two more vectors of that width, for what it says of others and what others say of
    it, and those of a context add up past the encoder: an item-to-item matrix of rank M, as of EASE (Steck 2019) or
    ELSA (Vancura et al. 2022). An encoder of width D cannot hold more than rank D of it.
    """

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary, rngs: nnx.Rngs):
        self.coded = config.coded_items
        self.share = config.width_share
        self.items = Embedding(vocabulary.items, config.d_model, rngs)
        in_codes = config.head == "items" and config.item_input in ("sid", "both")  # a decoder has its own
        self.codes = CodeEmbedding(vocabulary.codebook_sizes, config.d_model, rngs) if in_codes else None
        width = config.item_memory
        self.memory_in = Embedding(vocabulary.items, width, rngs) if width else None
        self.memory_out = Embedding(vocabulary.items, width, rngs) if width else None

    @jax.named_scope("item_head")
    def states(self, context: Context, item_BxL: Array, visible_BxT: Array) -> Array:
        """What each target is predicted from [B,T,D+M].

        The last token it may see, the static one where it sees no event; and the sum over those events of what memory has
        of their items, divided by the root of their number.

        Args:
            context: the encoded requests.
            item_BxL: the items of `short`, -1 where there is none.
            visible_BxT: how many of them each target may see.
        """
        last = context.last_seen(visible_BxT)
        if self.share != 1:  # these vectors are input too: not their first scale but the product follows the width
            last = last * self.share
        if self.memory_in is None:
            return last
        seen = (jnp.arange(item_BxL.shape[1]) < visible_BxT[..., None]) & (item_BxL >= 0)[:, None]
        share = seen * jnp.maximum(jnp.sum(seen, axis=-1, keepdims=True), 1) ** -0.5
        vectors = self.memory_in(jnp.maximum(item_BxL, 0), last.dtype)
        return jnp.concatenate([last, share.astype(last.dtype) @ vectors], axis=-1)

    def vectors(self, codes: CodeEmbedding | None, trie: DeviceTrie | None) -> Array:
        """What items are predicted by, float32 [I,D+M].

        Args:
            codes: the model's code embeddings, needed with a trie where item vectors hold codes.
            trie: the semantic IDs of all items.
        """
        vectors = self.items.embedding[...]
        if self.coded:
            if codes is None or trie is None or trie.item_codes is None:
                raise ValueError("model.item_input both with an item head needs the semantic IDs of all items")
            vectors = vectors + codes.item(trie.item_codes, vectors.dtype)
        if self.memory_out is None:
            return vectors
        return jnp.concatenate([vectors, self.memory_out.embedding[...]], axis=-1)
