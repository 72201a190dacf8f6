"""What the server makes of a user or of a history in JSON, against the features that evaluation reads from the dataset."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from served import exported, offline_features, offline_lists, recommender_of
from tiny import ALONE, SHAPES, tiny_model

from onerec_jax.config import Recipe
from onerec_jax.data.batch import make_batch
from onerec_jax.data.schema import Batch
from onerec_jax.export import contents
from onerec_jax.generate.step import ListOptions
from onerec_jax.model.batch import pathways
from onerec_jax.serve.engine import Engine, Shape, features
from onerec_jax.serve.released import Released, load_released
from onerec_jax.serve.requests import MAX_LEFT_OUT, Limits, Query, Refused, describe, parse, resolve

LIMITS = Limits((8,), 5)
FOUR_PATHWAYS = {"moe": {"experts": 4, "active": 2, "hidden": 16, "tile": 8}}


def query(released: Released, **body) -> Query:
    return resolve(parse(json.dumps(body).encode()), released, LIMITS)


def history_of(released: Released, user: int | str) -> list[dict]:
    """What a caller sends to ask for a sample user without naming it."""
    history = describe(released.users[str(user)], released)["history"]
    return [{name: value for name, value in event.items() if name != "title"} for event in history]


def check_same(served: Batch, offline: Batch, *, user_rows: bool = True) -> None:
    np.testing.assert_array_equal(served.user[:, 0 if user_rows else 1 :], offline.user[:, 0 if user_rows else 1 :])
    np.testing.assert_array_equal(served.visible, offline.visible)
    assert pathways(served).keys() == pathways(offline).keys()
    for name, events in pathways(served).items():
        jax.tree.map(np.testing.assert_array_equal, events, pathways(offline)[name])


@pytest.mark.parametrize("changes", [FOUR_PATHWAYS, *SHAPES.values()], ids=["four pathways", *SHAPES])
def test_features_of_sample_users_are_those_of_the_dataset(changes: dict, tiny_recipe: Recipe, tmp_path: Path):
    recommender = recommender_of(tiny_recipe, tiny_model(**changes))
    released = load_released(exported(recommender, tmp_path / "export"))
    assert len(released.samples) == 20
    offline = offline_features(recommender, [user.row for user in released.samples])
    check_same(features([query(released, user=user.id) for user in released.samples], released), offline)
    histories = [
        query(released, history=history_of(released, user.id), user_features=user.features.tolist())
        for user in released.samples
    ]
    check_same(features(histories, released), offline, user_rows=False)


def test_what_a_sample_user_did_before_the_events_of_the_export_still_counts(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An export that keeps seven events, of users whose lifelong clusters and positive events reach further back."""
    monkeypatch.setattr(contents, "EVENTS", 1)
    recommender = recommender_of(tiny_recipe, tiny_model())
    released = load_released(exported(recommender, tmp_path / "export"))
    assert max(len(user.events) for user in released.samples) == 7
    offline = offline_features(recommender, [user.row for user in released.samples])
    check_same(features([query(released, user=user.id) for user in released.samples], released), offline)
    for user in released.samples:
        seen = recommender.dataset.history(user.row).item
        assert query(released, user=user.id, exclude_seen=True).exclude.tolist() == np.unique(seen).tolist()


def test_ages_count_up_to_the_time_of_the_request(released: Released, recommender):
    """As they do for a test example, whose first target has that time."""
    examples = np.asarray(recommender.dataset.examples("test")[:8])
    examples = examples[examples[:, 1] == examples[:, 2]]
    assert len(examples)
    queries = []
    for row, cut, start, _ in examples.tolist():
        history, item_ids = recommender.dataset.history(row), recommender.dataset.item_ids
        past = [
            {
                "item": int(item_ids[event["item"]]),
                "timestamp_ms": int(event["timestamp_ms"]),
                "playtime_s": float(event["playtime_s"]) if event["playtime_s"] >= 0 else None,
                "duration_s": float(event["duration_s"]) if event["duration_s"] >= 0 else None,
                "feedback": [released.labels[y] for y in np.flatnonzero(history.feedback[n])],
            }
            for n, event in enumerate(history.events[:cut])
        ]
        request_ms = int(history.timestamp_ms[start])
        queries.append(query(released, history=past[::-1], request_ms=request_ms))
    offline = make_batch(recommender.dataset, recommender.ids.codes, recommender.recipe.model, examples, 1, frozen=True)
    served = features(queries, released)
    jax.tree.map(np.testing.assert_array_equal, served.short, offline.short)


def test_an_event_without_a_duration_has_that_of_its_item(released: Released):
    event = {"item": released.item_ids[3], "timestamp_ms": 5}
    found = query(released, history=[event, {**event, "duration_s": 7.5}]).events
    assert found["duration_s"].tolist() == [released.duration_s[3], 7.5]


def test_a_stranger_is_the_mean_of_all_users(recommender, released: Released):
    known = np.asarray(recommender.state.tables["user"]["rows"])
    rows = np.asarray(released.tables["user"]["rows"])
    stranger = query(released, history=[]).user
    np.testing.assert_array_equal(rows[: len(known)], known)
    np.testing.assert_allclose(rows[stranger], known.mean(axis=0), atol=1e-7)


def test_more_seen_items_than_a_search_can_leave_out_are_refused(released: Released):
    user = dataclasses.replace(released.samples[0], id=-1, seen=np.arange(MAX_LEFT_OUT + 1))
    crowded = dataclasses.replace(released, samples=[user])
    with pytest.raises(Refused, match="exclude_seen: 8193 items were seen"):
        query(crowded, user=-1, exclude_seen=True)
    assert not len(query(crowded, user=-1, exclude_seen=False).exclude)


LISTS = {
    "four pathways": (FOUR_PATHWAYS, 0.0, False),
    "both heads": ({**ALONE, "head": "both", "causal": True, "softmax": "legal"}, 0.5, False),
    "an item head": ({**ALONE, "head": "items"}, 0.0, True),
    "codes alone": (ALONE, 1.0, True),
}


@pytest.mark.parametrize(("changes", "diversity", "limited"), LISTS.values(), ids=list(LISTS))
def test_served_lists_are_those_of_the_step_offline(
    changes: dict, diversity: float, limited: bool, tiny_recipe: Recipe, tmp_path: Path
):
    """Three users in a batch padded to four, with a list of what may be listed where `limited` says so."""
    recommender = recommender_of(tiny_recipe, tiny_model(**changes))
    released = load_released(exported(recommender, tmp_path / "export", users=3))
    rows = [user.row for user in released.samples]
    kept = list(range(0, recommender.dataset.num_items, 2)) if limited else None
    options = ListOptions(8, 8, diversity=diversity)
    expected = offline_lists(recommender, rows, options, kept)
    allow = {"allow": [released.item_ids[row] for row in kept]} if kept else {}
    queries = [
        query(released, user=u.id, k=8, diversity=diversity, exclude_seen=True, **allow) for u in released.samples
    ]
    engine = Engine(released, (4,))
    assert engine.shape(queries) == Shape(engine.kind(queries[0]), 4, 64, 1024 if limited else 0)
    engine.compile(engine.shape(queries))
    for n, answer in enumerate(engine.run(queries)):
        count = int((expected.items[n] >= 0).sum())
        assert count and answer.items.tolist() == expected.items[n, :count].tolist()
        np.testing.assert_allclose(answer.scores, expected.scores[n, :count], atol=1e-4)
