"""Shared by all tests: the compile cache, and one simulated dataset with semantic IDs per session."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is nearly all of the time of these tests; what is compiled runs once.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

import jax
import pytest
from tiny import COMPILED, tiny_values

from onerec_jax import cli
from onerec_jax.config import Recipe
from onerec_jax.recipe import make_recipe

jax.config.update("jax_compilation_cache_dir", str(COMPILED))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="session")
def tiny_recipe(tiny_folder: Path) -> Recipe:
    """The tiny recipe with its dataset and semantic IDs written."""
    from onerec_jax.data.prepare import prepare
    from onerec_jax.data.store import Dataset
    from onerec_jax.tokenizer.semantic_ids import fit_semantic_ids

    recipe = make_recipe(tiny_values(tiny_folder))
    prepare(recipe)
    fit_semantic_ids(Dataset(recipe.dataset_directory), recipe.tokenizer, recipe.seed).save(recipe.tokenizer_directory)
    return recipe


class Answer(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def onerec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Runs the `onerec` command in an empty working folder, with the output of C++ libraries captured too."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["onerec", *words])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        return Answer(code, *capfd.readouterr())

    return run


# Files that take longest, longest first: two workers that take whole files in this order end together.
SLOW = (
    "test_slurm.py",
    "test_processes.py",
    "test_moe_on_devices.py",
    "test_training_with_spread_tables.py",
    "test_tables_on_devices.py",
    "test_reinforcement.py",
    "test_step.py",
    "test_kills.py",
    "test_local_sweep.py",
    "test_docs.py",
    "test_sample.py",
    "test_onerec.py",
    "test_flip.py",
    "test_beam.py",
    "test_ab_test.py",
    "test_cli.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden from what the code gives now")


@pytest.fixture
def golden(request: pytest.FixtureRequest):
    """Compares a text with a file of tests/golden, which `--update-golden` rewrites, so that changes show in review."""

    def check(name: str, text: str) -> None:
        path = Path(__file__).parent / "golden" / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        hint = "if the change is meant, run `pytest --update-golden` and commit the difference"
        assert path.is_file(), f"no {path}: {hint}"
        assert text == path.read_text(encoding="utf-8"), hint

    return check
