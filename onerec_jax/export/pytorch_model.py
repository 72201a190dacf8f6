"""The whole recommender in plain PyTorch, to be read beside the papers: a second home of the weights, and a check on the first.

This file stands alone: an export directory has a copy of it, which needs torch and safetensors and nothing else.

    python pytorch_model.py my-export --user 7        a list for one of the sample users

    model = load("my-export")
    items, log_p = model.recommend(request, k=10)

A `request` is a dict of tensors: `user` int [B,1+F], the user's row and categorical features, and for each pathway that the
model has (`short`, `positive`, `lifelong`), oldest event first and left-aligned:

    short.item        int [B,L], item rows, -1 = padding, beside which anything may stand
    short.age_s       float [B,L], seconds from the event to the request (causal encoder: since the event before)
    short.playtime_s  float [B,L], negative = unknown          short.duration_s  likewise
    short.feedback    0 or 1 [B,L,Y]

Axis letters: B requests, L events of a pathway, N context tokens, T targets of a request, C levels of a semantic ID, D width,
H heads, K head width, E experts, V codes of a level, W beams, J children of a node, I items, Y feedback labels.

Sources: OneRec technical report (2506.13695), section 2; TIGER (2305.05065); HSTU (2402.17152); SASRec (1808.09781).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

BUCKETS = 64  # of ages, play times and durations
SPREAD_ROWS, STRIPES = 65_536, 3_072  # an id table of so many rows or more is stored in stripes
PATHWAYS = ("short", "positive", "lifelong")
Request = dict[str, Tensor]


class Events(NamedTuple):
    """One pathway's events, every padded position 0, and which positions hold one, bool [B,L]."""

    item: Tensor
    codes: Tensor
    author: Tensor
    tag: Tensor
    age_s: Tensor
    playtime_s: Tensor
    duration_s: Tensor
    feedback: Tensor
    valid: Tensor


class Context(NamedTuple):
    """An encoded request."""

    tokens: Tensor  # [B,N,D]: one static token, then short, positive and lifelong
    valid: Tensor  # bool [B,N]
    position: (
        Tensor  # int [N], the event within `short` under a causal encoder; -1 for tokens that every target may see
    )
    per_event: int
    short: Events | None

    @property
    def visible(self) -> Tensor:
        """How many events of `short` each request has, all of which its next item may see, int [B,1]."""
        count = self.valid[:, :1].long() * 0
        return count if self.short is None else self.short.valid.sum(1, keepdim=True)

    def last_seen(self, visible: Tensor) -> Tensor:
        """The last token of `short` among the first `visible` [B,T] events [B,T,D], the static one where there is none."""
        at = (self.per_event * visible)[..., None].expand(-1, -1, self.tokens.shape[-1])
        return self.tokens.gather(1, at)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape), requires_grad=False)


class Linear(nn.Module):
    """y = x W (+ b), W [in, out]."""

    def __init__(self, d_in: int, d_out: int, bias: bool = False):
        super().__init__()
        self.kernel = weight(d_in, d_out)
        self.bias = weight(d_out) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.kernel
        return y if self.bias is None else y + self.bias


class Embedding(nn.Module):
    def __init__(self, rows: int, width: int):
        super().__init__()
        self.embedding = weight(rows, width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding[ids]


class CodeEmbedding(nn.Module):
    """The codes of all levels in one table, those of a level after those of the level before."""

    def __init__(self, sizes: list[int], width: int):
        super().__init__()
        self.offsets = [sum(sizes[:level]) for level in range(len(sizes))]
        self.embedding = weight(sum(sizes), width)

    def level(self, level: int, codes: Tensor) -> Tensor:
        return self.embedding[codes + self.offsets[level]]

    def each(self, codes: Tensor) -> Tensor:
        """One vector per code of semantic IDs [..., C] -> [..., C, D]; their sum stands for the item."""
        return self.embedding[codes + torch.tensor(self.offsets, device=codes.device)]


class IdTable(nn.Module):
    """Vectors of ids; of a table with fewer rows than ids, an id's row is its hash."""

    def __init__(self, rows: int, ids: int, width: int):
        super().__init__()
        self.count, self.hashed = rows, rows < ids
        self.stored = -(-rows // STRIPES) * STRIPES if rows >= SPREAD_ROWS else rows
        self.rows = weight(self.stored, width)

    def forward(self, ids: Tensor) -> Tensor:
        row = ids.long()
        if self.hashed:
            mixed = (row * 2654435761) & 0xFFFFFFFF
            row = (mixed ^ (mixed >> 15)) % self.count
        if self.count >= SPREAD_ROWS:
            row = row % STRIPES * (self.stored // STRIPES) + row // STRIPES
        return self.rows[row]


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.scale = weight(width)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.scale


class MLP(nn.Module):
    """Two matrices: a pathway's with biases and LeakyReLU (report, section 2.2.1), a block's feed-forward with ReLU."""

    def __init__(self, d_in: int, hidden: int, d_out: int, pathway: bool):
        super().__init__()
        self.up, self.down = Linear(d_in, hidden, bias=pathway), Linear(hidden, d_out, bias=pathway)
        self.slope = 0.01 if pathway else 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), self.slope))


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int, *experts: int):
        super().__init__()
        self.gate, self.up = weight(*experts, width, hidden), weight(*experts, width, hidden)
        self.down = weight(*experts, hidden, width)

    def forward(self, x: Tensor, *expert: int) -> Tensor:
        return (F.silu(x @ self.gate[expert]) * (x @ self.up[expert])) @ self.down[expert]


