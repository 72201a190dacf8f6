"""Mutated recipes, boards, sweeps and overrides, and what an accepted one must be: what its text says, and nothing else.

A mutation knows whether it must be refused; see `stated` for what an accepted one is held against.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import annotated_types
import numpy as np
import yaml
from stated import Strict, difference, read, same

from onerec_jax.config import Recipe, Section
from onerec_jax.evaluate.board import jobs, load_board
from onerec_jax.recipe import CONFIGS, load_recipe
from onerec_jax.scaling.sweep import load_sweep, overrides, points_of

SUBJECTS = {"recipe": CONFIGS, "board": CONFIGS / "boards", "sweep": CONFIGS / "sweeps"}
LONGEST = 400  # characters of the sentence about one problem
Path_ = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """One mutated file of settings, or a whole file with a mutated override."""

    kind: str
    subject: str
    file: Path
    must_refuse: bool
    override: str | None = None


# ------------------------------------------------------------------------------------------------- what was accepted


def load(case: Case) -> str | None:
    """Loads a case as the command line does; returns what is wrong with what came out, None if nothing is."""
    name = str(case.file)
    if case.subject == "board":
        board = load_board(name)
        jobs(board.model_copy(update={"seeds": board.seeds[:1]}))
        said = {"name": case.file.stem, "seeds": [0, 1, 2], **read(case.file)}
        return None if same(board.model_dump(mode="json"), said) else "the board is not what its text says"
    if case.subject == "sweep":
        sweep, said = load_sweep(name), read(case.file)
        for point in sweep.points:
            load_recipe(sweep.recipe, overrides(point))
        as_said = (sweep.recipe, sweep.points) == (said["recipe"], points_of(said["sweep"]))
        return None if as_said else "the sweep is not what its text says"
    recipe = load_recipe(name, [case.override] if case.override is not None else [])
    inherited, said = None, read(case.file)
    if case.override is not None:
        key, _, value = case.override.partition("=")
        inherited, said = load_recipe(name), tree_of(key.strip().split("."), yaml.load(value, Strict))
    elif said.get("base") is not None:
        inherited = load_recipe(said.pop("base"))
    said.setdefault("name", case.file.stem)
    return difference(recipe, said, inherited)


# -------------------------------------------------------------------------------------------------------- mutations


def settings_of(section: Section, path: Path_ = ()) -> list[tuple[Path_, Any, Any]]:
    """(path, field, value) of every setting that is no section."""
    found = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        inside = settings_of(value, (*path, name)) if isinstance(value, Section) else [((*path, name), field, value)]
        found += inside
    return found


def tree_of(path: Path_ | list[str], value: Any) -> dict[str, Any]:
    for name in reversed(path):
        value = {name: value}
    return value


def put(tree: Any, path: Path_, value: Any) -> Any:
    """The tree with a value at a path."""
    if not path:
        return value
    inner = tree if isinstance(tree, dict) else {}
    return {**inner, path[0]: put(inner.get(path[0]), path[1:], value)}


def pick(rng: np.random.Generator, options: Any) -> Any:
    options = list(options)
    return options[rng.integers(len(options))]


def kinds_of(field: Any) -> set[Any]:
    """The plain types and literals that a field is made of."""

    def parts(kind: Any) -> set[Any]:
        inner = get_args(kind)
        if get_origin(kind) is Literal:
            return {Literal}
        return {get_origin(kind) or kind}.union(*map(parts, inner)) if inner else {kind}

    return parts(field.annotation)


def wrong_value(rng: np.random.Generator, field: Any) -> Any:
    """A value of another type than the field's."""
    kinds = kinds_of(field)
    wrong: list[Any] = [{"a": {"b": 1}}, [[[]]]]
    if dict not in kinds:
        wrong += [{}] if kinds & {tuple, int, float, str, bool} else []
    if tuple in kinds:
        wrong += ["many", 3, None, True]
    elif str not in kinds and dict not in kinds:
        wrong += ["many", "", "1,5", [1, 2]]
    if bool not in kinds and not (kinds & {dict}):
        wrong += [True, False]
    if bool in kinds:
        wrong += [7, "perhaps", 1.5]
    if kinds <= {str, type(None), Literal}:
        wrong += [3, 2.5, [1], False]
    return pick(rng, wrong)


