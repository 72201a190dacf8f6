"""The simulated A/B test: its users, their sessions, what the platform expects of them, and the intervals."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny import tiny_model

from onerec_jax.data.batch import make_batch
from onerec_jax.data.histories import Histories
from onerec_jax.data.prepare import history_records
from onerec_jax.data.records import decode
from onerec_jax.data.sources.simulator import (
    Platform,
    expected_feedback,
    expected_watch_time,
    fresh_log,
    make_platform,
    respond,
    stream,
)
from onerec_jax.data.sources.world import AGE_BANDS, DEVICES, make_users
from onerec_jax.data.store import Dataset
from onerec_jax.errors import InputError
from onerec_jax.evaluate import ab_test as module
from onerec_jax.evaluate.ab_metrics import measure
from onerec_jax.evaluate.ab_report import compare, write_report
from onerec_jax.evaluate.ab_sessions import SESSION_GAP_MS, Policy, Served, recommending, serve, truly_best
from onerec_jax.evaluate.ab_test import ab_test
from onerec_jax.evaluate.jackknife import Estimate, interval
from onerec_jax.evaluate.simulated_users import SimulatedUsers
from onerec_jax.generate.recommender import Recommender
from onerec_jax.model.onerec import build
from onerec_jax.tokenizer.semantic_ids import SemanticIds

USERS, SESSIONS, IMPRESSIONS = 12, 3, 4


@pytest.fixture(scope="module")
def dataset(tiny_recipe) -> Dataset:
    return Dataset(tiny_recipe.dataset_directory)


@pytest.fixture(scope="module")
def platform(tiny_recipe) -> Platform:
    return make_platform(tiny_recipe.data.source, tiny_recipe.seed)


@pytest.fixture(scope="module")
def fresh(platform):
    return fresh_log(platform, USERS)


@pytest.fixture(scope="module")
def recommender(tiny_recipe, dataset) -> Recommender:
    """All pathways, random parameters, heads large enough for lists that depend on the history."""
    ids, config = SemanticIds.load(tiny_recipe.tokenizer_directory), tiny_model(user_id=False)
    settings = tiny_recipe.evaluate.model_copy(update={"beam_width": 40, "batch_size": 8})
    recipe = tiny_recipe.model_copy(update={"model": config, "evaluate": settings})
    model = build(config, dataset.vocabulary(ids.codebook_sizes))
    params, tables = model.init(0)
    params["decoder"]["heads"] = jax.tree.map(lambda x: 5 * x, params["decoder"]["heads"])
    state = SimpleNamespace(params=params, tables=tables, bias=model.init_bias())
    return Recommender(Path(), recipe, dataset, ids, model, state)  # type: ignore[arg-type]


def with_settings(recommender: Recommender, section: str, **changes) -> Recommender:
    settings = getattr(recommender.recipe, section).model_copy(update=changes)
    return dataclasses.replace(recommender, recipe=recommender.recipe.model_copy(update={section: settings}))


class Watched:
    """A policy that notes what its users know whenever it is asked."""

    def __init__(self, policy: Policy, users: SimulatedUsers):
        self.policy, self.users = policy, users
        self.contexts, self.lists = [], []

    def __call__(self, k: int) -> np.ndarray:
        rows = np.arange(len(self.users))
        self.contexts.append([
            (h.item[:-1].copy(), h.timestamp_ms[:-1].copy(), h.timestamp_ms[-1]) for h in self.users.histories(rows)
        ])  # fmt: skip
        self.lists.append(self.policy(k))
        return self.lists[-1]


@pytest.fixture(scope="module")
def arm(recommender, dataset, platform, fresh) -> tuple[SimulatedUsers, Watched, Served]:
    """Sessions of fresh users with the model."""
    users = SimulatedUsers(dataset, fresh)
    watched = Watched(recommending(recommender, users), users)
    return users, watched, serve(watched, users, platform, SESSIONS, IMPRESSIONS, seed=7)


def at_random(users: SimulatedUsers, seed: int = 0) -> Policy:
    """Any items that may be shown."""
    rng = np.random.default_rng(seed)

    def choose(k: int) -> np.ndarray:
        rows, offsets = users.not_to_show
        lists = []
        for n in range(len(users)):
            left = np.setdiff1d(np.arange(len(users.item_ids)), rows[offsets[n] : offsets[n + 1]])
            lists.append(rng.permutation(left)[:k])
        return np.array(lists, np.int32)

    return choose


def test_fresh_users_come_with_what_the_platform_showed_them_until_train_ends(tiny_recipe, dataset, platform, fresh):
    source, users = tiny_recipe.data.source, SimulatedUsers(dataset, fresh)
    (log,) = stream(source, tiny_recipe.seed, 66_000, 66_000, platform)  # as far as the first cohort of fresh users
    positive = np.any([log[name] for name in tiny_recipe.data.positive_labels if name in log], axis=0)
    lengths = []
    for n, history in enumerate(users.histories(np.arange(USERS))):
        own = np.flatnonzero((log["user_id"] == source.users + n) & (log["timestamp_ms"] <= dataset.train_end_ms))
        assert (history.item[:-1] == log["item_id"][own]).all()
        assert (history.timestamp_ms[:-1] == log["timestamp_ms"][own]).all()
        np.testing.assert_allclose(history.playtime_s[:-1], log["playtime_ms"][own] / 1000, rtol=1e-6)
        assert (history.feedback[:-1] == np.stack([log[name][own] for name in dataset.labels], 1)).all()
        assert (history.positive[:-1] == positive[own]).all()
        lengths.append(len(own))
    assert min(lengths) > 3 and users.user_ids.tolist() == list(range(source.users, source.users + USERS))
    assert ((log["user_id"] >= source.users) & (log["timestamp_ms"] > dataset.train_end_ms)).any()


def test_features_of_fresh_users_have_the_codes_of_the_dataset(dataset, platform, fresh):
    users, world = SimulatedUsers(dataset, fresh), platform.world
    logged, fresh = make_users(world, np.arange(dataset.num_users)), make_users(world, users.user_ids)
    for f, (own, new, classes) in enumerate(
        [(logged.age_band, fresh.age_band, AGE_BANDS), (logged.device, fresh.device, DEVICES)]
    ):
        known = 0
        for kind in range(len(classes)):
            codes = set(dataset.user_features[own == kind, f].tolist()) or {0}
            assert set(users.user_features[new == kind, f].tolist()) <= codes and len(codes) == 1
            known += bool((new == kind).any())
        assert known > 1


def test_what_is_recorded_is_what_the_platform_expects_of_what_was_shown(arm, platform):
    _, watched, served = arm
    assert (served.item == np.stack(watched.lists)).all() and (served.item >= 0).all()
    for s, n, k in np.ndindex(served.item.shape):
        impression = platform, platform.world.source.users + n, served.item[s, n, k], served.request_ms[s, n]
        assert served.watch_s[s, n, k] == pytest.approx(float(expected_watch_time(*impression)))
        for name, chance in expected_feedback(*impression).items():
            assert served.chance[name][s, n, k] == pytest.approx(float(chance))


def test_a_place_left_empty_is_watched_by_nobody_and_enters_no_history(dataset, platform, fresh):
    users = SimulatedUsers(dataset, fresh)
    before = users.examples[:, 1]
    full = at_random(users)

    def gappy(k: int) -> np.ndarray:
        lists = full(k)
        lists[::2, 1:] = -1
        return lists

    served = serve(gappy, users, platform, 2, 3, 0)
    filled = served.item >= 0
    assert filled.sum() == 2 * (6 * 1 + 6 * 3) and (served.watch_s[filled] > 0).all()
    for values in (served.watch_s, *served.chance.values()):
        assert (values[~filled] == 0).all()
    assert (users.examples[:, 1] - before == filled.sum(axis=(0, 2))).all()


def test_nothing_is_shown_twice_or_before_its_upload(arm, dataset):
    users, _, served = arm
    for n, history in enumerate(users.histories(np.arange(USERS))):
        shown = served.item[:, n].ravel()
        shown = shown[shown >= 0]
        before = history.item[: len(history.item) - 1 - len(shown)]
        assert len(set(shown.tolist())) == len(shown) and not set(shown.tolist()) & set(before.tolist())
        assert (history.item[len(before) : -1] == shown).all()
    filled = served.item >= 0
    moments = np.broadcast_to(served.request_ms[:, :, None], filled.shape)[filled]
    assert (dataset.items.upload_ms[served.item[filled]] <= moments).all()
    assert (dataset.items.upload_ms > dataset.train_end_ms + SESSION_GAP_MS).any()


def test_what_is_not_to_be_shown_is_what_was_met_and_what_comes_later(dataset, fresh):
    users = SimulatedUsers(dataset, fresh)
    users.ask(dataset.train_end_ms + SESSION_GAP_MS)
    rows, offsets = users.not_to_show
    later = {item for item in range(dataset.num_items) if dataset.items.upload_ms[item] > users.request_ms[0]}
    for n, history in enumerate(users.histories(np.arange(USERS))):
        assert set(rows[offsets[n] : offsets[n + 1]].tolist()) == later | set(history.item[:-1].tolist())
    assert later and len(offsets) == USERS + 1


def test_histories_grow_in_time_order_and_every_context_ends_before_its_request(arm, dataset, recommender):
    users, watched, served = arm
    for session, contexts in enumerate(watched.contexts):
        for n, (items, times, request_ms) in enumerate(contexts):
            assert (np.diff(times) > 0).all() and times[-1] < request_ms == served.request_ms[session, n]
            if session:
                former = watched.contexts[session - 1][n][0]
                new = watched.lists[session - 1][n]
                assert items.tolist() == [*former.tolist(), *new[new >= 0].tolist()]
    assert (np.diff(served.request_ms, axis=0) >= SESSION_GAP_MS).all()
    assert (served.request_ms[0] == dataset.train_end_ms + SESSION_GAP_MS).all()
    ids, config = recommender.ids, recommender.recipe.model
    batch = make_batch(users, ids.codes, config, users.examples, 1, frozen=True)  # type: ignore[arg-type]
    for n, history in enumerate(users.histories(np.arange(USERS))):
        recent = history.timestamp_ms[:-1][-config.short_length :]
        np.testing.assert_allclose(batch.short.age_s[n], (users.request_ms[n] - recent) / 1000)
        assert (batch.short.item[n] == history.item[:-1][-config.short_length :]).all()


def test_videos_follow_one_another_as_long_as_they_are_watched(arm):
    users, _, served = arm
    for n, history in enumerate(users.histories(np.arange(USERS))):
        last = int((served.item[-1, n] >= 0).sum())
        times, played = history.timestamp_ms[:-1][-last:], history.playtime_s[:-1][-last:]
        assert times[0] == served.request_ms[-1, n]
        np.testing.assert_allclose(np.diff(times), 1000 * played[:-1] + 2000, atol=1)


def test_what_users_do_enters_their_histories_as_it_would_from_the_log(tiny_recipe, dataset, fresh):
    """Every label at random, so that some events are positive by one label alone; two places left empty."""
    users, rng = SimulatedUsers(dataset, fresh), np.random.default_rng(0)
    shown = rng.integers(0, 150, (USERS, 6))
    shown[2, 1] = shown[5, 5] = -1
    done = {label: rng.random(shown.shape) < 0.2 for label in dataset.labels}
    done |= {name: rng.integers(500, 90_000, shown.shape) for name in ("playtime_ms", "duration_ms")}
    users.watch(shown, done)
    for n, history in enumerate(users.histories(np.arange(USERS))):
        places = np.flatnonzero(shown[n] >= 0)
        new = slice(len(history.item) - 1 - len(places), -1)
        assert (history.item[new] == shown[n, places]).all()
        assert (history.feedback[new] == np.stack([done[label][n, places] for label in dataset.labels], 1)).all()
        positive = [done[label][n, places] for label in tiny_recipe.data.positive_labels]
        assert (history.positive[new] == np.any(positive, axis=0)).all()
        np.testing.assert_allclose(history.playtime_s[new], done["playtime_ms"][n, places] / 1000, rtol=1e-6)
        np.testing.assert_allclose(history.duration_s[new], done["duration_ms"][n, places] / 1000, rtol=1e-6)


def test_a_user_who_is_still_watching_asks_when_done(dataset, platform, fresh):
    users = SimulatedUsers(dataset, fresh)
    users.ask(dataset.train_end_ms + 1000)
    shown = at_random(users)(1)
    longest = {"playtime_ms": np.where(np.arange(USERS) == 3, 9_000_000, 500)[:, None]}
    rest = respond(platform, users.user_ids[:, None], shown, users.request_ms[:, None], np.random.default_rng(0))
    begun = users.request_ms
    users.watch(shown, {**rest, **longest})
    users.ask(dataset.train_end_ms + 1_000_000)
    assert users.request_ms[3] == begun[3] + 9_002_000
    assert (np.delete(users.request_ms, 3) == dataset.train_end_ms + 1_000_000).all()


def test_histories_that_grew_hold_the_clusters_of_histories_made_at_once(arm, tiny_recipe, dataset, fresh):
    """The dataset's own code on all events, the request left out."""
    users, _, _ = arm
    grown = users.histories(np.arange(USERS))
    events = [history.events[:-1] for history in grown]
    flat = np.concatenate(events)
    whole = Histories(
        0,
        np.cumsum([0, *map(len, events)]),
        flat["item"],
        flat["timestamp_ms"],
        flat["playtime_s"],
        flat["duration_s"],
        np.concatenate([history.feedback[:-1] for history in grown]),
        flat["positive"],
        np.zeros(len(flat), np.int32),
    )
    more = 0
    for history, record in zip(grown, history_records(whole, dataset.items.embedding, tiny_recipe.data), strict=True):
        expected = decode(record)
        assert history.snapshot_start.tolist() == expected.snapshot_start.tolist()
        assert history.clusters.tobytes() == expected.clusters.tobytes()
        assert history.rows[:-1].tobytes() == expected.rows.tobytes()
        more += len(expected.snapshot_start) > 1
    before = SimulatedUsers(dataset, fresh).histories(np.arange(USERS))
    assert more and any(len(a.clusters) < len(b.clusters) for a, b in zip(before, grown, strict=True))


