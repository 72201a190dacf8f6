"""Items predicted directly: a softmax over the catalogue from the encoder's state, as in SASRec and HSTU."""

from __future__ import annotations

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
    """

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary, rngs: nnx.Rngs):
        self.coded = config.coded_items
        self.items = Embedding(vocabulary.items, config.d_model, rngs)
        in_codes = config.head == "items" and config.item_input in ("sid", "both")  # a decoder has its own
        self.codes = CodeEmbedding(vocabulary.codebook_sizes, config.d_model, rngs) if in_codes else None

    def states(self, context: Context, visible_BxT: Array) -> Array:
        """What each target is predicted from [B,T,D]: the last token it may see, the static one where it sees no event."""
        return context.last_seen(visible_BxT)

    def vectors(self, codes: CodeEmbedding | None, trie: DeviceTrie | None) -> Array:
        """What items are predicted by, float32 [I,D].

        Args:
            codes: the model's code embeddings, needed with a trie where item vectors hold codes.
            trie: the semantic IDs of all items.
        """
        vectors = self.items.embedding[...]
        if not self.coded:
            return vectors
        if codes is None or trie is None or trie.item_codes is None:
            raise ValueError("model.item_input both with an item head needs the semantic IDs of all items")
        return vectors + codes.item(trie.item_codes, vectors.dtype)
