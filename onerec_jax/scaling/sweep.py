"""A sweep is data: a list of points, each a mapping from settings to values, made by five combinators.

    prod(param("model.d_model", [128, 256]), zipped(param("train.learning_rate", [1e-3, 7e-4]), param("train.steps", [500, 1000])))

    param(key, values)      one setting, one point a value
    prod(a, b, ..)          every point of a with every point of b; the last one varies fastest
    zipped(a, b, ..)        the first of a with the first of b, and so on
    chain(a, b, ..)         the points of a, then those of b
    subsample(a, n, seed)   n points of a at random, in the order of a

The same in YAML, as in `configs/sweeps/`:

    recipe: quickstart
    sweep:
      prod:
        - param: {model.d_model: [128, 256]}
        - zip:
            - param: {train.learning_rate: [1.0e-3, 7.0e-4]}
            - param: {train.steps: [500, 1000]}
        - subsample: {of: {param: {seed: [0, 1, 2, 3]}}, count: 2, seed: 0}
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import yaml

from onerec_jax.config import digest_of
from onerec_jax.errors import InputError
from onerec_jax.recipe import CONFIGS, config_path, read_yaml

Point = dict[str, Any]  # key.path -> a value that JSON can hold

READABLE = 120  # most characters of a name before its digest
MOST = 100_000  # points of a product: more are a mistake that would fill the memory before anyone reads them


def param(key: str, values: Iterable[Any]) -> list[Point]:
    """One setting, one point a value; only in a zip may a value occur twice.

    Raises:
        InputError: no value, or one that YAML could not write.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", key):
        raise InputError(f"'{key}' is no setting: a key has the form section.name")
    if isinstance(values, (str, dict)) or not isinstance(values, Iterable):
        raise InputError(f"param {key} takes a list of values, not {values!r}")
    points = [{key: value} for value in values]
    if not points:
        raise InputError(f"param {key} has no values")
    for point in points:
        _digest(point, f"param {key}")
    return points


def prod(*sweeps: Sequence[Point]) -> list[Point]:
    """Every combination; the last sweep varies fastest.

    Raises:
        InputError: no sweeps, more than `MOST` points, or a point that would be there twice or say a setting twice.
    """
    if (count := math.prod(map(len, sweeps))) > MOST:
        raise InputError(f"prod would make {count} points, {MOST} at most are taken: take a subsample of its parts")
    return _distinct([_merged(parts, "prod") for parts in itertools.product(*_some(sweeps, "prod"))], "prod")


def zipped(*sweeps: Sequence[Point]) -> list[Point]:
    """The first points together, then the second ones; all sweeps must be of one length."""
    lengths = [len(sweep) for sweep in _some(sweeps, "zip")]
    if len(set(lengths)) > 1:
        raise InputError(f"zip needs sweeps of one length, not of {', '.join(map(str, lengths))} points")
    return _distinct([_merged(parts, "zip") for parts in zip(*sweeps, strict=True)], "zip")


def chain(*sweeps: Sequence[Point]) -> list[Point]:
    """The points of one sweep after those of the other; none may be in two."""
    return _distinct([point for sweep in _some(sweeps, "chain") for point in sweep], "chain")


def subsample(sweep: Sequence[Point], count: int, seed: int) -> list[Point]:
    """So many points at random, none twice, in the order they have; equal for equal points and seed."""
    if not 1 <= count <= len(sweep):
        raise InputError(f"subsample of {len(sweep)} points can take 1 to {len(sweep)} of them, not {count}")
    chosen = np.random.default_rng(seed).permutation(len(sweep))[:count]
    return [sweep[i] for i in sorted(chosen)]


def _some(sweeps: Sequence[Sequence[Point]], name: str) -> Sequence[Sequence[Point]]:
    if not sweeps:
        raise InputError(f"{name} of no sweeps")
    return sweeps


def _merged(points: Iterable[Point], name: str) -> Point:
    """All settings of several points, of which no two may say the same setting, or one a section that holds the other."""
    merged: Point = {}
    for point in points:
        for key, value in point.items():
            for other in merged:
                if key == other or key.startswith(f"{other}.") or other.startswith(f"{key}."):
                    both = f"'{key}' twice" if key == other else f"'{other}' and '{key}'"
                    raise InputError(f"{name} sets {both}: one point can set a value only once")
            merged[key] = value
    return merged