class MoE(SwiGLU):
    """The chosen experts' outputs weighted by their gates, plus that of the shared experts; no token is ever dropped.

    The balancing bias takes part in the choice alone: gates are the unbiased scores of the chosen, renormalised.
    """

    def __init__(self, c: SimpleNamespace):
        super().__init__(c.d_model, c.moe.hidden, c.moe.experts)
        self.c = c.moe
        self.router, self.bias = weight(c.d_model, c.moe.experts), weight(c.moe.experts)
        self.shared = SwiGLU(c.d_model, c.moe.shared * c.moe.hidden) if c.moe.shared else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        logits = flat @ self.router
        scores = logits.softmax(-1) if self.c.router == "softmax" else logits.sigmoid()
        chosen = (scores + self.bias).topk(self.c.active).indices
        gates = scores.gather(1, chosen)
        gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
        y = torch.zeros_like(flat) if self.shared is None else self.shared(flat)
        for expert in range(self.c.experts):
            row, choice = (chosen == expert).nonzero(as_tuple=True)
            y.index_add_(0, row, super().forward(flat[row], expert) * gates[row, choice, None])
        return y.reshape(x.shape)


def experts_every(c: SimpleNamespace, stack: str) -> int:
    """Of every how many blocks of a stack the last one has experts; 0 = none has."""
    there = c.head != "items" if stack == "decoder" else c.moe.location == "both"
    return c.moe.every if c.moe.experts and there else 0


def experts_by_layer(c: SimpleNamespace, stack: str, layers: int) -> list[bool]:
    every = experts_every(c, stack)
    return [bool(every) and layer % every == every - 1 for layer in range(layers)]


class FeedForward(nn.Module):
    """The last sub-layer of a block: dense, or routed to experts."""

    def __init__(self, c: SimpleNamespace, moe: bool):
        super().__init__()
        if moe:
            self.moe = MoE(c)
        else:
            self.dense = MLP(c.d_model, c.ffn_hidden, c.d_model, pathway=False)
        self.routed = moe

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x) if self.routed else self.dense(x)


class Attention(nn.Module):
    """softmax(q k^T / sqrt(K)) v over the keys that a mask [B or 1, queries or 1, N] shows."""

    def __init__(self, c: SimpleNamespace):
        super().__init__()
        self.heads, width = c.heads, c.heads * c.head_dim
        self.query, self.key, self.value = (Linear(c.d_model, width) for _ in range(3))
        self.out = Linear(width, c.d_model)
        self.query_norm, self.key_norm = (RMSNorm(c.head_dim) if c.qk_norm else nn.Identity() for _ in range(2))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., H, K] each, of what is attended to."""
        keys, values = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.key, self.value))
        return self.key_norm(keys), values

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        queries = self.query_norm(self.query(x).unflatten(-1, (self.heads, -1)))
        by_head = (z.transpose(1, 2) for z in (queries, keys, values))
        y = F.scaled_dot_product_attention(*by_head, attn_mask=mask[:, None])
        return self.out(y.transpose(1, 2).flatten(2))


def bucket(value: Tensor) -> Tensor:
    """Log-spaced bucket of a quantity, 2.5 per octave; 0 for unknown, which is negative."""
    log = torch.log(1 + value.clamp(min=0)) / math.log(2)
    return torch.where(value < 0, 0, 1 + (2.5 * log).int().clamp(max=BUCKETS - 2))


class ItemEncoder(nn.Module):
    """One vector per event: the item (semantic ID, id, or both) and the event's features, joined."""

    def __init__(self, c: SimpleNamespace, v: SimpleNamespace):
        super().__init__()
        self.c = c
        sizes = {"tag": v.tags, "feedback": max(1, len(v.labels))}
        named = [name for name in c.event_features if name != "author"]
        self.feature: Any = nn.ModuleDict({name: Embedding(sizes.get(name, BUCKETS), c.feature_dim) for name in named})

    def forward(self, e: Events, embed: dict[str, Any]) -> Tensor:
        item = embed["item"](e.item) if self.c.item_input != "sid" else torch.zeros(())
        if self.c.item_input != "id":
            item = item + embed["codes"].each(e.codes).sum(-2)

        def feature(name: str) -> Tensor:
            if name == "author":
                return embed["author"](e.author)
            if name == "feedback":
                return e.feedback @ self.feature["feedback"].embedding[: e.feedback.shape[-1]]
            return self.feature[name](e.tag if name == "tag" else bucket(getattr(e, f"{name}_s")))

        return torch.cat([item, *map(feature, self.c.event_features)], -1)


