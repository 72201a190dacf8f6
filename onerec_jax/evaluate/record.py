"""Results of a board in a folder that can be committed: a board goes on with them on another machine.

One JSON file per row and seed, which says of which settings it is; wherever data, runs and IDs lie does not matter. The learning
curves are thinned to what a chart shows.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from onerec_jax.config import Recipe, digest_of
from onerec_jax.evaluate.jobs import Job
from onerec_jax.train.metrics import read_metrics

POINTS = 60


def settings_digest(recipe: Recipe) -> str:
    """Equal for recipes that differ only in their name and in where things lie."""
    stated = recipe.stated()
    data = {name: value for name, value in stated.get("data", {}).items() if name != "directory"}
    if "source" in data:
        data["source"] = {name: value for name, value in data["source"].items() if name != "path"}
    tokenizer = {name: value for name, value in stated.get("tokenizer", {}).items() if name != "directory"}
    others = {name: value for name, value in stated.items() if name not in ("name", "runs", "data", "tokenizer")}
    return digest_of(others, data, tokenizer)


def _settings(job: Job) -> str:
    return "-".join(filter(None, (settings_digest(job.recipe), job.stage)))


class Record:
    """The results kept in a folder; without one there are none and none are kept."""

    def __init__(self, folder: Path | None):
        self.folder = folder

    def _path(self, job: Job) -> Path | None:
        name = re.sub(r"[^A-Za-z0-9]+", "_", job.row).strip("_")
        return self.folder and self.folder / f"{name}_{job.seed}.json"

    def find(self, job: Job) -> dict[str, Any] | None:
        """The result of this job's settings, or None."""
        path = self._path(job)
        if path is None or not path.exists():
            return None
        result = json.loads(path.read_text())
        return result if result["settings"] == _settings(job) else None

    def add(self, job: Job, result: dict[str, Any]) -> None:
        """Keeps a result with its curves; one of other settings in its place is replaced."""
        path = self._path(job)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        curves = thinned(read_metrics(job.runs.last))
        kept = {"row": job.row, "seed": job.seed, "settings": _settings(job), **result, "curves": curves}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(kept, indent=1) + "\n")
        partial.rename(path)


def thinned(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    """At most `POINTS` lines of each kind, first and last among them, with the losses alone."""
    found = []
    for name in ("loss", "valid/loss"):
        own = [{"step": line["step"], name: round(line[name], 5)} for line in lines if name in line]
        every = max(1, -(-len(own) // (POINTS - 1)))
        found += own[::every] + own[-1:] * bool((len(own) - 1) % every)
    return found
