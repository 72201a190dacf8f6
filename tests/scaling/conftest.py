from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from onerec_jax.config import Recipe


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tiny recipe on the dataset that is there already; runs go to the working folder, which is empty."""
    monkeypatch.chdir(tmp_path)
    values = yaml.safe_load(tiny_recipe.to_yaml()) | {"runs": "runs"}
    values["model"] |= {"positive_length": 0, "lifelong_length": 0, "moe": {}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    return "tiny.yaml"


@pytest.fixture
def sweep_file(recipe_file: str, tmp_path: Path) -> Callable[..., str]:
    """Writes a sweep `small.yaml` of the tiny recipe, made of these combinators."""

    def write(sweep: dict[str, Any]) -> str:
        (tmp_path / "small.yaml").write_text(yaml.safe_dump({"recipe": recipe_file, "sweep": sweep}))
        return "small.yaml"

    return write
