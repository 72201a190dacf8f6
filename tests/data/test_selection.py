"""Which requests and targets are kept for their play time, against a plain reading of the histories."""

import dataclasses
import math

import numpy as np
import pyarrow as pa
import pytest
from test_pipeline import arrays_of, assert_same, codes_for, logs, recipe  # noqa: F401

from onerec_jax.data.pipeline import Pipeline
from onerec_jax.data.selection import least_playtime, longest_watched

SHARES = (0.25, 0.5, 0.75)


def least_of(times, share):
    """The shortest of those kept, when the shortest are dropped as long as more than `share` of the others stays."""
    times = sorted(times)
    return times[math.floor((1 - share) * (len(times) - 1))]


def plain_thresholds(entries, share, per):
    """The play time that each (user, seconds) must reach."""
    return [least_of([t for u, t in entries if per == "all" or u == user], share) for user, _ in entries]


def plainly_kept(dataset, share, per):
    """(user, cut, start, stop) of the train requests that stay."""
    examples = dataset.examples("train").tolist()
    entries = []
    for user, _, start, stop in examples:
        times = dataset.history(user).playtime_s[start:stop].tolist()
        entries.append((user, float(np.sum([t for t in times if t >= 0], dtype=np.float32))))
    limits = plain_thresholds(entries, share, per)
    return [row for row, (_, time), limit in zip(examples, entries, limits, strict=True) if time >= limit]


def plain_least(dataset, share, per):
    """User -> what a target must have been played, of users with a known play time in train."""
    entries = []
    for user in range(dataset.num_users):
        times = dataset.history(user).playtime_s[: dataset.train_stop(user)].tolist()
        entries += [(user, time) for time in times if time >= 0]
    return {user: limit for (user, _), limit in zip(entries, plain_thresholds(entries, share, per), strict=True)}


def timed(tables, playtime_ms):
    """The same log with other play times, one of each event."""
    place = tables.events.column_names.index("playtime_ms")
    events = tables.events.set_column(place, "playtime_ms", pa.array(playtime_ms, pa.int64()))
    return dataclasses.replace(tables, events=events)


@pytest.mark.parametrize("per", ["user", "all"])
@pytest.mark.parametrize("share", SHARES)
def test_the_requests_watched_longest_stay_in_their_order(logs, share, per):  # noqa: F811
    for seed in range(3):
        dataset = logs(seed)
        examples = dataset.examples("train")
        kept = longest_watched(dataset, examples, share, per)
        assert kept.tolist() == plainly_kept(dataset, share, per)
        assert share * len(examples) <= len(kept) < len(examples)


@pytest.mark.parametrize("per", ["user", "all"])
@pytest.mark.parametrize("share", SHARES)
def test_the_least_play_time_is_of_known_play_times_of_train(logs, share, per):  # noqa: F811
    for seed in range(3):
        dataset = logs(seed)
        lengths = [len(dataset.history(user).item) for user in range(dataset.num_users)]
        assert (dataset.train_stops < lengths).any()
        found = least_playtime(dataset, share, per)
        assert found is not None and found.shape == (dataset.num_users,)
        expected = plain_least(dataset, share, per)
        assert len(expected) > 3
        for user, limit in expected.items():
            assert found[user] == limit
        assert (len(set(found.tolist())) == 1) == (per == "all")


def test_a_user_without_play_times_has_the_limit_of_all_or_none(noise_tables, write):
    tables = noise_tables()
    rows = tables.events.select(["user_id", "playtime_ms"]).to_pylist()
    dataset = write(timed(tables, [None if row["user_id"] == "u4" else row["playtime_ms"] for row in rows]))
    for per in ("user", "all"):
        found, expected = least_playtime(dataset, 0.5, per), plain_least(dataset, 0.5, per)
        assert found is not None and 4 not in expected
        assert found[4] == (0.0 if per == "user" else expected[0])


@pytest.mark.parametrize("per", ["user", "all"])
def test_a_share_of_all_drops_nothing(logs, per):  # noqa: F811
    dataset = logs(0)
    examples = dataset.examples("train")
    assert longest_watched(dataset, examples, 1.0, per) is examples
    assert least_playtime(dataset, 1.0, per) is None


