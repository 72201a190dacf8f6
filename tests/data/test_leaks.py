"""No feature of an example comes from an event at or after its request time."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from onerec_jax.config import ModelConfig
from onerec_jax.data.pipeline import make_batch
from onerec_jax.data.schema import LABELS, ItemFeatures

MODELS = {
    "pathways": ModelConfig(short_length=6, positive_length=5, lifelong_length=0),
    "lifelong": ModelConfig(short_length=3, positive_length=0, lifelong_length=40),
    "causal": ModelConfig(short_length=8, causal=True),
}
MOMENTS = {"valid_from": "2022-01-01T00:01:00", "test_from": "2022-01-01T00:01:20"}
SPLITS = {
    "rolling": MOMENTS,
    "frozen": MOMENTS | {"context": "frozen"},
    "leave_one_out": {"kind": "leave_one_out"},
}
TARGETS = 3


def perturb(tables, user, from_ms, keep_ms):
    """Changes every field of one user's events at or after `from_ms`; times stay there, `keep_ms` stays a time."""
    rng = np.random.default_rng(1)
    columns = {name: tables.events[name].to_pylist() for name in tables.events.column_names}
    touched = [
        row
        for row, (owner, time) in enumerate(zip(columns["user_id"], columns["timestamp_ms"], strict=True))
        if owner == user and time >= from_ms
    ]
    for row in touched:
        columns["item_id"][row] = 100 + (columns["item_id"][row] - 100 + 1 + rng.integers(0, 8)) % 9
        columns["playtime_ms"][row] = int(rng.integers(40_000, 50_000))
        columns["duration_ms"][row] = int(rng.integers(40_000, 50_000))
        columns["request_id"][row] = 9 - columns["request_id"][row]
        if columns["timestamp_ms"][row] != keep_ms:
            columns["timestamp_ms"][row] = keep_ms + int(rng.integers(0, 50_000))
        for label in LABELS:
            if label in columns:
                columns[label][row] = not columns[label][row]
    assert touched
    return dataclasses.replace(tables, events=pa.table(columns, schema=tables.events.schema))


def tied_example(dataset, examples):
    """An example whose first target has the same time as the event before it, the hardest case; else the first one."""
    for user, cut, start, stop in examples.tolist():
        times = dataset.history(user).timestamp_ms
        if start and times[start - 1] == times[start]:
            return np.array([user, cut, start, stop])
    return examples[0]


def visible_context(batch, model, target):
    """All that the model may read to predict one target of the batch's only example."""
    seen = {"user": batch.user, "visible": batch.visible[:, target]}
    for name in ("short", "positive", "lifelong"):
        features: ItemFeatures = getattr(batch, name)
        stop = batch.visible[0, target] if name == "short" and model.causal else None
        seen |= {f"{name}.{field}": array[:, :stop] for field, array in vars(features).items()}
    return seen


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("model", MODELS)
def test_events_at_or_after_the_request_change_nothing_that_is_seen(noise_tables, write, split, model):
    """The time of the request itself, which is that of the first target, is known when it is made."""
    settings = {"split": SPLITS[split], "lifelong_refresh": 4, "lifelong_cluster_size": 2, "request_gap_s": 10.0}
    tables = noise_tables(seed=5, users=3, events=120, span=100)
    dataset = write(tables, **settings)
    codes = np.arange(2 * dataset.num_items, dtype=np.int32).reshape(-1, 2)
    for name in ("train", "valid", "test"):
        frozen = name != "train" and split == "frozen"
        examples = dataset.examples(name)
        for example in (examples[-1], tied_example(dataset, examples)):
            times = dataset.history(example[0]).timestamp_ms
            causal_targets = min(TARGETS, example[3] - example[2]) if MODELS[model].causal and not frozen else 1
            for target in range(causal_targets):
                request_ms = int(times[example[2] + target])
                changed = write(perturb(tables, dataset.user_ids[example[0]], request_ms, request_ms), **settings)
                before, after = (
                    make_batch(log, codes, MODELS[model], example[None], TARGETS, frozen=frozen)
                    for log in (dataset, changed)
                )
                seen, expected = (visible_context(b, MODELS[model], target) for b in (after, before))
                for field, array in expected.items():
                    assert np.array_equal(seen[field], array), (name, field)


def test_the_perturbation_is_noticed_where_it_should_be(noise_tables, write):
    """The same comparison sees a change of the last event before the request, so it is not blind."""
    settings = {"split": MOMENTS, "lifelong_refresh": 4, "lifelong_cluster_size": 2}
    tables = noise_tables(seed=5, users=3, events=120, span=100)
    dataset = write(tables, **settings)
    codes = np.arange(2 * dataset.num_items, dtype=np.int32).reshape(-1, 2)
    example = next(row for row in dataset.examples("test") if row[1] > 10)
    before_ms = int(dataset.history(example[0]).timestamp_ms[example[1] - 1])
    changed = write(perturb(tables, dataset.user_ids[example[0]], before_ms, before_ms), **settings)
    for model in MODELS.values():
        before, after = (
            visible_context(make_batch(log, codes, model, example[None], 1), model, 0) for log in (dataset, changed)
        )
        assert any(not np.array_equal(before[field], after[field]) for field in before)