def test_two_lists_for_the_same_users_meet_the_same_luck(platform):
    """The likelier click happens whenever the other one does; labels of a clicked item likewise."""
    rng, n = np.random.default_rng(0), 20_000
    users, time_ms = rng.integers(0, 60, n), 1_704_400_000_000
    lists = [rng.integers(0, 150, n) for _ in range(2)]
    chance = [expected_feedback(platform, users, items, time_ms) for items in lists]
    seen = [respond(platform, users, items, time_ms, np.random.default_rng(5)) for items in lists]
    for label in ("click", "long_view"):
        likelier = chance[0][label] >= chance[1][label]
        assert (seen[0][label] >= seen[1][label])[likelier].all()
    both = seen[0]["click"] & seen[1]["click"]
    for label in ("like", "profile_enter"):
        given = [chance[i][label] / chance[i]["click"] for i in range(2)]
        assert seen[0][label].any() and (seen[0][label] >= seen[1][label])[both & (given[0] >= given[1])].all()
    same = lists[0] == lists[1]
    assert same.any() and all((seen[0][name] == seen[1][name])[same].all() for name in seen[0])


def test_responses_happen_as_often_and_last_as_long_as_expected(platform):
    rng, n = np.random.default_rng(1), 60_000
    shown = rng.integers(0, 60, n), rng.integers(0, 150, n), 1_704_400_000_000
    seen = respond(platform, *shown, rng)
    for name, chance in expected_feedback(platform, *shown).items():
        deviation = (seen[name] - chance).sum() / np.sqrt((chance * (1 - chance)).sum())
        assert abs(deviation) < 4.5, name
    seconds = seen["playtime_ms"] / 1000
    difference = seconds - expected_watch_time(platform, *shown)
    assert abs(difference.mean() + 0.0005) < 4.5 * difference.std() / np.sqrt(n)
    assert not (seen["like"] & ~seen["click"]).any() and not (seen["hate"] & seen["click"]).any()
    assert (seen["duration_ms"] == (platform.world.duration_s[shown[1]] * 1000).astype(int)).all()


