"""TPU chips as a plan needs to know them, and the names of their slices."""

from __future__ import annotations

import dataclasses
import re

from onerec_jax.errors import InputError

GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip; "How to Scale Your Model" (Austin et al. 2025), chapter 2, but for `usable`."""

    name: str
    flops: float  # dense bfloat16, FLOP/s
    hbm: int  # bytes
    usable: int  # bytes that a program may take: what libtpu 0.0.42 says when one does not fit
    hbm_bandwidth: float  # bytes/s
    ici_bandwidth: float  # bytes/s along one axis of the torus, both directions together
    dimensions: int  # of the torus


CHIPS = {
    "v5e": Chip("v5e", 197e12, 16 * GiB, int(15.75 * GiB), 8.1e11, 9e10, 2),
    "v5p": Chip("v5p", 459e12, 96 * GiB, int(95.74 * GiB), 2.8e12, 1.8e11, 3),
    "v6e": Chip("v6e", 918e12, 32 * GiB, int(31.25 * GiB), 1.6e12, 1.8e11, 2),
}


def parse_topology(name: str) -> tuple[Chip, tuple[int, ...]]:
    """`v5p:4x4x8` -> the chip and the sides of the slice.

    Raises:
        InputError: no such chip, or sides that its torus does not have.
    """
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name)
    if match is None or match[1] not in CHIPS:
        raise InputError(
            f"topology '{name}' is not CHIP:AxB or CHIP:AxBxC with CHIP one of {', '.join(CHIPS)}; such as v5e:4x4"
        )
    chip, sides = CHIPS[match[1]], tuple(int(side) for side in match[2].split("x"))
    if len(sides) != chip.dimensions or 0 in sides:
        shape = "x".join("ABC"[: chip.dimensions])
        raise InputError(
            f"topology '{name}' has {len(sides)} sides, a slice of {chip.name} has {chip.dimensions}: {chip.name}:{shape}"
        )
    return chip, sides
