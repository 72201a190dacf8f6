"""The simulated platform: reproducible, calibrated, its expectations true, its exposures like a short-video feed's."""

from __future__ import annotations

from functools import cache

import numpy as np
import polars as pl
import pytest

from onerec_jax.config import SimulatorSource
from onerec_jax.data.sources import exposure, response, world
from onerec_jax.data.sources.simulator import (
    Platform,
    expected_feedback,
    expected_watch_time,
    make_platform,
    stream,
    tables,
)
from onerec_jax.data.sources.titles import topic_name

SMALL = SimulatorSource(users=40, items=300, events_per_user=30.0, days=6, topics=8, embedding_dim=16)


@cache
def default_platform() -> Platform:
    return make_platform(SimulatorSource(), 0)


@cache
def default_events() -> pl.DataFrame:
    source = SimulatorSource()
    count = int(world.make_users(default_platform().world, np.arange(source.users)).events.sum())
    (chunk,) = stream(source, 0, count, count, default_platform())
    return pl.DataFrame(chunk)


def test_the_same_source_and_seed_give_identical_tables() -> None:
    one, two, other = tables(SMALL, 3), tables(SMALL, 3), tables(SMALL, 4)
    assert one.events.equals(two.events) and one.items.equals(two.items) and one.users.equals(two.users)
    assert not one.events.equals(other.events) and not one.items.equals(other.items)


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("users", 41, "users"),
        ("items", 301, "items"),
        ("events_per_user", 31.0, "events"),
        ("days", 7, "events"),
        ("topics", 9, "items"),
        ("embedding_dim", 17, "items"),
        ("drift", 0.5, "events"),
    ],
)
def test_every_setting_changes_the_tables(field: str, value: float, part: str) -> None:
    base, changed = tables(SMALL, 0), tables(SMALL.model_copy(update={field: value}), 0)
    assert not getattr(base, part).equals(getattr(changed, part))


def test_settings_mean_what_they_say() -> None:
    made = tables(SMALL, 0)
    events, items = pl.DataFrame(made.events), pl.DataFrame(made.items)
    assert items.height == 300 and made.users.num_rows == 40
    assert items["embedding"].dtype == pl.Array(pl.Float32, 16)
    assert {tags[0] for tags in items["tags"]} <= {topic_name(k) for k in range(8)}
    assert events["timestamp_ms"].min() >= world.START_MS  # type: ignore[operator]
    assert events["timestamp_ms"].max() < world.START_MS + 7 * 86_400_000  # type: ignore[operator]
    assert default_events().height / default_events()["user_id"].n_unique() == pytest.approx(80, rel=0.05)


def test_a_user_meets_no_item_before_its_upload_and_hardly_any_twice() -> None:
    events = default_events()
    uploaded_ms = world.START_MS + default_platform().world.upload_s * 1000.0
    assert (events["timestamp_ms"].to_numpy() >= uploaded_ms[events["item_id"].to_numpy()] - 1).all()
    assert events.select("user_id", "item_id").is_duplicated().mean() < 0.02  # type: ignore[operator]
    steps = events.group_by("user_id", maintain_order=True).agg(pl.col("timestamp_ms").diff().min())["timestamp_ms"]
    assert steps.drop_nulls().min() > 0  # type: ignore[operator]


@pytest.mark.parametrize("label", list(response.MARGINALS))
def test_expected_marginals_over_the_stream_are_those_of_kuairand(label: str) -> None:
    events = default_events()
    columns = (events[name].to_numpy() for name in ("user_id", "item_id", "timestamp_ms"))
    mean = expected_feedback(default_platform(), *columns)[label].mean()
    assert mean == pytest.approx(response.MARGINALS[label], rel=0.08 if label not in ("click", "long_view") else 0.04)


@pytest.mark.parametrize("label", ["click", "long_view"])
def test_frequent_labels_of_the_stream_are_within_five_percent_of_kuairand(label: str) -> None:
    assert default_events()[label].mean() == pytest.approx(response.MARGINALS[label], rel=0.05)


