"""The collectives of a compiled program: kind, count, bytes and mesh axes, read from its text (HLO)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32,
        "f32": 32, "s64": 64, "u64": 64, "f64": 64, "f8e4m3fn": 8, "f8e5m2": 8}  # fmt: skip

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.+?) ([a-z][a-z0-9\-]*)\((.*)$")
_SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([0-9,]*)\]")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind, size and set of mesh axes."""

    kind: str
    axes: tuple[str, ...]  # mesh axes along which devices take part
    devices: int  # that take part together
    bytes: int  # of the larger of what a device gives and gets, once
    count: int  # how often a step runs it

    @property
    def total_bytes(self) -> int:
        return self.bytes * self.count


def shape_bytes(text: str) -> list[int]:
    """Bytes of every array in the text of a shape, which may be a tuple."""
    return [
        BITS[kind] * math.prod(int(n) for n in sizes.split(",") if n) // 8
        for kind, sizes in _SHAPE.findall(text)
        if kind in BITS
    ]


def collectives(program: str, mesh: Mesh) -> list[Collective]:
    """The collectives of a program for this mesh, the most traffic first; bodies of loops count as often as they run."""
    computations = _computations(program)
    entry = next(match[1] for match in re.finditer(r"^ENTRY %?([\w.\-]+)", program, re.MULTILINE))
    found: dict[tuple[str, tuple[str, ...], int, int], int] = {}
    for line, runs in _instructions(computations, entry, 1):
        match = _INSTRUCTION.match(line)
        kind = match[2].removesuffix("-start") if match else ""
        if match is None or kind not in KINDS:
            continue
        group = _group(kind, match[3], mesh.devices.size)
        sizes = shape_bytes(match[1])
        operands = sizes[: len(sizes) // 2] if match[2].endswith("-start") and len(sizes) > 1 else []
        results = sizes[len(operands) :]
        size = sum(results) * (len(group) if kind == "reduce-scatter" else 1)
        key = kind, _axes(group, mesh), len(group), size
        found[key] = found.get(key, 0) + runs
    rows = [Collective(*key, count) for key, count in found.items() if key[2] > 1]
    return sorted(rows, key=lambda c: -c.total_bytes)


def _computations(program: str) -> dict[str, list[str]]:
    """The lines of each computation, by name."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in program.splitlines():
        if match := _COMPUTATION.match(line):
            current = found.setdefault(match[1], [])
        elif line != "}":
            current.append(line)
    return found


def _instructions(computations: dict[str, list[str]], name: str, runs: int) -> Iterator[tuple[str, int]]:
    """Every instruction that a computation runs, called ones included, and how often."""
    for line in computations.get(name, ()):
        yield line, runs
        trips = _TRIPS.search(line)
        branches = _BRANCHES.search(line)
        called = _CALLED.findall(line) + ([b.strip().lstrip("%") for b in branches[1].split(",")] if branches else [])
        for inner in called:
            yield from _instructions(computations, inner, runs * (int(trips[1]) if trips else 1))


def _group(kind: str, attributes: str, devices: int) -> list[int]:
    """The first group of partitions that take part together."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
        return [int(pairs[1]), int(pairs[2])] if pairs else []
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return [int(n) for n in listed[1].split(",") if n]
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):  # jax 0.12
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        along = re.findall(r"'(\w+)'", named[2])
        numbers = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        return numbers[tuple(slice(None) if name in along else 0 for name in sizes)].reshape(-1).tolist()
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        groups, shape = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
        order = [int(n) for n in iota[3].split(",")] if iota[3] else list(range(len(shape)))
        return np.arange(math.prod(shape)).reshape(shape).transpose(order).reshape(groups)[0].tolist()
    return list(range(devices))


def _axes(group: list[int], mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which the partitions of a group differ; partitions are numbered in the mesh's order."""
    places = np.array(np.unravel_index(group, mesh.devices.shape)).T if group else np.zeros((0, mesh.devices.ndim))
    varies = [len(set(column)) > 1 for column in places.T]
    return tuple(axis for axis, differs in zip(mesh.axis_names, varies, strict=True) if differs)
