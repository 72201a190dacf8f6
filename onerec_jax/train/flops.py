"""Matmul FLOPs from the config, by part: the one rule behind every MFU this project prints (DESIGN 6).

Counted: matrix products, 2 per multiply-add; attention scores in full (the causal halves are not deducted). Not counted:
element-wise work, softmax, norms, lookups, optimizer, padding. Training = 3 x forward. Experts count as the active ones.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from onerec_jax.config import ModelConfig
from onerec_jax.data.schema import Vocabulary

# dense peak of one device in FLOP/s by device kind, bfloat16 (the vendors' data sheets)
PEAK_BF16 = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


@dataclasses.dataclass(frozen=True)
class Flops:
    """Forward FLOPs of one request by part."""

    pathways: float
    lifelong: float
    encoder: float
    decoder: float
    heads: float

    @property
    def forward(self) -> float:
        return self.pathways + self.lifelong + self.encoder + self.decoder + self.heads

    @property
    def training(self) -> float:
        return 3 * self.forward


def _ffn(config: ModelConfig, moe_stack: bool, layers: int) -> float:
    """FFN FLOPs of one token through a stack of `layers` blocks."""
    d, moe = config.d_model, config.moe
    dense = 2 * 2 * d * config.ffn_hidden
    if not (moe.experts and moe_stack):
        return layers * dense
    routed = 2 * 3 * d * moe.hidden * (moe.active + moe.shared) + 2 * d * moe.experts
    groups = layers // moe.every
    return groups * routed + (layers - groups) * dense


def request_flops(
    config: ModelConfig,
    vocabulary: Vocabulary,
    *,
    short: float,
    positive: float,
    lifelong: float,
    targets: float,
    sampled_items: int = 0,
    decoded: float | None = None,
) -> Flops:
    """Forward FLOPs of one request with this many real (or padded, to count what the hardware does) events and targets.

    `decoded` of the targets go through the decoder, all of them by default.
    """
    decoded = targets if decoded is None else decoded
    d, levels = config.d_model, vocabulary.levels
    hidden = config.pathway_hidden or 2 * d
    widths = config.feature_widths()
    per_event = 2 * ((d + sum(widths.values())) * hidden + hidden * d)
    per_event += 2 * len(vocabulary.labels) * widths.get("feedback", 0)
    static = config.static_dim * (int(config.user_id) + len(vocabulary.user_features))
    if not config.project_events:
        per_event = 0
    pathways = 2 * (max(1, static) * hidden + hidden * d) + per_event * (short + positive)
    queries, compressor = 0.0, 0.0
    if config.lifelong_length:
        queries = config.lifelong_queries
        width = config.heads * config.width_of_head
        per_block = 2 * 2 * d * width * lifelong + queries * (
            2 * 2 * d * width + 2 * 2 * width * lifelong + 2 * 2 * d * config.ffn_hidden
        )
        compressor = per_event * lifelong + config.lifelong_layers * per_block
    n = 1 + (short + positive) * config.tokens_per_event(levels) + queries
    width = config.heads * config.width_of_head
    if config.block == "hstu":
        encoder = config.encoder_layers * (n * 2 * 5 * d * width + 2 * 2 * n * n * width)
    else:
        attention = n * 2 * 4 * d * width + 2 * 2 * n * n * width
        in_encoder = config.moe.location == "both"
        encoder = config.encoder_layers * attention + n * _ffn(config, in_encoder, config.encoder_layers)
    states = targets if config.causal or sampled_items else min(1.0, targets)  # else all targets share one
    over_items = 0.0
    if config.head != "codes":
        over_items = states * 2 * (d + config.item_memory) * (sampled_items or vocabulary.items)
        over_items += states * 2 * config.item_memory * short
    if config.head == "items":
        return Flops(pathways, compressor, encoder, 0.0, over_items)
    tokens = decoded * levels
    own = tokens * 2 * 4 * d * width + 2 * 2 * tokens * levels * width
    cross = n * 2 * 2 * d * width + tokens * 2 * 2 * d * width + 2 * 2 * tokens * n * width
    decoder = config.decoder_layers * (own + cross) + tokens * _ffn(config, True, config.decoder_layers)
    heads = decoded * sum(2 * d * size for size in vocabulary.codebook_sizes)
    return Flops(pathways, compressor, encoder, decoder, heads + over_items)


def peak_flops(device: Any, dtype: str) -> float | None:
    """The device's dense matmul peak at the compute type, or None where it has no published one (CPUs)."""
    for kind, peak in PEAK_BF16.items():
        if device.device_kind.startswith(kind):
            return peak if dtype == "bfloat16" else peak / 2
    return None
