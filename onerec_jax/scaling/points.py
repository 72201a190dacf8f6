"""A sweep as a folder: one run per point, and what is known of each of them.

    RUNS/sweeps/NAME/sweep.yaml          recipe, settings of all points, and the points by name
                     POINT/recipe.yaml   the point's settings, resolved: what is run
                     POINT/done.json     what a finished run gave; failed.json: how it failed
                     POINT/..            and all else that a run directory has
                     data/, ids/         of points whose settings of these differ from the recipe's

Points that share the settings of data and tokenizer share a dataset and semantic IDs, of the recipe's seed: a loss is over codes,
and only losses over the same codes can be compared. A point's own seed is that of its training.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from onerec_jax.config import Recipe, digest_of
from onerec_jax.errors import InputError
from onerec_jax.recipe import load_recipe
from onerec_jax.scaling.sweep import Point, Sweep, overrides
from onerec_jax.storage import is_remote
from onerec_jax.train.goodput import FILE as GOODPUT

PLACED = ("name", "runs", "data.directory", "tokenizer.directory")
DECIDED = ("distributed", "evaluate.floors")  # by the launcher; none are measured


class PointRun(NamedTuple):
    """One point and its run."""

    name: str
    point: Point
    recipe: Recipe
    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def done(self) -> Path:
        return self.folder / "done.json"

    @property
    def failed(self) -> Path:
        return self.folder / "failed.json"

    def result(self) -> dict[str, Any] | None:
        """What the finished run gave, None before."""
        return json.loads(self.done.read_text()) if self.done.exists() else None

    def failure(self) -> dict[str, Any] | None:
        """Exit code and sentence of a run that failed."""
        return json.loads(self.failed.read_text()) if self.failed.exists() else None

    def finished(self, evaluate: bool) -> bool:
        result = self.result()
        return result is not None and (not evaluate or result["metrics"] is not None)

    def state(self) -> str:
        """done, failed, begun or waiting."""
        if self.done.exists():
            return "done"
        if self.failed.exists():
            return "failed"
        return "begun" if (self.folder / GOODPUT).exists() else "waiting"


class SweepFolder(NamedTuple):
    """A sweep and where its runs are."""

    folder: Path
    recipe: str
    overrides: tuple[str, ...]
    seed: int  # of dataset and semantic IDs
    points: list[PointRun]

    def prepared(self) -> Iterator[tuple[Path, list[str]]]:
        """What all runs need before they start: the file that tells of it, and the words after `onerec` that make it."""
        made = set()
        for verb, named in (("data", "dataset_directory"), ("tokenize", "tokenizer_directory")):
            for run in self.points:
                directory: Path = getattr(run.recipe, named)
                if directory not in made:
                    made.add(directory)
                    yield directory / "card.json", [verb, str(run.file), f"seed={self.seed}"]

    def write(self) -> None:
        """`sweep.yaml`, and the recipe of every point."""
        for run in self.points:
            write(run.file, run.recipe.to_yaml())
        points = {run.name: run.point for run in self.points}
        values = {"recipe": self.recipe, "overrides": list(self.overrides), "seed": self.seed, "points": points}
        write(self.folder / "sweep.yaml", yaml.safe_dump(values, sort_keys=False))


def write(path: Path, text: str) -> None:
    """A file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)


def plan(name: str, sweep: Sweep, changes: Sequence[str] = ()) -> SweepFolder:
    """The runs of a sweep, checked and not yet written.

    Args:
        name: of the sweep's folder.
        sweep: its points.
        changes: `key.path=value` settings of all points.

    Raises:
        InputError: any setting out of place; one that a sweep decides itself, or that is given to all points and to one of them; a
            point that was begun with other settings than it has now; runs in a bucket.
    """
    base = load_recipe(sweep.recipe, list(changes))
    if is_remote(base.runs):
        raise InputError(
            f"runs is {base.runs}, but the folder of a sweep is on a disk; for GKE, where cluster.bucket is mounted as one"
        )
    folder = Path(base.runs) / "sweeps" / name
    given = {change.partition("=")[0].strip() for change in changes}
    _check_keys(given, DECIDED)
    runs = []
    for own, point in sweep.named.items():
        _check_keys(point, (*PLACED, *DECIDED))
        for key in given & set(point):
            raise InputError(f"{key} is set by the points of the sweep, and cannot be set for all of them")
        recipe = _placed(load_recipe(sweep.recipe, [*changes, *overrides(point)]), own, folder, base)
        run = PointRun(own, point, recipe, recipe.run_directory)
        _check_unchanged(run, folder)
        runs.append(run)
    return SweepFolder(folder, sweep.recipe, tuple(changes), base.seed, runs)


def _check_keys(keys: Iterable[str], refused: tuple[str, ...]) -> None:
    for key in keys:
        if any(key == one or key.startswith(f"{one}.") for one in refused):
            raise InputError(f"a sweep decides itself what {key} is: leave it out")


def _placed(recipe: Recipe, name: str, folder: Path, base: Recipe) -> Recipe:
    """The recipe of a point, whose run is in the folder, on a dataset and IDs that it shares with all that may."""
    data, ids = base.dataset_directory, base.tokenizer_directory
    if recipe.data != base.data:
        data = folder / "data" / digest_of(recipe.data.stated())
    if (recipe.data, recipe.tokenizer) != (base.data, base.tokenizer):
        ids = folder / "ids" / digest_of(recipe.data.stated(), recipe.tokenizer.stated())
    return recipe.model_copy(
        update={
            "name": name,
            "runs": str(folder),
            "data": recipe.data.model_copy(update={"directory": str(data)}),
            "tokenizer": recipe.tokenizer.model_copy(update={"directory": str(ids)}),
            "evaluate": recipe.evaluate.model_copy(update={"floors": ()}),
        }
    )


def _check_unchanged(run: PointRun, folder: Path) -> None:
    """Refuses a point whose run was begun under this name with other settings."""
    kept = run.folder / "config.yaml"
    if not kept.exists():
        return
    before, now = _settings(load_recipe(str(kept))), _settings(run.recipe)
    for key in [*before, *(key for key in now if key not in before)]:
        if before.get(key) != now.get(key):
            raise InputError(
                f"{run.folder} was begun with {key} {before.get(key, 'at its default')}, and now the sweep says "
                f"{now.get(key, 'its default')}: give the sweep another --name than {folder.name}"
            )


def _settings(recipe: Recipe) -> dict[str, Any]:
    """All settings of a recipe that are not at their defaults by key, but for where things lie."""
    found: dict[str, Any] = {}

    def walk(values: dict[str, Any], path: str) -> None:
        for name, value in values.items():
            key = f"{path}{name}"
            if isinstance(value, dict):
                walk(value, f"{key}.")
            elif key not in PLACED and key != "data.source.path":
                found[key] = value

    walk(recipe.stated(), "")
    return found


def load_folder(name: str) -> SweepFolder:
    """A sweep that was started, by its folder or by name in `runs/sweeps`.

    Raises:
        InputError: there is none.
    """
    for folder in (Path(name), Path("runs") / "sweeps" / name):
        if (folder / "sweep.yaml").is_file():
            break
    else:
        raise InputError(f"no sweep '{name}': neither a folder with sweep.yaml nor in {Path('runs') / 'sweeps'}")
    values = yaml.safe_load((folder / "sweep.yaml").read_text(encoding="utf-8"))
    points = []
    for own, point in values["points"].items():
        points.append(PointRun(own, point, load_recipe(str(folder / own / "recipe.yaml")), folder / own))
    return SweepFolder(folder, values["recipe"], tuple(values["overrides"]), values["seed"], points)
