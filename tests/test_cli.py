"""The command line: bad input is one line on stderr and exit code 2, with nothing half-written left behind."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from rich.table import Table
from stand_ins import instant_training

from onerec_jax import cli
from onerec_jax.config import Recipe
from onerec_jax.data import prepare
from onerec_jax.errors import InputError, StorageError
from onerec_jax.recipe import load_recipe
from onerec_jax.terminal import make_console


def files(folder: Path) -> dict[str, str]:
    """Every file and folder, with a hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refused(onerec, tmp_path: Path, tiny_folder: Path):
    """Runs a command that must be refused; returns the sentence it says."""

    def run(*words: str) -> str:
        before = files(tmp_path), files(tiny_folder)
        answer = onerec(*words)
        assert (answer.code, answer.out) == (2, "")
        lines = answer.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("onerec: "), answer.err
        assert (files(tmp_path), files(tiny_folder)) == before
        return lines[0].removeprefix("onerec: ")

    return run


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_recipe: Recipe):
    """Writes the tiny recipe, on the dataset that is there already, and gives the file's path."""

    def write(name: str = "tiny", **sections) -> str:
        values = yaml.safe_load(tiny_recipe.to_yaml()) | {"name": name, "runs": "runs"} | sections
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    return write


@pytest.fixture
def parquet_recipe(tmp_path: Path):
    """Writes a recipe of a Parquet log of two users and ten events each, with some columns replaced."""

    def write(**columns: list) -> str:
        events = {
            "user_id": ["a", "b"] * 10, "item_id": list(range(10)) * 2, "timestamp_ms": list(range(20)),
            "like": [True] * 20,
        }  # fmt: skip
        pl.DataFrame(events | columns).write_parquet(tmp_path / "events.parquet")
        (tmp_path / "mine.yaml").write_text("data: {source: {kind: parquet, events: events.parquet}}\n")
        return "mine.yaml"

    return write


