"""Pathways, encoder, decoder or item head, experts."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from onerec_jax.config.section import Section, setting


class MoEConfig(Section):
    """Mixture-of-experts feed-forward (REFERENCE 1.4-1.6)."""

    experts: int = setting(0, "experts per MoE block, 0 = dense feed-forward everywhere", ge=0)
    active: int = setting(2, "experts per token", ge=1)
    hidden: int = setting(2816, "SwiGLU width of one expert", ge=1)
    location: Literal["decoder", "both"] = setting("decoder", "which stacks have MoE blocks")
    every: int = setting(1, "every how many blocks one is MoE (the last of each group)", ge=1)
    router: Literal["softmax", "sigmoid"] = setting(
        "softmax", "score function; gates are the chosen scores renormalised"
    )
    balance_rate: float = setting(1e-3, "gamma of loss-free balancing, 0 = off", ge=0)
    shared: int = setting(0, "experts that every token goes through beside the chosen ones", ge=0)
    z_loss: float = setting(0.0, "weight of the mean squared logsumexp of the router's logits (ST-MoE)", ge=0)
    backend: Literal["auto", "reference", "tiles", "ragged", "tokamax"] = setting(
        "auto", "matmul backend; auto: tiles on a CPU, elsewhere tokamax if it is installed, or ragged"
    )
    transport: Literal["auto", "local", "allgather", "all_to_all"] = setting(
        "auto",
        "how tokens meet experts that a mesh splits: local brings all weights to every device; allgather all tokens to every "
        "device of the expert axis; all_to_all each token to the devices of its experts; auto: all_to_all if there is a capacity",
    )
    capacity: float = setting(
        0.0,
        "tokens that all_to_all has room for between two devices, in even shares; the rest are dropped and counted; "
        "0 = room for all, none is dropped",
        ge=0,
    )
    tile: int = setting(64, "rows per tile of the tiles backend", ge=1)


class TablesConfig(Section):
    """Id tables: items, authors and users, where the model has them."""

    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "type of the rows; bfloat16 halves them and rounds every update stochastically, right in the mean"
    )
    evict_after: int = setting(
        0,
        "a row that no step has touched for more than so many starts anew, fresh, when its id comes back; 0 = never",
        ge=0,
    )
    admit_after: int = setting(
        0,
        "rows read as zero and learn nothing until their id has been in so many steps; 0 = from the first on",
        ge=0,
        le=255,
    )

    @property
    def optional(self) -> bool:
        """Whether anything is asked for beyond float32 rows that stay."""
        return self != TablesConfig()


class ModelConfig(Section):
    """Four-pathway encoder and point-wise decoder (REFERENCE 1.2-1.4)."""

    d_model: int = setting(128, "width", ge=2)
    base_width: int = setting(
        0,
        "muP: the width at which train.learning_rate was found; rates of matrices and the first scale of the heads are carried "
        "over from there to d_model, with heads of the same width; 0 = the rate is for all weights and this width",
        ge=0,
    )
    heads: int = setting(4, "attention heads", ge=1)
    head_dim: int = setting(0, "width of one head, 0 = d_model / heads", ge=0)
    ffn_hidden: int = setting(256, "width of the dense two-matrix feed-forward", ge=1)
    encoder_layers: int = setting(2, "encoder blocks", ge=1)
    decoder_layers: int = setting(2, "decoder blocks", ge=1)
    head: Literal["codes", "items", "both"] = setting(
        "codes",
        "what is predicted: codes, the semantic ID level by level; items, the item itself by a softmax over all of them, "
        "without a decoder (SASRec, HSTU); both, each with its loss: the encoder learns from all other items as negatives, and "
        "beams are ranked by both",
    )
    softmax: Literal["all", "legal"] = setting(
        "all",
        "codes that each level is predicted among: all of its codebook, or those that go on from the prefix to an item, "
        "which leaves nothing of the loss for learning which IDs exist, and free generation without a meaning",
    )
    block: Literal["transformer", "hstu"] = setting(
        "transformer", "encoder block: attention, then feed-forward; hstu: gated pointwise attention alone (HSTU)"
    )
    item_input: Literal["sid", "id", "both"] = setting("sid", "what stands for an item in the context")
    event_tokens: Literal["item", "codes"] = setting(
        "item", "tokens of an event in the encoder: one, or one per code of its semantic ID (TIGER)"
    )
    project_events: bool = setting(
        True, "pathway MLPs between event and encoder; false: the item's embedding enters as it is (SASRec, TIGER)"
    )
    item_memory: int = setting(
        0,
        "rank of a linear memory beside the item head, in which what follows from each event of `short` adds up; 0 = none",
        ge=0,
    )
    short_length: int = setting(20, "L_s, most recent events", ge=0)
    positive_length: int = setting(0, "L_p, most recent positive events; 0 = no such pathway", ge=0)
    lifelong_length: int = setting(0, "L_l, lifelong clusters; 0 = no such pathway", ge=0)
    lifelong_queries: int = setting(128, "N_q, tokens the lifelong pathway is compressed to", ge=1)
    lifelong_layers: int = setting(2, "N_l, QFormer blocks", ge=1)
    static_dim: int = setting(64, "embedding width per user feature", ge=1)
    event_features: tuple[Literal["author", "tag", "age", "playtime", "duration", "feedback"], ...] = setting(
        ("author", "tag", "age", "playtime", "duration", "feedback"),
        "what stands beside the item in every event of the context; leave out what the log does not have",
    )
    author_dim: int = setting(512, "embedding width of the author", ge=1)
    feature_dim: int = setting(128, "embedding width of tag, age, play time, duration and feedback each", ge=1)
    pathway_hidden: int = setting(0, "hidden width of the pathway MLPs, 0 = 2 x d_model", ge=0)
    causal: bool = setting(False, "causal encoder over `short`: every position is the context of its own target")
    user_id: bool = setting(True, "user-id embedding in the static pathway")
    item_rows: int = setting(0, "rows of the item-id table, 0 = one per item; fewer rows share by hashing", ge=0)
    author_rows: int = setting(0, "rows of the author table, 0 = one per author; fewer rows share by hashing", ge=0)
    user_rows: int = setting(0, "rows of the user-id table, 0 = one per user; fewer rows share by hashing", ge=0)
    dropout: float = setting(0.0, "dropout on embeddings and block outputs", ge=0, lt=1)
    qk_norm: bool = setting(False, "RMS-normalise queries and keys")
    attention: Literal["auto", "heads", "xla", "fused", "tokamax"] = setting(
        "auto",
        "heads: one head after the other, as a CPU likes it; xla: plain einsums; fused: jax.nn.dot_product_attention; tokamax: "
        "a flash kernel on a GPU; auto: heads on a CPU, tokamax on a GPU where it is installed, else fused",
    )
    dtype: Literal["float32", "bfloat16"] = setting("float32", "compute type; parameters stay float32")
    remat: Literal["none", "dots", "block"] = setting(
        "none", "recompute in the backward pass: nothing, all but matmuls, blocks"
    )
    tables: TablesConfig = TablesConfig()
    moe: MoEConfig = MoEConfig()

    @property
    def coded_items(self) -> bool:
        """Whether the vectors that items are predicted by hold their codes, as those in the context do."""
        return self.head != "codes" and self.item_input == "both"

    @property
    def width_share(self) -> float:
        """`base_width / d_model`, 1 where nothing is carried over."""
        return self.base_width / self.d_model if self.base_width else 1.0

    @property
    def width_of_head(self) -> int:
        return self.head_dim or self.d_model // self.heads

    def tokens_per_event(self, levels: int) -> int:
        """Encoder tokens of one event, where semantic IDs have this many levels."""
        return levels if self.event_tokens == "codes" else 1

    def feature_widths(self) -> dict[str, int]:
        """Embedding width of each of `event_features`."""
        return {name: self.author_dim if name == "author" else self.feature_dim for name in self.event_features}

    @model_validator(mode="after")
    def _shapes(self) -> ModelConfig:
        if not self.head_dim and self.d_model % self.heads:
            raise ValueError(f"model.d_model {self.d_model} must be a multiple of model.heads {self.heads}")
        other_pathways = bool(self.positive_length or self.lifelong_length)
        if not self.project_events and (self.event_features or other_pathways):
            raise ValueError(
                "model.project_events false needs event_features [] and positive_length = lifelong_length = 0: "
                "without the pathway's MLP nothing but the item's embedding fits the width of the model"
            )
        if self.event_tokens == "codes" and (self.project_events or self.item_input != "sid"):
            raise ValueError("model.event_tokens codes needs item_input sid and project_events false")
        if self.block == "hstu" and (other_pathways or (self.moe.experts and self.moe.location == "both")):
            raise ValueError(
                "model.block hstu needs positive_length = lifelong_length = 0 and no experts in the encoder: "
                "its biases are of distances in one sequence, and it has no feed-forward to route"
            )
        if self.head == "items" and self.moe.experts and self.moe.location == "decoder":
            raise ValueError(
                "model.head items has no decoder to put experts in: set moe.location both or moe.experts 0"
            )
        if self.head == "both" and self.item_input == "sid":
            raise ValueError(
                "model.head both needs item_input id or both: the item vectors it predicts by are those it reads"
            )
        if self.head == "items" and self.softmax == "legal":
            raise ValueError("model.softmax legal is of the codes of a semantic ID: model.head items predicts none")
        if self.head == "codes" and self.item_memory:
            raise ValueError("model.item_memory is of the item head: model.head must be items or both")
        if self.head != "codes" and self.item_rows:
            raise ValueError(f"model.head {self.head} has one vector per item: model.item_rows must be 0")
        if self.moe.experts and self.moe.active > self.moe.experts:
            raise ValueError(f"model.moe.active {self.moe.active} must be at most model.moe.experts {self.moe.experts}")
        if self.moe.experts:
            stacks = (self.decoder_layers,) + ((self.encoder_layers,) if self.moe.location == "both" else ())
            for layers in stacks:
                if layers % self.moe.every:
                    raise ValueError(
                        f"model.moe.every {self.moe.every} must divide the {layers} layers of each MoE stack"
                    )
        item_table = self.item_input != "sid" and self.head == "codes"
        if self.tables.optional and not (item_table or self.user_id or "author" in self.event_features):
            raise ValueError(
                "model.tables is of id tables and this model has none: it needs user_id, author among event_features, or "
                "item_input id or both with head codes"
            )
        if self.causal and (self.positive_length or self.lifelong_length or not self.short_length):
            raise ValueError(
                "model.causal needs short_length > 0 and positive_length = lifelong_length = 0: "
                "other pathways would show a position its own future"
            )
        return self
