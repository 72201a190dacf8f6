"""Lists from an export directory, with jax and NumPy alone.

    python recommend.py --user 7                    a list for one of the sample users

    import recommend
    served = recommend.load("my-export")
    items, scores = served.recommend(features, exclude)      rows of items.jsonl, -1 = no more, and log P

`features` are arrays [B, ...] as `signature.json` names and describes them, without `exclude`: `served.features(user)` makes those
of a line of users.jsonl. An export directory has a copy of this file; it runs what `recommend.stablehlo` holds, on CPU, GPU or TPU.

Axis letters: B requests, L events of a pathway, X items to leave out, J items to score, K items of a list, Y feedback labels.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.core
import jax.export
import jax.numpy as jnp
import numpy as np

HASHES = "hashes.json"
DTYPES = {
    "F32": np.float32, "F64": np.float64, "BF16": jnp.bfloat16, "U8": np.uint8, "I8": np.int8, "I32": np.int32,
    "I64": np.int64, "U32": np.uint32, "U64": np.uint64, "U16": np.uint16, "BOOL": np.bool_,
}  # fmt: skip
Features = dict[str, np.ndarray]


def check(directory: Path) -> None:
    """Compares all files with the digests that were written beside them.

    Raises:
        ValueError: a file is missing, changed or added.
    """
    try:
        card = json.loads((directory / HASHES).read_text())
        digest = card.pop("card_sha256")
        files = dict(card["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory} is no whole export: {HASHES} cannot be read ({error})") from None
    if digest != hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest():
        raise ValueError(f"{directory} is damaged: {HASHES} is not what was written; copy or export it again")
    there = {path.relative_to(directory) for path in directory.rglob("*") if path.is_file()}
    names = {path.as_posix() for path in there if "__pycache__" not in path.parts} - {HASHES}
    if names != files.keys():
        name = min(names ^ files.keys())
        what = "is missing" if name in files else "was added"
        raise ValueError(f"{directory} is damaged: {name} {what}; copy or export it again")
    for name, written in files.items():
        with (directory / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != written["sha256"]:
                raise ValueError(f"{directory} is damaged: {name} is not what was written; copy or export it again")


def read_tensors(directory: Path, stem: str) -> dict[str, np.ndarray]:
    """Arrays by name from STEM.safetensors, or from the files that STEM.safetensors.index.json names; mapped, not read."""
    index = directory / f"{stem}.safetensors.index.json"
    files = (
        sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if index.is_file()
        else [f"{stem}.safetensors"]
    )
    found: dict[str, np.ndarray] = {}
    for name in files:
        found |= _read_file(directory / name)
    return found


def _read_file(path: Path) -> dict[str, np.ndarray]:
    """Eight bytes of length, a JSON header of that length, then the bytes of all arrays, little-endian."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    total = max((about["data_offsets"][1] for about in header.values()), default=0)
    data = np.memmap(path, np.uint8, "r", 8 + size, (total,)) if total else np.zeros(0, np.uint8)
    found = {}
    for name, about in header.items():
        begin, end = about["data_offsets"]
        found[name] = np.asarray(data[begin:end]).view(DTYPES[about["dtype"]]).reshape(about["shape"])
    return found