@pytest.fixture
def trained(recipe_file, onerec, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run named `tiny`, trained for two instant steps; gives its recipe's path."""
    instant_training(monkeypatch)
    recipe = recipe_file()
    answer = onerec("pretrain", recipe, "train.steps=2")
    assert answer.code == 0, answer.err
    return recipe


# ----------------------------------------------------------------------------------------------------------- what it does


def test_config_prints_the_resolved_recipe(onerec):
    answer = onerec("config", "quickstart", "seed=3", "train.steps=7")
    assert (answer.code, answer.err) == (0, "")
    assert answer.out == load_recipe("quickstart", ["seed=3", "train.steps=7"]).to_yaml()


def test_count_prints_the_parameters_of_every_part(onerec):
    answer = onerec("count", "onerec_0.935b")
    assert (answer.code, answer.err) == (0, "")
    counted = {
        part: int(number.replace(",", "")) for part, number in re.findall(r"│ (\w+) +│ +([\d,]+) +│", answer.out)
    }
    assert set(counted) == {"model", "active", "codes", "features", "tables"}
    assert 0.8e9 < counted["model"] < 1e9 and counted["active"] < counted["model"]


def test_data_and_pretrain_say_what_they_made(onerec, parquet_recipe, trained: str):
    assert "2 users, 10 items, 20 events" in onerec("data", parquet_recipe()).out
    assert Path("datasets/mine/card.json").is_file()
    answer = onerec("pretrain", trained, "train.steps=4")
    assert answer.out.splitlines()[0] == "resumed runs/tiny at step 2"
    assert answer.out.splitlines()[-1] == "run: runs/tiny"


def test_tokenize_prints_the_quality_and_writes_a_report_beside_the_ids(onerec, recipe_file):
    recipe = recipe_file()
    for _ in range(2):  # the second run replaces the first one's folder
        answer = onerec("tokenize", recipe, "tokenizer.directory=ids")
        assert (answer.code, answer.out.splitlines()[-1]) == (0, "report: ids/report.html"), answer.err
        assert "Semantic IDs of 150 items" in answer.out
    assert Path("ids/report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_tokenize_leaves_given_embeddings_in_their_file(onerec, recipe_file, monkeypatch: pytest.MonkeyPatch):
    from onerec_jax.tokenizer.embedding_files import EmbeddingRows

    monkeypatch.delattr(EmbeddingRows, "whole")
    np.save("given.npy", np.random.default_rng(0).normal(size=(150, 4)))
    answer = onerec("tokenize", recipe_file(), "tokenizer.directory=ids", "tokenizer.embedding_path=given.npy")
    assert (answer.code, answer.out.splitlines()[-1]) == (0, "report: ids/report.html"), answer.err


def test_expand_gives_new_items_ids_and_moves_none(onerec, tmp_path: Path):
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(60, 4)).astype(np.float32)
    for name, items in (("early", 40), ("late", 60)):
        events = {"user_id": [0, 1] * 40, "item_id": [n % items for n in range(80)], "timestamp_ms": list(range(80))}
        pl.DataFrame(events).write_parquet(tmp_path / f"{name}_events.parquet")
        rows = {"item_id": list(range(items)), "embedding": embedding[:items].tolist()}
        pl.DataFrame(rows).write_parquet(tmp_path / f"{name}_items.parquet")
        source = {"kind": "parquet", "events": f"{name}_events.parquet", "items": f"{name}_items.parquet"}
        recipe = {"data": {"source": source}, "tokenizer": {"codebook_sizes": [4, 4], "iterations": 3}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        assert onerec("data", f"{name}.yaml").code == 0
    assert onerec("tokenize", "early.yaml").code == 0
    answer = onerec("expand", "late.yaml", "--former", "datasets/early")
    assert answer.code == 0, answer.err
    early, late = (np.load(f"datasets/{name}/semantic_ids/codes.npy") for name in ("early", "late"))
    assert late.shape == (60, 2)
    np.testing.assert_array_equal(late[:40], early)


def test_a_wrong_number_of_levels_to_expand_is_refused(refused, onerec, recipe_file, tiny_recipe: Recipe):
    former = str(tiny_recipe.dataset_directory)
    assert "'last' or 'all'" in refused("expand", recipe_file(), "--former", former, "--levels", "some")


@pytest.mark.parametrize(
    "words", [["nonsense"], ["config"], ["recommend", "runs/tiny"], ["config", "quickstart", "--no"]]
)
def test_a_wrong_use_of_the_command_exits_with_2(onerec, words: list[str]):
    answer = onerec(*words)
    assert answer.code == 2
    assert "Usage: " in answer.err and "Traceback" not in answer.err


def test_without_a_verb_the_help_lists_all_of_them(onerec):
    answer = onerec("--help")
    assert answer.code == 0
    for verb in ("config", "count", "data", "tokenize", "expand", "pretrain", "evaluate", "recommend", "run"):
        assert f" {verb} " in answer.out


# --------------------------------------------------------------------------------------------------------------- bad input


def test_as_a_process_it_says_one_line_and_exits_with_2(tmp_path: Path):
    command = [sys.executable, "-m", "onerec_jax.cli", "config", "quickstart", "train.stepz=1"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "unknown setting 'train.stepz', did you mean 'steps'?" in done.stderr


@pytest.mark.parametrize("verb", ["config", "count", "data", "tokenize", "pretrain", "run"])
def test_a_missing_recipe_is_refused(refused, verb: str):
    assert "no recipe 'missing.yaml'" in refused(verb, "missing.yaml")


@pytest.mark.parametrize("verb", ["config", "count", "data", "tokenize", "pretrain", "run"])
def test_an_unknown_setting_is_refused_with_a_suggestion(refused, verb: str):
    assert "unknown setting 'train.stepz', did you mean 'steps'?" in refused(verb, "quickstart", "train.stepz=1")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("parquet, events: nowhere.parquet", "data.source.events: no file matches 'nowhere.parquet'"),
        ("amazon, path: nowhere", "data.source.path: no folder 'nowhere'"),
        ("kuairand, path: nowhere", "data.source.path: no folder 'nowhere'"),
        ("kuairand, path: .", "expected log_standard_*.csv or log_standard_*.parquet, there is none"),
    ],
)
def test_a_missing_log_is_refused(refused, tmp_path: Path, kind: str, said: str):
    (tmp_path / "mine.yaml").write_text(f"data: {{source: {{kind: {kind}}}}}\n")
    assert said in refused("data", "mine.yaml")


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("timestamp_ms", ["yesterday"] * 20, "'timestamp_ms'"),
        ("timestamp_ms", [0.5] * 20, "'timestamp_ms'"),
        ("like", ["yes"] * 20, "'like'"),
        ("user_id", [0.5] * 20, "'user_id'"),
        ("timestamp_ms", [5] * 7 + [-1] + [5] * 12, "'timestamp_ms' row 7 is -1"),
    ],
)
def test_a_wrong_column_type_or_value_is_refused_by_name(refused, parquet_recipe, column: str, values: list, said: str):
    message = refused("data", parquet_recipe(**{column: values}))
    assert "events.parquet" in message and said in message and "expected" in message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.split.valid_from=2050-01-01", "data.split.valid_from 2050-01-01 must not be later than"),
        ("data.split.test_from=2050-01-01", "data.split.test_from 2050-01-01: empty test split"),
        ("data.min_history=50", "empty train split"),
        ("data.positive_labels=[click]", "data.positive_labels: the source provides none of click"),
    ],
)
def test_an_empty_split_is_refused(refused, parquet_recipe, override: str, said: str):
    assert said in refused("data", parquet_recipe(), override)


