from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from onerec_jax.cli import app
from onerec_jax.recipe import config_path, load_recipe
from onerec_jax.scaling.sweep import load_sweep

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "BENCHMARKS.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "launch" / "README.md",
]


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
    if words[0] == "fit":
        assert (ROOT / words[1]).is_file()
        return
    if words[0] == "serve":
        assert any(w[0] == "export" and words[1] in w for w in _commands()), "no documented export makes this folder"
        return
    if words[0] == "sweep":
        named = words[2] if words[1] in ("status", "report") else words[1]
        sweep = load_sweep(named)
        load_recipe(
            sweep.recipe, [word for word in words[2:] if "=" in word and not word.startswith(("-", "cluster."))]
        )
        return
    if words[0] == "launch":
        assert "--dry-run" in words, "the next test runs what is documented"
        return
    load_recipe(words[1], [word for word in words[2:] if "=" in word and not word.startswith("-")])


@pytest.mark.parametrize(
    "words", [w for w in _commands() if w[0] in ("config", "count", "fit") or "--dry-run" in w], ids=" ".join
)
def test_documented_commands_that_only_print_are_run(words: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output


# A documented command is run as it stands, with the recipe it names made small.
SMALL = (
    "data.source.users=60", "data.source.items=150", "data.source.events_per_user=30", "data.source.days=6",
    "tokenizer.codebook_sizes=[8,8,8]", "tokenizer.iterations=5", "model.d_model=32", "model.heads=2",
    "model.moe.hidden=16", "model.moe.experts=4", "model.short_length=6", "model.positive_length=6",
    "model.lifelong_length=6", "model.lifelong_queries=4", "train.steps=2", "train.batch_size=16", "train.eval_every=0",
    "evaluate.beam_width=10", "evaluate.max_examples=16", "evaluate.batch_size=16", "evaluate.free_examples=4",
)  # fmt: skip


def test_the_commands_of_the_readme_lead_from_a_log_to_recommendations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text()
    steps = [shlex.split(line, comments=True)[1:] for line in re.findall(r"^onerec .*quickstart.*$", text, re.M)]
    verbs = ["config", "data", "tokenize", "pretrain", "evaluate", "recommend", "export"]
    assert [words[0] for words in steps] == verbs
    for words in steps:
        takes_recipe = words[0] in ("config", "data", "tokenize", "pretrain")
        result = CliRunner().invoke(app, [*words, *(SMALL if takes_recipe else ())], catch_exceptions=False)
        assert result.exit_code == 0, (words, result.output)
        if words[0] == "recommend":
            assert "recommended next" in result.output
    scripts = [shlex.split(line, comments=True)[1:] for line in re.findall(r"^python exported.*$", text, re.M)]
    assert len(scripts) == 2
    listed = [subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True) for words in scripts]
    items = [re.findall(r"^ *-[0-9.]+ +(\S+)", result.stdout, re.M) for result in listed]
    assert items[0] and items[0] == items[1]


ALONE = ("model.positive_length=0", "model.lifelong_length=0", "model.moe.experts=0")
LATER = (
    "reward.steps=2", "reward.batch_size=8", "reward.width=8", "reward.heads=2", "reward.hidden=8", "reward.history=6",
    "rsft.steps=2", "rl.steps=2", "rl.requests=4", "rl.batch_size=4", "rl.group=8", "rl.watch_every=2",
    "rl.watch_examples=20", "rl.max_fall=1", "rl.log_every=1",
)  # fmt: skip


def test_the_commands_of_post_training_lead_from_a_run_to_an_ab_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "post-training.md").read_text()
    steps = [shlex.split(line, comments=True)[1:] for line in re.findall(r"^onerec .*$", text, re.M)]
    assert [words[0] for words in steps] == ["run", "rsft", "reward", "rl", "ab"]
    for words in steps:
        small = (
            ["--users", "6", "--sessions", "2", "--impressions", "3"] if words[0] == "ab" else [*SMALL, *ALONE, *LATER]
        )
        result = CliRunner().invoke(app, [*words, *small], catch_exceptions=False)
        assert result.exit_code == 0, (words, result.output)
    assert (Path("runs") / "simulator_post-rl" / "ab" / "ab_test.png").exists() and "watch s" in result.output


def test_every_file_that_a_page_links_to_exists():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_recipe_starts_with_a_comment_that_says_what_it_is():
    for path in (ROOT / "configs").glob("*.yaml"):
        assert config_path(path.stem) == path
        assert path.read_text().startswith("# ")


def test_make_targets_named_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.M):
        assert re.search(rf"^{target}:", makefile, re.M)