def read_function(directory: Path, about: dict[str, Any], hurried: bool = False) -> Callable[..., Any]:
    """A function of `signature.json` over its StableHLO, as `jax.export` would read it from its own format.

    That format needs one more package to be read, and holds nothing else than what `about` says. `hurried` is as in `load`.
    """
    scope = jax.export.SymbolicScope()

    def avals(arrays: list[dict[str, Any]]) -> tuple[Any, ...]:
        shapes = ["(" + "".join(f"{size}," for size in array["shape"]) + ")" for array in arrays]
        parsed = [jax.export.symbolic_shape(shape, scope=scope) for shape in shapes]
        return tuple(
            jax.core.ShapedArray(shape, np.dtype(DTYPES[array["type"]]))
            for shape, array in zip(parsed, arrays, strict=True)
        )

    inputs, outputs = about["inputs"], about["outputs"]
    arguments: dict[str, dict[str, int]] = {name: {} for name in about["arguments"]}
    for array in inputs:
        arguments[array["argument"]][array["name"]] = 0
    ins, outs = avals(inputs), avals(outputs)
    values = {
        "fun_name": about["name"],
        "in_tree": jax.tree.structure((tuple(arguments.values()), {})),
        "in_avals": ins,
        "out_tree": jax.tree.structure({array["name"]: 0 for array in outputs}),
        "out_avals": outs,
        "_has_named_shardings": True,
        "_in_named_shardings": (None,) * len(ins),
        "_out_named_shardings": (None,) * len(outs),
        "in_shardings_hlo": (None,) * len(ins),
        "out_shardings_hlo": (None,) * len(outs),
        "nr_devices": 1,
        "platforms": tuple(about["platforms"]),
        "ordered_effects": (),
        "unordered_effects": (),
        "disabled_safety_checks": (),
        "mlir_module_serialized": (directory / about["file"]).read_bytes(),
        "calling_convention_version": about["calling_convention_version"],
        "module_kept_var_idx": tuple(about["kept"]),
        "uses_global_constants": about["global_constants"],
        "_get_vjp": None,
    }
    known = {field.name for field in dataclasses.fields(jax.export.Exported)}
    if known - values.keys():
        raise ValueError(
            f"jax {jax.__version__} is newer than this file knows; use the version that signature.json names"
        )
    exported: Any = jax.export.Exported(**{name: value for name, value in values.items() if name in known})
    options: Any = {"xla_backend_optimization_level": 0} if hurried and jax.default_backend() == "cpu" else None
    return jax.jit(exported.call, compiler_options=options)