def test_a_run_against_itself_differs_by_exactly_nothing(recommender):
    result = ab_test({"A": recommender, "again": recommender}, USERS, 2, IMPRESSIONS)
    assert result.arms["A"] == result.arms["again"] and "12 fresh users" in result.protocol
    for change in result.changes["again"].values():
        assert change.absolute == (0, 0, 0) and change.percent == (0, 0, 0) and change.overlap


def test_another_seed_is_other_luck_for_the_same_lists(dataset, platform, fresh):
    grown = []
    for seed in (0, 0, 1):
        users = SimulatedUsers(dataset, fresh)
        serve(at_random(users), users, platform, 1, IMPRESSIONS, seed)
        grown.append([history.rows.tobytes() for history in users.histories(np.arange(USERS))])
    assert grown[0] == grown[1] != grown[2]


def test_users_begin_anew_with_every_arm(dataset, platform, fresh):
    users = SimulatedUsers(dataset, fresh)
    before = [history.rows.tobytes() for history in users.histories(np.arange(USERS))]
    served = [serve(at_random(users), users, platform, 2, IMPRESSIONS, 0) for _ in range(2)]
    assert (served[0].item == served[1].item).all() and (served[0].request_ms == served[1].request_ms).all()
    users.begin()
    assert [history.rows.tobytes() for history in users.histories(np.arange(USERS))] == before