def test_labels_of_the_stream_happen_as_often_as_expected() -> None:
    events = default_events()
    columns = [events[name].to_numpy() for name in ("user_id", "item_id", "timestamp_ms")]
    for name, chance in expected_feedback(default_platform(), *columns).items():
        deviation = (events[name].to_numpy() - chance).sum() / np.sqrt((chance * (1 - chance)).sum())
        assert abs(deviation) < 4.5, name


def test_play_time_of_the_stream_is_as_long_as_expected_in_every_tier() -> None:
    events = default_events()
    columns = [events[name].to_numpy() for name in ("user_id", "item_id", "timestamp_ms")]
    expected = expected_watch_time(default_platform(), *columns)
    played = events["playtime_ms"].to_numpy() / 1000.0
    tier = np.digitize(expected, np.quantile(expected, [0.25, 0.5, 0.75]))
    for row in range(4):
        here = tier == row
        error = (played[here] - expected[here]).std() / np.sqrt(here.sum())
        assert abs(played[here].mean() - expected[here].mean()) < 4.5 * error


def test_one_response_drawn_many_times_has_its_closed_form_mean() -> None:
    rng, count = np.random.default_rng(0), 200_000
    intercepts = default_platform().intercepts | {"like": -1.0, "hate": -1.0}
    attraction, duration_s = np.full(count, 0.7), np.full(count, 40.0)
    click, long_view, played = response.draw_view(rng, attraction, duration_s, intercepts)
    labels = {"click": click, "long_view": long_view} | response.draw_feedback(rng, click, attraction, intercepts)
    chances = response.probabilities(attraction[:1], duration_s[:1], intercepts)
    for name in ("click", "long_view", "like", "hate"):
        assert labels[name].mean() == pytest.approx(chances[name][0], abs=0.005)
    assert played.mean() == pytest.approx(response.mean_play_s(attraction[:1], duration_s[:1], intercepts)[0], rel=0.01)
    assert not (labels["like"] & ~click).any() and not (labels["hate"] & click).any() and not (long_view & ~click).any()


def test_a_user_alone_is_the_same_as_in_a_crowd() -> None:
    platform = default_platform()
    crowd = world.make_users(platform.world, np.arange(50))
    alone = world.make_users(platform.world, np.array([37]))
    np.testing.assert_allclose(alone.interest[0], crowd.interest[37], rtol=1e-5)
    np.testing.assert_array_equal(alone.taste[0], crowd.taste[37])
    moment = world.START_MS + 3 * 86_400_000
    items = np.arange(200)
    grid = expected_watch_time(platform, np.arange(50)[:, None], items, moment)
    np.testing.assert_allclose(grid[37], expected_watch_time(platform, np.array(37), items, moment), rtol=1e-5)


def test_interests_drift_by_day_only_when_told_to() -> None:
    ids = np.arange(400)
    fixed = world.make_users(world.make_world(SMALL.model_copy(update={"drift": 0.0}), 0), ids).interest
    moving = world.make_users(world.make_world(SMALL.model_copy(update={"drift": 0.3}), 0), ids).interest
    np.testing.assert_array_equal(fixed[:, 0], fixed[:, -1])
    steps = np.diff(np.log(moving), axis=1)
    steps -= steps.mean(axis=2, keepdims=True)  # the softmax takes the mean out
    assert steps.std() == pytest.approx(0.3 * np.sqrt(7 / 8), rel=0.05)


def test_a_stream_cut_into_chunks_is_the_stream_and_goes_on_past_the_last_user() -> None:
    whole = next(stream(SMALL, 1, 3_000, 3_000))
    parts = list(stream(SMALL, 1, 3_000, 700))
    assert [len(part["user_id"]) for part in parts] == [700, 700, 700, 700, 200]
    for name in whole:
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])
    assert whole["user_id"].max() >= SMALL.users
    ours = pl.DataFrame(whole).filter(pl.col("user_id") < SMALL.users)
    logged = pl.DataFrame(tables(SMALL, 1).events)
    order = ["user_id", "timestamp_ms"]
    assert ours.sort(order).equals(logged.sort(order))


