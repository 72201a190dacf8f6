"""P-Score: what one item is worth to one user, learnt from logged feedback (REFERENCE 1.9, TR 2.4.1).

    a   = TargetAttention(candidate; user, events)          behaviours read by what is asked about
    h_y = MLP_y([a, candidate, a * candidate, user])        a tower per label y, p_y = sigmoid(w_y h_y)
    p   = sigmoid(MLP([h_1 .. h_Y, candidate, user]))       the tower that fuses them
    L   = sum_y BCE(y, p_y) + sum_y w_y BCE(y, p)

`playtime` is a label too: the share of `reward.playtime_cap_s` that was watched, so that p_playtime times the cap is the
expected play time in seconds. `hate` has a tower and no part in the fused one: what is good is 1 there, and hate is not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from onerec_jax.config import ModelConfig, RewardConfig
from onerec_jax.data.schema import Batch, ItemFeatures, Vocabulary
from onerec_jax.errors import InputError
from onerec_jax.model.attention import Attention
from onerec_jax.model.layers import CodeEmbedding, Embedding, Linear, PathwayMLP, RMSNorm, dropout
from onerec_jax.model.pathways import BUCKETS, blank_padding, bucket
from onerec_jax.parallel.sharding import by_batch
from onerec_jax.reward.candidates import Candidates, Catalogue, Reward
from onerec_jax.train.metrics import Metrics

PLAYTIME = "playtime"
NOT_FUSED = ("hate",)


class Scores(NamedTuple):
    """Logits of G candidates."""

    labels: Array  # float32 [B,G,Y], the towers' own, in the order of `objectives`
    fused: Array  # float32 [B,G]


def objectives(labels: tuple[str, ...]) -> tuple[str, ...]:
    """The labels that have a tower: those of the log, and `playtime`."""
    return (*labels, PLAYTIME)


def fused_weights(config: RewardConfig, labels: tuple[str, ...]) -> dict[str, float]:
    """w_y of every label in the fused tower's loss.

    Raises:
        InputError: a label is named that the log does not have, or that is bad to have.
    """
    known = [name for name in objectives(labels) if name not in NOT_FUSED]
    if not config.objectives:
        return dict.fromkeys(known, 1.0)
    wrong = [name for name in config.objectives if name not in known]
    if wrong:
        raise InputError(f"reward.objectives names '{wrong[0]}'; this log has {', '.join(known)}")
    return dict(config.objectives)


class PScore(nnx.Module):
    """The reward model; items by semantic ID, author, tag, duration and, unless told otherwise, an embedding of their own."""

    def __init__(self, config: RewardConfig, vocabulary: Vocabulary, rngs: nnx.Rngs):
        d, hidden = config.width, config.hidden
        self.rate = config.dropout
        self.labels = objectives(vocabulary.labels)
        self.codes = CodeEmbedding(vocabulary.codebook_sizes, d, rngs)
        self.items = Embedding(vocabulary.items, d, rngs) if config.item_id else None
        sizes = {"author": vocabulary.authors, "tag": vocabulary.tags, "duration": BUCKETS}
        self.of_item = nnx.Dict({name: Embedding(size, d, rngs) for name, size in sizes.items()})
        sizes = {"age": BUCKETS, "playtime": BUCKETS, "feedback": max(1, len(vocabulary.labels))}
        self.of_event = nnx.Dict({name: Embedding(size, d, rngs) for name, size in sizes.items()})
        self.features = nnx.List([Embedding(size, d, rngs) for size in vocabulary.user_features])
        shape = ModelConfig(d_model=d, heads=config.heads, attention="xla")
        self.attention = Attention(shape, rngs)
        self.item_norm, self.query_norm, self.key_norm = RMSNorm(d), RMSNorm(d), RMSNorm(d)
        read = (4 if self.items is None else 5) * d
        made = {"item": (read, d), "event": (4 * d, d), "user": (max(1, len(self.features)) * d, d)}
        made |= {f"tower_{name}": (4 * d, hidden // 2) for name in self.labels}
        made |= {"fused": (len(self.labels) * (hidden // 2) + 2 * d, hidden // 2)}
        self.projection = nnx.Dict({name: PathwayMLP(a, hidden, b, rngs) for name, (a, b) in made.items()})
        self.heads = nnx.List([Linear(hidden // 2, 1, rngs) for _ in range(len(self.labels) + 1)])

    def _project(self, catalogue: Catalogue, row: Array) -> Array:
        """[..., D] of items [...], rows of the catalogue."""
        dtype, columns = jnp.float32, jax.tree.map(lambda column: column[row], catalogue)
        parts = [
            self.codes.item(columns.codes, dtype),
            self.of_item["author"](columns.author, dtype),
            self.of_item["tag"](columns.tag, dtype),
            self.of_item["duration"](bucket(columns.duration_s), dtype),
        ]
        parts += [] if self.items is None else [self.items(row, dtype)]
        # embeddings of .02 would leave the first layer nothing to work with
        scale = self.codes.embedding.shape[-1] ** 0.5
        return self.item_norm(self.projection["item"](scale * jnp.concatenate(parts, axis=-1)))

    def _items(self, catalogue: Catalogue, asked: list[Array]) -> list[Array]:
        """[..., D] of each array of rows; of the whole catalogue once, where that is the fewer."""
        if catalogue.codes.shape[0] > sum(rows.size for rows in asked):
            return [self._project(catalogue, rows) for rows in asked]
        every = self._project(catalogue, jnp.arange(catalogue.codes.shape[0]))
        return [every[rows] for rows in asked]

    def _events(self, events: ItemFeatures, item_BxLxD: Array) -> Array:
        """[B,L,D] of behaviours: the item, when it was met, and what was done."""
        scale = self.codes.embedding.shape[-1] ** 0.5
        age = self.of_event["age"](bucket(events.age_s), jnp.float32)
        playtime = self.of_event["playtime"](bucket(events.playtime_s), jnp.float32)
        feedback = self.of_event["feedback"].embedding[...][: events.feedback.shape[-1]]
        said = events.feedback.astype(jnp.float32) @ feedback
        done = scale * jnp.concatenate([age, playtime, said], axis=-1)
        return self.projection["event"](jnp.concatenate([item_BxLxD, done], axis=-1))

    def _user(self, user_Bx1F: Array) -> Array:
        """[B,D] of the categorical features; the user's id has no part, so that new users are scored as others are."""
        parts = [table(user_Bx1F[:, 1 + i], jnp.float32) for i, table in enumerate(self.features)]
        nothing = jnp.ones((user_Bx1F.shape[0], self.codes.embedding.shape[-1]), jnp.float32)
        return self.projection["user"](jnp.concatenate(parts, axis=-1) if parts else nothing)

    def __call__(self, request: Batch, item_BxG: Array, catalogue: Catalogue, key: Array | None) -> Scores:
        """Scores of items, rows of the catalogue; rows below 0 are scored as row 0, whose score is nobody's."""
        clean, valid = blank_padding(request.short)
        candidate, met = self._items(catalogue, [jnp.maximum(item_BxG, 0), clean.item])
        events = self._events(clean, met)
        user = self._user(request.user)[:, None, :]
        keys = [None] * 4 if key is None else list(jax.random.split(key, 4))
        candidate, events = dropout(candidate, self.rate, keys[0]), dropout(events, self.rate, keys[1])
        seen = self.key_norm(by_batch(jnp.concatenate([user, events], axis=1)))
        mask = jnp.concatenate([jnp.ones_like(valid[:, :1]), valid], axis=1)[:, None, :]
        read = self.attention(self.query_norm(candidate), *self.attention.keys_values(seen), mask)
        user = jnp.broadcast_to(user, candidate.shape)
        joined = dropout(jnp.concatenate([read, candidate, read * candidate, user], axis=-1), self.rate, keys[2])
        towers = [jax.nn.relu(self.projection[f"tower_{name}"](joined)) for name in self.labels]
        logits = [head(tower)[..., 0] for head, tower in zip(self.heads, towers, strict=False)]
        fused = jax.nn.relu(self.projection["fused"](jnp.concatenate([*towers, candidate, user], axis=-1)))
        return Scores(jnp.stack(logits, axis=-1), self.heads[len(towers)](dropout(fused, self.rate, keys[3]))[..., 0])


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """The static part of a reward model, passed by closure."""

    config: RewardConfig
    vocabulary: Vocabulary
    graph: Any
    abstract: Any  # parameters as ShapeDtypeStructs

    @property
    def labels(self) -> tuple[str, ...]:
        return objectives(self.vocabulary.labels)

    def bind(self, params: Any) -> PScore:
        return nnx.merge(self.graph, params)

    def init(self, seed: int) -> Any:
        return nnx.split(PScore(self.config, self.vocabulary, nnx.Rngs(params=seed)))[1].to_pure_dict()