def test_sessions_of_a_user_have_luck_of_their_own(dataset, platform, fresh, monkeypatch):
    draws = []

    def noted(platform, users, items, time_ms, rng):
        draws.append(rng.bit_generator.state["state"]["state"])
        return respond(platform, users, items, time_ms, rng)

    monkeypatch.setattr("onerec_jax.evaluate.ab_sessions.respond", noted)
    users = SimulatedUsers(dataset, fresh)
    serve(at_random(users), users, platform, 3, 2, 0)
    assert len(set(draws)) == 3


def test_an_arm_that_knows_the_truth_beats_a_random_one_beyond_the_intervals(dataset, platform):
    measured = {}
    for name in ("random", "oracle"):
        users = SimulatedUsers(dataset, fresh_log(platform, 40))
        policy = at_random(users)
        policy = policy if name == "random" else truly_best(policy, users, platform, 40)
        measured[name] = measure(serve(policy, users, platform, 2, 5, 0), dataset.items.author)
    result = compare(measured, "")
    watched = result.changes["oracle"]["watch s"]
    assert not watched.overlap and watched.percent is not None and watched.percent.low > 10
    assert result.arms["oracle"]["watch s"].low > result.arms["random"]["watch s"].high


def test_the_best_of_n_are_the_truly_longest_watched_of_the_first_n_candidates(dataset, platform, fresh):
    users = SimulatedUsers(dataset, fresh)
    users.ask(dataset.train_end_ms + 1000)
    candidates = at_random(users)(9)
    candidates[2, 3:] = -1
    asked = []
    found = truly_best(lambda k: asked.append(k) or candidates, users, platform, 9)(4)
    assert asked == [9]
    for n, own in enumerate(candidates):
        seconds = {
            item: float(expected_watch_time(platform, users.user_ids[n], item, users.request_ms[n]))
            for item in own[own >= 0].tolist()
        }
        best = sorted(seconds, key=lambda item: -seconds[item])[:4]
        assert found[n].tolist() == best + [-1] * (4 - len(best))