def _distinct(points: list[Point], name: str) -> list[Point]:
    seen: dict[str, list[Point]] = {}
    for point in points:
        seen.setdefault(_digest(point, name), []).append(point)
    repeated = [same[0] for same in seen.values() if len(same) > 1]
    if repeated:
        raise InputError(f"{name} has the point {_shown(repeated[0])} more than once")
    return points


def _digest(point: Point, name: str) -> str:
    try:
        json.dumps(point, allow_nan=False)
        return digest_of(point)
    except (TypeError, ValueError):
        raise InputError(f"{name}: {point} holds a value that is no number, text, list, mapping or null") from None


def _shown(point: Point) -> str:
    return " ".join(f"{key}={json.dumps(value)}" for key, value in point.items())


def overrides(point: Point) -> list[str]:
    """A point as `key.path=value`, as `load_recipe` and every verb take it."""
    return [f"{key}={_written(value)}" for key, value in point.items()]


def _written(value: Any) -> str:
    """A value in YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("\n").removesuffix("\n...")


def name_of(point: Point) -> str:
    """A folder's name: what can be read of the settings, and eight digits that no other point has.

    It depends on the point alone: a sweep that grows renames nothing, and the order of settings does not matter.
    """
    parts = []
    for key in sorted(point):
        value = point[key]
        text = f"{value:g}" if isinstance(value, float) else str(value)
        parts.append(f"{key.rpartition('.')[2]}-{text}")
    readable = re.sub(r"[^A-Za-z0-9.-]+", "_", "_".join(parts)).strip("_")[:READABLE].strip("_.-")
    return f"{readable}_{digest_of(point)[:8]}".strip("_")


class Sweep(NamedTuple):
    """A recipe and the points at which it is run."""

    recipe: str
    points: list[Point]

    @property
    def named(self) -> dict[str, Point]:
        return {name_of(point): point for point in self.points}


def load_sweep(name: str) -> Sweep:
    """A sweep by name (in `configs/sweeps/`) or by path.

    Raises:
        InputError: no such sweep, bad YAML, an unknown combinator, or what a combinator refuses.
    """
    path = config_path(name, "sweep", CONFIGS / "sweeps")
    fields = "a sweep has the fields 'recipe', a name, and 'sweep'"
    values = read_yaml(path, fields)
    if set(values) != {"recipe", "sweep"} or not isinstance(values["recipe"], str):
        raise InputError(f"{path}: {fields}")
    try:
        return Sweep(values["recipe"], _distinct(points_of(values["sweep"]), "the sweep"))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


SEVERAL = {"prod": prod, "zip": zipped, "chain": chain}


def points_of(node: Any) -> list[Point]:
    """The points of a sweep written as mappings and lists, each mapping with one combinator's name.

    Raises:
        InputError: another shape or name, or what a combinator refuses.
    """
    known = ", ".join(["param", *SEVERAL, "subsample"])
    if not isinstance(node, dict) or len(node) != 1:
        raise InputError(f"a sweep is a mapping with one of {known}, not {node!r}")
    name, inner = next(iter(node.items()))
    if name == "param":
        if not isinstance(inner, dict) or len(inner) != 1:
            raise InputError(f"param takes one setting and its list of values, not {inner!r}")
        ((key, values),) = inner.items()
        return param(str(key), values)
    if name in SEVERAL:
        if not isinstance(inner, list):
            raise InputError(f"{name} takes a list of sweeps, not {inner!r}")
        return SEVERAL[name](*(points_of(part) for part in inner))
    if name == "subsample":
        if not isinstance(inner, dict) or set(inner) != {"of", "count", "seed"}:
            raise InputError("subsample takes the fields of (a sweep), count and seed")
        numbers = inner["count"], inner["seed"]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise InputError(f"subsample takes whole numbers as count and seed, not {numbers[0]!r} and {numbers[1]!r}")
        return subsample(points_of(inner["of"]), *numbers)
    raise InputError(f"no combinator '{name}': a sweep is one of {known}")
