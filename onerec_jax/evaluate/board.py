"""A board: one dataset and protocol, its floors, and rows of models that are each trained on several seeds.

    board = load_board("simulator")
    run_board(board)               # boards/simulator/board.md and board.html, rewritten after every result

Every row is a recipe with overrides. A result is kept in `results/` under the digest of its whole recipe and the run that it is
of in `runs/` under the digest of all but `evaluate`, so that a board that was stopped goes on, a changed row is run again and no
other, and nothing is trained again for another evaluation. Floors depend on no seed and are measured once.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from pydantic import field_validator

from onerec_jax.config import Recipe, Section, digest_of, setting
from onerec_jax.data.prepare import prepare
from onerec_jax.data.store import Dataset
from onerec_jax.errors import InputError
from onerec_jax.evaluate.board_page import Row, html, markdown
from onerec_jax.evaluate.evaluation import evaluate_floors
from onerec_jax.evaluate.jobs import Job, Report, run_jobs
from onerec_jax.evaluate.record import Record
from onerec_jax.evaluate.stages import relevant, runs_of, split_stage
from onerec_jax.recipe import CONFIGS, checked, config_path, load_recipe, read_yaml
from onerec_jax.train.metrics import read_metrics


class Board(Section):
    """What a board compares."""

    name: str = setting(
        ..., "name of the board and of its folder", pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=200
    )
    recipe: str = setting(..., "recipe that all rows start from, by name or path", min_length=1)
    seeds: tuple[int, ...] = setting((0, 1, 2), "seeds of every row", min_length=1)
    rows: dict[str, tuple[str, ...]] = setting(
        ...,
        "overrides of the recipe by row, as key.path=value; stage=rsft or stage=rl trains on after it",
        min_length=1,
    )

    @field_validator("rows")
    @classmethod
    def _stages(cls, rows: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for entries in rows.values():
            split_stage(entries)
        return rows


def load_board(name: str) -> Board:
    """Reads and checks a board.

    Raises:
        InputError: no such board, bad YAML, or a field out of place.
    """
    path = config_path(name, "board", CONFIGS / "boards")
    values = read_yaml(path, "a board is a mapping of its fields")
    return checked(Board, {"name": path.stem, **values}, str(path))


def jobs(board: Board, overrides: list[str] | tuple[str, ...] = (), folder: Path | None = None) -> list[Job]:
    """All jobs, seed by seed. Rows that differ in `evaluate` alone share a run, rows that differ in the model alone a
    tokenizer, and all of them the dataset.

    Args:
        board: what to compare.
        overrides: settings of all rows; those of a row win.
        folder: where runs, results and IDs go; `boards/NAME` by default.

    Raises:
        InputError: an override that does not fit the recipe, or a row of another dataset or protocol.
    """
    folder = folder or Path("boards") / board.name
    shared = load_recipe(board.recipe, overrides)
    found, trained = [], {}
    for seed in board.seeds:
        for row, entries in board.rows.items():
            stage, changes = split_stage(entries)
            own = [*overrides, *changes, f"seed={seed}", f"runs={folder / 'runs'}", "evaluate.floors=[]"]
            own += [f"data.directory={shared.dataset_directory}"]
            try:
                recipe = load_recipe(board.recipe, own)
            except InputError as error:
                raise InputError(f"board {board.name}, row '{row}': {error}") from None
            _check_comparable(row, recipe, shared)
            ids = digest_of(recipe.tokenizer.stated(), recipe.data.stated(), seed)
            recipe = relevant(load_recipe(board.recipe, [*own, f"tokenizer.directory={folder / 'ids' / ids}"]), stage)
            name, trains = f"{re.sub(r'[^A-Za-z0-9]+', '_', row).strip('_')}_{seed}", _training(recipe)
            run = trained.setdefault(trains, recipe.model_copy(update={"name": f"{name}_{trains}"}))
            result = {"name": "_".join(filter(None, (name, recipe.digest(), stage))), "runs": str(folder / "results")}
            runs = runs_of(recipe.model_copy(update={"name": name}), stage, run)
            found.append(Job(row, seed, recipe.model_copy(update=result), runs, stage))
    return found


def _check_comparable(row: str, recipe: Recipe, shared: Recipe) -> None:
    """Refuses a row that would not be measured on the board's data and under its protocol."""
    own, common = recipe.model_dump(mode="json"), shared.model_dump(mode="json")
    fixed = [("data", name) for name in common["data"] if name != "directory"]
    fixed += [("evaluate", name) for name in ("split", "ks", "max_examples", "exclude_seen", "targets", "recall")]
    changed = [f"{section}.{name}" for section, name in fixed if own[section][name] != common[section][name]]
    if changed:
        raise InputError(
            f"row '{row}' changes {', '.join(changed)}, but all rows of a board share one dataset and protocol; "
            "give the setting to the whole board, or make another board"
        )


