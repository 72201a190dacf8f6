"""Which run is served where a later stage has not made an earlier one better: `promotion.json` in the later one's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onerec_jax.storage import joined, relative, write_text

FILE = "promotion.json"


def write_promotion(
    run: Path, step: int, start: Path, start_step: int | None, promoted: bool, measured: dict[str, Any]
) -> None:
    """Says whether `run`, as it is at `step`, is served, or `start`, which it began from; and what that was decided by."""
    values = {"promoted": promoted, "step": step, "start": relative(start, run), "start_step": start_step}
    write_text(run / FILE, json.dumps(values | measured, indent=1) + "\n")


def decided_at(run: Path) -> int | None:
    """The step at which it was decided about a run, None if it was not."""
    return json.loads((run / FILE).read_text())["step"] if (run / FILE).is_file() else None


def served_run(folder: Path, step: int | None) -> tuple[Path, int | None]:
    """The run and step that are read where `folder` is asked for; the same ones where a step is asked for by number."""
    while step is None and (folder / FILE).is_file():
        decided = json.loads((folder / FILE).read_text())
        if decided["promoted"]:
            break
        folder, step = joined(folder, decided["start"]), decided["start_step"]
    return folder, step
