"""The algebra of sweeps against brute force, its YAML against Python, and points against the recipes they are of."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from onerec_jax.errors import InputError
from onerec_jax.recipe import CONFIGS, load_recipe
from onerec_jax.scaling.sweep import (
    chain,
    load_sweep,
    name_of,
    overrides,
    param,
    points_of,
    prod,
    subsample,
    zipped,
)

lists = st.lists(st.integers(-5, 5), min_size=1, max_size=4, unique=True)


@given(lists, lists, lists)
def test_a_product_is_every_combination_with_the_last_sweep_fastest(a: list, b: list, c: list):
    wanted = [{"x.a": i, "x.b": j, "c": k} for i in a for j in b for k in c]
    assert prod(param("x.a", a), param("x.b", b), param("c", c)) == wanted
    assert prod(prod(param("x.a", a), param("x.b", b)), param("c", c)) == wanted, "grouping does not matter"


@given(lists, st.integers(0, 9))
def test_zipped_sweeps_go_side_by_side_and_chained_ones_one_after_the_other(a: list, shift: int):
    b = [value + shift for value in a]
    assert zipped(param("a", a), param("b", b)) == [{"a": i, "b": j} for i, j in zip(a, b, strict=True)]
    assert chain(param("a", a), param("b", b)) == [{"a": i} for i in a] + [{"b": j} for j in b]


@given(st.integers(1, 12), st.integers(0, 5))
def test_a_subsample_is_an_ordered_part_that_its_seed_decides(count: int, seed: int):
    whole = prod(param("a", range(3)), param("b", range(4)))
    part = subsample(whole, count, seed)
    assert len(part) == count and part == [point for point in whole if point in part]
    assert part == subsample(whole, count, seed)


def test_subsamples_reach_every_point_about_as_often():
    whole = param("a", range(10))
    drawn = [point["a"] for seed in range(400) for point in subsample(whole, 3, seed)]
    assert all(80 < drawn.count(value) < 160 for value in range(10)), "120 expected"


def test_yaml_gives_the_points_that_python_gives():
    text = """
    chain:
      - prod:
          - zip:
              - param: {model.d_model: [128, 256]}
              - param: {train.learning_rate: [1.0e-3, 7.0e-4]}
          - param: {tokenizer.codebook_sizes: [[8, 8], [16, 16, 16]]}
      - subsample: {of: {param: {seed: [5, 6, 7]}}, count: 2, seed: 3}
    """
    pairs = zipped(param("model.d_model", [128, 256]), param("train.learning_rate", [1e-3, 7e-4]))
    wanted = chain(
        prod(pairs, param("tokenizer.codebook_sizes", [[8, 8], [16, 16, 16]])),
        subsample(param("seed", [5, 6, 7]), 2, 3),
    )
    assert points_of(yaml.safe_load(text)) == wanted and len(wanted) == 6


VALUES = {
    "train.learning_rate": 1e-05, "train.clip_norm": 1, "train.init_from": "runs/a@100", "data.positive_labels": ["like", "yes"],
    "train.tensorboard": False, "model.moe": {"experts": 4, "active": 1}, "data.split.valid_from": "2022-04-28T00:00:00+08:00",
    "tokenizer.codebook_sizes": [8, 8], "runs": "a folder: with, signs #1",
}  # fmt: skip


def test_a_point_says_to_a_recipe_what_it_holds():
    values = load_recipe("quickstart", overrides(VALUES)).model_dump(mode="json")
    for key, wanted in VALUES.items():
        found = values
        for part in key.split("."):
            found = found[part]
        if isinstance(wanted, dict):
            found = {name: found[name] for name in wanted}
        assert found == wanted, key


def test_a_name_is_of_the_point_alone_and_no_other_point_has_it():
    points = prod(
        param("model.d_model", [128, 256]), param("train.learning_rate", [1e-3, 1.0000001e-3]), param("seed", [1, 2])
    )
    names = [name_of(point) for point in points]
    assert len(set(names)) == len(points)
    assert names[0] == name_of(dict(reversed(points[0].items())))
    assert names[0].startswith("d_model-128_seed-1_learning_rate-0.001_")
    assert name_of(VALUES) == name_of(dict(VALUES)) and len(name_of(VALUES)) <= 129
    for name in [*names, name_of(VALUES), name_of({})]:
        assert load_recipe("quickstart", [f"name={name}"]).name == name


def test_names_stay_as_they_were():
    """A changed name would make a sweep that was stopped begin anew."""
    assert name_of({"model.d_model": 128, "train.learning_rate": 1e-3}) == "d_model-128_learning_rate-0.001_2d0898c5"


REFUSED = {
    "a key in two factors": (lambda: prod(param("a.b", [1]), param("a.b", [2])), "prod sets 'a.b' twice"),
    "a section and its setting": (
        lambda: zipped(param("model.moe", [{}]), param("model.moe.experts", [2])), "zip sets 'model.moe' and 'model.moe.experts'",
    ),
    "a setting and its section": (lambda: prod(param("a.b", [1]), param("a", [{}])), "prod sets 'a.b' and 'a'"),
    "a value twice": (lambda: prod(param("a", [1, 2, 1])), "prod has the point a=1 more than once"),
    "a point twice": (lambda: chain(param("a", [1, 2]), param("a", [2])), "chain has the point a=2 more than once"),
    "unequal lengths": (lambda: zipped(param("a", [1, 2]), param("b", [1])), "zip needs sweeps of one length, not of 2, 1 points"),
    "no values": (lambda: param("a", []), "param a has no values"),
    "a text for a list": (lambda: param("a", "abc"), "takes a list of values, not 'abc'"),
    "no key": (lambda: param("a b", [1]), "'a b' is no setting"),
    "NaN": (lambda: param("a", [float("nan")]), "holds a value that is no number"),
    "an object": (lambda: param("a", [object()]), "holds a value that is no number"),
    "too large a part": (lambda: subsample(param("a", [1, 2]), 3, 0), "can take 1 to 2 of them, not 3"),
    "no part": (lambda: subsample(param("a", [1, 2]), 0, 0), "can take 1 to 2 of them, not 0"),
    "no factors": (lambda: prod(), "prod of no sweeps"),
    "unknown combinator": (lambda: points_of({"grid": {}}), "no combinator 'grid': a sweep is one of param, prod"),
    "two combinators": (lambda: points_of({"prod": [], "zip": []}), "a mapping with one of param"),
    "two settings in a param": (lambda: points_of({"param": {"a": [1], "b": [1]}}), "param takes one setting"),
    "no list": (lambda: points_of({"prod": {"param": {"a": [1]}}}), "prod takes a list of sweeps"),
    "a subsample without seed": (lambda: points_of({"subsample": {"of": {}, "count": 1}}), "takes the fields of (a sweep), count"),
    "a share": (lambda: points_of({"subsample": {"of": {}, "count": 0.5, "seed": 0}}), "whole numbers as count and seed, not 0.5"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_sweep_that_says_something_twice_or_not_at_all_is_refused(call, sentence: str):
    with pytest.raises(InputError) as caught:
        call()
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_bad_file_is_refused_by_its_name(tmp_path: Path):
    path = tmp_path / "bad.yaml"
    for text, sentence in {
        "recipe: [": "not valid YAML",
        "sweep: {param: {a: [1]}}": "a sweep has the fields 'recipe', a name, and 'sweep'",
        "recipe: quickstart\nsweep: {param: {seed: [1, 1]}}": "more than once",
    }.items():
        path.write_text(text)
        with pytest.raises(InputError) as caught:
            load_sweep(str(path))
        assert str(caught.value).startswith(f"{path}: ") and sentence in str(caught.value)
    with pytest.raises(InputError, match=r"no sweep 'nothing': .*known sweeps: .*quickstart_sizes"):
        load_sweep("nothing")


@pytest.mark.parametrize("path", sorted((CONFIGS / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_point_of_a_kept_sweep_is_a_recipe(path: Path):
    sweep = load_sweep(path.stem)
    assert path.read_text().startswith("# ")
    recipes = [load_recipe(sweep.recipe, [*overrides(point), f"name={name}"]) for name, point in sweep.named.items()]
    assert len(recipes) == len(sweep.points)
    for one, two in itertools.combinations(recipes, 2):
        assert one.digest() != two.digest()


def test_a_product_that_would_fill_the_memory_is_refused_before_it_is_made():
    with pytest.raises(InputError, match="prod would make 1000000000000 points, 100000 at most"):
        prod(*(param(f"model.setting{n}", range(100)) for n in range(6)))
