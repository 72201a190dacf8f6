"""What a file of settings says, read a second time by a plain YAML parser, and whether that is what was loaded.

The settings that a text says must be the loaded ones; all others must be those of its base, or the defaults.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from onerec_jax.config import Section


class Strict(yaml.CSafeLoader):
    """YAML read independently of the project: a key stands once, dates are text, 1e-4 is a number."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len(keys) != len(set(keys)) and "<<" not in keys:
            raise yaml.YAMLError("a key twice")
        return super().construct_mapping(node, deep)


Strict.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if not tag.endswith(":timestamp")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Strict.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read(file: Path) -> dict[str, Any]:
    return yaml.load(file.read_text(encoding="utf-8"), Strict)


def difference(made: Section, said: dict[str, Any], inherited: Section | None, at: str = "") -> str | None:
    """A setting that is neither what the text says nor, where it says nothing, inherited or the default."""
    if unknown := set(said) - set(type(made).model_fields) - {"base"}:
        return f"{at}{unknown} is no setting, and was accepted"
    for name, field in type(made).model_fields.items():
        value, stated = getattr(made, name), said.get(name)
        before = getattr(inherited, name) if inherited is not None else field.get_default(call_default_factory=True)
        if isinstance(value, Section) and (name in said or not field.is_required()):
            kept = before if inherited is not None and type(before) is type(value) else None
            found = difference(value, stated or {}, kept, f"{at}{name}.")
            if found or (name in said and not isinstance(stated, dict)):
                return found or f"{at}{name} is {stated!r}, and was accepted"
            continue
        if inherited is not None and all(isinstance(one, dict) for one in (value, stated, before)):
            stated = {**before, **stated}
        if not (same(value, stated) if name in said else value == before):
            return f"{at}{name} is {value!r}, the text says {stated!r} and before it was {before!r}"
    return None


def same(made: Any, said: Any) -> bool:
    """Whether a loaded value is what a text says."""
    if isinstance(made, dict) and isinstance(said, dict):
        return set(made) == set(said) and all(same(made[key], said[key]) for key in said)
    if isinstance(made, list | tuple) and isinstance(said, list | tuple):
        return len(made) == len(said) and all(map(same, made, said))
    if isinstance(said, bool) or made is None or said is None:
        return made is said
    if isinstance(made, bool):
        return (str(said).lower() in ("1", "true", "yes", "on", "y", "t")) == made
    if isinstance(made, int | float) and isinstance(said, str):
        return float(said) == made
    return type(made) in (int, float, str) and made == said
