"""The collectives of a compiled program: kind, count, bytes and mesh axes, read from its text (HLO)."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
from jax.sharding import Mesh

from onerec_jax.plan.program import Program, array_bytes

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


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


def collectives(program: Program, mesh: Mesh) -> list[Collective]:
    """The collectives of a program for this mesh, the most traffic first; bodies of loops count as often as they run."""
    found: dict[tuple[str, tuple[str, ...], int, int], int] = {}
    for computation, instruction, runs in program.executed():
        kind = instruction.kind.removesuffix("-start")
        if kind not in KINDS:
            continue
        group = _group(kind, instruction.rest, mesh.devices.size)
        sizes = array_bytes(instruction.shape.replace("u32[]", ""))  # what an asynchronous one keeps for itself
        operands = sizes[: len(sizes) // 2] if instruction.kind.endswith("-start") and len(sizes) > 1 else []
        results = sizes[len(operands) :]
        size = sum(results) * (len(group) if kind == "reduce-scatter" else 1)
        if computation.startswith("all-reduce-scatter"):  # a TPU's fusion of all-reduce and taking one's share
            kind = "reduce-scatter"
        key = kind, _axes(group, mesh), len(group), size
        found[key] = found.get(key, 0) + runs
    rows = [Collective(*key, count) for key, count in found.items() if key[2] > 1]
    return sorted(rows, key=lambda c: -c.total_bytes)


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