def out_of_range(rng: np.random.Generator, field: Any) -> Any:
    """A number that the field's bounds, or anyone, refuses; None where the field is no number."""
    if not kinds_of(field) <= {int, float}:
        return None
    values = [math.nan, math.inf, -math.inf, 10**30, -(10**30), int("9" * 4000)]
    for bound in field.metadata:
        if isinstance(bound, annotated_types.Ge):
            values += [bound.ge - 1, bound.ge - 1e-9 if float in kinds_of(field) else bound.ge - 7]
        elif isinstance(bound, annotated_types.Gt):
            values += [bound.gt, bound.gt - 1]
        elif isinstance(bound, annotated_types.Le):
            values += [bound.le + 1]
        elif isinstance(bound, annotated_types.Lt):
            values += [bound.lt, bound.lt + 1]
    return pick(rng, values)


def near(rng: np.random.Generator, field: Any, value: Any) -> Any:
    """Another value of the field's type, which may be a good one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return pick(rng, [value + 1, value * 2, value // 2, 1, 0, 0.5, int(rng.integers(1, 2**40))])
    if get_origin(field.annotation) is Literal:
        return pick(rng, get_args(field.annotation))
    if isinstance(value, str):
        return pick(rng, ["ünïcödé 数据", "a b", "null", "1e5", "#", "x" * 100, "a: b", "\u202e", "yes"])
    return value


UNFIT = (
    {"model": {"d_model": 33, "heads": 2, "head_dim": 0}},
    {"model": {"moe": {"experts": 2, "active": 3}}},
    {"model": {"causal": True, "lifelong_length": 4}},
    {"model": {"head": "items", "softmax": "legal"}},
    {"train": {"batch_size": 10, "accumulation": 3}},
    {"train": {"length_buckets": [10**6]}},
    {"reward": {"width": 65, "heads": 4}},
    {"reward": {"objectives": {"click": -1}}},
    {"data": {"split": {"valid_from": 1.5}}},
    {"data": {"split": {"test_from": "next week"}}},
    {"mesh": {"data": 0}},
    {"rl": {"distribution": "legal", "constrained": False}},
)
TAGS = (
    '!!python/object/apply:os.system ["true"]', "!!python/name:os.system", "!!python/object/new:tuple [[1]]", "!mine 3",
    "!!binary AAAA", "!!set {a, b}", "!!int many", "!!float many", "!!bool many", "!!timestamp 2020-99-99", "!!omap [3]",
    "${nowhere}", "${oc.nothing:1}", "???", '"\\0"', "*nothing", "&a [*a]", "[1, 2", "{a: 1, a: 2}", "'", "|\n3", "@", "\x07",
)  # fmt: skip
BOMB = "".join(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]\n" for n in range(1, 10))
WHOLE = (
    "", " \n\t\n", "# nothing\n", "3\n", "many\n", "- a\n- b\n", "null\n", "a: 1\n---\nb: 2\n", "true\n", "\ufeff",
    "[" * 30_000, "a: " * 500, "{a: " * 2_000, "- " * 5_000, f"b0: &b0 x\n{BOMB}", "&a [*a]", "%YAML 9.9\n---\n", "\0" * 100,
    "? [a]\n: 3\n", "x" * 200_000, "key: value\n" * 2, "9" * 6_000,
)  # fmt: skip
BASES = ("nowhere", "[a]", "{a: b}", "a" * 300, "${name}", "???", "''", "3", "../configs", ".")


def text_flip(rng: np.random.Generator, text: str) -> str:
    """A few characters changed, taken out or put in."""
    for _ in range(rng.integers(1, 4)):
        at, new = int(rng.integers(len(text) + 1)), pick(rng, "\n \t:-[]{},#'\"&*!|>%@`0179.aeéZ_~?\\")
        text = text[:at] + pick(rng, [new, "", new + text[at : at + 1]]) + text[at + 1 :]
    return text


def text_lines(rng: np.random.Generator, text: str) -> str:
    """Lines swapped, said twice, taken out, or moved in or out."""
    lines = text.split("\n")
    a, b = rng.integers(len(lines), size=2).tolist()
    what = pick(rng, ["swap", "twice", "out", "indent", "dedent", "tab"])
    if what == "swap":
        lines[a], lines[b] = lines[b], lines[a]
    elif what == "twice":
        lines.insert(b, lines[a])
    elif what == "out":
        del lines[a]
    else:
        lines[a] = {"indent": "  " + lines[a], "dedent": lines[a].removeprefix("  "), "tab": "\t" + lines[a]}[what]
    return "\n".join(lines)


def dump(tree: Any) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def typo(rng: np.random.Generator, tree: dict[str, Any]) -> dict[str, Any]:
    """One key of the file, at any depth, misspelt."""
    name = pick(rng, tree)
    if isinstance(tree[name], dict) and tree[name] and rng.random() < 0.7 and name not in ("rows", "columns"):
        return {**tree, name: typo(rng, tree[name])}
    at = int(rng.integers(len(name)))
    return {(name[:at] + "q" + name[at:] if key == name else key): value for key, value in tree.items()}


def of_tree(change: Callable[[np.random.Generator, dict[str, Any], Any], Any]) -> Callable[..., str]:
    return lambda rng, text, made: dump(change(rng, yaml.load(text, Strict), made))


def set_one(value: Callable[..., Any]) -> Callable[..., str]:
    """Sets one setting of the recipe, whether or not the file says it."""

    def change(rng: np.random.Generator, tree: dict[str, Any], made: Recipe) -> Any:
        while True:
            path, field, former = pick(rng, settings_of(made))
            if path[-1] != "kind" and (new := value(rng, field, former)) is not None:
                return put(tree, path, None if isinstance(new, str) and new == "NULL" else new)

    return of_tree(change)


def _null(rng: np.random.Generator, field: Any, former: Any) -> Any:
    return None if type(None) in kinds_of(field) else "NULL"


def _unfit(rng: np.random.Generator, tree: dict[str, Any], made: Recipe) -> Any:
    for path, value in leaves(pick(rng, UNFIT)):
        tree = put(tree, path, value)
    return tree


def leaves(tree: Any, path: Path_ = ()) -> list[tuple[Path_, Any]]:
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in leaves(value, (*path, key))]
    return [(path, tree)]


def _unknown(rng: np.random.Generator, tree: dict[str, Any], made: Any) -> Any:
    places = {path[:-1] for path, _, _ in settings_of(made)} if isinstance(made, Recipe) else {()}
    return put(
        tree, (*pick(rng, sorted(places)), pick(rng, ["zzz", "Steps", "数", "", "a b", "__class__", "x" * 300])), 3
    )


def _without(rng: np.random.Generator, tree: dict[str, Any], made: Any) -> Any:
    required = {"recipe", "rows", "sweep", "data", "base"} & set(tree)
    return {key: value for key, value in tree.items() if key not in required}


def _tag(rng: np.random.Generator, text: str, made: Any) -> str:
    key = pick(rng, yaml.load(text, Strict))
    return re.sub(rf"^{key}:.*(\n[ #-].*)*", lambda _: f"{key}: {pick(rng, TAGS)}", text, count=1, flags=re.M)


def _twice(rng: np.random.Generator, text: str, made: Any) -> str:
    return text.rstrip() + f"\n{pick(rng, yaml.load(text, Strict))}: {pick(rng, ['{}', '3', 'quickstart', '[]'])}\n"


def _rewritten(rng: np.random.Generator, text: str, made: Any) -> str:
    tree = yaml.load(text, Strict)
    names = [list(tree)[at] for at in rng.permutation(len(tree))]
    style = bool(rng.integers(2))
    return "# another order\n\n" + yaml.safe_dump(
        {n: tree[n] for n in names}, sort_keys=False, default_flow_style=style
    )


COMBINATORS: tuple[Any, ...] = (
    {"permute": []}, {"prod": []}, {"zip": 3}, {"param": {"seed": []}}, {"param": {"seed": 3}}, {"param": {"seed": [1, 1]}},
    {"param": {"seed": ["many"]}}, {"param": {"sede": [1]}}, {"param": {"seed": [True]}}, {"param": {"a b": [1]}}, [], 3, None,
    {"zip": [{"param": {"seed": [1]}}, {"param": {"train.steps": [1, 2]}}]}, {"param": {"seed": [-1]}}, {},
    {"prod": [{"param": {"seed": [1]}}, {"param": {"seed": [2]}}]}, {"chain": [{"param": {"seed": [1]}}] * 2},
    {"subsample": {"of": {"param": {"seed": [1]}}, "count": 2, "seed": 0}},
    {"subsample": {"of": {"param": {"seed": [1]}}, "count": True, "seed": 0}},
    {"prod": [{"param": {f"s{n}.a": list(range(100))}} for n in range(6)]},
)  # fmt: skip
ROWS: tuple[Any, ...] = (
    {}, 3, [], None, {"a": 3}, {"a": "seed=1"}, {"a": [3]}, {"a": ["seed"]}, {"a": ["sede=1"]}, {"a": ["model.heads=many"]},
    {"a": ["stage=other"]}, {"a": ["evaluate.ks=[3]"]}, {"a": ["data.targets=2"]}, {3: []}, {"a": {"b": []}}, {"a": ["model={"]},
)  # fmt: skip
FIELDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "board": {
        "rows": ROWS,
        "seeds": ([], 3, ["a"], None, [True], [1.5], {}, [10**30]),
        "recipe": ("", "nowhere", 3, None),
    },
    "sweep": {"sweep": COMBINATORS, "recipe": ("nowhere", 3, None, [], "")},
}


def _field(rng: np.random.Generator, tree: dict[str, Any], subject: str) -> Any:
    name = pick(rng, FIELDS[subject])
    return {**tree, name: pick(rng, FIELDS[subject][name])}


# Kind of mutation -> (must be refused, subjects, (rng, text, loaded recipe or subject) -> text).
ALL, RECIPE, OTHER = tuple(SUBJECTS), ("recipe",), ("board", "sweep")
MUTATIONS: dict[str, tuple[bool, tuple[str, ...], Callable[..., str | bytes]]] = {
    "wrong type": (True, RECIPE, set_one(lambda rng, field, _: wrong_value(rng, field))),
    "out of range, NaN, inf, beyond 64 bits": (True, RECIPE, set_one(lambda rng, field, _: out_of_range(rng, field))),
    "null": (True, RECIPE, set_one(_null)),
    "wrong choice": (
        True,
        RECIPE,
        set_one(lambda rng, field, _: "nonesuch" if get_origin(field.annotation) is Literal else None),
    ),
    "settings that do not fit each other": (True, RECIPE, of_tree(_unfit)),
    "wrong field of a board or sweep": (True, OTHER, of_tree(_field)),
    "unknown key": (True, ALL, of_tree(_unknown)),
    "misspelt key": (True, ALL, of_tree(lambda rng, tree, _: typo(rng, tree))),
    "required key taken out": (True, ALL, of_tree(_without)),
    "key said twice": (True, ALL, _twice),
    "tag, interpolation, broken scalar": (True, ALL, _tag),
    "another file: empty, bombs, nesting, no mapping": (True, ALL, lambda rng, text, _: pick(rng, WHOLE)),
    "bytes that are no UTF-8": (
        True,
        ALL,
        lambda rng, text, _: pick(
            rng,
            [text.encode("utf-16"), (b := text.encode())[: (at := int(rng.integers(len(b))))] + b"\xff" + b[at:]],
        ),
    ),
    "base that is none, or in a circle": (
        True,
        RECIPE,
        lambda rng, text, _: f"base: {pick(rng, [*BASES, 'mutated'])}\n" + re.sub(r"^base:.*", "", text, flags=re.M),
    ),
    "another value of the type": (False, RECIPE, set_one(near)),
    "characters changed": (False, ALL, lambda rng, text, _: text_flip(rng, text)),
    "lines moved": (False, ALL, lambda rng, text, _: text_lines(rng, text)),
    "cut short": (False, ALL, lambda rng, text, _: text[: rng.integers(len(text))]),
    "other order and style": (False, ALL, _rewritten),
}
OVERRIDES: dict[str, tuple[bool, Callable[[np.random.Generator, Recipe], str]]] = {
    "override: malformed": (
        True,
        lambda rng, _: pick(
            rng,
            ["", "=", "seed", "=3", "seed 3", ".seed=1", "seed.=1", "a..b=1", "[=1", "${x}=1", "seed=1\nseeds: 2", "seed=[", "\n",
             "train.steps=[" + "[" * 9_000, "seed=" + "9" * 9_000, "x" * 9_000 + "=1", "seed=" + "x" * 9_000, "model.=1",
             "base=quickstart", "seed.x=1", "seed=\0", "train.b1.x.y=3", "data.source.kind={}", "seed=*a", "evaluate.ks.x=1"],
        ),
    ),
    "override: wrong type or out of range": (True, lambda rng, made: _override(rng, made, wrong=True)),
    "override: tag or interpolation": (True, lambda rng, made: f"{'.'.join(pick(rng, settings_of(made))[0])}={pick(rng, TAGS)}"),
    "override: another value of the type": (False, lambda rng, made: _override(rng, made, wrong=False)),
}  # fmt: skip


def _override(rng: np.random.Generator, made: Recipe, wrong: bool) -> str:
    while True:
        path, field, value = pick(rng, settings_of(made))
        if path[-1] == "kind":
            continue
        if wrong:
            new = pick(rng, [out_of_range(rng, field), wrong_value(rng, field)])
            if new is None or new == {}:  # merging nothing into a setting is no change
                continue
        else:
            new = near(rng, field, value)
        text = yaml.safe_dump(new, default_flow_style=True, width=math.inf).strip().removesuffix("...")
        return f"{'.'.join(path)}={text.strip()}"


def make_case(number: int, seed: int, folder: Path) -> Case:
    """The case of a number, written into `folder`; kinds take turns."""
    rng = np.random.default_rng((seed, number))
    kinds = [*MUTATIONS, *OVERRIDES]
    kind = kinds[number % len(kinds)]
    if kind in OVERRIDES:
        file = pick(rng, sorted(CONFIGS.glob("*.yaml")))
        must, make = OVERRIDES[kind]
        return Case(kind, "recipe", file, must, make(rng, load_recipe(str(file))))
    must, subjects, mutate = MUTATIONS[kind]
    subject = subjects[number // len(kinds) % len(subjects)]
    source = pick(rng, sorted(SUBJECTS[subject].glob("*.yaml")))
    text = source.read_text(encoding="utf-8")
    mutated = mutate(rng, text, load_recipe(str(source)) if subject == "recipe" else subject)
    file = folder / "mutated.yaml"
    file.write_bytes(mutated if isinstance(mutated, bytes) else mutated.encode("utf-8"))
    return Case(kind, subject, file, must)