def build_reward(config: RewardConfig, vocabulary: Vocabulary) -> RewardModel:
    """The reward model of a config without any memory for its parameters."""
    graph, state = nnx.split(nnx.eval_shape(lambda: PScore(config, vocabulary, nnx.Rngs(params=0))))
    return RewardModel(config, vocabulary, graph, state.to_pure_dict())


def check_labels(config: RewardConfig, labels: tuple[str, ...]) -> None:
    """Raises InputError where a setting names a label that the log does not have."""
    fused_weights(config, labels)
    for name in config.known_with_playtime:
        if name not in labels:
            raise InputError(f"reward.known_with_playtime names '{name}'; this log has {', '.join(labels)}")


def outcomes(batch: Batch, config: RewardConfig, labels: tuple[str, ...]) -> tuple[Array, Array]:
    """What happened to every target: labels float32 [B,T,Y] in the order of `objectives`, and which are known [B,T,Y].

    Args:
        labels: those of the log, which `batch.feedback` holds.
    """
    there = jnp.asarray(batch.target_item) >= 0
    played = jnp.asarray(batch.playtime_s)
    share = jnp.clip(played / config.playtime_cap_s, 0.0, 1.0)
    y = jnp.concatenate([jnp.asarray(batch.feedback, jnp.float32), share[..., None]], axis=-1)
    with_playtime = np.array([name in (*config.known_with_playtime, PLAYTIME) for name in objectives(labels)])
    known = there[..., None] & ((played >= 0)[..., None] | ~with_playtime)
    # what is not known is 0: a NaN there would pass through the derivative of a loss that leaves it out
    return jnp.where(known, y, 0.0), known