def test_the_bound_stands_beside_the_runs_and_is_above_the_first(recommender, monkeypatch):
    monkeypatch.setattr(module, "recommending", lambda run, users: at_random(users))
    bounded = ab_test({"A": recommender}, USERS, 1, IMPRESSIONS, best_of=24)
    assert list(bounded.arms) == ["A", "true best of 24"]
    change = bounded.changes["true best of 24"]["watch s"]
    assert change.absolute.low > 0


@pytest.fixture(scope="module")
def invented() -> list[tuple[Served, np.ndarray]]:
    """Two arms with a few lists of made-up values, some places empty; 300 items of 250 authors."""
    rng, author = np.random.default_rng(0), np.arange(300) % 250
    arms = []
    for popular in (60, 120):
        item = rng.integers(0, popular, (2, 15, 4)).astype(np.int32)
        item[rng.random(item.shape) < 0.1] = -1
        filled = item >= 0
        watch = rng.gamma(2.0, 4.0, item.shape) * filled
        arms.append((Served(item, np.zeros((2, 15)), watch, {"like": rng.random(item.shape) * 0.1 * filled}), author))
    return arms


def by_hand(served: Served, author: np.ndarray, users: list[int]) -> dict[str, float]:
    """The metrics of some users, counted one by one."""
    item = served.item[:, users].ravel()
    shown = item[item >= 0].tolist()
    authors = sorted(Counter(author[shown].tolist()).values())
    return {
        "watch s": served.watch_s[:, users].mean(),
        "like": served.chance["like"][:, users].mean(),
        "filled": len(shown) / len(item),
        "coverage": len(set(shown)) / len(author),
        "top 1% authors": sum(authors[-3:]) / len(shown),
    }


