"""A board: one dataset and protocol, its floors, and rows of models that are each trained on several seeds.

    board = load_board("simulator")
    run_board(board)               # boards/simulator/board.md and board.html, rewritten after every result

Every row is a recipe with overrides. A result is kept under the digest of its whole recipe, so that a board that was stopped
goes on, and a changed row is run again and no other. Floors depend on no seed and are measured once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import yaml
from pydantic import ValidationError

from onerec_jax.config import Recipe, Section, setting
from onerec_jax.data.prepare import prepare
from onerec_jax.data.store import Dataset
from onerec_jax.errors import InputError
from onerec_jax.evaluate.board_page import Row, html, markdown
from onerec_jax.evaluate.evaluation import evaluate, evaluate_floors
from onerec_jax.generate.load import load_recommender
from onerec_jax.recipe import CONFIGS, load_recipe
from onerec_jax.tokenizer.semantic_ids import fit_and_save
from onerec_jax.train.loop import pretrain
from onerec_jax.train.metrics import read_metrics

Report = Callable[[str], None]


class Board(Section):
    """What a board compares."""

    name: str = setting(..., "name of the board and of its folder", pattern=r"^[A-Za-z0-9._-]+$")
    recipe: str = setting(..., "recipe that all rows start from, by name or path", min_length=1)
    seeds: tuple[int, ...] = setting((0, 1, 2), "seeds of every row", min_length=1)
    rows: dict[str, tuple[str, ...]] = setting(..., "overrides of the recipe by row, as key.path=value", min_length=1)


def board_path(name: str) -> Path:
    """The file of a board given by name (in `configs/boards/`) or by path."""
    folder = CONFIGS / "boards"
    for candidate in (Path(name), folder / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise InputError(f"no board '{name}': neither a file nor in {folder}; known boards: {known}")


def load_board(name: str) -> Board:
    """Reads and checks a board.

    Raises:
        InputError: no such board, bad YAML, or a field out of place.
    """
    path = board_path(name)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Board.model_validate({"name": path.stem, **values})
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise InputError(f"{path}: not a board: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        problems = "; ".join(f"'{'.'.join(map(str, item['loc']))}': {item['msg']}" for item in error.errors())
        raise InputError(f"{path}: {problems}") from None


@dataclasses.dataclass(frozen=True)
class Job:
    """One row of one seed."""

    row: str
    seed: int
    recipe: Recipe

    @property
    def result(self) -> Path:
        return self.recipe.run_directory / "result.json"


def jobs(board: Board, overrides: list[str] | tuple[str, ...] = (), folder: Path | None = None) -> list[Job]:
    """All jobs, seed by seed; rows that differ in the model alone share a tokenizer, and all share the dataset.

    Args:
        board: what to compare.
        overrides: settings of all rows; those of a row win.
        folder: where runs and IDs go; `boards/NAME` by default.

    Raises:
        InputError: an override that does not fit the recipe, or a row of another dataset or protocol.
    """
    folder = folder or Path("boards") / board.name
    shared = load_recipe(board.recipe, overrides)
    found = []
    for seed in board.seeds:
        for row, changes in board.rows.items():
            own = [*overrides, *changes, f"seed={seed}", f"runs={folder / 'runs'}", "evaluate.floors=[]"]
            own += [f"data.directory={shared.dataset_directory}"]
            recipe = load_recipe(board.recipe, own)
            _check_comparable(row, recipe, shared)
            ids = _digest(recipe.tokenizer.model_dump(mode="json"), recipe.data.model_dump(mode="json"), seed)
            recipe = load_recipe(board.recipe, [*own, f"tokenizer.directory={folder / 'ids' / ids}"])
            name = f"{re.sub(r'[^A-Za-z0-9]+', '_', row).strip('_')}_{seed}_{recipe.digest()}"
            found.append(Job(row, seed, recipe.model_copy(update={"name": name})))
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


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def run_job(job: Job, dataset: Dataset, report: Report = print) -> dict[str, Any]:
    """Tokenizer, training and evaluation of one job, each where it is missing; keeps and returns the result."""
    if job.result.exists():
        return json.loads(job.result.read_text())
    recipe, started = job.recipe, time.perf_counter()
    resumed = recipe.run_directory.exists()
    if not (recipe.tokenizer_directory / "card.json").exists():
        fit_and_save(dataset, recipe.tokenizer, recipe.seed, recipe.tokenizer_directory)
    run = pretrain(recipe, report)
    evaluation = evaluate(load_recommender(str(run)), report)
    result = {
        "metrics": evaluation.rows["model"],
        "seconds": round(time.perf_counter() - started, 1),
        "resumed": resumed,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    partial = job.result.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.rename(job.result)
    return result


def run_board(
    board: Board,
    overrides: list[str] | tuple[str, ...] = (),
    folder: Path | None = None,
    only: str = "",
    report: Report = print,
) -> Path:
    """Runs what is missing of a board; returns its folder, in which `board.md` and `board.html` hold what there is.

    `only` names the rows to run, by a part of their names; results of others are shown where they are there.

    Raises:
        InputError: no row of that name; bad settings or data, before anything is trained; a job's own error when its turn comes.
    """
    folder = folder or Path("boards") / board.name
    if not any(only in row for row in board.rows):
        raise InputError(f"board {board.name} has no row with '{only}' in its name; rows: {', '.join(board.rows)}")
    shared, planned = load_recipe(board.recipe, overrides), jobs(board, overrides, folder)
    if not (shared.dataset_directory / "card.json").exists():
        report(f"dataset: {prepare(shared)}")
    dataset = Dataset(shared.dataset_directory)
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"floors_{_digest(shared.evaluate.model_dump(mode='json'), dataset.card.get('content_hash'))}.json"
    if not kept.exists():
        report("floors")
        floors = evaluate_floors(dataset, shared)
        kept.write_text(json.dumps(dataclasses.asdict(floors), indent=1) + "\n")
    measured = json.loads(kept.read_text())
    results: dict[str, list[tuple[Job, dict[str, Any]]]] = {row: [] for row in board.rows}
    for number, job in enumerate(planned, 1):
        if only not in job.row and not job.result.exists():
            continue
        report(f"{number} of {len(planned)}: {job.row}, seed {job.seed}")
        results[job.row].append((job, run_job(job, dataset, report)))
        _write(folder, board, overrides, measured, results)
    return folder


def _write(folder: Path, board: Board, overrides: Any, floors: dict[str, Any], results: dict[str, Any]) -> None:
    rows = [Row(name, [metrics], [], [], floor=True) for name, metrics in floors["rows"].items()]
    for name, found in results.items():
        rows.append(
            Row(
                name,
                [result["metrics"] for _, result in found],
                [result["seconds"] for _, result in found if not result["resumed"]],
                [read_metrics(job.recipe.run_directory) for job, _ in found],
            )
        )
    devices = sorted({f"{result['device']}, jax {result['jax']}" for found in results.values() for _, result in found})
    command = " ".join(["onerec board", board.name, *overrides])
    for name, page in (("board.md", markdown), ("board.html", html)):
        text = page(board.name, floors["protocol"], command, "; ".join(devices), rows)
        partial = folder / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.rename(folder / name)
