"""`onerec export`: from a run to a directory, in one call."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from onerec_jax.errors import InputError
from onerec_jax.export.artifact import check_replaceable, write_artifact
from onerec_jax.export.contents import contents_of
from onerec_jax.export.quantize import DType
from onerec_jax.generate.load import load_recommender
from onerec_jax.storage import folder

GIGABYTE = 10**9


def export_run(
    run: str,
    directory: str,
    overrides: list[str] | tuple[str, ...] = (),
    *,
    dtype: str = "float32",
    k: int = 10,
    width: int | None = None,
    users: int = 50,
    shard_gb: float = 5.0,
) -> Path:
    """Exports the newest checkpoint of RUN, or that of RUN@STEP, or the run that is served in its place; returns the folder.

    Args:
        run: RUN or RUN@STEP.
        directory: where to; an older export there is replaced, anything else is left alone.
        overrides: settings of the recipe, as key.path=value.
        dtype: float32, bfloat16 or int8.
        k: items of a list.
        width: beams, by default those of `evaluate.beam_width`.
        users: sample users.
        shard_gb: most gigabytes of one file of weights.

    Raises:
        InputError: no such run, or a folder that cannot be written to.
    """
    stored_as = _dtype(dtype)
    place = folder(directory)
    check_replaceable(place)
    recommender = load_recommender(run, overrides)
    width = width or recommender.recipe.evaluate.beam_width
    contents = contents_of(recommender, stored_as, k, width, users)
    write_artifact(contents, place, stored_as, max(1, int(shard_gb * GIGABYTE)))
    return place


def _dtype(name: str) -> DType:
    for known in get_args(DType):
        if name == known:
            return known
    raise InputError(f"--dtype {name} must be one of {', '.join(get_args(DType))}")