def test_metrics_with_and_without_each_user_are_those_counted_by_hand(invented):
    for served, author in invented:
        found = measure(served, author)
        assert {name: e.value for name, e in found.items()} == pytest.approx(by_hand(served, author, list(range(15))))
        for n in range(15):
            rest = by_hand(served, author, [user for user in range(15) if user != n])
            assert {name: e.without[n] for name, e in found.items()} == pytest.approx(rest)


def test_intervals_of_means_and_paired_differences_are_196_standard_errors(invented):
    (one, author), (two, _) = invented
    result = compare({"A": measure(one, author), "B": measure(two, author)}, "")
    a, b = one.watch_s.mean(axis=(0, 2)), two.watch_s.mean(axis=(0, 2))
    for (value, low, high), sample in (
        (result.arms["A"]["watch s"], a),
        (result.arms["B"]["watch s"], b),
        (result.changes["B"]["watch s"].absolute, b - a),
    ):
        half = 1.96 * np.std(sample, ddof=1) / np.sqrt(15)
        assert (value, low, high) == pytest.approx((sample.mean(), sample.mean() - half, sample.mean() + half))


def test_the_interval_of_a_relative_change_is_the_delta_methods_for_many_users():
    rng = np.random.default_rng(0)
    a = rng.gamma(3.0, 2.0, 4000)
    b = 1.1 * a + rng.gamma(2.0, 1.0, 4000)

    def mean(values: np.ndarray) -> Estimate:
        return Estimate(values.mean(), (values.sum() - values) / (len(values) - 1))

    change = compare({"A": {"x": mean(a)}, "B": {"x": mean(b)}}, "").changes["B"]["x"].percent
    ratio = b.mean() / a.mean()
    half = 100 * 1.96 * np.std(b - ratio * a, ddof=1) / a.mean() / np.sqrt(4000)
    assert change is not None and change.value == pytest.approx(100 * (ratio - 1))
    assert change.high - change.value == pytest.approx(half, rel=2e-3)


def test_intervals_of_all_metrics_are_the_jackknifes(invented):
    (served, author), _ = invented
    whole = by_hand(served, author, list(range(15)))
    without = [by_hand(served, author, [user for user in range(15) if user != n]) for n in range(15)]
    for name, estimate in measure(served, author).items():
        values = np.array([rest[name] for rest in without])
        half = 1.96 * np.sqrt(14 / 15 * np.square(values - values.mean()).sum())
        assert interval(lambda x: x, estimate) == pytest.approx((whole[name], whole[name] - half, whole[name] + half))


def test_arms_whose_intervals_touch_are_told_from_those_that_are_apart():
    def around(value: float, half: float) -> dict[str, Estimate]:
        spread = half / 1.96 / np.sqrt(2 - 1)
        return {"x": Estimate(value, np.array([value - spread, value + spread]))}

    changes = compare(
        {"A": around(5, 1), "near": around(6.9, 1), "far": around(7.1, 1), "low": around(2.9, 1)}, ""
    ).changes
    assert [changes[arm]["x"].overlap for arm in ("near", "far", "low")] == [True, False, False]


def test_a_change_from_nothing_has_no_percentage(tmp_path):
    nothing, some = Estimate(0.0, np.zeros(3)), Estimate(2.0, np.array([1.0, 2.0, 3.0]))
    result = compare({"A": {"x": nothing, "y": some}, "B": {"x": some, "y": some}}, "p")
    assert result.changes["B"]["x"].percent is None and result.changes["B"]["x"].absolute.value == 2
    write_report(result, tmp_path)
    assert json.loads((tmp_path / "ab_test.json").read_text())["changes"]["B"]["x"]["percent"] is None


