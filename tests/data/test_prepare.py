"""Histories, splits and requests against a plain reading of the log, and writes that fail."""

import errno
import resource

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_jax.data.prepare import write_dataset
from onerec_jax.data.schema import Tables
from onerec_jax.errors import InputError

START_MS = 1_640_995_200_000  # 2022-01-01, where the noise logs begin


def plain_histories(tables, max_history=100_000):
    """Per user row, the event rows of the table in time order, equal times in table order."""
    events = tables.events.to_pylist()
    histories = []
    for user in tables.users["user_id"].to_pylist():
        mine = [event for event in events if event["user_id"] == user]
        histories.append(sorted(mine, key=lambda event: event["timestamp_ms"])[-max_history:])
    return histories


def plain_windows(history, first, stop, gap_s, targets, stride):
    """(cut, start, stop) of the requests among history[first:stop]."""
    requests = []
    for j in range(first, stop):
        new = j == first
        if not new:
            late = history[j]["timestamp_ms"] - history[j - 1]["timestamp_ms"] > gap_s * 1000
            new = late or history[j].get("request_id") != history[j - 1].get("request_id")
        if new:
            requests.append([])
        requests[-1].append(j)
    windows = []
    for request in requests:
        for i in range(0, len(request), stride):
            chosen = request[i : i + targets]
            now = history[chosen[0]]["timestamp_ms"]
            cut = sum(event["timestamp_ms"] < now for event in history)
            windows.append((cut, chosen[0], chosen[-1] + 1))
    return windows


def test_histories_are_in_time_order_and_equal_times_keep_the_order_of_the_table(noise_tables, write):
    tables = noise_tables()
    dataset = write(tables)
    for user, events in enumerate(plain_histories(tables)):
        history = dataset.history(user)
        assert [dataset.item_ids[item] for item in history.item] == [event["item_id"] for event in events]
        assert history.timestamp_ms.tolist() == [event["timestamp_ms"] for event in events]
        playtimes = [-1 if event["playtime_ms"] is None else event["playtime_ms"] / 1000 for event in events]
        assert history.playtime_s.tolist() == pytest.approx(playtimes)
        labels = [[event[label] for label in ("click", "long_view", "like")] for event in events]
        assert history.feedback.tolist() == labels
        assert history.positive.tolist() == [event["long_view"] or event["like"] for event in events]


def test_an_event_without_duration_has_that_of_its_item(noise_tables, write):
    tables = noise_tables()
    dataset = write(tables)
    of_item = dict(zip(*(tables.items[name].to_pylist() for name in ("item_id", "duration_ms")), strict=True))
    for user, events in enumerate(plain_histories(tables)):
        own = [event["duration_ms"] for event in events]
        expected = [of_item[e["item_id"]] if d is None else d for e, d in zip(events, own, strict=True)]
        seconds = [-1 if duration is None else duration / 1000 for duration in expected]
        assert dataset.history(user).duration_s.tolist() == pytest.approx(seconds)


def test_only_the_most_recent_events_are_kept_and_the_rest_is_counted(noise_tables, write):
    tables = noise_tables()
    dataset = write(tables, max_history=5)
    expected = plain_histories(tables, max_history=5)
    assert [len(dataset.history(user).item) for user in range(6)] == [len(events) for events in expected]
    dropped = tables.events.num_rows - sum(map(len, expected))
    assert dataset.card["counts"]["events_beyond_max_history"] == dropped > 0
    for user, events in enumerate(expected):
        assert dataset.history(user).timestamp_ms.tolist() == [event["timestamp_ms"] for event in events]