class QFormer(nn.Module):
    """Learned queries read a long sequence by cross-attention: h <- h + CrossAttn(h, v, v); h <- h + FFN(h)."""

    def __init__(self, c: SimpleNamespace):
        super().__init__()
        d, layers = c.d_model, range(c.lifelong_layers)
        self.queries, self.input_norm = weight(c.lifelong_queries, d), RMSNorm(d)
        self.query_norm, self.ffn_norm = (nn.ModuleList(RMSNorm(d) for _ in layers) for _ in range(2))
        self.attention: Any = nn.ModuleList(Attention(c) for _ in layers)
        self.ffn = nn.ModuleList(MLP(d, c.ffn_hidden, d, pathway=False) for _ in layers)

    def forward(self, events: Tensor, valid: Tensor) -> Tensor:
        v = self.input_norm(events)
        h = self.queries.expand(len(v), -1, -1)
        mask = (valid | ~valid.any(-1, keepdim=True))[:, None]  # without events: blanks, which the encoder will not see
        for i, attention in enumerate(self.attention):
            h = h + attention(self.query_norm[i](h), *attention.keys_values(v), mask)
            h = h + self.ffn[i](self.ffn_norm[i](h))
        return h


class StaticPathway(nn.Module):
    """The user's id and categorical features as one token."""

    def __init__(self, c: SimpleNamespace, v: SimpleNamespace):
        super().__init__()
        self.user_id = c.user_id
        self.features = nn.ModuleList(Embedding(n, c.static_dim) for n in v.user_features)
        width = c.static_dim * (int(c.user_id) + len(self.features))
        self.mlp = MLP(max(1, width), c.pathway_hidden or 2 * c.d_model, c.d_model, pathway=True)

    def forward(self, user: Tensor, embed: dict[str, Any]) -> Tensor:
        parts = [embed["user"](user[:, 0].clamp(min=0))] if self.user_id else []
        parts += [table(user[:, 1 + i]) for i, table in enumerate(self.features)]
        return self.mlp(torch.cat(parts, -1) if parts else torch.ones(len(user), 1, device=user.device))[:, None]


class EncoderBlock(nn.Module):
    """z <- z + SelfAttn(norm z); z <- z + FFN or MoE(norm z)."""

    def __init__(self, c: SimpleNamespace, moe: bool):
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(c.d_model), Attention(c)
        self.ffn_norm, self.ffn = RMSNorm(c.d_model), FeedForward(c, moe)

    def forward(self, z: Tensor, mask: Tensor, time: Tensor) -> Tensor:
        normed = self.attention_norm(z)
        z = z + self.attention(normed, *self.attention.keys_values(normed), mask)
        return z + self.ffn(self.ffn_norm(z))


class HSTUBlock(nn.Module):
    """U, V, Q, K = split(silu(norm(z) W)); z <- z + (norm(silu(Q K^T + bias) V / N) * U) W_out (HSTU, eq. 1-3)."""

    def __init__(self, c: SimpleNamespace, tokens: int):
        super().__init__()
        width = c.heads * c.head_dim
        self.heads, self.tokens = c.heads, tokens
        self.input_norm, self.mix = RMSNorm(c.d_model), Linear(c.d_model, 4 * width)
        self.gate_norm, self.out = RMSNorm(width), Linear(width, c.d_model)
        self.distance_bias = weight(2 * tokens - 1)
        self.time_bias = weight(BUCKETS) if "age" in c.event_features else None

    def forward(self, z: Tensor, mask: Tensor, time: Tensor) -> Tensor:
        gate, *rest = F.silu(self.mix(self.input_norm(z))).chunk(4, -1)
        values, queries, keys = (x.unflatten(-1, (self.heads, -1)) for x in rest)
        place = torch.arange(z.shape[1], device=z.device)
        bias = self.distance_bias[place[:, None] - place + self.tokens - 1]
        if self.time_bias is not None:
            bias = bias + self.time_bias[bucket((time[:, :, None] - time[:, None, :]).abs())]
        scores = torch.einsum("bqhk,bnhk->bhqn", queries, keys) + (bias if bias.ndim == 2 else bias[:, None])
        weights = torch.where(mask[:, None], F.silu(scores) / self.tokens, 0)
        y = torch.einsum("bhqn,bnhk->bqhk", weights, values).flatten(2)
        return z + self.out(self.gate_norm(y) * gate)