def make_reward_loss(model: RewardModel) -> Callable[..., tuple[Array, Metrics]]:
    """(params, batch, catalogue, key) -> loss sum over targets, metrics; L of the module's docstring."""
    check_labels(model.config, model.vocabulary.labels)
    weights = fused_weights(model.config, model.vocabulary.labels)
    fused_weight = jnp.array([weights.get(name, 0.0) for name in model.labels])

    def loss(params: Any, batch: Batch, catalogue: Catalogue, key: Array | None) -> tuple[Array, Metrics]:
        scores = model.bind(params)(batch, batch.target_item, catalogue, key)
        y, known = outcomes(batch, model.config, model.vocabulary.labels)
        of_labels = jnp.where(known, bce(scores.labels, y), 0.0)
        of_fused = jnp.where(known, bce(scores.fused[..., None], y), 0.0) * fused_weight
        count = jnp.sum(batch.target_item >= 0)
        total = jnp.sum(of_labels) + jnp.sum(of_fused)
        metrics: Metrics = {
            f"loss/{name}": (jnp.sum(of_labels[..., i]), jnp.sum(known[..., i])) for i, name in enumerate(model.labels)
        }
        return total, metrics | {"loss/p_score": (jnp.sum(of_fused), count), "loss": (total, count)}

    return loss


def bce(logit: Array, y: Array) -> Array:
    """Binary cross-entropy in nats, y in [0, 1]."""
    return jax.nn.softplus(logit) - y * logit


def reward_names(labels: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the learnt rewards in `rl.rewards`."""
    return ("p_score", *(f"p_{name}" for name in objectives(labels)))


def learnt_rewards(
    model: RewardModel, params: Any, catalogue: Catalogue
) -> Callable[[Batch, Candidates], dict[str, Array]]:
    """(request, candidates) -> every learnt reward by name, float32 [B,G]: probabilities, of `playtime` the share of the cap."""

    def rewards(request: Batch, candidates: Candidates) -> dict[str, Array]:
        found = model.bind(params)(request, candidates.item, catalogue, None)
        columns = (found.fused, *jnp.moveaxis(found.labels, -1, 0))
        exists = candidates.item >= 0
        named = zip(reward_names(model.vocabulary.labels), columns, strict=True)
        return {name: jnp.where(exists, jax.nn.sigmoid(x), 0.0) for name, x in named}

    return rewards


__all__ = ["PScore", "Reward", "RewardModel", "Scores", "build_reward", "learnt_rewards", "make_reward_loss"]