def test_leave_one_out_keeps_the_last_two_events_of_users_with_three(noise_tables, write):
    tables = noise_tables(users=12, events=40, span=500)
    dataset = write(tables, split={"kind": "leave_one_out"}, min_history=0)
    expected = {"valid": [], "test": []}
    for user, events in enumerate(plain_histories(tables)):
        assert dataset.train_stop(user) == (len(events) - 2 if len(events) >= 3 else len(events))
        for name, back in (("valid", 2), ("test", 1)):
            if len(events) >= 3:
                target = len(events) - back
                cut = sum(event["timestamp_ms"] < events[target]["timestamp_ms"] for event in events)
                expected[name].append([user, cut, target, target + 1])
    assert {name: dataset.examples(name).tolist() for name in expected} == expected


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    gap=st.sampled_from([0.0, 1.0, 5.0, 1000.0]),
    targets=st.integers(1, 5),
    stride=st.integers(1, 5),
    min_history=st.integers(0, 3),
    requests=st.booleans(),
)
def test_rolling_examples_are_the_windows_of_each_request(
    noise_tables, write, seed, gap, targets, stride, min_history, requests
):
    tables = noise_tables(seed=seed)
    if not requests:
        tables = Tables(tables.events.drop_columns(["request_id"]), tables.items, tables.users)
    split = {"valid_from": "2022-01-01T00:00:35", "test_from": "2022-01-01T01:00:50+01:00"}
    dataset = write(
        tables, split=split, request_gap_s=gap, targets=targets, target_stride=stride, min_history=min_history
    )
    bounds = {"train": (0, 35), "valid": (35, 50), "test": (50, 1000)}
    for name, (begin, end) in bounds.items():
        expected = []
        for user, events in enumerate(plain_histories(tables)):
            seconds = [(event["timestamp_ms"] - START_MS) // 1000 for event in events]
            first, stop = (sum(second < bound for second in seconds) for bound in (begin, end))
            windows = plain_windows(events, first, stop, gap, targets, stride if name == "train" else targets)
            kept = [window for window in windows if name != "train" or window[0] >= min_history]
            expected += [[user, *window] for window in kept]
        assert dataset.examples(name).tolist() == expected
        if name == "train":
            covered = {(user, event) for user, _, start, end_ in expected for event in range(start, end_)}
            assert dataset.card["counts"]["train_targets"] == len(covered)
            assert dataset.card["counts"]["train_events"] == dataset.train_stops.sum()


def test_frozen_examples_hold_each_users_whole_split_behind_one_context(noise_tables, write):
    tables = noise_tables()
    split = {"valid_from": "2022-01-01T00:00:35", "test_from": "2022-01-01T00:00:50", "context": "frozen"}
    dataset = write(tables, split=split)
    expected = {"valid": [], "test": []}
    for user, events in enumerate(plain_histories(tables)):
        seconds = [(event["timestamp_ms"] - START_MS) // 1000 for event in events]
        train, valid = (sum(second < bound for second in seconds) for bound in (35, 50))
        if valid > train:
            expected["valid"].append([user, train, train, valid])
        if len(events) > valid:
            expected["test"].append([user, valid, valid, len(events)])
    assert {name: dataset.examples(name).tolist() for name in expected} == expected
    assert dataset.frozen


def test_a_share_is_the_moment_that_share_of_all_events_precede(noise_tables, write):
    tables = noise_tables(events=200, span=10_000)
    dataset = write(tables, split={"valid_from": 0.7, "test_from": 0.9})
    times = np.sort(tables.events["timestamp_ms"].to_numpy())
    assert dataset.card["split_moments_ms"] == {"valid_ms": times[140], "test_ms": times[180]}
    assert dataset.train_stops.sum() == 140
    assert dataset.train_end_ms == times[139]


def test_train_counts_are_events_of_train_alone(noise_tables, write):
    tables = noise_tables()
    dataset = write(tables)
    counts = np.zeros(dataset.num_items, int)
    for user in range(dataset.num_users):
        np.add.at(counts, dataset.history(user).item[: dataset.train_stop(user)], 1)
    assert dataset.items.train_count.tolist() == counts.tolist()


@pytest.mark.parametrize(
    ("labels", "wanted", "expected"),
    [
        (("click", "like"), ["like", "forward"], lambda event: event["like"]),
        (("click", "like"), [], lambda event: True),
        ((), ["like"], lambda event: True),
    ],
)
def test_positive_events_follow_the_labels_that_the_source_has(noise_tables, write, labels, wanted, expected):
    tables = noise_tables(labels=labels)
    dataset = write(tables, positive_labels=wanted)
    assert dataset.labels == labels
    for user, events in enumerate(plain_histories(tables)):
        assert dataset.history(user).positive.tolist() == [expected(event) for event in events]


@pytest.mark.parametrize("wanted", [["forward"], ["likes"]])
def test_positive_labels_that_do_not_exist_are_named(noise_tables, write, wanted):
    with pytest.raises(InputError, match=r"data\.positive_labels.*" + wanted[0]):
        write(noise_tables(), positive_labels=wanted)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"valid_from": "2021-01-01", "test_from": 0.9}, "empty train split"),
        ({"valid_from": "2022-01-01T00:00:40", "test_from": "2023-01-01"}, r"data\.split\.test_from.*empty test split"),
        ({"valid_from": "2022-01-01T00:00:30.1", "test_from": "2022-01-01T00:00:30.5"}, "empty valid split"),
        ({"valid_from": 0.9, "test_from": 0.5}, "must not be later"),
    ],
)
def test_an_empty_split_names_its_setting_and_leaves_nothing_behind(
    noise_tables, data_config, tmp_path, split, message
):
    with pytest.raises(InputError, match=message):
        write_dataset(noise_tables(), data_config(split=split), tmp_path / "log", 0, {})
    assert list(tmp_path.iterdir()) == []


