"""The whole model, and how to make it: abstractly for counting and planning, or with values.

`nnx.split` is called once; everything after passes plain pytrees. `Model` holds the static part.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from onerec_jax.config import ModelConfig, Recipe, SimulatorSource
from onerec_jax.data.schema import LABELS, Batch, Vocabulary
from onerec_jax.model.decoder import Decoder
from onerec_jax.model.encoder import Context, Encoder
from onerec_jax.model.item_head import ItemHead
from onerec_jax.model.layers import CodeEmbedding
from onerec_jax.model.moe.router import Routed
from onerec_jax.model.prefixes import DeviceTrie
from onerec_jax.model.table_rows import Table
from onerec_jax.model.tables import gather, init_tables, localise, table_shapes


class Outputs(NamedTuple):
    """What a forward pass in training leaves to the loss; a head that the model does not have leaves None."""

    logits: tuple[Array, ...] | None  # float32 [B,T,V] per level, teacher-forced
    states: Array | None  # [B,T,D], what an item head predicts each target from
    items: Array | None  # [I,D], the item vectors
    routed: dict[str, Routed]  # by stack, stacked [G]


class OneRec(nnx.Module):
    """Encoder and decoder over shared code embeddings; or an encoder and a softmax over items; or both heads."""

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary, rngs: nnx.Rngs):
        self.causal = config.causal
        self.encoder = Encoder(config, vocabulary, rngs)
        self.decoder = Decoder(config, vocabulary, rngs) if config.head != "items" else None
        self.head = ItemHead(config, vocabulary, rngs) if config.head != "codes" else None

    def encode(self, batch: Batch, rows: dict[str, Array], bias: dict[str, Array], key: Array | None):
        if self.head is not None:
            rows = {**rows, "item": self.head.items.embedding[...]}
        return self.encoder(batch, rows, self.codes, bias["encoder"], key)

    @property
    def codes(self) -> CodeEmbedding | None:
        """The code embeddings, one table for all parts that read codes."""
        return self.decoder.codes if self.decoder is not None else self.head.codes if self.head is not None else None

    def item_logits(self, states_xD: Array, trie: DeviceTrie | None) -> Array:
        """Those of a model with an item head, float32 [..., I]."""
        assert self.head is not None
        return (states_xD @ self.head.vectors(self.codes, trie).astype(states_xD.dtype).T).astype(jnp.float32)

    def outputs(
        self,
        batch: Batch,
        rows: dict[str, Array],
        bias: dict[str, Array],
        key: Array | None,
        trie: DeviceTrie | None = None,
        decoded: slice = slice(None),
    ) -> Outputs:
        """One pass through the encoder and every head that there is; `trie` where item vectors hold codes.

        Only the targets of a request that `decoded` names go through the decoder.
        """
        context, encoded = self.encode(batch, rows, bias, key)
        routed = {"encoder": encoded}
        logits = states = items = None
        if self.decoder is not None:
            valid = batch.target_weight[:, decoded] > 0
            targets = jnp.where(valid[..., None], batch.targets[:, decoded], 0)
            visible = batch.visible[:, decoded]
            logits, routed["decoder"] = self.decoder(context, targets, visible, valid, bias["decoder"], key)
        if self.head is not None:
            items = self.head.vectors(self.codes, trie)
            states = self.head.states(context, batch.short.item, batch.visible if self.causal else batch.visible[:, :1])
        return Outputs(logits, states, items, routed)

    def __call__(
        self,
        batch: Batch,
        rows: dict[str, Array],
        bias: dict[str, Array],
        key: Array | None,
        trie: DeviceTrie | None = None,
    ):
        """Teacher-forced logits per level (those of all items where there is no decoder), and what was routed."""
        found = self.outputs(batch, rows, bias, key, trie)
        if found.logits is not None:
            return found.logits, found.routed
        assert found.states is not None
        logits = self.item_logits(found.states, trie)
        return (jnp.broadcast_to(logits, (*batch.target_item.shape, logits.shape[-1])),), found.routed


@dataclasses.dataclass(frozen=True)
class Model:
    """The static part of a model: made once, passed by closure."""

    config: ModelConfig
    vocabulary: Vocabulary
    graph: Any
    abstract: Any  # parameters as ShapeDtypeStructs, a plain nested dict

    @property
    def tables(self) -> dict[str, tuple[int, int]]:
        return table_shapes(self.config, self.vocabulary)

    def bind(self, params: Any) -> OneRec:
        """The module over these parameters; free of cost inside a trace."""
        return nnx.merge(self.graph, params)

    def localise(self, batch: Batch, *, touched_only: bool) -> tuple[Batch, dict[str, Array | None]]:
        return localise(batch, self.tables, self.vocabulary, self.config.tables, touched_only=touched_only)

    def read(self, tables: dict[str, Table], batch: Batch) -> tuple[Batch, dict[str, Array]]:
        """The batch and the rows of its ids, for a forward pass in evaluation mode."""
        batch, touched = self.localise(batch, touched_only=False)
        return batch, gather(tables, touched, self.config.tables)

    def encode(self, params: Any, tables: dict[str, Table], bias: dict[str, Array], batch: Batch) -> Context:
        """Contexts in evaluation mode."""
        return self.bind(params).encode(*self.read(tables, batch), bias, None)[0]

    def item_scores(self, params: Any, batch: Batch, context: Context, trie: DeviceTrie | None) -> Array:
        """log P of every item [B,I] by the item head, from contexts of `encode`."""
        module = self.bind(params)
        assert module.head is not None
        states = module.head.states(context, batch.short.item, batch.visible[:, :1])
        return jax.nn.log_softmax(module.item_logits(states, trie)[:, 0])

    def init(self, seed: int) -> tuple[Any, dict[str, dict[str, Array]]]:
        """Fresh parameters (plain nested dict, float32) and id tables."""
        params = nnx.split(OneRec(self.config, self.vocabulary, nnx.Rngs(params=seed)))[1].to_pure_dict()
        return params, init_tables(self.tables, jax.random.fold_in(jax.random.key(seed), 1), self.config.tables)

    def init_bias(self) -> dict[str, Array]:
        """Zero balancing biases [G,E] of both stacks; a stack without experts has one idle column."""
        shapes = {}
        for name, layers, moe in (
            ("encoder", self.config.encoder_layers, self.config.moe.location == "both"),
            ("decoder", self.config.decoder_layers, self.config.head != "items"),
        ):
            moe = moe and self.config.moe.experts > 0
            groups = layers // self.config.moe.every if moe else layers
            shapes[name] = (groups, self.config.moe.experts if moe else 1)
        return {name: jnp.zeros(shape) for name, shape in shapes.items()}


def build(config: ModelConfig, vocabulary: Vocabulary) -> Model:
    """The model of a config without any memory for its parameters."""
    module = nnx.eval_shape(lambda: OneRec(config, vocabulary, nnx.Rngs(params=0)))
    graph, state = nnx.split(module)
    return Model(config, vocabulary, graph, state.to_pure_dict())


def planned_vocabulary(recipe: Recipe) -> Vocabulary:
    """The sizes a recipe will meet, as far as they are known without its data; id-table rows fall back to one."""
    source = recipe.data.source
    users, items = (source.users, source.items) if isinstance(source, SimulatorSource) else (1, 1)
    return Vocabulary(
        users=users, items=items, authors=items, tags=256, user_features=(8, 8), labels=LABELS,
        codebook_sizes=recipe.tokenizer.codebook_sizes,
    )  # fmt: skip


VOCABULARY_TABLES = ("codes", "heads", "tag", "age", "playtime", "duration", "feedback", "features")


def count_parameters(model: Model) -> dict[str, int]:
    """Parameters under one rule, so that sizes compare with the report's table (REFERENCE 1.6).

    Counted as `model`: everything whose size follows from width and depth. Listed apart, since their rows are a vocabulary:
    `codes` (code embeddings and output heads), `features` (tags, buckets, labels, user categories), `tables` (ids).
    `active` is `model` with only the experts that one token uses.
    """
    moe = model.config.moe
    totals = {"model": 0, "active": 0, "codes": 0, "features": 0, "tables": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.abstract):
        names = [str(getattr(k, "key", k)) for k in path]
        size = math.prod(leaf.shape)
        if any(n in ("items", "memory_in", "memory_out") for n in names):
            totals["tables"] += size
        elif any(n in ("codes", "heads") for n in names):
            totals["codes"] += size
        elif any(n in VOCABULARY_TABLES for n in names):
            totals["features"] += size
        else:
            totals["model"] += size
            routed = names[-2:-1] == ["moe"] and names[-1] in ("gate", "up", "down")
            totals["active"] += size * moe.active // moe.experts if routed else size
    totals["tables"] += sum(rows * width for rows, width in model.tables.values())
    return totals
