"""Reads recipes: YAML files of `configs/` (or any path) with the settings of `config/`.

`base: NAME` inherits from another recipe, `key.path=value` overrides win over both. Unknown keys are refused with a
suggestion, and all problems of a recipe are reported at once.
"""

from __future__ import annotations

import difflib
import io
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError, create_model
from pydantic.fields import FieldInfo

from onerec_jax.config import Recipe, Section
from onerec_jax.errors import InputError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
S = TypeVar("S", bound=Section)

_DEEPEST = 32  # mappings and lists within each other; a parser takes a time of its square, and Python's stack ends
_LONGEST = 300  # characters of one problem
_LISTED = 12  # settings that a message lists
_PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# What PyYAML's constructors raise at values that are not what their tag says is none of its own errors.
_UNREADABLE = (
    yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, LookupError, AttributeError, TypeError,
)  # fmt: skip


def config_path(name: str, kind: str = "recipe", folder: Path = CONFIGS) -> Path:
    """The file of a recipe, board or sweep given by name (in `folder`) or by path.

    Raises:
        InputError: there is none.
    """
    for candidate in (Path(name), folder / f"{name}.yaml", folder / name):
        if _is_file(candidate):
            return candidate
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else f"; known {kind}s: {', '.join(known)}"
    raise InputError(f"no {kind} '{_sentence(name, 60)}': neither a file nor in {folder}{hint}")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than any file's
        return False


def _sentence(text: object, longest: int = _LONGEST) -> str:
    """A text on one line, cut where it is too long."""
    line = " ".join(str(text).split())
    return line if len(line) <= longest else line[: longest - 3] + "..."


