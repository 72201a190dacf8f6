"""A model's arrays by name, as an export directory holds them, and how training goes on from there.

Names are `params.`, `tables.` or `bias.` and the path in the tree: `params.decoder.heads.0.kernel`, `tables.author.rows`. What the
optimizer knows stays behind. Stored float32, as bfloat16, or as int8 with one float32 scale per output channel (`NAME.scale`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from onerec_jax.config import ModelConfig, Recipe
from onerec_jax.data.tensor_files import HASHES, check_seal, read_tensors
from onerec_jax.errors import InputError
from onerec_jax.parallel.sharding import path_name
from onerec_jax.train.state import TrainState

CONFIG = "config.json"
WEIGHTS = "model"  # stem of the files
SCALE = ".scale"
_AGAIN = "export the run again with `onerec export RUN --to DIR`"


def is_export(directory: Path) -> bool:
    """Whether a folder is an export directory, whole or not."""
    return (directory / CONFIG).is_file() and (directory / HASHES).is_file()


def read_config(directory: Path) -> dict[str, Any]:
    """`config.json` of an export directory, once all of its files are known to be those that were written.

    Raises:
        InputError: there is no export, or a file of it is missing, changed or added.
    """
    if not is_export(directory):
        raise InputError(f"{directory} is no export directory: {CONFIG} or {HASHES} is missing; {_AGAIN}")
    try:
        check_seal(directory)
        return json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{directory} is damaged ({' '.join(str(error).split())}); {_AGAIN}") from None


def named_weights(params: Any, tables: Any, bias: Any) -> dict[str, Any]:
    """All arrays of a forward pass by name; of a table its rows alone."""
    rows = {name: {"rows": table["rows"]} for name, table in tables.items()}
    leaves = jax.tree_util.tree_leaves_with_path({"params": params, "tables": rows, "bias": bias})
    return {path_name(path).replace("/", "."): leaf for path, leaf in leaves}


def restored(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Stored arrays, of NumPy or JAX, as float32 by name; scales are multiplied in."""
    found = {}
    for name, array in stored.items():
        if name.endswith(SCALE) and name.removesuffix(SCALE) in stored:
            continue
        array = array.astype(jnp.float32)
        found[name] = array * stored[name + SCALE] if name + SCALE in stored else array
    return found


def as_trees(named: Mapping[str, Any], abstract: Any, tables: Mapping[str, Any]) -> tuple[Any, dict, dict[str, Any]]:
    """Parameters in the shape of `abstract`, tables (rows alone) and biases, of arrays by name."""
    params = jax.tree_util.tree_map_with_path(
        lambda path, _: named["params." + path_name(path).replace("/", ".")], abstract
    )
    rows = {name: {"rows": named[f"tables.{name}.rows"]} for name in tables}
    return params, rows, {stack: named[f"bias.{stack}"] for stack in ("encoder", "decoder")}


def start_from_export(directory: Path, abstract: TrainState, recipe: Recipe) -> dict[str, Any]:
    """`params`, `tables` and `bias` for training to go on from an export, placed as `abstract` says.

    Accumulators begin at 0, and rows count as touched just now and as admitted.

    Raises:
        InputError: the export is damaged, of int8, of another model or of another dataset.
    """
    config = read_config(directory)
    if config["dtype"] == "int8":
        raise InputError(
            f"{directory} holds int8 weights, which are too coarse to train on; export with --dtype float32 or bfloat16"
        )
    _check_model(directory, ModelConfig.model_validate(config["model"]), recipe.model)
    stored = read_tensors(directory, WEIGHTS)
    wanted = {name: getattr(abstract, name) for name in ("params", "tables", "bias")}

    def load(path: Any, leaf: Any) -> jax.Array:
        name, value = path_name(path).replace("/", "."), None
        if name.startswith("tables.") and not name.endswith(".rows"):
            value = np.full(leaf.shape, recipe.model.tables.admit_after if name.endswith(".appearances") else 0)
        elif name not in stored or stored[name].shape != leaf.shape:
            there = stored[name].shape if name in stored else "missing"
            raise InputError(
                f"{directory} does not fit this dataset: {name} is {there} there and {leaf.shape} here; "
                "use the dataset and semantic IDs it was trained on"
            )
        value = stored[name] if value is None else value
        return jax.device_put(value.astype(leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(load, wanted)


def _check_model(directory: Path, theirs: ModelConfig, mine: ModelConfig) -> None:
    there, here = theirs.model_dump(), mine.model_dump()
    different = [f"model.{k} is {here[k]!r} but {there[k]!r} in the export" for k in here if here[k] != there[k]]
    if different:
        raise InputError(f"{directory} is of another model: {'; '.join(different)}; use the recipe it was trained with")
