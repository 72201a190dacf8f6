"""Requests whose targets were taken out of the context, against a plain reading of the histories."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pipeline import arrays_of, check_pathway, codes_for, logs, plain_events, recipe  # noqa: F401

from onerec_jax.config import ModelConfig
from onerec_jax.data.batch import TargetWeights, make_masked_batch
from onerec_jax.data.pipeline import Pipeline
from onerec_jax.errors import InputError
from onerec_jax.recipe import load_recipe

MASKED = {"model": {"short_length": 6}, "masked_share": 0.5}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_is_taken_out_is_predicted_from_what_stays(logs, data):  # noqa: F811
    """Draws that put the events of a window into a known order, so that nothing is left to chance."""
    dataset = logs(data.draw(st.integers(0, 2)))
    users = np.flatnonzero(dataset.train_stops >= 2)
    users = users[data.draw(st.lists(st.integers(0, len(users) - 1), min_size=1, max_size=20))]
    length, targets = data.draw(st.integers(2, 30)), data.draw(st.integers(1, 6))
    share = data.draw(st.sampled_from([0.01, 0.3, 0.5, 0.99]))
    model = ModelConfig(short_length=length, positive_length=data.draw(st.integers(0, 5)))
    random = np.random.default_rng(data.draw(st.integers(0, 99))).random((len(users), 1 + length))
    codes, weights = codes_for(dataset), TargetWeights(0.25, data.draw(st.sampled_from([0.0, 30 / 86_400_000])))
    batch = make_masked_batch(dataset, codes, model, users, targets, share, random, weights)
    for b, user in enumerate(users.tolist()):
        events = plain_events(dataset, user)[: dataset.train_stop(user)]
        size = min(length, len(events))
        begin = int(random[b, 0] * (len(events) - size + 1))
        window = events[begin : begin + size]
        count = min(size - 1, max(1, round(share * size)))
        shuffled = sorted(range(size), key=lambda i: random[b, 1 + i])
        stays = [event for i, event in enumerate(window) if i not in shuffled[:count]]
        asked = [window[i] for i in shuffled[:count][:targets]]
        now = window[-1]["timestamp_ms"]
        liked = (
            [event for event in stays if event["positive"]][-model.positive_length :] if model.positive_length else []
        )
        for features, chosen in ((batch.short, stays), (batch.positive, liked)):
            check_pathway(
                dataset, codes, features, b, chosen, [(now - event["timestamp_ms"]) / 1000 for event in chosen]
            )
        assert batch.user[b].tolist() == [user, *dataset.user_features[user]]
        assert batch.visible[b].tolist() == [len(stays)] * targets
        assert batch.target_item[b].tolist() == [event["item"] for event in asked] + [-1] * (targets - len(asked))
        for t, event in enumerate(asked):
            days = max(0, dataset.train_end_ms - event["timestamp_ms"]) / 86_400_000
            halvings = days / weights.half_life_days if weights.half_life_days else 0
            weight = (1 if event["positive"] else weights.negative) * 0.5**halvings
            assert batch.target_weight[b, t] == pytest.approx(weight, rel=1e-6)
            assert batch.targets[b, t].tolist() == codes[event["item"]].tolist()
        assert not batch.target_weight[b, len(asked) :].any()


def test_the_global_batch_is_the_same_for_any_number_of_processes_and_is_drawn_anew(logs):  # noqa: F811
    dataset = logs(0)
    codes = codes_for(dataset)
    whole = Pipeline(dataset, codes, recipe(**MASKED))
    for step in (0, 7):
        parts = [
            arrays_of(Pipeline(dataset, codes, recipe(**MASKED), process_index=i, process_count=4).batch_at(step))
            for i in range(4)
        ]
        for name, array in arrays_of(whole.batch_at(step)).items():
            assert np.array_equal(np.concatenate([part[name] for part in parts]), array), name
    drawn = [whole.batch_at(step) for step in range(40)]
    of_one = {tuple(b.target_item[i]) for b in drawn for i in range(len(b.user)) if b.user[i, 0] == drawn[0].user[0, 0]}
    assert len(of_one) > 3, "the same events are taken out every time"


def test_every_user_with_two_events_is_an_example_and_validation_is_as_ever(logs):  # noqa: F811
    dataset = logs(0)
    codes = codes_for(dataset)
    pipeline = Pipeline(dataset, codes, recipe(**MASKED))
    users = {int(u) for step in range(20) for u in pipeline.batch_at(step).user[:, 0]}
    assert users == set(np.flatnonzero(dataset.train_stops >= 2).tolist())
    plain = recipe(model=MASKED["model"])
    for one, other in zip(
        arrays_of(Pipeline(dataset, codes, recipe(**MASKED), "valid").batch_at(0)).items(),
        arrays_of(Pipeline(dataset, codes, plain, "valid").batch_at(0)).items(),
        strict=True,
    ):
        assert np.array_equal(one[1], other[1]), one[0]


@pytest.mark.parametrize("change", ["model.causal=true", "model.lifelong_length=9", "model.short_length=1"])
def test_what_would_tell_the_targets_is_refused(change):
    others = ["model.positive_length=0", "model.lifelong_length=0", "train.masked_share=0.5"]
    with pytest.raises(InputError, match="masked_share"):
        load_recipe("quickstart", [*others, change])