def test_exposure_decays_with_age_and_has_a_long_tail() -> None:
    events, catalogue = default_events(), default_platform().world
    item = events["item_id"].to_numpy()
    age_days = (events["timestamp_ms"].to_numpy() - world.START_MS) / 86.4e6 - catalogue.upload_s[item] / world.DAY_S
    shown, _ = np.histogram(age_days, bins=[0, 2, 4, 6])
    assert shown[0] > 1.4 * shown[1] > 1.4 * 1.4 * shown[2] > 0
    counts = np.sort(np.bincount(item, minlength=catalogue.source.items))[::-1]
    assert 0.4 < counts[: len(counts) // 5].sum() / counts.sum() < 0.9


def test_topics_and_items_are_shown_as_often_as_the_exposure_model_says() -> None:
    platform = default_platform()
    rng, count, now_s = np.random.default_rng(1), 60_000, 9 * world.DAY_S
    user = world.make_users(platform.world, np.array([5]))
    interest, taste, anchor = user.interest[0, 9], user.taste[0], 2
    topic, explores = exposure.choose_topics(
        rng,
        platform.world,
        np.cumsum(interest)[None],
        np.zeros(count, dtype=np.int64),
        np.full(count, anchor),
        np.full(count, exposure.AFTER_CLICK),
    )
    item, match = exposure.choose_items(
        rng,
        platform.world,
        platform.shelves,
        topic,
        explores,
        np.full(count, now_s),
        np.tile(taste, (count, 1)),
        np.zeros((count, 1), dtype=bool),
    )
    chance = exposure.exposure_probability(
        platform.world, interest.astype(float), taste, anchor, exposure.AFTER_CLICK, now_s
    )
    assert chance.sum() == pytest.approx(1.0)
    expected = np.bincount(platform.world.topic, chance)
    found = np.bincount(topic, minlength=platform.world.topics) / count
    assert np.abs(found - expected).max() < 0.01
    often = np.argsort(-chance)[:200]
    shown = np.bincount(item, minlength=len(chance)) / count
    assert np.corrcoef(shown[often], chance[often])[0, 1] > 0.98
    np.testing.assert_allclose(match, exposure.style_match(taste, platform.world.style[item]), rtol=1e-5)


def test_shelves_draw_by_weight_among_what_is_uploaded() -> None:
    """Against sampling by explicit weights: popularity halved every two days since the upload."""
    platform = make_platform(SimulatorSource(items=60, topics=2, users=5), 0)
    small, now_s, count = platform.world, 6 * world.DAY_S, 80_000
    zeros = np.zeros(count, dtype=np.int64)
    item, _ = exposure.choose_items(
        np.random.default_rng(0),
        small,
        platform.shelves,
        zeros,
        zeros > 0,
        np.full(count, now_s),
        np.zeros((count, world.STYLE), dtype=np.float32),
        np.zeros((count, 1), dtype=bool),
    )
    steady = small.popularity * (small.topic == 0) * (small.upload_s <= now_s)
    fresh = steady * 0.5 ** ((now_s - small.upload_s) / world.HALF_LIFE_S)
    share = exposure.STEADY / exposure.CANDIDATES
    expected = share * steady / steady.sum() + (1 - share) * fresh / fresh.sum()
    np.testing.assert_allclose(np.bincount(item, minlength=60) / count, expected, atol=0.006)


def test_the_embedding_tells_topics_apart() -> None:
    catalogue = default_platform().world
    vectors = catalogue.embedding - catalogue.embedding.mean(axis=0)
    centres = np.stack([vectors[catalogue.topic == k].mean(axis=0) for k in range(catalogue.topics)])
    nearest = ((vectors[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == catalogue.topic).mean() > 0.7


def test_titles_are_readable_and_name_their_topic() -> None:
    items = tables(SMALL, 0).items
    assert len(set(items["text"].to_pylist())) > 100
    assert all(len(text.split()) >= 4 for text in items["text"].to_pylist())


def test_a_tiny_platform_runs() -> None:
    made = tables(SimulatorSource(users=3, items=2, topics=5, days=1, events_per_user=30.0), 0)
    assert made.events.num_rows > 30
