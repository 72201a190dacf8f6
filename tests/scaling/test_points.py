"""A sweep's folder: what its points share, what they may not say, and what their files tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onerec_jax.config import Recipe
from onerec_jax.errors import InputError
from onerec_jax.recipe import load_recipe
from onerec_jax.scaling.points import PointRun, load_folder, plan
from onerec_jax.scaling.progress import Row, last_line, row_of, table
from onerec_jax.scaling.sweep import Point, Sweep, name_of

WIDTHS = [{"model.ffn_hidden": 16}, {"model.ffn_hidden": 24}]


def begin(run: PointRun) -> None:
    """Leaves what a training leaves that was stopped early."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.yaml").write_text(run.recipe.to_yaml())
    (run.folder / "goodput.jsonl").touch()


def test_every_point_is_a_run_of_its_own_with_the_points_settings(recipe_file: str):
    sweep = plan("s", Sweep(recipe_file, WIDTHS), ["train.batch_size=8"])
    for run, point in zip(sweep.points, WIDTHS, strict=True):
        assert run.folder == Path("runs/sweeps/s") / name_of(point) == run.recipe.run_directory
        assert run.recipe.model.ffn_hidden == point["model.ffn_hidden"] and run.recipe.train.batch_size == 8
    assert not Path("runs").exists(), "nothing is written by planning"


def test_a_sweep_that_was_written_is_read_back_as_it_was(recipe_file: str):
    sweep = plan("s", Sweep(recipe_file, WIDTHS), ["train.batch_size=8"])
    sweep.write()
    assert load_folder("s") == sweep == load_folder("runs/sweeps/s")
    with pytest.raises(InputError, match="no sweep 'other'"):
        load_folder("other")


def test_points_share_a_dataset_and_ids_wherever_their_settings_of_them_are_the_same(
    recipe_file: str, tiny_recipe: Recipe
):
    points: list[Point] = [
        {"seed": 0}, {"seed": 1}, {"tokenizer.iterations": 7}, {"tokenizer.iterations": 7, "train.steps": 4},
        {"data.targets": 2}, {"data.targets": 2, "tokenizer.iterations": 7},
    ]  # fmt: skip
    sweep = plan("s", Sweep(recipe_file, points))
    data = [run.recipe.dataset_directory for run in sweep.points]
    ids = [run.recipe.tokenizer_directory for run in sweep.points]
    assert data[:4] == [tiny_recipe.dataset_directory] * 4 and data[4] == data[5] != data[0]
    assert ids[:2] == [tiny_recipe.tokenizer_directory] * 2 and ids[2] == ids[3] and len(set(ids)) == 4
    made = [(str(there.parent), words[0], words[2]) for there, words in sweep.prepared()]
    assert len(made) == len(set(made)) == 6, "each once, and with the recipe's seed"
    assert {seed for _, _, seed in made} == {"seed=0"}


def test_a_point_that_was_begun_with_other_settings_is_not_gone_on_with(recipe_file: str):
    sweep = plan("s", Sweep(recipe_file, WIDTHS))
    begin(sweep.points[1])
    assert plan("s", Sweep(recipe_file, WIDTHS)) == sweep, "the same settings may go on"
    with pytest.raises(InputError) as caught:
        plan("s", Sweep(recipe_file, WIDTHS), ["train.batch_size=8"])
    assert f"{sweep.points[1].folder} was begun with train.batch_size 16, and now the sweep says 8" in str(caught.value)
    with pytest.raises(InputError, match=r"was begun with train.clip_norm at its default, and now the sweep says 2\.5"):
        plan("s", Sweep(recipe_file, WIDTHS), ["train.clip_norm=2.5"])
    assert plan("other", Sweep(recipe_file, WIDTHS), ["train.batch_size=8"]).points, "another name is another sweep"
    assert plan("s", Sweep(recipe_file, WIDTHS[:1]), ["train.batch_size=8"]).points, "this one was not begun"


@pytest.mark.parametrize("key", ["name", "runs", "data.directory", "tokenizer.directory", "distributed.processes"])
def test_a_point_cannot_say_what_the_sweep_decides(recipe_file: str, key: str):
    with pytest.raises(InputError, match=f"a sweep decides itself what {key} is"):
        plan("s", Sweep(recipe_file, [{key: "1"}]))


def test_a_setting_of_the_points_cannot_be_set_for_all_of_them(recipe_file: str):
    with pytest.raises(InputError, match=r"model\.ffn_hidden is set by the points"):
        plan("s", Sweep(recipe_file, WIDTHS), ["model.ffn_hidden=8"])


def test_a_sweep_in_a_bucket_is_refused_before_anything_is_written(recipe_file: str):
    with pytest.raises(InputError, match="runs is gs://bucket/runs, but the folder of a sweep is on a disk"):
        plan("s", Sweep(recipe_file, WIDTHS), ["runs=gs://bucket/runs"])
    assert not Path("gs:").exists()


def test_the_state_of_a_point_is_what_its_files_tell(recipe_file: str):
    run = plan("s", Sweep(recipe_file, WIDTHS)).points[0]
    assert row_of(run, running=False) == Row(run.name, "waiting", 0, 6)
    begin(run)
    line = {"step": 4, "time": 100.0, "loss": 2.5, "step_ms": 500.0}
    partial = '{"step": 6, "loss": 1'
    lines = [json.dumps(line), json.dumps({"step": 5, "time": 101.0, "valid/loss": 2.0}), partial]
    (run.folder / "metrics.jsonl").write_text("\n".join(lines))
    assert row_of(run, running=False) == Row(run.name, "begun", 4, 6, 2.5, 0.5, 1.0, 100.0)
    assert row_of(run, running=True).state == "running"
    run.failed.write_text(json.dumps({"code": 3, "error": "it diverged"}))
    assert row_of(run, running=False).error == "exit code 3: it diverged" and run.state() == "failed"
    run.done.write_text(json.dumps({"metrics": None}))
    assert row_of(run, running=False).state == "done" and run.finished(evaluate=False)
    assert not run.finished(evaluate=True), "its Recall is not measured yet"


def test_the_last_line_of_a_long_log_is_found_without_reading_all_of_it(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0, "more": "x" * 90}) + "\n" for step in range(2000)))
    assert last_line(path)["step"] == 1999  # type: ignore[index]
    assert last_line(tmp_path / "none") is None


def test_a_screen_that_is_too_small_shows_first_what_fails_and_runs(recipe_file: str):
    sweep = plan("s", Sweep(recipe_file, WIDTHS))
    states = ["done"] * 5 + ["waiting"] * 5 + ["failed", "running"]
    rows = [Row(f"point-{i}", state, 0, 9) for i, state in enumerate(states)]
    small, whole = table(sweep, rows, 4), table(sweep, rows)
    assert list(small.columns[1].cells) == ["failed", "running", "waiting", "waiting", ""]
    assert list(small.columns[0].cells)[-1] == ".. and 8 more"
    assert small.caption == "1 failed, 1 running, 5 waiting, 5 done"
    assert list(whole.columns[1].cells) == states


def test_a_point_is_run_from_a_file_that_holds_all_of_its_settings(recipe_file: str):
    sweep = plan("s", Sweep(recipe_file, WIDTHS), ["train.batch_size=8"])
    sweep.write()
    Path(recipe_file).unlink()
    for run in sweep.points:
        assert load_recipe(str(run.file)) == run.recipe
