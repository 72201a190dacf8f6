"""The reward model: its loss against NumPy, what may not change a score, and that it learns."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import VOCABULARY, poison, random_batch, tiny_model

from onerec_jax.config import RewardConfig
from onerec_jax.errors import InputError
from onerec_jax.model.batch import Batch
from onerec_jax.reward.candidates import Candidates, Catalogue
from onerec_jax.reward.pscore import (
    PScore,
    build_reward,
    fused_weights,
    learnt_rewards,
    make_reward_loss,
    reward_names,
)

B, T, G, ITEMS = 4, 3, 30, 1000
LABELS = ("click", "like", "hate")
SIZES = dataclasses.replace(VOCABULARY, items=ITEMS, labels=LABELS)
CONFIG = RewardConfig(
    width=8, heads=2, hidden=16, history=6, playtime_cap_s=50.0, objectives={"click": 0.5, "like": 2.0, "playtime": 1.0}
)
MODEL = build_reward(CONFIG, SIZES)


def _catalogue() -> Catalogue:
    rng = np.random.default_rng(5)
    return Catalogue(
        codes=jnp.asarray(rng.integers(0, 16, (ITEMS, 3)), jnp.int32),
        author=jnp.asarray(rng.integers(0, SIZES.authors, ITEMS), jnp.int32),
        tag=jnp.asarray(rng.integers(0, SIZES.tags, ITEMS), jnp.int32),
        duration_s=jnp.asarray(rng.random(ITEMS) * 100 - 5, jnp.float32),
        exposures=jnp.zeros(ITEMS),
    )


def _batch(seed: int = 0) -> Batch:
    """Requests of items 0 to 99; some targets are missing, some play times are unknown or above the cap."""
    rng = np.random.default_rng(seed)
    vocabulary = dataclasses.replace(SIZES, items=100)
    batch = random_batch(tiny_model(short_length=6), vocabulary, batch=B, targets=T, seed=seed)
    batch.short.item[2] = -1  # a user of whom nothing is known
    item = np.where(batch.target_weight > 0, batch.target_item, -1)
    item[0] = -1
    return dataclasses.replace(
        batch,
        target_item=item,
        target_weight=(item >= 0).astype(np.float32),
        feedback=rng.integers(0, 2, batch.feedback.shape).astype(np.uint8),
        playtime_s=np.array([[7, 8, 9], [-1, 20, 3], [10, 80, 3], [0, -1, 3]], np.float32),
    )


CATALOGUE = _catalogue()
score = jax.jit(lambda params, batch, item, catalogue, key=None: MODEL.bind(params)(batch, item, catalogue, key))
rewards = jax.jit(lambda params, batch, candidates: learnt_rewards(MODEL, params, CATALOGUE)(batch, candidates))
loss = jax.jit(jax.value_and_grad(make_reward_loss(MODEL), has_aux=True))


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: MODEL.init(0))()


def _asked(count: int = G) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 100, (B, count)).astype(np.int32)


def _close(a, b) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6)


def _bce(logit: float, y: float) -> float:
    p = 1 / (1 + np.exp(-float(logit)))
    return -(y * np.log(p) + (1 - y) * np.log(1 - p))


def test_the_loss_is_the_cross_entropy_of_every_known_outcome_by_its_tower_and_weighted_by_the_fused_one(params):
    batch = _batch()
    (total, metrics), _ = loss(params, batch, CATALOGUE, None)
    found = score(params, batch, np.concatenate([batch.target_item, _asked(G - T)], axis=1), CATALOGUE)
    names = (*LABELS, "playtime")
    sums, counts = dict.fromkeys((*names, "p_score"), 0.0), dict.fromkeys(names, 0)
    for b, t in np.argwhere(batch.target_item >= 0):
        for i, name in enumerate(names):
            if name == "playtime":
                if batch.playtime_s[b, t] < 0:
                    continue
                y = min(batch.playtime_s[b, t] / 50.0, 1.0)
            else:
                y = float(batch.feedback[b, t, i])
            sums[name] += _bce(found.labels[b, t, i], y)
            counts[name] += 1
            weight = {"click": 0.5, "like": 2.0, "hate": 0.0, "playtime": 1.0}[name]
            sums["p_score"] += weight * _bce(found.fused[b, t], y)
    assert counts == {"click": 6, "like": 6, "hate": 6, "playtime": 4}
    for name in names:
        assert metrics[f"loss/{name}"][0] == pytest.approx(sums[name], rel=1e-5)
        assert metrics[f"loss/{name}"][1] == counts[name]
    assert metrics["loss/p_score"][0] == pytest.approx(sums["p_score"], rel=1e-5)
    assert total == metrics["loss"][0] == pytest.approx(sum(sums.values()), rel=1e-5)
    assert metrics["loss"][1] == metrics["loss/p_score"][1] == 6


def test_what_padding_holds_changes_neither_the_loss_nor_its_gradient(params):
    batch = _batch()
    assert (batch.short.item < 0).any() and (batch.short.item >= 0).any()
    given = poison(batch)
    given.feedback[given.target_item < 0] = 255
    (total, metrics), gradient = loss(params, batch, CATALOGUE, None)
    (other, other_metrics), other_gradient = loss(params, given, CATALOGUE, None)
    assert np.isfinite(other) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(other_gradient))
    _close((total, metrics, gradient), (other, other_metrics, other_gradient))


def test_padding_is_no_event_of_the_item_that_stands_in_for_it(params):
    batch, asked = _batch(), _asked()
    asked[asked == 0] = 1
    named = np.concatenate([batch.short.item.ravel(), asked.ravel()])
    assert (named == -1).any() and not (named == 0).any()
    other = CATALOGUE._replace(codes=CATALOGUE.codes.at[0].set(0), author=CATALOGUE.author.at[0].add(1))
    _close(score(params, batch, asked, other), score(params, batch, asked, CATALOGUE))


def test_what_is_not_known_of_a_target_has_no_gradient(params):
    batch = _batch()
    unknown = dataclasses.replace(batch, playtime_s=np.full((B, T), -1, np.float32))
    (_, metrics), gradient = loss(params, unknown, CATALOGUE, None)
    assert tuple(map(float, metrics["loss/playtime"])) == (0.0, 0.0)
    towers = len(LABELS)  # the head of playtime comes after those of the labels
    assert not np.any(gradient["heads"][towers]["kernel"]) and np.any(gradient["heads"][0]["kernel"])
    nobody = dataclasses.replace(batch, target_item=np.full((B, T), -1, np.int32))
    (total, _), gradient = loss(params, nobody, CATALOGUE, None)
    assert total == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_a_label_known_with_play_time_is_learnt_only_of_events_whose_play_time_is_known(params):
    batch = _batch()
    config = MODEL.config.model_copy(update={"known_with_playtime": ("click",)})
    model = dataclasses.replace(MODEL, config=config)
    (_, all_known), _ = loss(params, batch, CATALOGUE, None)
    (_, found), _ = jax.jit(jax.value_and_grad(make_reward_loss(model), has_aux=True))(params, batch, CATALOGUE, None)
    assert {name: int(found[f"loss/{name}"][1]) for name in (*LABELS, "playtime")} == {
        "click": 4, "like": 6, "hate": 6, "playtime": 4
    }  # fmt: skip
    assert 0 < found["loss/click"][0] < all_known["loss/click"][0]
    assert found["loss/like"] == all_known["loss/like"]
    unheard = MODEL.config.model_copy(update={"known_with_playtime": ("share",)})
    with pytest.raises(InputError, match=r"reward\.known_with_playtime names 'share'; this log has click, like, hate"):
        make_reward_loss(dataclasses.replace(MODEL, config=unheard))


def test_hate_is_learnt_by_its_own_tower_and_moves_the_fused_one_nowhere(params):
    batch = _batch()
    feedback = batch.feedback.copy()
    feedback[..., LABELS.index("hate")] ^= 1
    hated = dataclasses.replace(batch, feedback=feedback)
    (_, one), gradient = loss(params, batch, CATALOGUE, None)
    (_, other), other_gradient = loss(params, hated, CATALOGUE, None)
    assert {name for name in one if one[name][0] != other[name][0]} == {"loss", "loss/hate"}
    fused = [[g["projection"]["fused"], g["heads"][len(LABELS) + 1]] for g in (gradient, other_gradient)]
    _close(*fused)
    assert fused_weights(RewardConfig(), LABELS) == {"click": 1.0, "like": 1.0, "playtime": 1.0}


@pytest.mark.parametrize("name", ["hate", "likes"])
def test_a_label_that_cannot_be_in_the_fused_tower_is_refused_with_those_that_can(name):
    config = CONFIG.model_copy(update={"objectives": {"click": 1.0, name: 1.0}})
    said = f"^reward.objectives names '{name}'; this log has click, like, playtime$"
    with pytest.raises(InputError, match=said):
        make_reward_loss(build_reward(config, SIZES))


def test_the_score_of_a_candidate_does_not_depend_on_the_others(params):
    batch, asked = _batch(), _asked()
    whole = score(params, batch, asked, CATALOGUE)
    others = asked.copy()
    others[:, 1:] = np.random.default_rng(8).integers(0, ITEMS, (B, G - 1))
    others[:, 5] = -1
    assert np.array_equal(score(params, batch, others, CATALOGUE).fused[:, 0], whole.fused[:, 0])
    order = np.random.default_rng(9).permutation(G)
    _close(score(params, batch, asked[:, order], CATALOGUE), jax.tree.map(lambda x: x[:, order], whole))
    assert len(np.unique(np.asarray(whole.fused[0]).round(6))) > G / 2


def test_a_score_depends_on_what_was_watched_and_on_the_users_features_but_not_on_who_the_user_is(params):
    batch, asked = _batch(), _asked()
    before = np.asarray(score(params, batch, asked, CATALOGUE).fused)

    def after(**changes) -> np.ndarray:
        return np.asarray(score(params, dataclasses.replace(batch, **changes), asked, CATALOGUE).fused)

    user = batch.user.copy()
    user[:, 0] = (user[:, 0] + 1) % SIZES.users
    assert np.array_equal(after(user=user), before)
    user[:, 1] = (user[:, 1] + 1) % SIZES.user_features[0]
    assert (after(user=user) != before).all()
    watched = (batch.short.item >= 0).any(axis=1)
    assert watched.any() and not watched.all()
    for name in ("item", "age_s", "playtime_s", "feedback"):
        changed = np.array(getattr(batch.short, name))
        changed[batch.short.item >= 0] = {"item": 3, "age_s": 1e6, "playtime_s": 1e3, "feedback": 1}[name]
        moved = (after(short=dataclasses.replace(batch.short, **{name: changed})) != before).any(axis=1)
        assert np.array_equal(moved, watched), name


def test_projecting_the_whole_catalogue_or_the_rows_asked_for_gives_the_same_scores(params, monkeypatch):
    batch, asked = _batch(), _asked()
    few = jax.tree.map(lambda column: column[:100], CATALOGUE)  # all that the batch names
    projected = []
    plain = PScore._project
    monkeypatch.setattr(PScore, "_project", lambda self, c, row: projected.append(row.shape) or plain(self, c, row))
    shapes = {}
    for catalogue in (few, CATALOGUE):
        jax.eval_shape(lambda c: MODEL.bind(params)(batch, jnp.asarray(asked), c, None), catalogue)
        shapes[len(catalogue.codes)], projected = projected, []
    assert shapes == {100: [(100,)], ITEMS: [(B, G), (B, 6)]}
    _close(score(params, batch, asked, few), score(params, batch, asked, CATALOGUE))


def test_learnt_rewards_are_probabilities_by_name_and_nothing_for_what_is_no_item(params):
    batch, asked = _batch(), _asked()
    asked[0], asked[1, ::2] = -1, -1
    candidates = Candidates(CATALOGUE.codes[np.maximum(asked, 0)], jnp.asarray(asked), jnp.zeros((B, G)))
    found = rewards(params, batch, candidates)
    found = {name: np.asarray(found[name]) for name in reward_names(LABELS)}
    assert tuple(found) == ("p_score", "p_click", "p_like", "p_hate", "p_playtime")
    logits = score(params, batch, asked, CATALOGUE)
    for i, (name, value) in enumerate(found.items()):
        logit = np.asarray(logits.fused if name == "p_score" else logits.labels[..., i - 1], np.float64)
        assert value.shape == (B, G) and not np.any(value[asked < 0]), name
        assert ((value[asked >= 0] > 0) & (value[asked >= 0] < 1)).all(), name
        np.testing.assert_allclose(value[asked >= 0], 1 / (1 + np.exp(-logit[asked >= 0])), rtol=1e-4)


def test_a_log_without_labels_or_user_features_is_scored_by_play_time():
    sizes = dataclasses.replace(SIZES, labels=(), user_features=())
    model = build_reward(CONFIG.model_copy(update={"objectives": {}, "item_id": False}), sizes)
    batch = random_batch(tiny_model(short_length=6), dataclasses.replace(sizes, items=100), batch=2, targets=2)
    total, metrics = jax.jit(lambda: make_reward_loss(model)(model.init(0), batch, CATALOGUE, None))()
    assert set(metrics) == {"loss/playtime", "loss/p_score", "loss"}
    assert total == pytest.approx(float(metrics["loss/playtime"][0] + metrics["loss/p_score"][0]))
    assert metrics["loss/playtime"][1] == 4 and metrics["loss/p_score"][0] > 0


def test_a_small_batch_is_learnt_by_heart(params):
    batch, optimizer = _batch(), optax.adam(1e-2)
    state = optimizer.init(params)
    advance = jax.jit(lambda grads, state, params: _applied(optimizer.update(grads, state, params), params))
    history = []
    for _ in range(120):
        (_, metrics), gradient = loss(params, batch, CATALOGUE, None)
        history.append({name: float(s / w) for name, (s, w) in metrics.items()})
        params, state = advance(gradient, state, params)
    for name in LABELS:
        assert history[-1][f"loss/{name}"] < 0.02 < 0.4 < history[0][f"loss/{name}"], name
    played = batch.playtime_s[(batch.target_item >= 0) & (batch.playtime_s >= 0)].astype(float)
    share = np.clip(played / 50, 1e-9, 1 - 1e-9)
    least = np.mean([_bce(np.log(y / (1 - y)), y) for y in share])
    assert least < history[-1]["loss/playtime"] < least + 0.02, "a share cannot be met better than by itself"


def _applied(updated, params):
    updates, state = updated
    return optax.apply_updates(params, updates), state


def test_dropout_is_drawn_by_the_key_and_absent_without_one(params):
    assert CONFIG.dropout > 0
    batch, asked, keys = _batch(), _asked(), [jax.random.key(i) for i in range(2)]
    plain = score(params, batch, asked, CATALOGUE).fused
    one, other = (score(params, batch, asked, CATALOGUE, key).fused for key in keys)
    assert np.array_equal(one, score(params, batch, asked, CATALOGUE, keys[0]).fused)
    assert not np.array_equal(one, other) and not np.array_equal(one, plain)