@pytest.mark.parametrize("known", [True, False])
def test_ties_are_kept_and_so_is_a_log_without_play_times(noise_tables, write, known):
    tables = noise_tables()
    count = tables.events.num_rows
    dataset = write(timed(tables, [5000 if known else None] * count))
    stops = enumerate(dataset.train_stops.tolist())
    examples = np.array([[user, at, at, at + 1] for user, stop in stops for at in range(stop)])
    for per in ("user", "all"):
        assert longest_watched(dataset, examples, 0.25, per).tolist() == examples.tolist()
        least = least_playtime(dataset, 0.25, per)
        assert least is not None and least.tolist() == [5.0 if known else 0.0] * dataset.num_users


def test_an_unknown_play_time_takes_nothing_from_a_request(noise_tables, write):
    """Events of one user, two a request: unknown ones count 0, not the -1 that stands for them."""
    tables = noise_tables(users=1, events=8, span=1)
    seconds = [0, 1, 100, 101, 200, 201, 300, 301]
    place = tables.events.column_names.index("timestamp_ms")
    events = tables.events.set_column(
        place, "timestamp_ms", pa.array([1_640_995_200_000 + 1000 * s for s in seconds])
    ).drop_columns("request_id")
    tables = timed(dataclasses.replace(tables, events=events), [4, None, 4, 0, None, None, 9, 9])
    dataset = write(tables, request_gap_s=20, target_stride=1, split={"kind": "leave_one_out"})
    examples = np.array([[0, start, start, start + 2] for start in (0, 2, 4)])
    assert longest_watched(dataset, examples, 0.5, "all")[:, 2].tolist() == [0, 2]


def test_training_sees_each_kept_request_once_an_epoch_and_no_other(logs):  # noqa: F811
    dataset = logs(0)
    for per in ("user", "all"):
        kept = plainly_kept(dataset, 0.5, per)
        settings = recipe(batch_size=1, kept_share=0.5, kept_per=per)
        pipeline = Pipeline(dataset, codes_for(dataset), settings)
        seen = []
        for step in range(len(kept)):
            batch = pipeline.batch_at(step)
            seen.append((int(batch.user[0, 0]), [i for i in batch.target_item[0].tolist() if i >= 0]))
        expected = [(u, dataset.history(u).item[a : min(b, a + 2)].tolist()) for u, _, a, b in kept]
        assert sorted(seen) == sorted(expected)


def test_validation_is_on_all_requests_whatever_is_kept(logs):  # noqa: F811
    dataset = logs(0)
    codes = codes_for(dataset)
    for changes in ({}, {"model": {"short_length": 6}, "masked_share": 0.5}):
        model = changes.get("model")
        kept = Pipeline(dataset, codes, recipe(**changes, kept_share=0.25), "valid")
        for step in range(3):
            assert_same(kept.batch_at(step), Pipeline(dataset, codes, recipe(model=model), "valid").batch_at(step))


@pytest.mark.parametrize("per", ["user", "all"])
def test_masked_targets_that_were_played_too_short_weigh_nothing_and_all_else_stays(logs, per):  # noqa: F811
    dataset = logs(0)
    codes, masked = codes_for(dataset), {"model": {"short_length": 6}, "masked_share": 0.5, "negative_weight": 0.25}
    least = plain_least(dataset, 0.5, per)
    kept = Pipeline(dataset, codes, recipe(**masked, kept_share=0.5, kept_per=per))
    plain = Pipeline(dataset, codes, recipe(**masked))
    outcomes = set()
    for step in range(8):
        found, batch = arrays_of(kept.batch_at(step)), arrays_of(plain.batch_at(step))
        weight = batch.pop("target_weight.").copy()
        for (b, t), seconds in np.ndenumerate(batch["playtime_s."]):
            if batch["target_item."][b, t] >= 0:
                limit = least[int(batch["user."][b, 0])]
                outcomes.add("unknown" if seconds < 0 else "kept" if seconds >= limit else "rejected")
                weight[b, t] = weight[b, t] if seconds < 0 or seconds >= limit else 0.0
        assert np.array_equal(found.pop("target_weight."), weight)
        for name, array in batch.items():
            assert np.array_equal(found[name], array), name
    assert outcomes == {"unknown", "kept", "rejected"}