def test_leave_one_out_without_long_users_is_an_empty_split(noise_tables, write):
    tables = noise_tables()
    with pytest.raises(InputError, match="leave_one_out: empty valid split"):
        two_events = Tables(tables.events.slice(0, 2), tables.items, tables.users)
        write(two_events, split={"kind": "leave_one_out"}, min_history=0)


def test_a_log_without_events_is_an_empty_split(noise_tables, write):
    tables = noise_tables()
    with pytest.raises(InputError, match="no events"):
        write(Tables(tables.events.slice(0, 0), tables.items, tables.users))


def test_equal_moments_mean_no_validation(noise_tables, write):
    dataset = write(noise_tables(), split={"valid_from": 0.8, "test_from": 0.8})
    assert len(dataset.examples("valid")) == 0
    assert len(dataset.examples("test")) > 0


def test_an_event_of_an_unknown_item_is_named(noise_tables, write):
    tables = noise_tables()
    with pytest.raises(InputError, match=r"item_id 10[0-9] is not in the items table"):
        write(Tables(tables.events, tables.items.slice(3), tables.users))


def test_users_without_events_and_items_nobody_met_are_kept(noise_tables, write):
    tables = noise_tables()
    only_one = tables.events.filter(pa.array([user == "u3" for user in tables.events["user_id"].to_pylist()]))
    dataset = write(Tables(only_one, tables.items, tables.users), min_history=0)
    assert (dataset.num_users, dataset.num_items) == (6, 9)
    assert len(dataset.history(0).item) == 0
    assert len(dataset.history(3).item) == only_one.num_rows


def test_shards_change_the_files_only(noise_tables, write):
    tables = noise_tables(users=7)
    one, three = (write(tables, shards=shards, lifelong_refresh=5) for shards in (1, 3))
    assert len(list(three.directory.glob("histories-*"))) == 3
    for user in range(7):
        assert one.history(user).rows.tobytes() == three.history(user).rows.tobytes()
        assert one.history(user).clusters.tobytes() == three.history(user).clusters.tobytes()
    for name in ("train", "valid", "test"):
        assert np.array_equal(one.examples(name), three.examples(name))


def test_the_content_hash_is_the_same_for_the_same_log_and_differs_for_another(noise_tables, write):
    hashes = [write(noise_tables(seed=seed), lifelong_refresh=5).card["content_hash"] for seed in (1, 1, 2)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_card_tells_what_was_made(noise_tables, write):
    tables = noise_tables()
    card = write(tables).card
    assert card["labels"] == ["click", "long_view", "like"]
    assert card["counts"]["events"] == tables.events.num_rows
    assert card["counts"]["skipped"] == {"unreadable": 2}
    assert card["vocabulary"] == {"authors": 5, "tags": 4, "user_features": {"age": 4, "city": 3}}
    assert card["source"] == {"kind": "test"}
    assert card["settings"]["targets"] == 4


@pytest.mark.parametrize("limit", [100, 2_000])
def test_a_full_disk_names_the_folder_and_keeps_the_dataset_that_was_there(noise_tables, data_config, tmp_path, limit):
    directory = tmp_path / "log"
    write_dataset(noise_tables(seed=1), data_config(), directory, 0, {})
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(InputError, match=rf"cannot write the dataset to {directory}"):
            write_dataset(noise_tables(seed=2, events=500), data_config(), directory, 0, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("writer", ["numpy.save", "pyarrow.parquet.write_table", "pathlib.Path.write_text"])
def test_no_space_in_any_writer_leaves_nothing_half_written(noise_tables, data_config, tmp_path, monkeypatch, writer):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, full)
    with pytest.raises(InputError, match="No space left on device"):
        write_dataset(noise_tables(), data_config(), tmp_path / "log", 0, {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_other_files_is_never_replaced(noise_tables, data_config, tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds other files than a dataset"):
        write_dataset(noise_tables(), data_config(), tmp_path / "log", 0, {})
    assert (tmp_path / "log" / "thesis.txt").read_text() == "years of work"


def test_a_new_dataset_replaces_the_old_one(noise_tables, data_config, tmp_path):
    for seed in (1, 2):
        write_dataset(noise_tables(seed=seed), data_config(), tmp_path / "log", seed, {})
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    assert '"seed": 2' in (tmp_path / "log" / "card.json").read_text()


def test_a_dataset_of_other_settings_is_refused_with_the_first_that_differs(noise_tables, write, data_config):
    dataset = write(noise_tables(), targets=4)
    dataset.check_settings(data_config(targets=4), "small")
    with pytest.raises(InputError, match=r"made with data\.targets 4, the recipe says 3.*onerec data small"):
        dataset.check_settings(data_config(targets=3), "small")