class Encoder(nn.Module):
    """z = [h_u; h_s; h_p; h_l] + e_pos through pre-norm blocks."""

    def __init__(self, c: SimpleNamespace, v: SimpleNamespace):
        super().__init__()
        self.c = c
        lengths = (c.short_length, c.positive_length, c.lifelong_queries if c.lifelong_length else 0)
        self.lengths = {name: n for name, n in zip(PATHWAYS, lengths, strict=True) if n}
        self.item, self.static = ItemEncoder(c, v), StaticPathway(c, v)
        width = c.d_model + sum(c.author_dim if name == "author" else c.feature_dim for name in c.event_features)
        hidden = c.pathway_hidden or 2 * c.d_model
        projected = self.lengths if c.project_events else ()
        self.projection = nn.ModuleDict({name: MLP(width, hidden, c.d_model, pathway=True) for name in projected})
        self.qformer = QFormer(c) if c.lifelong_length else None
        self.per_event = len(v.codebook_sizes) if c.event_tokens == "codes" else 1
        tokens = 1 + self.per_event * sum(self.lengths.values())
        self.position = weight(tokens, c.d_model)
        moe = experts_by_layer(c, "encoder", c.encoder_layers)
        self.stack = nn.ModuleList(HSTUBlock(c, tokens) if c.block == "hstu" else EncoderBlock(c, m) for m in moe)
        self.norm = RMSNorm(c.d_model)

    def forward(self, user: Tensor, events: dict[str, Events], embed: dict[str, Any]) -> Context:
        tokens, valid = [self.static(user, embed) + self.position[:1]], [torch.ones_like(user[:, :1], dtype=torch.bool)]
        start = 1
        for name, length in self.lengths.items():
            stop = start + self.per_event * length
            h, seen = self._events(name, events[name], embed)
            if self.qformer is not None and name == "lifelong":
                h, seen = (
                    self.qformer(h, seen) + self.position[start:stop],
                    seen.any(-1, keepdim=True).expand(-1, length),
                )
            else:
                h = h + self._positions(self.position[start:stop], seen)
            tokens.append(h)
            valid.append(seen)
            start = stop
        z, seen = torch.cat(tokens, 1), torch.cat(valid, 1)
        position, mask = torch.full_like(seen[0], -1, dtype=torch.long), seen[:, None]
        if self.c.causal:
            position = (torch.arange(z.shape[1], device=z.device) + self.per_event - 1) // self.per_event - 1
            mask = mask & (position[:, None] >= position)
        time = self._times(events["short"]) if self.c.block == "hstu" else z
        for block in self.stack:
            z = block(z, mask, time)
        return Context(self.norm(z), seen, position, self.per_event, events.get("short"))

    def _events(self, name: str, e: Events, embed: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Tokens of a pathway's events and their validity; without a projection at the size of what blocks add."""
        scale = (self.c.base_width or self.c.d_model) ** 0.5
        if self.per_event > 1:
            return embed["codes"].each(e.codes).flatten(1, 2) * scale, e.valid.repeat_interleave(self.per_event, 1)
        h = self.item(e, embed)
        return self.projection[name](h) if self.c.project_events else h * scale, e.valid

    def _positions(self, e_pos: Tensor, valid: Tensor) -> Tensor:
        """Counted back from the most recent event; under a causal encoder from the first one."""
        length, present = len(e_pos), valid.shape[1]
        if self.c.causal:
            return e_pos[:present]
        shift = length - valid.sum(-1, keepdim=True)
        return e_pos[(torch.arange(present, device=valid.device) + shift).clamp(max=length - 1)]

    def _times(self, short: Events) -> Tensor:
        """Seconds [B,N] of the static token, which has the first event's, and of every token of `short`."""
        time = short.age_s.cumsum(1) if self.c.causal else -short.age_s
        time = time.repeat_interleave(self.per_event, 1)
        return torch.cat([time[:, :1], time], 1)


class DecoderBlock(nn.Module):
    """d <- d + CausalSelfAttn(norm d); d <- d + CrossAttn(norm d, Z, Z); d <- d + FFN or MoE(norm d)."""

    def __init__(self, c: SimpleNamespace, moe: bool):
        super().__init__()
        self.self_norm, self.self_attention = RMSNorm(c.d_model), Attention(c)
        self.cross_norm, self.cross_attention = RMSNorm(c.d_model), Attention(c)
        self.ffn_norm, self.ffn = RMSNorm(c.d_model), FeedForward(c, moe)

    def forward(self, x: Tensor, past: Any, cross: Any, cross_mask: Tensor) -> tuple[Tensor, Any]:
        """x [B,T,levels,D], of which every target is a sequence by itself; `past` are keys and values of levels before."""
        targets, new = x.shape[:2], x.shape[2]
        normed = self.self_norm(x)
        now = self.self_attention.keys_values(normed)
        if past is not None:
            now = tuple(torch.cat(pair, 2) for pair in zip(past, now, strict=True))
        total = now[0].shape[2]
        causal = torch.ones(1, total, total, dtype=torch.bool, device=x.device).tril()[:, total - new :]
        y = self.self_attention(normed.flatten(0, 1), *(z.flatten(0, 1) for z in now), causal)
        x = x + y.unflatten(0, targets)
        y = self.cross_attention(self.cross_norm(x).flatten(1, 2), *cross, cross_mask)
        x = x + y.unflatten(1, x.shape[1:3])
        return x + self.ffn(self.ffn_norm(x)), now


class Decoder(nn.Module):
    """BOS, s1, .. -> s1, s2, ..; all targets, or beams, of a request share the keys and values of its context."""

    def __init__(self, c: SimpleNamespace, v: SimpleNamespace):
        super().__init__()
        self.c, self.levels, d = c, len(v.codebook_sizes), c.d_model
        self.codes = CodeEmbedding(v.codebook_sizes, d)
        self.bos, self.position = weight(d), weight(self.levels, d)
        self.stack: Any = nn.ModuleList(
            DecoderBlock(c, moe) for moe in experts_by_layer(c, "decoder", c.decoder_layers)
        )
        self.norm = RMSNorm(d)
        self.heads = nn.ModuleList(Linear(d, size) for size in v.codebook_sizes)

    def cross(self, context: Context) -> list[Any]:
        return [block.cross_attention.keys_values(context.tokens) for block in self.stack]

    def embed(self, level: int, before: Tensor, context: Context, visible: Tensor) -> Tensor:
        """Input [B,T,D] of a level: the code of the level before; BOS at first, with the last event under a causal encoder."""
        if level:
            return self.codes.level(level - 1, before) + self.position[level]
        start = (self.bos + self.position[0]).expand(*before.shape, -1)
        return start + context.last_seen(visible) if self.c.causal else start

    def decode(self, x: Tensor, past: list[Any], cross: list[Any], mask: Tensor) -> tuple[Tensor, list[Any]]:
        grown = []
        for block, own_past, own_cross in zip(self.stack, past, cross, strict=True):
            x, now = block(x, own_past, own_cross, mask)
            grown.append(now)
        return self.norm(x), grown

    def forward(self, context: Context, targets: Tensor, visible: Tensor) -> list[Tensor]:
        """Logits per level [B,T,V] of targets [B,T,C], each given its own codes before."""
        levels = range(self.levels)
        x = torch.stack([self.embed(i, targets[..., max(0, i - 1)], context, visible) for i in levels], 2)
        mask = context.valid[:, None] & (context.position < visible[..., None]).repeat_interleave(self.levels, 1)
        x, _ = self.decode(x, [None] * len(self.stack), self.cross(context), mask)
        return [head(x[:, :, i]) for i, head in enumerate(self.heads)]


class ItemHead(nn.Module):
    """A softmax over all items: by one vector each, and by what their memory vectors say of the events seen."""

    def __init__(self, c: SimpleNamespace, v: SimpleNamespace):
        super().__init__()
        self.c = c
        self.items = Embedding(v.items, c.d_model)
        own_codes = c.head == "items" and c.item_input in ("sid", "both")
        self.codes = CodeEmbedding(v.codebook_sizes, c.d_model) if own_codes else None
        self.memory_in, self.memory_out = (
            Embedding(v.items, c.item_memory) if c.item_memory else None for _ in range(2)
        )

    def forward(self, context: Context, visible: Tensor, codes: CodeEmbedding | None, item_codes: Tensor) -> Tensor:
        """log P of every item [B,T,I] for targets that see the first `visible` [B,T] events of `short`."""
        state = context.last_seen(visible) * (self.c.base_width / self.c.d_model if self.c.base_width else 1)
        vectors = self.items.embedding
        if codes is not None and self.c.item_input == "both":
            vectors = vectors + codes.each(item_codes).sum(-2)
        logits = state @ vectors.T
        short = context.short
        if self.memory_in is not None and self.memory_out is not None and short is not None:
            place = torch.arange(short.item.shape[1], device=visible.device)
            seen = (place < visible[..., None]) & short.valid[:, None]
            share = seen * seen.sum(-1, keepdim=True).clamp(min=1) ** -0.5
            logits = logits + share @ self.memory_in(short.item) @ self.memory_out.embedding.T
        return logits.log_softmax(-1)


class Catalogue(NamedTuple):
    """What is known of all items, and the trie of their semantic IDs.

    The children of node n at depth l are the nodes child_start[l][n] to child_start[l][n+1]-1 of depth l+1, in the order of
    the codes, token[l], that lead to them. The items of leaf n are items[item_start[n]:item_start[n+1]], served in this order.
    """

    codes: Tensor  # int [I,C]
    author: Tensor  # int [I]
    tag: Tensor  # int [I]
    item_start: Tensor  # int [leaves + 1]
    items: Tensor  # int [I]
    child_start: list[Tensor]
    token: list[Tensor]
    shift: Tensor | None  # float [I], added to the item head's log P before it is normalised again

    def children(self, level: int, node: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Child nodes, the codes that lead to them, and which of the places hold a child, each [..., J]."""
        start = self.child_start[level]
        slot = torch.arange(int(start.diff().max()), device=node.device)
        exists = slot < (start[node + 1] - start[node])[..., None]
        child = torch.where(exists, start[node][..., None] + slot, 0)
        return child, self.token[level][child], exists

    def permitted_nodes(self, permitted: Tensor) -> list[Tensor]:
        """By level, the nodes [B, nodes] that lead to at least one permitted item, of a mask [B,I]."""
        before = F.pad(permitted[:, self.items].long().cumsum(1), (1, 0))  # permitted items of all leaves before
        bounds, found = self.item_start, []
        for start in reversed(self.child_start):
            found.append(before[:, bounds[1:]] > before[:, bounds[:-1]])
            bounds = bounds[start]
        return found[::-1]


class OneRec(nn.Module):
    """The encoder with a decoder of semantic IDs, a softmax over items, or both."""

    def __init__(self, config: SimpleNamespace, vocabulary: SimpleNamespace):
        super().__init__()
        self.c, v = config, vocabulary
        c = self.c
        self.encoder = Encoder(c, v)
        self.decoder = Decoder(c, v) if c.head != "items" else None
        self.head = ItemHead(c, v) if c.head != "codes" else None
        tables = {}
        if "author" in c.event_features:
            tables["author"] = IdTable(c.author_rows or v.authors, v.authors, c.author_dim)
        if c.item_input != "sid" and c.head == "codes":
            tables["item"] = IdTable(c.item_rows or v.items, v.items, c.d_model)
        if c.user_id:
            tables["user"] = IdTable(c.user_rows or v.users, v.users, c.static_dim)
        self.tables = nn.ModuleDict(tables)
        self.catalogue: Catalogue
        self.lists: SimpleNamespace  # k, width and item_weight

    @property
    def codes(self) -> CodeEmbedding | None:
        """The code embeddings, one table for all parts that read codes."""
        return self.decoder.codes if self.decoder is not None else self.head.codes if self.head is not None else None

    def encode(self, request: Request) -> Context:
        embed = {**self.tables, "codes": self.codes}
        if self.head is not None:
            embed["item"] = self.head.items
        events = {name: self._events(request, name) for name in self.encoder.lengths}
        return self.encoder(request["user"].long(), events, embed)

    def _events(self, request: Request, name: str) -> Events:
        item = request[f"{name}.item"].long()
        valid = item >= 0
        row = torch.where(valid, item, 0)
        age_s, playtime_s, duration_s, feedback = (
            request[f"{name}.{feature}"].float() for feature in ("age_s", "playtime_s", "duration_s", "feedback")
        )
        known = self.catalogue
        return Events(
            row, known.codes[row], known.author[row], known.tag[row], torch.where(valid, age_s, 0),
            torch.where(valid, playtime_s, 0), torch.where(valid, duration_s, 0),
            torch.where(valid[..., None], feedback, 0), valid,
        )  # fmt: skip

    @torch.no_grad()
    def logits(self, request: Request, targets: Tensor, visible: Tensor) -> list[Tensor]:
        """Teacher-forced logits [B,T,V] per level of targets int [B,T,C] that see the first `visible` [B,T] events of `short`."""
        assert self.decoder is not None, "a model with only an item head has no codes"
        return self.decoder(self.encode(request), targets.long(), visible.long())

    @torch.no_grad()
    def item_log_p(self, request: Request) -> Tensor:
        """log P of every item [B,I] by the item head."""
        return self._item_log_p(self.encode(request))

    def _item_log_p(self, context: Context) -> Tensor:
        assert self.head is not None, "a model without an item head has no softmax over items"
        log_p = self.head(context, context.visible, self.codes, self.catalogue.codes)[:, 0]
        return log_p if self.catalogue.shift is None else (log_p + self.catalogue.shift).log_softmax(-1)

    @torch.no_grad()
    def recommend(
        self,
        request: Request,
        exclude: Tensor | None = None,
        allow: Tensor | None = None,
        k: int | None = None,
        width: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Item rows int [B,k], best first, -1 = no more, and their log P float [B,k].

        A model with both heads takes the items of all beams and as many of its item head's best ones, and ranks them by their
        log P by codes and `item_weight` times that by the item head.

        Args:
            exclude: item rows int [B,X] not to list, -1 = none.
            allow: the only item rows int [B,A] to list, -1 = none; None = all.
            k: items of a list.
            width: beams.
        """
        k, width = int(k or self.lists.k), int(width or self.lists.width)
        permitted = self._permitted(len(request["user"]), exclude, allow)
        context = self.encode(request)
        if self.head is None:
            return listed(*self._items_of_beams(context, permitted, width), k)
        own = self._item_log_p(context).masked_fill(~permitted, -torch.inf)
        best = own.topk(min(max(k, width), own.shape[1]))
        if self.decoder is None:
            return listed(best.indices, best.values, k)
        items, scores = self._items_of_beams(context, permitted, width)
        found = torch.where(scores == -torch.inf, -1, items)
        known = (best.indices[:, :, None] == found[:, None, :]).any(-1) | (best.values == -torch.inf)
        by_codes = self._code_log_p(context, best.indices).masked_fill(known, -torch.inf)
        items, scores = torch.cat([items, best.indices], 1), torch.cat([scores, by_codes], 1)
        both = scores + self.lists.item_weight * own.gather(1, items)
        return listed(items, torch.where(scores == -torch.inf, scores, both), k)

    def _permitted(self, batch: int, exclude: Tensor | None, allow: Tensor | None) -> Tensor:
        """Which items may be listed, bool [B,I]."""
        items = len(self.catalogue.items)
        mask = torch.full((batch, items + 1), allow is None, device=self.catalogue.items.device)
        for rows, value in ((allow, True), (exclude, False)):
            if rows is not None:
                mask.scatter_(1, torch.where(rows < 0, items, rows).long(), value)
        return mask[:, :items]

    def _items_of_beams(self, context: Context, permitted: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Items of all beams, those of one beam in the order in which they are served, and scores, -inf where there is none."""
        known = self.catalogue
        leaf, score = self._beams(context, known.permitted_nodes(permitted), width)
        most = int(known.item_start.diff().max())
        place = known.item_start[leaf][..., None] + torch.arange(most, device=leaf.device)
        items = known.items[place.clamp(max=len(known.items) - 1)].flatten(1)
        exists = (place < known.item_start[leaf + 1][..., None]).flatten(1) & permitted.gather(1, items)
        return items, torch.where(exists, score.repeat_interleave(most, 1), -torch.inf)

    def _beams(self, context: Context, permitted: list[Tensor], width: int) -> tuple[Tensor, Tensor]:
        """Leaves [B,W] of the most probable semantic IDs, best first, and log P; -inf where there are no more."""
        decoder = self.decoder
        assert decoder is not None
        batch, cross, past = len(context.tokens), decoder.cross(context), [None] * len(decoder.stack)
        node = last = torch.zeros_like(context.visible)
        score = torch.zeros_like(context.tokens[:, :1, 0])
        for level, head in enumerate(decoder.heads):
            x = decoder.embed(level, last, context, context.visible)[:, :, None]
            x, past = decoder.decode(x, past, cross, context.valid[:, None])
            log_p, child, token = (z.flatten(1) for z in self._next(level, head(x[:, :, 0]), node))
            per_beam = log_p.shape[1] // node.shape[1]
            total = score.repeat_interleave(per_beam, 1) + log_p
            total = total.masked_fill(~permitted[level].gather(1, child), -torch.inf)
            score, chosen = total.topk(min(width, total.shape[1]))
            node, last = child.gather(1, chosen), token.gather(1, chosen)
            of_request = torch.arange(batch, device=node.device)[:, None], chosen // per_beam
            past = [tuple(z[of_request] for z in pair) for pair in past]
        return node, score

    def _next(self, level: int, logits: Tensor, node: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log P of every child of nodes [B,W], the children, and the codes that lead to them, [B,W,J] each.

        Among all codes of the level, or with `softmax: legal` among those of the children alone; -inf where there is no child.
        """
        child, token, exists = self.catalogue.children(level, node)
        own = logits.gather(-1, token).masked_fill(~exists, -torch.inf)
        among = own if self.c.softmax == "legal" else logits
        return own - among.logsumexp(-1, keepdim=True), child, token

    def _code_log_p(self, context: Context, items: Tensor) -> Tensor:
        """log P of items [B,J] by their codes, teacher-forced."""
        assert self.decoder is not None
        codes = self.catalogue.codes[items]
        node, total = torch.zeros_like(items), torch.zeros_like(context.tokens[:, :1, 0])
        for level, logits in enumerate(self.decoder(context, codes, context.visible.expand_as(items))):
            log_p, child, token = self._next(level, logits, node)
            own = (token == codes[..., level, None]) & log_p.isfinite()
            total = total + torch.where(own, log_p, 0).sum(-1)
            node = torch.where(own, child, 0).sum(-1)
        return total


def listed(items: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of candidates [B,M], equals in their order; -1 and -inf in places that are left."""
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    items = torch.where(scores == -torch.inf, -1, items.gather(1, order))
    room = (0, max(0, k - items.shape[1]))
    return F.pad(items, room, value=-1)[:, :k], F.pad(scores, room, value=-torch.inf)[:, :k]


def read_tensors(folder: Path, device: str) -> dict[str, Tensor]:
    """The weights as float32, whole or in shards, with those of int8 multiplied by their scales."""
    index = folder / "model.safetensors.index.json"
    files = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["model.safetensors"]
    )
    stored: dict[str, Tensor] = {}
    for name in files:
        stored |= load_file(folder / name, device=device)
    scales = {f"{name}.scale" for name, tensor in stored.items() if tensor.dtype == torch.int8}
    return {
        name: tensor.float() * stored[f"{name}.scale"] if f"{name}.scale" in scales else tensor.float()
        for name, tensor in stored.items()
        if name not in scales
    }


def by_module(stored: dict[str, Tensor], c: SimpleNamespace) -> dict[str, Tensor]:
    """Exported names as those of the modules here: blocks, which are stored stacked, one by one."""
    found = {}
    for name, tensor in stored.items():
        kind, path = name.split(".", 1)
        stack, stacked, of_block = path.partition(".stack.groups.blocks.")
        every = experts_every(c, path if kind == "bias" else stack)
        if kind == "bias":
            if every:
                found |= {f"{path}.stack.{(g + 1) * every - 1}.ffn.moe.bias": row for g, row in enumerate(tensor)}
        elif stacked:
            place, rest = of_block.split(".", 1)
            found |= {f"{stack}.stack.{g * max(1, every) + int(place)}.{rest}": own for g, own in enumerate(tensor)}
        else:
            found[name if kind == "tables" else path] = tensor
    return found


def load(folder: str | Path, device: str = "cpu") -> OneRec:
    """The model of an export directory, in float32."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(), object_hook=lambda values: SimpleNamespace(**values))
    c = config.model
    c.head_dim = c.head_dim or c.d_model // c.heads
    with torch.device("meta"):
        model = OneRec(c, config.vocabulary)
    model.load_state_dict(by_module(read_tensors(folder, device), c), assign=True)
    arrays = load_file(folder / "catalogue.safetensors", device=device)
    levels = range(len(config.vocabulary.codebook_sizes))
    model.catalogue = Catalogue(
        **{name: arrays[name].long() for name in ("codes", "author", "tag", "item_start", "items")},
        child_start=[arrays[f"child_start.{level}"].long() for level in levels],
        token=[arrays[f"token.{level}"].long() for level in levels],
        shift=arrays.get("shift"),
    )
    model.lists = config.lists
    return model.eval()


def request_of(user: dict[str, Any], config: dict[str, Any]) -> Request:
    """The request, B = 1, of a line of users.jsonl as of its last event.

    Of `user` are read `row`, `features` and `events`, oldest first: item row, timestamp_ms, playtime_s and duration_s (None =
    unknown) and feedback, a list of labels; and `positive` and `lifelong`, such lists too, where the model has these pathways.
    """
    request = {"user": torch.tensor([[user["row"], *user["features"]]])}
    events, nothing = user["events"], {"item": -1, "timestamp_ms": 0, "playtime_s": 0, "duration_s": 0, "feedback": []}
    for name in PATHWAYS:
        if length := config["model"][f"{name}_length"]:
            run = (events if name == "short" else user.get(name, []))[-length:]
            times = [event["timestamp_ms"] for event in run]
            if config["model"]["causal"]:
                since = [event["timestamp_ms"] for event in events[-len(run) - 1 :]][:1] + times[:-1]
                ages = [time - before for time, before in zip(times, since, strict=True)]
            else:
                ages = [events[-1]["timestamp_ms"] - time for time in times]
            run, ages = run or [nothing], ages or [0]
            columns: dict[str, list[Any]] = {
                feature: [-1.0 if event[feature] is None else event[feature] for event in run]
                for feature in ("playtime_s", "duration_s")
            }
            columns["item"], columns["age_s"] = [event["item"] for event in run], [age / 1000 for age in ages]
            columns["feedback"] = [[label in event["feedback"] for label in config["labels"]] for event in run]
            request |= {f"{name}.{feature}": torch.tensor([column]) for feature, column in columns.items()}
    return request


def read_lines(path: Path) -> list[Any]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A list for one of the sample users of an export, in plain PyTorch.")
    parser.add_argument("directory", type=Path, help="the export directory")
    parser.add_argument("--user", help="the user's id, as in users.jsonl; by default the first there")
    parser.add_argument("--device", default="cpu", help="where to compute, such as cuda")
    options = parser.parse_args(arguments)
    users = {str(user["id"]): user for user in read_lines(options.directory / "users.jsonl")}
    if not users:
        sys.exit("this export has no sample users; export the run again with `--users N`")
    chosen = next(iter(users)) if options.user is None else options.user
    if chosen not in users:
        sys.exit(f"no user '{chosen}' in users.jsonl; ids there look like {', '.join(list(users)[:3])}")
    user = users[chosen]
    config = json.loads((options.directory / "config.json").read_text(encoding="utf-8"))
    model = load(options.directory, options.device)
    seen = [*(event["item"] for event in user["events"]), *user.get("seen", [])] if config["exclude_seen"] else []
    request = {name: tensor.to(options.device) for name, tensor in request_of(user, config).items()}
    items, scores = model.recommend(request, torch.tensor([seen], dtype=torch.long, device=options.device))
    known = read_lines(options.directory / "items.jsonl")
    for item, score in zip(items[0].tolist(), scores[0].tolist(), strict=True):
        if item >= 0:
            print(f"{score:8.3f}  {known[item]['id']}  {known[item]['title'] or '(no title)'}")


if __name__ == "__main__":
    main()
