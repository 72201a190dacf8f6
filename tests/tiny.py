"""Tiny sizes, random batches and a recipe that runs in seconds, shared by all tests."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from onerec_jax.config import ModelConfig
from onerec_jax.data.schema import LABELS, Batch, ItemFeatures, Vocabulary
from onerec_jax.model.prefixes import DeviceTrie, training_trie
from onerec_jax.tokenizer.trie import Trie

TIMED = {"time", "examples_per_s", "target_tokens_per_s", "gflops", "data_wait", "step_ms", "mfu"}  # of a log line
COMPILED = Path(__file__).parent.parent / ".pytest_cache" / "jax"  # what XLA compiled, kept from run to run
VOCABULARY = Vocabulary(
    users=50, items=100, authors=20, tags=7, user_features=(3, 4), labels=LABELS, codebook_sizes=(16, 16, 16)
)
_CODES = np.random.default_rng(1).integers(0, 16, (100, 3)).astype(np.int32)
TINY = {
    "d_model": 32, "heads": 2, "ffn_hidden": 48, "encoder_layers": 1, "decoder_layers": 1, "item_input": "both",
    "short_length": 6, "positive_length": 5, "lifelong_length": 9, "lifelong_queries": 4, "lifelong_layers": 1,
    "static_dim": 8, "author_dim": 16, "feature_dim": 8,
}  # fmt: skip

# Changes of `TINY` to the shapes of other models.
ALONE = {"positive_length": 0, "lifelong_length": 0}
PLAIN = {**ALONE, "event_features": [], "project_events": False, "item_input": "id", "user_id": False}
SHAPES = {
    "SASRec": {**PLAIN, "head": "items", "causal": True},
    "SASRec of semantic IDs": {**ALONE, "head": "items", "item_input": "both"},
    "HSTU": {**ALONE, "head": "items", "causal": True, "block": "hstu"},
    "OneRec on HSTU": {**ALONE, "block": "hstu"},
    "OneRec with both heads": {**ALONE, "head": "both", "causal": True},
    "OneRec with a memory": {**ALONE, "head": "both", "item_input": "both", "item_memory": 5},
    "SASRec with a memory": {**PLAIN, "head": "items", "causal": True, "item_memory": 5},
    "TIGER": {**PLAIN, "item_input": "sid", "event_tokens": "codes", "head_dim": 12},
    "causal TIGER": {**PLAIN, "item_input": "sid", "event_tokens": "codes", "causal": True},
    "HSTU of codes": {**PLAIN, "item_input": "sid", "event_tokens": "codes", "head": "items", "block": "hstu"},
}


def tiny_model(**changes) -> ModelConfig:
    return ModelConfig.model_validate({**TINY, **changes})


def tiny_trie(config: ModelConfig) -> DeviceTrie | None:
    """What a model of `VOCABULARY` needs of the semantic IDs of its items."""
    return training_trie(config, Trie.build(_CODES, np.zeros(len(_CODES))))


def random_events(rng: np.random.Generator, vocabulary: Vocabulary, batch: int, length: int) -> ItemFeatures:
    """Left-aligned events of random number; padding holds random values, as nothing may depend on them."""
    counts = rng.integers(0, length + 1, batch)
    item = np.where(np.arange(length) < counts[:, None], rng.integers(0, vocabulary.items, (batch, length)), -1)
    sizes = vocabulary.codebook_sizes
    return ItemFeatures(
        item=item.astype(np.int32),
        codes=np.stack([rng.integers(0, s, (batch, length)) for s in sizes], axis=-1).astype(np.int32),
        author=rng.integers(0, vocabulary.authors, (batch, length)).astype(np.int32),
        tag=rng.integers(0, vocabulary.tags, (batch, length)).astype(np.int32),
        age_s=(rng.random((batch, length)) * 1e5).astype(np.float32),
        playtime_s=(rng.random((batch, length)) * 100 - 5).astype(np.float32),
        duration_s=(rng.random((batch, length)) * 100).astype(np.float32),
        feedback=rng.integers(0, 2, (batch, length, len(vocabulary.labels))).astype(np.uint8),
    )


def random_batch(
    config: ModelConfig, vocabulary: Vocabulary = VOCABULARY, batch: int = 4, targets: int = 3, seed: int = 0
) -> Batch:
    """A batch of random requests; the last target of every request is missing."""
    rng = np.random.default_rng(seed)
    weight = np.ones((batch, targets), np.float32)
    weight[:, -1] = 0
    short = random_events(rng, vocabulary, batch, config.short_length)
    visible = np.repeat((short.item >= 0).sum(1)[:, None], targets, axis=1)
    if config.causal:
        visible = np.minimum(visible, 1 + np.arange(targets)[None, :])
    return Batch(
        user=np.stack(
            [rng.integers(0, vocabulary.users, batch)] + [rng.integers(0, n, batch) for n in vocabulary.user_features],
            1,
        ).astype(np.int32),
        short=short,
        positive=random_events(rng, vocabulary, batch, config.positive_length),
        lifelong=random_events(rng, vocabulary, batch, config.lifelong_length),
        targets=np.stack([rng.integers(0, s, (batch, targets)) for s in vocabulary.codebook_sizes], -1).astype(
            np.int32
        ),
        target_item=rng.integers(0, vocabulary.items, (batch, targets)).astype(np.int32),
        target_weight=weight,
        visible=visible.astype(np.int32),
        feedback=np.zeros((batch, targets, len(vocabulary.labels)), np.uint8),
        playtime_s=np.zeros((batch, targets), np.float32),
    )


def poison(batch: Batch, value: float = np.nan) -> Batch:
    """NaN in every float and an absurd id in every integer of padded positions."""

    def poisoned(events: ItemFeatures) -> ItemFeatures:
        padded = events.item < 0
        changed = {}
        for field in dataclasses.fields(events):
            x = np.array(getattr(events, field.name))
            if field.name != "item":
                x[padded] = value if x.dtype.kind == "f" else (255 if x.dtype == np.uint8 else 1 << 30)
            changed[field.name] = x
        return ItemFeatures(**changed)

    missing = batch.target_weight == 0
    targets, playtime = np.array(batch.targets), np.array(batch.playtime_s)
    targets[missing], playtime[missing] = 1 << 30, value
    return dataclasses.replace(
        batch,
        short=poisoned(batch.short),
        positive=poisoned(batch.positive),
        lifelong=poisoned(batch.lifelong),
        targets=targets,
        playtime_s=playtime,
    )


def tiny_values(folder: Path) -> dict:
    """A recipe of the simulator that runs end to end in seconds, with every pathway and experts."""
    return {
        "name": "tiny",
        "runs": str(folder / "runs"),
        "data": {
            "source": {
                "kind": "simulator", "users": 60, "items": 150, "events_per_user": 30, "days": 6, "topics": 6,
                "embedding_dim": 8,
            },
            "directory": str(folder / "dataset"),
            "targets": 3,
            "target_stride": 3,
            "lifelong_refresh": 12,
            "lifelong_cluster_size": 4,
        },
        "tokenizer": {"codebook_sizes": [8, 8, 8], "iterations": 5},
        "model": {**TINY, "moe": {"experts": 4, "active": 2, "hidden": 16, "tile": 8}},
        "train": {
            "steps": 6, "batch_size": 16, "warmup_steps": 2, "log_every": 2, "checkpoint_every": 3, "threads": 1,
            "prefetch": 2, "tensorboard": False,
        },
        "evaluate": {"beam_width": 8, "batch_size": 16, "max_examples": 20, "free_examples": 4, "ks": [5, 10]},
    }  # fmt: skip


def untimed(line: dict[str, float]) -> dict[str, float]:
    """What of a log line must not depend on the machine's speed."""
    return {name: value for name, value in line.items() if name not in TIMED}