@pytest.mark.parametrize("part", ["write_records", "write_items", "np.save", "pq.write_table"])
@pytest.mark.parametrize("older", [False, True])
def test_a_full_disk_while_a_dataset_is_written_leaves_what_was_there(
    refused, onerec, parquet_recipe, monkeypatch: pytest.MonkeyPatch, part: str, older: bool
):
    recipe = parquet_recipe()
    if older:
        assert onerec("data", recipe, "seed=1").code == 0
    else:
        Path("datasets").mkdir()

    def full(path, *arguments, **settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    owner, _, name = part.rpartition(".")
    monkeypatch.setattr(getattr(prepare, owner) if owner else prepare, name, full)
    message = refused("data", recipe)
    assert message == "cannot write the dataset to datasets/mine: No space left on device"


def test_a_full_disk_while_semantic_ids_are_written_leaves_what_was_there(
    refused, recipe_file, monkeypatch: pytest.MonkeyPatch
):
    def full(path, array, **settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    assert re.search(r"semantic_ids(\.levels)?: No space left on device", refused("tokenize", recipe_file()))


def test_a_folder_that_holds_something_else_is_not_replaced_by_a_dataset(refused, parquet_recipe):
    Path("datasets/mine").mkdir(parents=True)
    Path("datasets/mine/thesis.txt").write_text("years of work")
    assert "datasets/mine holds other files than a dataset" in refused("data", parquet_recipe())


@pytest.mark.parametrize("verb", ["tokenize", "pretrain"])
def test_a_missing_dataset_is_refused_with_the_command_that_makes_it(refused, verb: str):
    message = refused(verb, "quickstart")
    assert "datasets/quickstart holds no dataset" in message and "`onerec data RECIPE`" in message


def test_missing_semantic_ids_are_refused_with_the_command_that_makes_them(refused, recipe_file):
    message = refused("pretrain", recipe_file(), "tokenizer.directory=nowhere")
    assert "no semantic IDs in nowhere" in message and "`onerec tokenize RECIPE`" in message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("mesh.tensor=3", "mesh data 1 x fsdp 1 x expert 1 x tensor 3 needs 3 devices but 1 are there"),
        ("mesh.data=2", "mesh data 2 x fsdp 1 x expert 1 x tensor 1 needs 2 devices but 1 are there"),
        ("mesh.data=0", "mesh.data must be positive, or -1 for all remaining devices"),
    ],
)
def test_an_impossible_mesh_is_refused(refused, recipe_file, override: str, said: str):
    assert said in refused("pretrain", recipe_file(), override)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--topology", "v5e:2x2x2"), "topology 'v5e:2x2x2' has 3 sides, a slice of v5e has 2: v5e:AxB"),
        (("--topology", "v9:2x2"), "topology 'v9:2x2' is not CHIP:AxB"),
        (("--topology", "v5e:2x2", "--step", "serve"), "step 'serve' is none of train, decode"),
        (("--topology", "v5e:2x2", "--batch", "6"), "use a multiple of 4"),
        (("--topology", "v5e:2x2", "mesh.fsdp=3"), "needs 3 devices but 4 are there"),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused(refused, recipe_file, words: tuple[str, ...], said: str):
    assert said in refused("plan", recipe_file(), *words)


def test_a_plan_of_a_log_that_is_not_there_is_refused(refused):
    assert "run onerec data and onerec tokenize first" in refused("plan", "beauty_small", "--topology", "v5e:2x2")


def test_a_batch_that_does_not_divide_into_micro_batches_is_refused(refused, recipe_file):
    message = refused("pretrain", recipe_file(), "train.batch_size=10", "train.accumulation=4")
    assert "train.batch_size 10 does not divide into train.accumulation 4 micro-batches" in message


