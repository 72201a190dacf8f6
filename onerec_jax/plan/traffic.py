"""Bytes that a compiled program moves between main memory and the chip, instruction by instruction.

A fusion reads each of its operands once and writes its results once; where it only slices an operand, or writes a part of it,
it moves that part. What the compiler keeps in on-chip memory moves nothing. `cost_analysis` counts the body of a loop once;
this counts it as often as it runs.
"""

from __future__ import annotations

from onerec_jax.plan.program import Instruction, Program, array_bytes

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
         "partition-id", "replica-id", "iota", "opt-barrier", "reshape"}  # fmt: skip
_SLICES = {"dynamic-slice", "slice", "gather"}


def traffic(program: Program) -> int:
    """Bytes read and written in a run, by one device."""
    shapes: dict[str, dict[str, str]] = {}
    total = 0
    for computation, instruction, runs in program.executed(into_fusions=False):
        if instruction.kind in _FREE or instruction.kind.endswith("-done"):
            continue
        if computation not in shapes:
            shapes[computation] = {i.name: i.shape for i in program.computations[computation]}
        total += runs * _moved(instruction, shapes[computation], program)
    return total


def _size(shape: str) -> int:
    return sum(array_bytes(shape, main_memory=True))


def _moved(instruction: Instruction, shapes: dict[str, str], program: Program) -> int:
    operands = [shapes.get(name, "") for name in instruction.operands]
    if instruction.kind == "fusion" and instruction.called:
        return _of_fusion(instruction, operands, program.computations.get(instruction.called[0], []))
    if instruction.kind in _SLICES:
        return 2 * _size(instruction.shape)
    if instruction.kind == "dynamic-update-slice":
        return 2 * _size(operands[1])
    if instruction.kind.endswith("-start"):  # its result names its operands again
        return 2 * sum(map(_size, operands))
    return _size(instruction.shape) + sum(map(_size, operands))


def _of_fusion(fusion: Instruction, operands: list[str], body: list[Instruction]) -> int:
    shapes = {i.name: i.shape for i in body}
    total = 0
    for i in body:
        if i.kind != "parameter":
            continue
        number = int(i.rest.split(")")[0])
        if number >= len(operands) or not _size(operands[number]):
            continue
        users = [user for user in body if i.name in user.operands]
        if users and all(u.kind in _SLICES and u.operands[0] == i.name for u in users):
            total += sum(sum(array_bytes(u.shape)) for u in users)
        elif users and all(u.kind == "dynamic-update-slice" and u.operands[0] == i.name for u in users):
            continue  # written in place, below
        else:
            total += _size(operands[number])
    last = next((i for i in body if i.root), None)
    if last is not None and last.kind == "dynamic-update-slice" and _size(fusion.shape):
        return total + sum(array_bytes(shapes.get(last.operands[1], "")))
    return total + _size(fusion.shape)
