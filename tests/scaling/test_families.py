"""Families and budgets against the counters of parameters and FLOPs, and against the published tables."""

from __future__ import annotations

import pytest
from known_law import V2_RUNS
from tiny import tiny_values

from onerec_jax.errors import InputError
from onerec_jax.model.onerec import build, count_parameters, planned_vocabulary
from onerec_jax.recipe import load_recipe, make_recipe
from onerec_jax.scaling.recipe import Member, Request, batch_size, candidates, family, learning_rate, with_settings
from onerec_jax.scaling.sweep import chain, overrides
from onerec_jax.train.flops import request_flops

DENSE, EXPERTS = load_recipe("onerec_0.121b"), load_recipe("onerec_2.633b")


def test_the_learning_rates_are_those_of_onerec_v2():
    published = [5.00e-4, 3.54e-4, 2.24e-4, 1.58e-4, 1.12e-4, 7.91e-5, 5.59e-5]
    for active, rate in zip(V2_RUNS.size("params"), published, strict=True):
        assert learning_rate(active) == pytest.approx(rate, rel=2e-3)


def test_the_batch_follows_the_data_by_its_exponent_in_whole_multiples():
    assert [batch_size(d, 1e6, 512, 0.0) for d in (1e5, 1e6, 1e9)] == [512] * 3
    assert [batch_size(d, 1e6, 512, 0.5) for d in (2.5e5, 1e6, 4e6)] == [256, 512, 1024]
    assert batch_size(3e6, 1e6, 512, 0.5, multiple=64) == 896 and batch_size(1, 1e6, 512, 1.0, multiple=64) == 64


@pytest.mark.parametrize(
    ("base", "along"), [(DENSE, "both"), (EXPERTS, "width"), (EXPERTS, "depth")], ids=["both", "width", "depth"]
)
def test_a_family_keeps_its_ratios_and_is_the_base_at_one(base, along):
    half, one, double = family(base, along, [0.5, 1, 2])
    assert one.recipe == base
    for member, ratio in ((half, 0.5), (double, 2)):
        wide, deep = (ratio if along != "depth" else 1), (ratio if along != "width" else 1)
        model, origin = member.recipe.model, base.model
        assert model.d_model == wide * origin.d_model and model.heads == wide * origin.heads
        assert model.ffn_hidden == wide * origin.ffn_hidden and model.width_of_head == origin.width_of_head
        assert (model.encoder_layers, model.decoder_layers) == (
            deep * origin.encoder_layers,
            deep * origin.decoder_layers,
        )
        if origin.moe.experts:
            assert model.moe.hidden == wide * origin.moe.hidden and model.moe.experts == origin.moe.experts
        assert member.recipe == load_recipe(base.name, overrides(member.point)), "the point is all that it differs by"


def test_parameters_are_counted_three_ways_by_the_one_counter():
    for base in (DENSE, EXPERTS):
        (member,) = family(base, "width", [0.5])
        counts = count_parameters(build(member.recipe.model, planned_vocabulary(base)))
        assert member.size == (
            counts["active"],
            counts["model"],
            counts["codes"] + counts["features"] + counts["tables"],
        )
    assert member.size.active < member.size.total
    dense, narrow = family(DENSE, "width", [1, 0.5])
    assert dense.size.active == dense.size.total == pytest.approx(123.4e6, rel=1e-3), "the README's count"
    assert dense.size.total / narrow.size.total == pytest.approx(4, rel=0.2)


@pytest.fixture(scope="module")
def dense_family() -> list[Member]:
    return family(DENSE, "both", [0.25, 0.5, 1])


@pytest.mark.parametrize("budget", [1e18, 3.3e19, 1e21])
def test_candidates_spend_the_budget_to_one_percent_by_the_counter_of_flops(dense_family: list[Member], budget: float):
    found = candidates(budget, dense_family)
    assert len(found) == 3
    for candidate in found:
        recipe = load_recipe("onerec_0.121b", overrides(candidate.point))
        model, train = recipe.model, recipe.train
        one = request_flops(
            model, planned_vocabulary(recipe), short=model.short_length, positive=model.positive_length,
            lifelong=model.lifelong_length, targets=recipe.data.targets,
        ).training  # fmt: skip
        assert candidate.flops == pytest.approx(one * train.steps * train.batch_size)
        assert abs(candidate.flops / budget - 1) <= 0.01
        assert candidate.targets == train.steps * train.batch_size * 5 and candidate.tokens == 3 * candidate.targets
        assert train.learning_rate == pytest.approx(learning_rate(candidate.member.size.active), rel=1e-3)
        assert train.warmup_steps / train.steps == pytest.approx(1000 / 20_000, abs=1 / train.steps)
    tokens = [candidate.tokens for candidate in found]
    assert tokens == sorted(tokens, reverse=True), "a larger model sees less"
    assert len(chain([candidate.point for candidate in found])) == 3


def test_filled_requests_and_a_law_for_the_batch_are_taken_into_account():
    request = Request(short=7.5, positive=31.0, lifelong=260.5, targets=2.2)
    members = family(DENSE, "width", [0.5], request=request)
    candidate = candidates(1e18, members, batch=lambda targets: batch_size(targets, 1e7, 512, 0.5, multiple=8))[0]
    recipe = load_recipe("onerec_0.121b", overrides(candidate.point))
    one = request_flops(recipe.model, planned_vocabulary(recipe), short=7.5, positive=31.0, lifelong=260.5, targets=2.2)
    requests = recipe.train.steps * recipe.train.batch_size
    assert candidate.flops == pytest.approx(one.training * requests) == pytest.approx(1e18, rel=0.01)
    assert candidate.targets == pytest.approx(2.2 * requests)
    assert recipe.train.batch_size % 8 == 0
    assert recipe.train.batch_size == pytest.approx(512 * (candidate.targets / 1e7) ** 0.5, rel=0.05)


def test_tokens_are_the_codes_that_are_learnt_or_the_items_of_an_item_head(tmp_path):
    values = tiny_values(tmp_path)
    values["model"] = {**values["model"], "head": "both", "item_input": "both"}
    both = make_recipe({**values, "train": {**values["train"], "code_targets": 2}})
    items = make_recipe({**values, "model": {**values["model"], "head": "items", "moe": {"experts": 0}}})
    assert [family(recipe, "width", [1])[0].tokens for recipe in (both, items)] == [2 * 3, 3]


def test_layers_come_in_whole_groups_where_not_every_block_is_moe():
    members = family(EXPERTS, "depth", [0.1, 0.3])
    assert [member.recipe.model.encoder_layers for member in members] == [2, 4]
    assert all(member.recipe.model.moe.every == 2 for member in members)


REFUSED = {
    "direction": (lambda: family(DENSE, "length", [1]), "along width, depth or both, not 'length'"),  # type: ignore[arg-type]
    "ratio": (lambda: family(DENSE, "width", [1, 0]), "must be above 0, not 0"),
    "one model twice": (lambda: family(DENSE, "depth", [1, 1.1]), "ratios 1 and 1.1 round to the same model of onerec_0.121b"),
    "small budget": (lambda: candidates(1e15, family(DENSE, "width", [1])), "comes within 1 % of no whole number of steps"),
    "budget": (lambda: candidates(-1.0, []), "a budget must be a positive number of FLOPs"),
    "setting": (lambda: with_settings(DENSE, {"model.widht": 3}), "unknown setting 'model.widht'"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_family_or_no_training_is_refused_in_one_sentence(call, sentence: str):
    with pytest.raises(InputError) as caught:
        call()
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
