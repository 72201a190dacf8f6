"""A compiled program's text (HLO), read: its computations, their instructions, and how often a run executes each."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32,
        "f32": 32, "s64": 64, "u64": 64, "f64": 64, "f8e4m3fn": 8, "f8e5m2": 8}  # fmt: skip

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,]*)\](\{[^{}]*\})?")
_BODY = re.compile(r"(?:body|calls)=%?([\w.\-]+)")
_APPLIED = re.compile(r"to_apply=%?([\w.\-]+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_INDEX = re.compile(r"index=(\d+)")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str  # text of its result's shape
    kind: str
    rest: str  # operands and attributes
    root: bool

    @property
    def operands(self) -> list[str]:
        return _NAME.findall(self.rest.split(")", 1)[0])

    @property
    def called(self) -> list[str]:
        """The computations that it runs, but for conditions of loops and what a reduction applies to single numbers."""
        branches = _BRANCHES.search(self.rest)
        names = [name.strip().lstrip("%") for name in branches[1].split(",")] if branches else []
        return _BODY.findall(self.rest) + names + (_APPLIED.findall(self.rest) if self.kind == "call" else [])


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, and which of them is run."""

    computations: dict[str, list[Instruction]]
    entry: str

    def executed(self, *, into_fusions: bool = True) -> Iterator[tuple[str, Instruction, int]]:
        """(computation, instruction, how often a run executes it), called ones included; bodies of loops as often as they run."""
        yield from self._executed(self.entry, 1, into_fusions)

    def _executed(self, name: str, runs: int, into_fusions: bool) -> Iterator[tuple[str, Instruction, int]]:
        for instruction in self.computations.get(name, ()):
            yield name, instruction, runs
            if instruction.kind == "fusion" and not into_fusions:
                continue
            trips = self._trips(instruction) if instruction.kind == "while" else 1
            for called in instruction.called:
                yield from self._executed(called, runs * trips, into_fusions)

    def _trips(self, loop: Instruction) -> int:
        """How often a loop runs: as the compiler says, or until a counter reaches the number it is compared with; else once."""
        if known := _TRIPS.search(loop.rest):
            return int(known[1])
        condition, body = (
            match[1] if match else "" for match in (_CONDITION.search(loop.rest), _BODY.search(loop.rest))
        )
        found = {i.name: i for i in self.computations.get(condition, [])}
        last = next((i for i in found.values() if i.root), None)
        if last is None or last.kind != "compare" or "direction=LT" not in last.rest:
            return 1
        counter, bound = (found.get(name) for name in last.operands[:2])
        place = _INDEX.search(counter.rest) if counter is not None and counter.kind == "get-tuple-element" else None
        if place is None or bound is None or bound.kind != "constant":
            return 1
        steps = {i.name: i for i in self.computations.get(body, [])}
        result = next(i for i in steps.values() if i.root).operands
        advance = steps.get(result[int(place[1])]) if int(place[1]) < len(result) else None
        return max(1, int(bound.rest.split(")")[0])) if advance is not None and advance.kind == "add" else 1


def read(text: str) -> Program:
    """The program of a compiled function's text."""
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    entry = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif match := _INSTRUCTION.match(line):
            current.append(Instruction(match[2], match[3], match[4], match[5], bool(match[1])))
    return Program(computations, entry)


def array_bytes(shape: str, *, main_memory: bool = False) -> list[int]:
    """Bytes of every array in the text of a shape, which may be a tuple; with `main_memory` none of those kept on the chip."""
    return [
        BITS[kind] * math.prod(int(n) for n in sizes.split(",") if n) // 8
        for kind, sizes, layout in _ARRAY.findall(shape)
        if kind in BITS and not (main_memory and "S(" in layout)
    ]
