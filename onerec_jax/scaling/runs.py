"""The table of runs that a scaling law is fitted to: parameters, data, compute, and one metric of each run."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from onerec_jax.errors import InputError

SIZES = ("params", "tokens", "flops")
FACTOR = 6.0  # FLOPs per parameter and token: 2 forward, 4 backward


@dataclasses.dataclass(frozen=True)
class Runs:
    """Finished runs. What counts as a parameter, a token or a FLOP is up to the one who made the table."""

    sizes: dict[str, np.ndarray]  # float64 [R] each, those of `SIZES` that are known
    metric: np.ndarray  # float64 [R]
    metric_name: str = "loss"
    factor: float = FACTOR  # C = factor x N x D
    origin: str = "runs"

    def __len__(self) -> int:
        return len(self.metric)

    def size(self, name: str) -> np.ndarray:
        """One of `SIZES`.

        Raises:
            InputError: the runs do not tell it.
        """
        if name not in self.sizes:
            others = " and ".join(size for size in SIZES if size != name)
            known = ", ".join(self.sizes) or "none of them"
            raise InputError(
                f"{self.origin}: no column '{name}', and without both of {others} it cannot be derived; there: {known}"
            )
        return self.sizes[name]

    def where(self, chosen: np.ndarray) -> Runs:
        """The runs of a mask or of rows."""
        sizes = {name: values[chosen] for name, values in self.sizes.items()}
        return dataclasses.replace(self, sizes=sizes, metric=self.metric[chosen])


def check_budget(flops: float) -> None:
    """Raises InputError unless a compute budget is a positive number."""
    if not (np.isfinite(flops) and flops > 0):
        raise InputError(f"a budget must be a positive number of FLOPs, not {flops}")


def make_runs(
    columns: Mapping[str, Any], metric: str = "loss", factor: float | None = None, origin: str = "runs"
) -> Runs:
    """Checked runs of columns of numbers; of params, tokens and flops the third is derived where two are there.

    Args:
        columns: by name, of equal length; those that are neither a size nor the metric are left alone.
        metric: the column that the law is of, such as loss, loss_level1 or recall@10.
        factor: FLOPs per parameter and token. By default 6, and where all three sizes are there the median of C / (N D).
        origin: what the errors name.

    Raises:
        InputError: no metric, no size, or a value that is no positive number.
    """
    if metric not in columns:
        raise InputError(f"{origin}: no column '{metric}' to fit; there: {', '.join(columns) or 'none'}")
    if factor is not None and not (np.isfinite(factor) and factor > 0):
        raise InputError(f"FLOPs per parameter and token must be a positive number, not {factor}")
    given = {name: _numbers(columns[name], name, origin) for name in (*SIZES, metric) if name in columns}
    if len({len(column) for column in given.values()}) > 1:
        raise InputError(
            f"{origin}: columns of unequal length: " + ", ".join(f"{k} {len(v)}" for k, v in given.items())
        )
    values = given.pop(metric)
    if not len(values):
        raise InputError(f"{origin}: a table with a header and no rows")
    if not given:
        raise InputError(f"{origin}: no column of {', '.join(SIZES)}; there: {', '.join(columns)}")
    if factor is None:
        factor = FACTOR
        if len(given) == len(SIZES):
            factor = float(np.median(given["flops"] / (given["params"] * given["tokens"])))
    if "flops" not in given and len(given) == 2:
        given["flops"] = factor * given["params"] * given["tokens"]
    elif len(given) == 2:
        missing, other = ("tokens", "params") if "params" in given else ("params", "tokens")
        given[missing] = given["flops"] / (factor * given[other])
    return Runs({name: given[name] for name in SIZES if name in given}, values, metric, factor, origin)


def _numbers(column: Any, name: str, origin: str) -> np.ndarray:
    try:
        values = np.array(column, np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{origin}: column '{name}' must hold numbers alone") from None
    wrong = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if len(wrong):
        raise InputError(
            f"{origin}: row {wrong[0] + 1}: '{name}' is {values[wrong[0]]:g}, and must be a positive number"
        )
    return values


def read_runs(path: str | Path, metric: str = "loss", factor: float | None = None) -> Runs:
    """Runs from a CSV file with a header; see `make_runs`.

    Raises:
        InputError: no such file, no CSV, or what `make_runs` refuses.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        table = pl.read_csv(io.BytesIO(content), infer_schema_length=None)
    except pl.exceptions.PolarsError as error:
        raise InputError(f"{path}: not a CSV table: {str(error).splitlines()[0]}") from None
    # An empty cell is null, which NumPy takes for NaN; a word makes the column one of strings.
    columns = {name.strip(): table[name].to_list() for name in table.columns}
    return make_runs(columns, metric, factor, str(path))
