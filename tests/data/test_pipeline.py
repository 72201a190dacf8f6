"""Batches against a plain reading of the histories; order, processes and restarts."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_jax.config import ModelConfig
from onerec_jax.data import pipeline as pipeline_module
from onerec_jax.data.batch import TargetWeights, make_batch
from onerec_jax.data.lifelong import compress
from onerec_jax.data.pipeline import Pipeline
from onerec_jax.data.schema import ItemFeatures
from onerec_jax.errors import InputError
from onerec_jax.recipe import make_recipe

REFRESH = 5
CLUSTER_SIZE = 2


def arrays_of(batch):
    """Every array of a batch by its name."""
    found = {}
    for name, value in vars(batch).items():
        inner = vars(value) if isinstance(value, ItemFeatures) else {"": value}
        found |= {f"{name}.{field}": array for field, array in inner.items()}
    return found


def assert_same(one, other):
    for (name, a), (_, b) in zip(arrays_of(one).items(), arrays_of(other).items(), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b), name


def codes_for(dataset, levels=3):
    return np.random.default_rng(0).integers(0, 50, (dataset.num_items, levels)).astype(np.int32)


def plain_events(dataset, user):
    """One dict per event of a user."""
    history = dataset.history(user)
    columns = ("item", "timestamp_ms", "playtime_s", "duration_s", "feedback", "positive")
    return [dict(zip(columns, row, strict=True)) for row in zip(*(getattr(history, c) for c in columns), strict=True)]


def plain_lifelong(dataset, events, cut, length):
    refreshed = cut // REFRESH * REFRESH
    early = events[:refreshed]
    sequence = []
    if early:
        vectors = dataset.items.embedding[[event["item"] for event in early]]
        columns = (np.array([event[c] for event in early]) for c in ("timestamp_ms", "playtime_s", "duration_s"))
        for representative, _, *means in zip(*compress(vectors, *columns, CLUSTER_SIZE), strict=True):
            means = dict(zip(("timestamp_ms", "playtime_s", "duration_s"), means, strict=True))
            sequence.append({**early[representative], **means})
    return (sequence + events[refreshed:cut])[-length:] if length else []


def check_pathway(dataset, codes, features, b, events, ages):
    """Row b of a pathway holds these events, then padding."""
    n = len(events)
    item = [event["item"] for event in events]
    assert features.item[b].tolist() == item + [-1] * (features.item.shape[1] - n)
    expected = {
        "codes": codes[item],
        "author": dataset.items.author[item],
        "tag": dataset.items.tag[item],
        "age_s": np.float32(ages),
        "playtime_s": np.float32([event["playtime_s"] for event in events]),
        "duration_s": np.float32([event["duration_s"] for event in events]),
        "feedback": [event["feedback"] for event in events],
    }
    for name, values in expected.items():
        row = getattr(features, name)[b]
        assert row[n:].max(initial=0) == row[n:].min(initial=0) == 0
        np.testing.assert_allclose(row[:n], np.reshape(values, row[:n].shape), rtol=1e-6, err_msg=name)


def check_batch(dataset, codes, model, examples, targets, weights, frozen):
    """`make_batch` against the definitions, one example and one event at a time."""
    batch = make_batch(dataset, codes, model, examples, targets, weights, frozen=frozen)
    for b, (user, cut, start, stop) in enumerate(examples.tolist()):
        events = plain_events(dataset, user)
        stop = min(stop, start + targets)
        assert batch.user[b].tolist() == [user, *dataset.user_features[user]]
        now = events[start if start < len(events) else -1]["timestamp_ms"]
        if model.causal:
            end = cut if frozen else max(cut, stop - 1)
            begin = max(0, end - model.short_length)
            short = events[begin:end]
            ages = [
                (events[i]["timestamp_ms"] - events[max(i - 1, 0)]["timestamp_ms"]) / 1000 for i in range(begin, end)
            ]
        else:
            short = events[max(0, cut - model.short_length) : cut]
            ages = [(now - event["timestamp_ms"]) / 1000 for event in short]
        check_pathway(dataset, codes, batch.short, b, short, ages)
        positive = [event for event in events[:cut] if event["positive"]] if not model.causal else []
        positive = positive[-model.positive_length :] if model.positive_length else []
        lifelong = plain_lifelong(dataset, events, cut, model.lifelong_length)
        for features, chosen in ((batch.positive, positive), (batch.lifelong, lifelong)):
            check_pathway(
                dataset, codes, features, b, chosen, [(now - event["timestamp_ms"]) / 1000 for event in chosen]
            )
        for t in range(targets):
            if start + t >= stop:
                assert batch.target_item[b, t] == -1 and batch.target_weight[b, t] == 0
                assert not batch.targets[b, t].any() and not batch.feedback[b, t].any()
                assert batch.visible[b, t] == len(short)
                continue
            target = events[start + t]
            assert batch.target_item[b, t] == target["item"]
            assert batch.targets[b, t].tolist() == codes[target["item"]].tolist()
            days = max(0, dataset.train_end_ms - target["timestamp_ms"]) / 86_400_000
            halvings = days / weights.half_life_days if weights.half_life_days else 0
            weight = (1 if target["positive"] else weights.negative) * 0.5**halvings
            assert batch.target_weight[b, t] == pytest.approx(weight, rel=1e-6)
            assert batch.feedback[b, t].tolist() == target["feedback"].tolist()
            assert batch.playtime_s[b, t] == target["playtime_s"]
            earlier = sum(event["timestamp_ms"] < target["timestamp_ms"] for event in short)
            assert batch.visible[b, t] == (earlier if model.causal and not frozen else len(short))


@pytest.fixture(scope="session")
def logs(noise_tables, write):
    """Datasets of noise by seed, made once."""
    made = {}

    def get(seed):
        if seed not in made:
            labels = [("click", "long_view", "like"), (), ("like",)][seed]
            tables = noise_tables(seed=seed, events=120, span=100, labels=labels)
            made[seed] = write(
                tables, lifelong_refresh=REFRESH, lifelong_cluster_size=CLUSTER_SIZE, request_gap_s=20, target_stride=1
            )
        return made[seed]

    return get


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_batch_holds_exactly_what_its_examples_may_see(logs, data):
    dataset = logs(data.draw(st.integers(0, 2)))
    causal = data.draw(st.booleans())
    lengths = st.integers(0, 30)
    model = ModelConfig(
        causal=causal,
        short_length=data.draw(st.integers(1, 30) if causal else lengths),
        positive_length=0 if causal else data.draw(lengths),
        lifelong_length=0 if causal else data.draw(lengths),
    )
    split = dataset.examples(data.draw(st.sampled_from(["train", "valid", "test"])))
    rows = data.draw(st.lists(st.integers(0, len(split) - 1), min_size=1, max_size=20))
    examples = np.array(split[rows])
    if data.draw(st.booleans()):  # a user as of now: the whole history is the context, there is no target
        user = examples[0, 0]
        size = len(dataset.history(user).item)
        examples = np.concatenate([examples, [[user, size, size, size]]])
    check_batch(
        dataset,
        codes_for(dataset),
        model,
        examples,
        data.draw(st.integers(1, 6)),
        TargetWeights(0.25, data.draw(st.sampled_from([0.0, 30 / 86_400_000]))),  # the log is 100 ms long
        frozen=data.draw(st.booleans()),
    )


def test_an_empty_history_gives_an_empty_context(noise_tables, write):
    tables = noise_tables()
    mask = np.array([user != "u2" for user in tables.events["user_id"].to_pylist()])
    dataset = write(dataclasses.replace(tables, events=tables.events.filter(mask)))
    for causal in (False, True):
        batch = make_batch(dataset, codes_for(dataset), ModelConfig(causal=causal), np.array([[2, 0, 0, 0]]), 2)
        assert (batch.short.item == -1).all() and (batch.target_item == -1).all()
        assert batch.visible.tolist() == [[0, 0]]


def recipe(model=None, **train):
    return make_recipe(
        {
            "name": "test",
            "seed": 3,
            "data": {"source": {"kind": "simulator"}, "targets": 2},
            "model": model or {"short_length": 4, "positive_length": 3, "lifelong_length": 8},
            "train": {"batch_size": 8, "accumulation": 1, **train},
        }
    )


def test_old_targets_weigh_less_from_the_step_on_where_the_half_life_sets_in(logs):
    dataset, half_life = logs(0), 30 / 86_400_000  # the log is 100 ms long
    codes = codes_for(dataset)
    alike = Pipeline(dataset, codes, recipe(steps=10))
    aged = Pipeline(dataset, codes, recipe(steps=10, half_life_days=half_life))
    late = Pipeline(dataset, codes, recipe(steps=10, half_life_days=half_life, half_life_from=0.8))
    for step in (0, 7, 8, 12):
        batches = arrays_of(late.batch_at(step)), arrays_of((aged if step >= 8 else alike).batch_at(step))
        for name, array in batches[0].items():
            np.testing.assert_array_equal(array, batches[1][name])
    assert (aged.batch_at(0).target_weight < alike.batch_at(0).target_weight).any()


def test_the_global_batch_is_the_same_for_one_two_and_four_processes(logs):
    dataset = logs(0)
    codes = codes_for(dataset)
    whole = Pipeline(dataset, codes, recipe())
    for step in (0, 7):
        expected = arrays_of(whole.batch_at(step))
        for count in (2, 4):
            shares = [Pipeline(dataset, codes, recipe(), process_index=i, process_count=count) for i in range(count)]
            parts = [arrays_of(share.batch_at(step)) for share in shares]
            for name, array in expected.items():
                assert np.array_equal(np.concatenate([part[name] for part in parts]), array), name


@pytest.mark.parametrize("train", [{"threads": 1}, {"threads": 3, "prefetch": 5}])
def test_iterating_gives_the_batch_of_each_step_and_resumes_anywhere(logs, train):
    dataset = logs(0)
    pipeline = Pipeline(dataset, codes_for(dataset), recipe(**train))
    for step in range(3):
        assert pipeline.state() == {"step": step}
        assert_same(next(pipeline), pipeline.batch_at(step))
    other = Pipeline(dataset, codes_for(dataset), recipe())
    other.restore(pipeline.state())
    assert_same(next(other), pipeline.batch_at(3))
    pipeline.restore({"step": 1})
    assert_same(next(pipeline), other.batch_at(1))
    assert pipeline.state() == {"step": 2}
    pipeline.close()


def test_loader_processes_give_the_batches_in_order(logs):
    dataset = logs(0)
    pipeline = Pipeline(dataset, codes_for(dataset), recipe(workers=1))
    pipeline.restore({"step": 5})
    for step in range(5, 8):
        assert_same(next(pipeline), pipeline.batch_at(step))
    assert pipeline.state() == {"step": 8}
    pipeline.close()


def test_each_epoch_has_every_example_once_in_another_order(logs):
    dataset = logs(0)
    examples = {tuple(row): i for i, row in enumerate(dataset.examples("train").tolist())}
    pipeline = Pipeline(dataset, codes_for(dataset), recipe(batch_size=1))
    order = [int(pipeline._load.order(i)[0][0]) for i in range(2 * len(examples))]
    first, second = order[: len(examples)], order[len(examples) :]
    assert sorted(first) == sorted(second) == list(range(len(examples)))
    assert first != second


@pytest.mark.parametrize("causal", [False, True])
def test_batches_of_like_length_have_every_example_once_and_lose_only_padding(logs, causal, monkeypatch):
    monkeypatch.setattr(pipeline_module, "_POOL", 5)
    dataset, codes = logs(0), codes_for(logs(0))
    examples = dataset.examples("train")
    grouped = recipe({"short_length": 14, "causal": causal}, batch_size=2, length_buckets=[4, 9])
    pipeline = Pipeline(dataset, codes, grouped)
    steps = [pipeline._load.order(step) for step in range(-(-len(examples) // 10) * 5)]
    numbers = np.concatenate([numbers for numbers, _ in steps])
    assert sorted(set(numbers.tolist())) == list(range(len(examples)))
    first = np.unique(np.concatenate([n for n, _ in steps[: len(examples) // 10 * 5]]), return_counts=True)[1]
    assert (first == 1).all()
    lengths = [length for _, length in steps]
    assert {4, 9, 14} == set(lengths) and lengths != sorted(lengths)
    for step, (chosen, length) in enumerate(steps[:20]):
        batch = pipeline.batch_at(step)
        whole = make_batch(dataset, codes, grouped.model, examples[chosen], 2)
        assert batch.short.item.shape == (2, length)
        assert (whole.short.item[:, length:] == -1).all()
        cut = dataclasses.replace(
            whole, short=ItemFeatures(**{name: array[:, :length] for name, array in vars(whole.short).items()})
        )
        assert_same(batch, cut)
        parts = [Pipeline(dataset, codes, grouped, process_index=i, process_count=2).batch_at(step) for i in range(2)]
        assert np.array_equal(np.concatenate([part.short.item for part in parts]), batch.short.item)
    again = Pipeline(dataset, codes, grouped)
    again.restore({"step": 7})
    assert_same(next(again), pipeline.batch_at(7))
    again.close()


def test_fewer_examples_than_a_batch_are_repeated(logs):
    dataset = logs(0)
    size = 3 * len(dataset.examples("test"))
    batch = Pipeline(dataset, codes_for(dataset), recipe(batch_size=size), split="test").batch_at(0)
    assert batch.user.shape[0] == size
    counts = np.unique(np.concatenate([batch.user, batch.target_item], axis=1), axis=0, return_counts=True)[1]
    assert (counts % 3 == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_requests_at_the_end_of_train_are_of_every_user_once_and_read_train_alone(logs, causal):
    dataset, codes = logs(0), codes_for(logs(0))
    users = np.flatnonzero(dataset.train_stops)
    own = recipe(
        batch_size=len(users),
        model={"short_length": 200, "causal": causal, "positive_length": 0, "lifelong_length": 0},
    )
    batch = Pipeline(dataset, codes, own, split="end").batch_at(0)
    assert sorted(batch.user[:, 0].tolist()) == users.tolist() and (batch.target_item == -1).all()
    for row, user in enumerate(batch.user[:, 0].tolist()):
        history, stop = dataset.history(user), dataset.train_stop(user)
        assert stop < len(history.item)  # there is something that must not be read
        assert batch.short.item[row, :stop].tolist() == history.item[:stop].tolist()
        assert (batch.short.item[row, stop:] == -1).all()
        if not causal:
            ages = (history.timestamp_ms[stop - 1] - history.timestamp_ms[:stop]) / 1000
            np.testing.assert_allclose(batch.short.age_s[row, :stop], ages, rtol=1e-6)


def test_a_batch_that_does_not_divide_among_processes_is_refused(logs):
    with pytest.raises(InputError, match=r"train\.batch_size 8 must be a multiple of the 3 processes"):
        Pipeline(logs(0), codes_for(logs(0)), recipe(), process_count=3)


def test_a_split_without_examples_is_refused(noise_tables, write):
    dataset = write(noise_tables(), split={"valid_from": 0.8, "test_from": 0.8})
    with pytest.raises(InputError, match="no valid examples"):
        Pipeline(dataset, codes_for(dataset), recipe(), split="valid")


def test_semantic_ids_of_another_dataset_are_refused(logs):
    with pytest.raises(InputError, match=r"cover 4 items but .* has 9"):
        Pipeline(logs(0), codes_for(logs(0))[:4], recipe())