def _training(recipe: Recipe) -> str:
    """Equal for recipes that pre-train the same model."""
    others = ("name", "evaluate", "rsft", "reward", "rl")
    return digest_of({name: value for name, value in recipe.stated().items() if name not in others})


def run_board(
    board: Board,
    overrides: list[str] | tuple[str, ...] = (),
    folder: Path | None = None,
    only: str = "",
    processes: int = 1,
    record: Path | None = None,
    report: Report = print,
) -> Path:
    """Runs what is missing of a board; returns its folder, in which `board.md` and `board.html` hold what there is.

    `only` names the row to run, or several by a part of their names; results of others are shown where they are there. Several
    `processes` share the processors, which is faster than one job at a time on all of them where the models are small. Results in
    the folder `record` are taken as they are, and new ones added to it; the pages are written there too.

    Raises:
        InputError: no row of that name; bad settings or data, before anything is trained; a job's own error when its turn comes.
    """
    folder = folder or Path("boards") / board.name
    chosen = {only} if only in board.rows else {row for row in board.rows if only in row}
    if not chosen:
        raise InputError(f"board {board.name} has no row with '{only}' in its name; rows: {', '.join(board.rows)}")
    shared, planned = load_recipe(board.recipe, overrides), jobs(board, overrides, folder)
    if not (shared.dataset_directory / "card.json").exists():
        report(f"dataset: {prepare(shared)}")
    dataset = Dataset(shared.dataset_directory)
    dataset.check_settings(shared.data, board.recipe)
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"floors_{digest_of(shared.evaluate.stated(), dataset.card.get('content_hash'))}.json"
    if not kept.exists():
        report("floors")
        floors = evaluate_floors(dataset, shared)
        kept.write_text(json.dumps(dataclasses.asdict(floors), indent=1) + "\n")
    measured = json.loads(kept.read_text())
    kept_results = Record(record)
    missing = [
        job for job in planned if job.row in chosen and not job.result.exists() and kept_results.find(job) is None
    ]
    report(f"{len(planned)} jobs, {len(missing)} to run")
    _write(folder, board, overrides, measured, planned, kept_results)
    for _ in run_jobs(missing, dataset, processes, report):
        _write(folder, board, overrides, measured, planned, kept_results)
    return folder


def _write(
    folder: Path, board: Board, overrides: Any, floors: dict[str, Any], planned: list[Job], record: Record
) -> None:
    """`board.md` and `board.html` of all results there are, and those of them in the record that were not yet."""
    found: dict[str, list[dict[str, Any]]] = {row: [] for row in board.rows}
    for job in planned:
        result = record.find(job)
        if result is None and job.result.exists():
            own = json.loads(job.result.read_text())
            record.add(job, own)
            result = {**own, "curves": read_metrics(job.runs.last)}
        if result is not None:
            found[job.row].append(result)
    rows = [Row(name, [metrics], [], [], floor=True) for name, metrics in floors["rows"].items()]
    for name, results in found.items():
        rows.append(
            Row(
                name,
                [result["metrics"] for result in results],
                [result["seconds"] for result in results if not result["resumed"]],
                [result["curves"] for result in results],
            )
        )
    devices = sorted({f"{result['device']}, jax {result['jax']}" for results in found.values() for result in results})
    shown = ["data.source.path=FOLDER" if word.startswith("data.source.path=") else word for word in overrides]
    command = " ".join(["onerec board", board.name, *shown])
    for place in (folder, record.folder):
        if place is None:
            continue
        place.mkdir(parents=True, exist_ok=True)
        for name, page in (("board.md", markdown), ("board.html", html)):
            text = page(board.name, floors["protocol"], command, "; ".join(devices), rows)
            partial = place / f"{name}.partial"
            partial.write_text(text, encoding="utf-8")
            partial.rename(place / name)