def _parse(text: str) -> Any:
    """A YAML document as an OmegaConf node.

    Raises:
        ValueError: what YAML knows and no setting can be: `???`, bytes, NUL, numbers beyond 64 bits, endless nesting.
        Exception: one of `_UNREADABLE`.
    """
    depth = 0
    for event in yaml.parse(text, _PARSER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise ValueError(f"nested more than {_DEEPEST} deep")
    node: Any = OmegaConf.load(io.StringIO(text))
    for leaf in _leaves(OmegaConf.to_container(node)):
        if isinstance(leaf, str) and (leaf == "???" or "\0" in leaf):
            raise ValueError(f"{leaf!r} is no value of a setting")
        if isinstance(leaf, int) and leaf.bit_length() > 63:
            raise ValueError("a whole number has more than 64 bits")
        if not isinstance(leaf, str | int | float | None):
            raise ValueError(f"{reprlib.repr(leaf)} is no text, number, list, mapping or null")
    return node


def _leaves(tree: Any) -> Iterator[Any]:
    """All that is no mapping or list in one, keys included."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield key
            yield from _leaves(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _leaves(value)
    else:
        yield tree


def read_yaml(path: Path, expected: str = "a recipe is a mapping of settings") -> dict[str, Any]:
    """The mapping that a YAML file holds, as plain values, interpolations as they stand.

    Raises:
        InputError: the file cannot be read, is not valid YAML, says a key twice, or holds something else.
    """
    try:
        values = OmegaConf.to_container(_parse(path.read_text(encoding="utf-8")))
    except _UNREADABLE as error:
        raise InputError(f"{path}: not valid YAML: {_sentence(error)}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: {expected}")
    return values  # type: ignore[return-value]


def _read(path: Path, seen: tuple[Path, ...] = ()) -> Any:
    if path.resolve() in seen:
        raise InputError(f"{path}: 'base' goes in a circle")
    values = read_yaml(path)
    base, node = values.pop("base", None), OmegaConf.create(values)
    if base is None:
        return node
    beside = path.parent / f"{base}.yaml"
    parent = _read(config_path(str(beside) if _is_file(beside) else str(base)), (*seen, path.resolve()))
    _drop_other_kinds(parent, node)
    try:
        return OmegaConf.merge(parent, node)
    except OmegaConfBaseException as error:
        raise InputError(f"{path}: does not fit its base {base}: {_sentence(error)}") from None


def _kinds(field: FieldInfo | None) -> dict[str, type[Section]]:
    """The sections that a field with a `kind` chooses from, by kind; empty for any other field."""
    if field is None or field.discriminator != "kind":
        return {}
    return {section.model_fields["kind"].default: section for section in get_args(field.annotation)}


def _choices(section: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all fields with a `kind`."""
    for name, field in section.model_fields.items():
        if _kinds(field):
            yield (*path, name)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _choices(field.annotation, (*path, name))


def _drop_other_kinds(base: Any, node: Any) -> None:
    """Takes from `base` each section of which `node` names another kind: that one inherits nothing."""

    def inner(tree: Any, path: tuple[str, ...]) -> Any:
        for name in path:
            known = OmegaConf.is_dict(tree) and not OmegaConf.is_interpolation(tree, name)
            tree = tree.get(name) if known else None
        return tree

    for path in _choices(Recipe):
        kind = inner(node, (*path, "kind"))
        if kind is not None and inner(base, path) is not None and kind != inner(base, (*path, "kind")):
            del inner(base, path[:-1])[path[-1]]


def _setting_at(location: tuple[Any, ...], root: type[Section]) -> tuple[str, type[BaseModel] | None]:
    """Dotted name of the setting that a validation error is about, and the section it ends in, if it ends in one."""
    section: type[BaseModel] | None = root
    kinds: dict[str, type[Section]] = {}
    names = []
    for part in location:
        if part in kinds:
            section, kinds = kinds[part], {}
            continue
        names.append(str(part))
        field = section.model_fields.get(part) if section else None
        kinds = _kinds(field)
        inner = field.annotation if field else None
        section = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None
    return ".".join(names), section


def _explain(error: ValidationError, origin: str, root: type[Section]) -> InputError:
    lines = []
    for item in error.errors():
        name, _ = _setting_at(item["loc"], root)
        if item["type"] == "extra_forbidden":
            known = sorted((_setting_at(item["loc"][:-1], root)[1] or root).model_fields)
            close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
            more = ", ..." if len(known) > _LISTED else ""
            hint = f", did you mean '{close[0]}'?" if close else f", known here: {', '.join(known[:_LISTED])}{more}"
            lines.append(f"unknown setting '{name}'{hint}")
        elif item["type"] in ("missing", "union_tag_not_found"):
            lines.append(f"'{name}{'.kind' if item['type'] == 'union_tag_not_found' else ''}' is required")
        elif item["type"] == "value_error":
            lines.append(str(item.get("ctx", {}).get("error")))
        else:
            lines.append(f"'{name}' is {reprlib.repr(item['input'])}: {item['msg'][0].lower()}{item['msg'][1:]}")
    return InputError(f"{origin}: " + "; ".join(_sentence(line) for line in lines))


def _truths_for_numbers(said: Any, made: Any, name: str = "") -> Iterator[str]:
    """Settings for which true or false was said and pydantic made 1 or 0 of it."""
    if isinstance(said, dict) and isinstance(made, dict):
        for key, value in said.items():
            yield from _truths_for_numbers(value, made.get(key), f"{name}.{key}" if name else key)
    elif isinstance(said, list | tuple) and isinstance(made, list | tuple):
        for place, (value, result) in enumerate(zip(said, made, strict=True)):
            yield from _truths_for_numbers(value, result, f"{name}.{place}")
    elif isinstance(said, bool) and not isinstance(made, bool):
        yield f"'{name}' is {said}: input should be a number"


def checked(section: type[S], values: Any, origin: str) -> S:
    """Settings of a section from plain values, or one `InputError` that lists every problem and names their `origin`."""
    try:
        made = section.model_validate(values)
    except ValidationError as error:
        raise _explain(error, origin, section) from None
    if wrong := [*_truths_for_numbers(values, made.model_dump())]:
        raise InputError(f"{origin}: " + "; ".join(wrong))
    return made


def _with_default_kinds(values: Any, section: type[BaseModel] = Recipe) -> Any:
    """Values in which a section that leaves out its `kind` has that of the default, if there is one."""
    if not isinstance(values, dict):
        return values
    filled = dict(values)
    for name, field in section.model_fields.items():
        inner = values.get(name)
        if not isinstance(inner, dict):
            continue
        if _kinds(field):
            default = field.get_default(call_default_factory=True)
            filled[name] = {"kind": default.model_dump()["kind"], **inner} if isinstance(default, BaseModel) else inner
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            filled[name] = _with_default_kinds(inner, field.annotation)
    return filled


def make_recipe(values: dict[str, Any], origin: str = "recipe") -> Recipe:
    """A checked recipe from plain values, or one `InputError` that lists every problem."""
    return checked(Recipe, _with_default_kinds(values), origin)


def _override(node: Any, overrides: list[str] | tuple[str, ...], what: str) -> None:
    """Merges `key.path=value` overrides into `node`, which is of `what`."""
    # Kinds first, so that what an override says of the new kind stays, wherever it stands.
    for override in sorted(overrides, key=lambda override: not override.partition("=")[0].strip().endswith(".kind")):
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise InputError(f"override '{_sentence(override, 80)}' must have the form key.path=value")
        try:
            if "\n" in value.strip():
                raise ValueError("a value is one line")
            new, change = _parse(f"v: {value}").v, OmegaConf.create()
            OmegaConf.update(change, key.strip(), new)
            _drop_other_kinds(node, change)
            OmegaConf.update(node, key.strip(), new, merge=True)
        except _UNREADABLE as error:
            raise InputError(f"override '{_sentence(override, 80)}' does not fit {what}: {_sentence(error)}") from None


def _plain(node: Any, origin: str) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(f"{origin}: {_sentence(error)}") from None
    assert isinstance(values, dict)
    return {str(k): v for k, v in values.items()}


def load_recipe(name: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Reads a recipe by name or path, merges `base`, then `key.path=value` overrides, and checks the whole.

    Raises:
        InputError: no such recipe, bad YAML, or any setting out of place; all settings' problems in one message.
    """
    path = config_path(name)
    node = _read(path)
    node.setdefault("name", path.stem)
    _override(node, overrides, "the recipe")
    return make_recipe(_plain(node, str(path)), str(path))


def load_section(section: type[S], name: str, path: str = "", overrides: list[str] | tuple[str, ...] = ()) -> S:
    """Settings that are no recipe's: those of a YAML file, where one is given, then `name.key=value` overrides.

    Raises:
        InputError: no such file, bad YAML, or any setting out of place; all settings' problems in one message.
    """
    if path and not _is_file(Path(path)):
        raise InputError(f"no file '{_sentence(path, 80)}' of {name} settings")
    node = OmegaConf.create({name: _read(Path(path)) if path else {}})
    _override(node, overrides, f"the settings of {name}")
    origin, root = path or name, create_model(name, __base__=Section, **{name: (section, ...)})  # type: ignore[call-overload]
    return getattr(checked(root, _plain(node, origin), origin), name)
