"""One export of a small model, and one server of it, for all tests of a process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Client, exported, recommender_of, serving
from tiny import ALONE, tiny_model

from onerec_jax.config import Recipe
from onerec_jax.generate.recommender import Recommender
from onerec_jax.serve.released import Released, load_released


@pytest.fixture(scope="session")
def recommender(tiny_recipe: Recipe) -> Recommender:
    return recommender_of(tiny_recipe, tiny_model(**ALONE))


@pytest.fixture(scope="session")
def export(recommender: Recommender, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(recommender, tmp_path_factory.mktemp("serve") / "export")


@pytest.fixture(scope="session")
def released(export: Path) -> Released:
    return load_released(export)


@pytest.fixture(scope="session")
def client(released: Released) -> Iterator[Client]:
    with serving(released) as found:
        yield found