def test_an_empty_arm_has_values_too():
    empty = Served(np.full((1, 3, 2), -1, np.int32), np.zeros((1, 3)), np.zeros((1, 3, 2)), {})
    assert {name: e.value for name, e in measure(empty, np.arange(9)).items()} == dict.fromkeys(
        ("watch s", "filled", "coverage", "top 1% authors"), 0
    )


def test_the_report_says_what_the_result_does_and_loads_nothing(invented, tmp_path):
    (one, author), (two, _) = invented
    result = compare({"base": measure(one, author), "<new>": measure(two, author)}, "30 users & more")
    page = write_report(result, tmp_path / "report").read_text()
    found = json.loads((tmp_path / "report" / "ab_test.json").read_text())
    assert found["protocol"] == result.protocol
    for metric, value in result.arms["base"].items():
        assert found["arms"]["base"][metric] == value._asdict() and f"{value.value:.4g} ±" in page
    for metric, change in result.changes["<new>"].items():
        assert change.percent is not None
        assert found["changes"]["<new>"][metric] == {
            "absolute": change.absolute._asdict(), "percent": change.percent._asdict(), "overlap": change.overlap,
        }  # fmt: skip
        cell = f"{change.percent.value:+.2f} % [{change.percent.low:+.2f}, {change.percent.high:+.2f}]"
        assert f"{cell}{'' if change.overlap else ' *'}<" in page
    assert not all(change.overlap for change in result.changes["<new>"].values())
    assert (tmp_path / "report" / "ab_test.png").read_bytes().startswith(b"\x89PNG")
    assert "&lt;new&gt; against base" in page and "<new>" not in page and "http://" not in page and 'src="data:' in page
    table = result.table()
    assert table.row_count == len(result.arms["base"]) and len(table.columns) == 4


@pytest.mark.parametrize(
    ("section", "changes", "asked", "says"),
    [
        (
            "model",
            {"user_id": True},
            {},
            "B has no embedding for users that are not in its log; .* model.user_id=false",
        ),
        ("evaluate", {"label_shift_days": 2.0}, {}, "B has evaluate.label_shift_days 2.0"),
        ("evaluate", {}, {"users": 1}, "at least 2 users, not 1"),
        ("evaluate", {}, {"sessions": 0}, "at least 1 sessions, not 0"),
        ("evaluate", {}, {"impressions": 0}, "at least 1 impressions, not 0"),
        ("evaluate", {}, {"impressions": 5, "best_of": 4}, "the best of 4 candidates cannot fill 5 impressions"),
        ("evaluate", {}, {"best_of": 41}, "A has evaluate.beam_width 40"),
    ],
)
def test_what_cannot_be_tested_is_refused_in_one_sentence(recommender, section, changes, asked, says, monkeypatch):
    monkeypatch.setattr(module, "make_platform", None)
    other = with_settings(recommender, section, **changes)
    with pytest.raises(InputError, match=says):
        ab_test({"A": recommender, "B": other}, **asked)


def test_one_run_alone_is_refused(recommender):
    with pytest.raises(InputError, match="compares two runs or more, and was given 1"):
        ab_test({"A": recommender})


@pytest.mark.parametrize(
    ("entry", "value", "says"),
    [
        ("seed", 5, "the seed of .* is 5, not 0"),
        ("train_end_ms", 9, "the train_end_ms of .* is 9, not"),
        ("source", {"kind": "simulator", "users": 61}, "A and B are not of one log: the source of"),
        ("source", {"kind": "amazon", "path": "x"}, "B is of a log of amazon, whose users nobody can ask"),
    ],
)
def test_runs_of_other_logs_are_refused(recommender, dataset, entry, value, says):
    foreign = SimpleNamespace(directory=dataset.directory, card={**dataset.card, entry: value})
    other = dataclasses.replace(recommender, dataset=foreign)
    with pytest.raises(InputError, match=says):
        ab_test({"A": recommender, "B": other})