@dataclasses.dataclass(frozen=True)
class Served:
    """An export directory, ready to answer."""

    directory: Path
    config: dict[str, Any]
    ids: list[Any]  # the caller's id of every item row
    titles: list[str]
    weights: dict[str, jax.Array]
    catalogue: dict[str, jax.Array]
    functions: dict[str, Callable[..., Any]]

    def recommend(self, features: Features, exclude: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Lists of item rows int32 [B,K], -1 = no more, and their log P float32 [B,K].

        `exclude` int32 [B,X] are item rows that a request may not list, -1 = none; at most `excluded` of config.json.

        Raises:
            ValueError: more than that.
        """
        most = self.config["excluded"]
        padded = np.full((len(features["user"]), most), -1, np.int32)
        if exclude is not None:
            if exclude.shape[1] > most:
                raise ValueError(f"{exclude.shape[1]} items to leave out; this export has room for {most} a request")
            padded[:, : exclude.shape[1]] = exclude
        found = self.functions["recommend"](self.weights, self.catalogue, {**features, "exclude": padded})
        return np.asarray(found["items"]), np.asarray(found["scores"])

    def score(self, features: Features, items: np.ndarray) -> np.ndarray:
        """log P float32 [B,J,C] of each code of given items [B,J]; of the items themselves, C = 1, where there are no codes."""
        request = {**features, "items": np.asarray(items, np.int32)}
        return np.asarray(self.functions["score"](self.weights, self.catalogue, request)["log_p"])

    def users(self) -> list[dict[str, Any]]:
        """The sample users."""
        return _read_lines(self.directory / "users.jsonl")

    def features(self, user: dict[str, Any], request_ms: int | None = None) -> Features:
        """What the model reads of a user, B = 1: as of the last event, or as of `request_ms`.

        Args:
            user: `row`, `features`, and `events`, oldest first: item row, timestamp_ms, playtime_s and duration_s (None =
                unknown), feedback (a list of labels). `positive` and `lifelong` are such lists too; without them they are
                made of the events.

        Raises:
            ValueError: without `lifelong`, and so many events that they would have to be clustered.
        """
        config, events = self.config["model"], user["events"]
        end = request_ms if request_ms is not None else events[-1]["timestamp_ms"] if events else 0
        found = {"user": np.array([[user["row"], *user["features"]]], np.int32)}
        runs = {"short": events, "positive": self._positive(user), "lifelong": self._lifelong(user)}
        for name, run in runs.items():
            if length := config[f"{name}_length"]:
                kept = run[-length:]
                before = (events[-len(kept) - 1 :] or [None])[0] if config["causal"] else None
                found |= {f"{name}.{key}": value for key, value in self._pathway(kept, length, end, before).items()}
        return found

    def seen(self, user: dict[str, Any]) -> np.ndarray:
        """Item rows int32 [1,X] that a user has met, the latest where there is not room for all."""
        latest = [event["item"] for event in reversed(user["events"])]
        rows = list(dict.fromkeys([*latest, *user.get("seen", ())]))
        return np.array([rows[: self.config["excluded"]]], np.int32)

    def _positive(self, user: dict[str, Any]) -> list[dict[str, Any]]:
        wanted = set(self.config["positive_labels"])
        of_events = [event for event in user["events"] if not wanted or wanted & set(event["feedback"])]
        return user.get("positive", of_events)

    def _lifelong(self, user: dict[str, Any]) -> list[dict[str, Any]]:
        refresh = self.config["lifelong"]["refresh"]
        if "lifelong" not in user and self.config["model"]["lifelong_length"] and len(user["events"]) >= refresh:
            raise ValueError(
                f"a user of {refresh} events or more needs `lifelong`: clusters of them, as in users.jsonl"
            )
        return user.get("lifelong", user["events"])

    def _pathway(
        self, events: list[dict[str, Any]], length: int, end: int, before: dict[str, Any] | None
    ) -> dict[str, np.ndarray]:
        """Arrays [1,L] of one run of events; ages up to `end`, or of a causal encoder from the event before."""
        labels, n = self.config["labels"], len(events)
        time = np.array([event["timestamp_ms"] for event in events], np.int64)
        age = end - time
        if before is not None:
            age = np.diff(time, prepend=before["timestamp_ms"])
        columns = {
            "item": (np.int32, -1, [event["item"] for event in events]),
            "age_s": (np.float32, 0, age / 1000),
            "playtime_s": (np.float32, 0, [_known(event["playtime_s"]) for event in events]),
            "duration_s": (np.float32, 0, [_known(event["duration_s"]) for event in events]),
        }
        found = {}
        for name, (dtype, padding, values) in columns.items():
            found[name] = np.full((1, length), padding, dtype)
            found[name][0, :n] = values
        found["feedback"] = np.zeros((1, length, len(labels)), np.uint8)
        for i, event in enumerate(events):
            found["feedback"][0, i] = [label in event["feedback"] for label in labels]
        return found


def _known(seconds: float | None) -> float:
    return -1 if seconds is None else seconds


def _read_lines(path: Path) -> list[Any]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def load(directory: str | Path, hurried: bool = False) -> Served:
    """Reads an export directory and puts its weights onto the default device.

    Args:
        directory: the export.
        hurried: on a CPU, compile in little more than half the time a program that takes half as long again to run: right for a
            few lists.

    Raises:
        ValueError: a file is missing, changed or added, or this jax is not one that can read it.
    """
    directory = Path(directory)
    check(directory)
    signature = json.loads((directory / "signature.json").read_text())
    items = _read_lines(directory / "items.jsonl")
    catalogue = read_tensors(directory, "catalogue")
    used = {
        array["name"] for array in signature["functions"]["recommend"]["inputs"] if array["argument"] == "catalogue"
    }
    return Served(
        directory=directory,
        config=json.loads((directory / "config.json").read_text()),
        ids=[item["id"] for item in items],
        titles=[item["title"] for item in items],
        weights=jax.device_put(read_tensors(directory, "model")),
        catalogue=jax.device_put({name: array for name, array in catalogue.items() if name in used}),
        functions={name: read_function(directory, about, hurried) for name, about in signature["functions"].items()},
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A list for one of the sample users of this export.")
    parser.add_argument("--user", help="the user's id, as in users.jsonl; by default the first there")
    parser.add_argument(
        "--directory", default=str(Path(__file__).resolve().parent), help="the export; by default this one"
    )
    options = parser.parse_args(arguments)
    served = load(options.directory, hurried=True)
    users = {str(user["id"]): user for user in served.users()}
    if not users:
        raise ValueError(
            "users.jsonl is empty: this was exported with --users 0; `recommend` takes features of your own"
        )
    options.user = options.user or next(iter(users))
    if options.user not in users:
        raise ValueError(f"no user '{options.user}' in users.jsonl; ids there look like {', '.join(list(users)[:3])}")
    user = users[options.user]
    exclude = served.seen(user) if served.config["exclude_seen"] else None
    items, scores = served.recommend(served.features(user), exclude)
    for item, score in zip(items[0].tolist(), scores[0].tolist(), strict=True):
        if item >= 0:
            print(f"{score:8.3f}  {served.ids[item]}  {served.titles[item] or '(no title)'}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"recommend.py: {error}")