def test_a_batch_that_does_not_divide_over_the_devices_is_refused(
    refused, recipe_file, monkeypatch: pytest.MonkeyPatch
):
    from onerec_jax.parallel import mesh

    one = mesh.jax.devices()[:1]
    monkeypatch.setattr(mesh.jax, "devices", lambda: one * 4)
    message = refused("pretrain", recipe_file(), "train.batch_size=12", "train.accumulation=2")
    assert "train.batch_size 12 in 2 micro-batches does not divide over the 4 data-parallel devices" in message
    assert "use a multiple of 8" in message


@pytest.mark.parametrize("verb", ["pretrain", "evaluate", "recommend"])
def test_a_checkpoint_of_another_model_is_refused(refused, trained: str, verb: str):
    words = {"pretrain": [trained], "evaluate": ["tiny"], "recommend": ["tiny", "--user", "0"]}[verb]
    message = refused(verb, *words, "model.d_model=48")
    assert "checkpoints/2 is of another model: model.d_model is 48 but 32 in the checkpoint" in message


def test_starting_from_a_run_of_another_model_is_refused(refused, trained: str):
    message = refused("pretrain", trained, "name=new", "train.init_from=tiny", "model.d_model=48")
    assert "is of another model: model.d_model is 48 but 32 in the checkpoint" in message


def test_validation_without_validation_examples_is_refused_before_training(refused, onerec, parquet_recipe):
    changes = ["data.split.valid_from=0.9", "data.split.test_from=0.9"]
    recipe = parquet_recipe()
    assert onerec("data", recipe, *changes).code == 0
    changes += ["tokenizer.content=[behaviour]", "tokenizer.codebook_sizes=[2]", "tokenizer.dimensions=2"]
    assert onerec("tokenize", recipe, *changes).code == 0
    assert "has no valid examples" in refused("pretrain", recipe, *changes, "train.eval_every=5")


def test_a_run_whose_dataset_has_changed_is_refused(refused, trained: str, onerec):
    small = "data.source={kind: simulator, users: 30, items: 60}"
    changes = ["data.directory=small", small]
    assert onerec("data", trained, *changes).code == onerec("tokenize", trained, *changes).code == 0
    assert "does not fit this dataset" in refused("pretrain", trained, *changes)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recommend", "tiny", "--user", "nobody"], "no user 'nobody' in"),
        (["recommend", "nothing", "--user", "0"], "no run 'nothing': neither a run folder nor one of tiny in runs/"),
        (["evaluate", "nothing"], "no run 'nothing'"),
        (["evaluate", "tiny@7"], "has no checkpoint of step 7; it has 2"),
        (["evaluate", "tiny@last"], "'tiny@last' must be RUN or RUN@STEP"),
        (
            ["evaluate", "tiny", "evaluate.beem=5"],
            "unknown setting 'evaluate.beem', known here: batch_size, beam_width",
        ),
        (["evaluate", "tiny", "data.directory=nowhere"], "nowhere holds no dataset"),
        (["pretrain", "tiny.yaml", "name=new", "train.init_from=nothing"], "no run 'nothing'"),
        (["pretrain", "tiny.yaml", "name=new", "train.init_from=tiny@7"], "has no checkpoint of step 7; it has 2"),
    ],
)
def test_an_unknown_user_run_or_step_is_refused(refused, trained: str, words: list[str], said: str):
    assert said in refused(*words)


def test_a_failure_of_storage_pauses_where_the_launcher_asks_for_it_and_bad_input_does_not(
    onerec, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise failure

    paused: list[float] = []
    monkeypatch.setenv("ONEREC_BACKOFF_S", "7")
    monkeypatch.setattr(cli.time, "sleep", paused.append)
    monkeypatch.setattr(cli, "app", fail)
    failure: Exception = StorageError("the bucket is gone")
    answer = onerec("pretrain", "tiny")
    assert (answer.code, answer.err, paused) == (4, "onerec: the bucket is gone\n", [7.0])
    failure = InputError("no")
    assert (onerec("pretrain", "tiny").code, paused) == (2, [7.0])


def test_a_table_in_a_file_keeps_its_numbers_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("COLUMNS", raising=False)
    table = Table(*(f"R@{10 * k}" for k in range(1, 13)))
    table.add_row(*["0.123456"] * 12)
    with (tmp_path / "log").open("w") as log, contextlib.redirect_stdout(log):
        make_console().print(table)
    assert (tmp_path / "log").read_text().count("0.123456") == 12
