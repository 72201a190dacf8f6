"""One export of a tiny model for all tests here."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_exports import export, random_recommender

from onerec_jax.generate.recommender import Recommender


@pytest.fixture(scope="session")
def random_tiny(tiny_recipe, tmp_path_factory) -> Recommender:
    """The tiny recipe, with every pathway and experts."""
    return random_recommender(tiny_recipe, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def exported(random_tiny, tmp_path_factory) -> Path:
    """An export of `random_tiny` that no test changes."""
    return export(random_tiny, tmp_path_factory.mktemp("exports") / "tiny")
