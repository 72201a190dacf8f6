"""What every group of settings is made of."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A frozen group of settings that refuses names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def stated(self) -> dict[str, Any]:
        """The settings that differ from their defaults, as JSON values, and the `kind` of what differs.

        What a digest is made of: a setting added later, with a default that does what was done before, changes no digest.
        """
        values, found = self.model_dump(mode="json"), {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name == "kind" or field.is_required() or value != field.get_default(call_default_factory=True):
                found[name] = value.stated() if isinstance(value, Section) else values[name]
        return found


def setting(default: Any, description: str, **checks: Any) -> Any:
    """A documented field; every field of the recipe goes through here."""
    return Field(default, description=description, validate_default=True, **checks)
