"""Reads recipes: YAML files of `configs/` (or any path) with the settings of `config/`.

`base: NAME` inherits from another recipe, `key.path=value` overrides win over both. Unknown keys are refused with a
suggestion, and all problems of a recipe are reported at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError, create_model
from pydantic.fields import FieldInfo
from yaml import YAMLError

from onerec_jax.config import Recipe, Section
from onerec_jax.errors import InputError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
S = TypeVar("S", bound=Section)


def config_path(name: str, kind: str = "recipe", folder: Path = CONFIGS) -> Path:
    """The file of a recipe, board or sweep given by name (in `folder`) or by path.

    Raises:
        InputError: there is none.
    """
    for candidate in (Path(name), folder / f"{name}.yaml", folder / name):
        if candidate.is_file():
            return candidate
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else f"; known {kind}s: {', '.join(known)}"
    raise InputError(f"no {kind} '{name}': neither a file nor in {folder}{hint}")


def _read(path: Path, seen: tuple[Path, ...] = ()) -> Any:
    if path.resolve() in seen:
        raise InputError(f"{path}: 'base' goes in a circle")
    try:
        node: Any = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(node):
        raise InputError(f"{path}: a recipe is a mapping of settings")
    base = node.pop("base", None)
    if base is None:
        return node
    sibling = path.parent / f"{base}.yaml"
    parent = _read(sibling if sibling.is_file() else config_path(str(base)), (*seen, path.resolve()))
    _drop_other_kinds(parent, node)
    return OmegaConf.merge(parent, node)


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


def _explain(error: ValidationError, origin: str, root: type[Section] = Recipe) -> InputError:
    lines = []
    for item in error.errors():
        name, _ = _setting_at(item["loc"], root)
        if item["type"] == "extra_forbidden":
            known = sorted((_setting_at(item["loc"][:-1], root)[1] or root).model_fields)
            close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
            hint = f", did you mean '{close[0]}'?" if close else f", known here: {', '.join(known)}"
            lines.append(f"unknown setting '{name}'{hint}")
        elif item["type"] in ("missing", "union_tag_not_found"):
            lines.append(f"'{name}{'.kind' if item['type'] == 'union_tag_not_found' else ''}' is required")
        elif item["type"] == "value_error":
            lines.append(str(item.get("ctx", {}).get("error")))
        else:
            lines.append(f"'{name}' is {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}")
    return InputError(f"{origin}: " + "; ".join(lines))


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
    try:
        return Recipe.model_validate(_with_default_kinds(values))
    except ValidationError as error:
        raise _explain(error, origin) from None


def _override(node: Any, overrides: list[str] | tuple[str, ...], what: str) -> None:
    """Merges `key.path=value` overrides into `node`, which is of `what`."""
    # Kinds first, so that what an override says of the new kind stays, wherever it stands.
    for override in sorted(overrides, key=lambda override: not override.partition("=")[0].strip().endswith(".kind")):
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise InputError(f"override '{override}' must have the form key.path=value")
        try:
            new, change = OmegaConf.create(f"v: {value}").v, OmegaConf.create()
            OmegaConf.update(change, key.strip(), new)
            _drop_other_kinds(node, change)
            OmegaConf.update(node, key.strip(), new, merge=True)
        except (YAMLError, OmegaConfBaseException, TypeError, AttributeError, LookupError, ValueError) as error:
            raise InputError(f"override '{override}' does not fit {what}: {' '.join(str(error).split())}") from None


def _plain(node: Any, origin: str) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(f"{origin}: {' '.join(str(error).split())}") from None
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
    if path and not Path(path).is_file():
        raise InputError(f"no file '{path}' of {name} settings")
    node = OmegaConf.create({name: _read(Path(path)) if path else {}})
    _override(node, overrides, f"the settings of {name}")
    origin, root = path or name, create_model(name, __base__=Section, **{name: (section, ...)})  # type: ignore[call-overload]
    try:
        return getattr(root.model_validate(_plain(node, origin)), name)
    except ValidationError as error:
        raise _explain(error, origin, root) from None
