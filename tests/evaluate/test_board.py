"""A board with training and beam search replaced by stand-ins: what is run, what is kept, and what the table says."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from onerec_jax.errors import InputError
from onerec_jax.evaluate import jobs as runs
from onerec_jax.evaluate import stages
from onerec_jax.evaluate.board import Board, jobs, load_board, run_board
from onerec_jax.evaluate.board_page import Row, html, markdown
from onerec_jax.evaluate.evaluation import Evaluation
from onerec_jax.evaluate.record import settings_digest, thinned
from onerec_jax.recipe import CONFIGS


@pytest.fixture
def recipe(tmp_path, tiny_recipe):
    path = tmp_path / "tiny.yaml"
    values = yaml.safe_load(tiny_recipe.to_yaml())
    values["evaluate"]["floors"] = ["popularity"]
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.fixture
def small(recipe):
    rows = {"wide": ("model.ffn_hidden=64",), "plain": (), "random | IDs": ("tokenizer.quantizer.kind=random",)}
    return Board(name="small", recipe=recipe, seeds=(0, 1), rows=rows)


@dataclasses.dataclass
class Loaded:
    """Stands for a recommender."""

    trained: Path
    run: Path
    recipe: Any


@pytest.fixture
def trained(monkeypatch, tiny_recipe):
    """Stand-ins for training and evaluation; the list of what was trained, as (feed-forward width, seed)."""
    done = []

    def pretrain(recipe, report):
        done.append((recipe.model.ffn_hidden, recipe.seed))
        recipe.run_directory.mkdir(parents=True, exist_ok=True)
        lines = [{"step": step, "loss": 9 - step} for step in (1, 2)] + [{"step": 2, "valid/loss": 7.5}]
        (recipe.run_directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (recipe.run_directory / "config.yaml").write_text(recipe.to_yaml())
        return recipe.run_directory

    def evaluate(recommender, report):
        trained = yaml.safe_load((recommender.trained / "config.yaml").read_text())
        beam = recommender.recipe.evaluate.beam_width - small_beam
        score = trained["model"]["ffn_hidden"] / 1000 + trained["seed"] / 100 + beam / 10
        assert recommender.run == recommender.recipe.run_directory and recommender.run.is_dir()
        return Evaluation("", {"model": {"R@10": score}})

    small_beam = tiny_recipe.evaluate.beam_width

    monkeypatch.setattr(stages, "pretrain", pretrain)
    monkeypatch.setattr(runs, "load_recommender", lambda run: Loaded(Path(run), Path(run), None))
    monkeypatch.setattr(runs, "evaluate", evaluate)
    return done


def line_of(table, row):
    return next(line for line in table.splitlines() if line.startswith(f"| {row} |"))


def test_every_row_is_trained_on_every_seed_and_the_table_has_mean_and_spread(small, trained, tmp_path):
    folder = run_board(small, folder=tmp_path / "out", report=lambda line: None)
    assert sorted(trained) == [(48, 0), (48, 0), (48, 1), (48, 1), (64, 0), (64, 1)]
    table = (folder / "board.md").read_text()
    assert " 0.0690 ± 0.0071 |" in line_of(table, "**wide**")
    assert " 0.0530 ± 0.0071 |" in line_of(table, "**random \\| IDs**")
    assert re.search(r"^\| popularity \| 0\.\d{4} \|", table, re.MULTILINE)
    assert "full catalogue" in table and "jax " in table


def test_a_second_call_trains_nothing_and_a_changed_row_alone_is_trained_again(small, trained, tmp_path):
    run_board(small, folder=tmp_path / "out", report=lambda line: None)
    before = (tmp_path / "out" / "board.md").read_text()
    trained.clear()
    run_board(small, folder=tmp_path / "out", report=lambda line: None)
    assert not trained and (tmp_path / "out" / "board.md").read_text() == before
    wider = small.model_copy(update={"rows": {**small.rows, "wide": ("model.ffn_hidden=80",)}})
    run_board(wider, folder=tmp_path / "out", report=lambda line: None)
    assert trained == [(80, 0), (80, 1)]


def test_a_board_that_was_killed_goes_on_with_the_job_it_was_at(small, trained, tmp_path, monkeypatch):
    real, calls = runs.evaluate, []

    def killed(recommender, report):
        calls.append(recommender.run)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(recommender, report)

    monkeypatch.setattr(runs, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        run_board(small, folder=tmp_path / "out", report=lambda line: None)
    run_board(small, folder=tmp_path / "out", report=lambda line: None)
    assert len(trained) == 7 and calls[2] == calls[3] and len(set(calls)) == 6


def test_rows_share_a_tokenizer_where_its_settings_and_seed_are_the_same(small, tmp_path):
    planned = jobs(small, folder=tmp_path)
    ids = {(job.row, job.seed): job.recipe.tokenizer_directory for job in planned}
    assert ids["wide", 0] == ids["plain", 0] != ids["plain", 1] and ids["random | IDs", 0] != ids["plain", 0]
    assert len({job.recipe.run_directory for job in planned}) == 6
    assert len({job.recipe.dataset_directory for job in planned}) == 1


@pytest.mark.parametrize("only", ["", "wide"])
def test_rows_that_differ_in_evaluation_alone_share_a_run(recipe, trained, tmp_path, tiny_recipe, only):
    width = tiny_recipe.evaluate.beam_width
    rows = {"plain": (), "wide": (f"evaluate.beam_width={width + 1}",), "wider": ("model.ffn_hidden=64",)}
    board = Board(name="small", recipe=recipe, seeds=(0, 1), rows=rows)
    folder = run_board(board, folder=tmp_path / "board", only=only, report=lambda line: None)
    assert trained.count((48, 0)) == (1 if only else 2) and len({job.runs.pretraining.name for job in jobs(board)}) == 4
    runs = {job.runs.pretraining.run_directory for job in jobs(board, folder=tmp_path / "board")}
    otherwise = jobs(board, ["evaluate.free_examples=7"], folder=tmp_path / "board")
    assert {job.runs.pretraining.run_directory for job in otherwise} == runs and not any(
        job.result.exists() for job in otherwise
    )
    table = (folder / "board.md").read_text()
    assert "0.1530" in line_of(table, "**wide**")
    assert ("0.0530" in line_of(table, "**plain**")) == (not only)


def test_rows_can_be_run_one_by_one(small, trained, tmp_path):
    run_board(small, folder=tmp_path / "out", only="wide", report=lambda line: None)
    assert trained == [(64, 0), (64, 1)]
    run_board(small, folder=tmp_path / "out", only="plain", report=lambda line: None)
    table = (tmp_path / "out" / "board.md").read_text()
    assert " 0.0690 ± " in line_of(table, "**wide**") and " 0.0530 ± " in line_of(table, "**plain**")
    with pytest.raises(InputError, match=r"no row with 'narrow'.*wide, plain"):
        run_board(small, folder=tmp_path / "out", only="narrow")


def test_a_board_goes_on_from_a_record_made_elsewhere(small, trained, tmp_path):
    record = tmp_path / "record"
    run_board(small, folder=tmp_path / "here", only="wide", record=record, report=lambda line: None)
    assert sorted(path.name for path in record.iterdir()) == ["board.html", "board.md", "wide_0.json", "wide_1.json"]
    kept = json.loads((record / "wide_1.json").read_text())
    assert (kept["row"], kept["seed"], kept["metrics"]) == ("wide", 1, {"R@10": 0.064 + 0.01})
    assert kept["curves"] == [{"step": 1, "loss": 8}, {"step": 2, "loss": 7}, {"step": 2, "valid/loss": 7.5}]
    trained.clear()
    folder = run_board(small, folder=tmp_path / "there", record=record, report=lambda line: None)
    assert all(width == 48 for width, _ in trained) and len(trained) == 4, "what the record has is not trained again"
    assert (folder / "board.md").read_text() == (record / "board.md").read_text()
    assert line_of((folder / "board.md").read_text(), "**wide**").count("±") == 1
    changed = small.model_copy(update={"rows": {"wide": ("model.ffn_hidden=80",)}})
    run_board(changed, folder=tmp_path / "changed", record=record, report=lambda line: None)
    assert {width for width, _ in trained} == {48, 80}, "a record of other settings is no result"
    assert json.loads((record / "wide_1.json").read_text())["metrics"] == {"R@10": 0.08 + 0.01}


def test_curves_are_thinned_to_what_a_chart_shows():
    lines = [{"step": i, "loss": 1.0 / (i + 1), "other": 3.0} for i in range(1000)] + [
        {"step": 999, "valid/loss": 0.25}
    ]
    found = thinned(lines)
    assert [line["step"] for line in found if "loss" in line][::58] == [0, 986] and found[-2]["step"] == 999
    assert found[-1] == {"step": 999, "valid/loss": 0.25} and len(found) <= 61


@pytest.mark.parametrize("change", ["data.targets=1", "evaluate.exclude_seen=false"])
def test_a_row_of_another_dataset_or_protocol_is_refused(small, tmp_path, change):
    other = small.model_copy(update={"rows": {"plain": (), "other": (change,)}})
    with pytest.raises(InputError, match=rf"row 'other' changes {change.partition('=')[0]}, but all rows"):
        jobs(other, folder=tmp_path)


def test_every_committed_board_plans_its_jobs():
    for path in sorted((CONFIGS / "boards").glob("*.yaml")):
        board = load_board(path.stem)
        planned = jobs(board)
        assert len(planned) == len(board.rows) * len(board.seeds) >= 3
        assert len({job.recipe.run_directory for job in planned}) == len(planned), "two rows have one recipe"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: {a: []}\n", "'recipe' is required"),
        ("- a\n", "a board is a mapping"),
        ("recipe: a\nrecipe: b\nrows: {a: []}\n", "duplicate key recipe"),
        ("recipe: quickstart\nrows: {}\n", "'rows'"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_board_is_refused(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        load_board(str(tmp_path / "bad.yaml"))


def test_an_unknown_board_names_the_known_ones():
    with pytest.raises(InputError, match=r"no board 'zzz'.*known boards: .*simulator"):
        load_board("zzz")
    with pytest.raises(InputError, match=r"no board 'beauty_typo'.*did you mean 'beauty'"):
        load_board("beauty_typo")


def test_names_cannot_break_the_page():
    row = Row("<b>|", [{"R@10": 0.5}], [60.0], [[{"step": 1, "loss": 2.0}]])
    assert "<b>|" not in html("name", "protocol", "command", "device", [row]).replace("<body>", "")
    assert "| **<b>\\|** | 0.5000 | 1 | 1.0 min |" in markdown("name", "protocol", "command", "device", [row])


def test_a_curve_ends_in_the_corners_of_its_chart():
    curve = [{"step": step, "loss": loss} for step, loss in ((10, 3.0), (20, 2.0), (30, 1.0))]
    page = html("name", "protocol", "command", "device", [Row("row", [{"R@10": 0.5}], [], [curve])])
    points = np.array([p.split(",") for p in re.findall(r'points="([^"]*)"', page)[0].split()], float)
    np.testing.assert_allclose(points, [[0, 0], [320, 120], [640, 240]])


def test_a_job_in_a_process_of_its_own_gives_what_it_gives_in_this_one(recipe, tmp_path, capfd):
    """The real thing, tiny: an item head is quick to compile and to search."""
    quick = ("model.head=items", "model.moe.experts=0", "model.lifelong_length=0", "model.positive_length=0")
    board = Board(name="real", recipe=recipe, seeds=(0,), rows={"full": (*quick, "train.steps=2")})
    apart = run_board(board, folder=tmp_path / "apart", processes=2, report=lambda line: None)
    assert "[full, seed 0] step 2/2" in capfd.readouterr().out
    here = run_board(board, folder=tmp_path / "here", report=lambda line: None)
    one, other = ((folder / "board.md").read_text() for folder in (apart, here))
    assert line_of(one, "**full**").split("|")[2:-2] == line_of(other, "**full**").split("|")[2:-2]


def test_a_job_that_fails_is_named_after_the_others_have_ended(recipe, tmp_path):
    board = Board(name="pair", recipe=recipe, seeds=(0,), rows={"bad": ("mesh.data=7",), "worse": ("mesh.data=9",)})
    with pytest.raises(InputError, match=r"bad, seed 0.*worse, seed 0|worse, seed 0.*bad, seed 0"):
        run_board(board, folder=tmp_path / "out", processes=2, report=lambda line: None)


@pytest.fixture
def staged(trained, monkeypatch):
    """Stand-ins for what comes after pre-training; the list of what was made, as (stage, name of the run)."""
    made = []

    def stand_in(stage, derive):
        def train(recipe, *rest):
            own = derive(recipe)
            made.append((stage, own.name))
            own.run_directory.mkdir(parents=True)
            (own.run_directory / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
            (own.run_directory / "config.yaml").write_text(own.to_yaml())
            return own.run_directory

        return train

    monkeypatch.setattr(stages, "rsft", stand_in("rsft", stages.rsft_recipe))
    monkeypatch.setattr(stages, "train_reward", stand_in("reward", stages.reward_recipe))
    monkeypatch.setattr(stages, "reinforce", stand_in("rl", stages.rl_recipe))
    return made


def test_rows_of_later_stages_share_the_runs_that_they_begin_with(recipe, trained, staged, tmp_path):
    rows = {
        "plain": (), "RSFT": ("stage=rsft",), "ECPO": ("stage=rl",), "GRPO": ("stage=rl", "rl.objective=grpo"),
        "hits": ("stage=rl", "rl.rewards={hit: 1.0, p_score: 0}"), "half": ("stage=rl", "rsft.share=0.3"),
    }  # fmt: skip
    board = Board(name="later", recipe=recipe, seeds=(0,), rows=rows)

    folder = run_board(board, folder=tmp_path / "out", report=lambda line: None, only="plain")
    assert trained == [(48, 0)] and staged == []
    planned = {job.row: job for job in jobs(board, folder=tmp_path / "out")}
    pretraining = {job.runs.pretraining.name for job in planned.values()}
    assert len(pretraining) == 1
    assert planned["ECPO"].runs.names[:3] == planned["GRPO"].runs.names[:3]
    assert planned["RSFT"].runs.names == planned["ECPO"].runs.names[:2] and planned["GRPO"].runs.reward is not None
    assert planned["hits"].runs.reward is None and planned["half"].runs.rsft.name != planned["RSFT"].runs.rsft.name
    assert len({job.runs.last for job in planned.values()}) == len({job.result for job in planned.values()}) == 6
    row = planned["GRPO"].runs
    assert row.rl.rl.init_from == str(stages.rsft_recipe(row.rsft).run_directory)
    assert row.rl.rl.reward_run == str(stages.reward_recipe(row.reward).run_directory)
    assert row.rsft.rsft.init_from == str(row.pretraining.run_directory)
    run_board(board, folder=folder, report=lambda line: None, only="GRPO")
    assert [stage for stage, _ in staged] == ["rsft", "reward", "rl"]


def test_what_later_stages_are_told_changes_no_earlier_result(recipe, tmp_path):
    rows = {"plain": (), "RSFT": ("stage=rsft",), "ECPO": ("stage=rl",)}
    board = Board(name="later", recipe=recipe, seeds=(0,), rows=rows)
    before, after = (
        {job.row: (job.result, settings_digest(job.recipe)) for job in jobs(board, change, tmp_path)}
        for change in ([], ["rl.steps=7", "reward.steps=7"])
    )
    assert before["plain"] == after["plain"] and before["RSFT"] == after["RSFT"] and before["ECPO"] != after["ECPO"]


def test_no_two_jobs_of_a_wave_train_the_same_run(recipe, tmp_path):
    rows = {"plain": (), "RSFT": ("stage=rsft",), "ECPO": ("stage=rl",), "GRPO": ("stage=rl", "rl.objective=grpo")}
    planned = jobs(Board(name="later", recipe=recipe, seeds=(0, 1), rows=rows), folder=tmp_path)
    found = [[job.row for job in wave] for wave in runs.waves(planned)]
    assert found == [["plain", "plain"], ["RSFT", "RSFT"], ["ECPO", "ECPO"], ["GRPO", "GRPO"]]


def test_a_stage_that_does_not_exist_is_refused(tmp_path):
    path = tmp_path / "board.yaml"
    path.write_text("recipe: quickstart\nrows: {late: [stage=export]}\n")
    with pytest.raises(InputError, match="stage=export must be one of rsft, rl"):
        load_board(str(path))
