from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from onerec_jax.cli import app
from onerec_jax.config import load_recipe, recipe_path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "BENCHMARKS.md", *sorted((ROOT / "docs").glob("*.md"))]


def _commands() -> list[list[str]]:
    """Every `onerec ...` line of every shell block of the docs, without comments."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S):
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] == "onerec" and words[1:] not in found:
                    found.append(words[1:])
    return found


@pytest.mark.parametrize("words", _commands(), ids=" ".join)
def test_every_documented_command_names_a_verb_and_a_recipe_that_exist(words: list[str]):
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert words[0] in verbs
    load_recipe(words[1], [word for word in words[2:] if "=" in word and not word.startswith("-")])


@pytest.mark.parametrize("words", [w for w in _commands() if w[0] in ("config", "count")], ids=" ".join)
def test_documented_commands_that_only_print_are_run(words: list[str]):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output


def test_every_file_that_a_page_links_to_exists():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_recipe_starts_with_a_comment_that_says_what_it_is():
    for path in (ROOT / "configs").glob("*.yaml"):
        assert recipe_path(path.stem) == path
        assert path.read_text().startswith("# ")


def test_make_targets_named_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.M):
        assert re.search(rf"^{target}:", makefile, re.M)
