"""The plans that the project keeps: big recipes on TPU slices, compiled on this machine (`onerec plan` makes any other).

    python tools/aot_plan.py                     all of them into tests/golden/plans/, two to six minutes each
    python tools/aot_plan.py 2.633b              those with this in their names

`tests/plan/test_kept_plans.py` holds what they must: all fit, nothing moves a whole table or all experts, FLOPs a chip stay equal
from 64 to 1024 chips.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from rich.console import Console

from onerec_jax.config import Recipe
from onerec_jax.plan.plan import make_plan
from onerec_jax.plan.report import tables
from onerec_jax.recipe import load_recipe

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "golden" / "plans"
TABLE = ("model.author_rows=1000000000", "model.author_dim=64")
BIG = ("mesh.fsdp=8", "mesh.expert=8")
ENCODER_TOO = (
    *BIG,
    "model.moe.capacity=2",
)  # experts in the encoder: all_to_all moves an eighth of what allgather does

# name: recipe, topology, requests a chip, step, settings
PLANS: dict[str, tuple[str, str, int, str, tuple[str, ...]]] = {
    "quickstart_v5e_2x2": ("quickstart", "v5e:2x2", 32, "train", ("mesh.fsdp=4",)),
    "0.935b_v5e_4x4": ("onerec_0.935b", "v5e:4x4", 32, "train", ("mesh.fsdp=2", "mesh.expert=8")),
    "0.935b_v5p_4x4x4": ("onerec_0.935b", "v5p:4x4x4", 64, "train", BIG),
    "0.935b_v5p_8x8x16": ("onerec_0.935b", "v5p:8x8x16", 64, "train", BIG),
    "0.935b_v6e_8x8": ("onerec_0.935b", "v6e:8x8", 64, "train", BIG),
    "0.935b_v6e_8x8_decode": ("onerec_0.935b", "v6e:8x8", 4, "decode", ("mesh.expert=8",)),
    "2.633b_v5p_4x4x8": ("onerec_2.633b", "v5p:4x4x8", 64, "train", ENCODER_TOO),
    "2.633b_v5p_8x8x16": ("onerec_2.633b", "v5p:8x8x16", 64, "train", ENCODER_TOO),
    "2.633b_table_v5p_8x8x16": ("onerec_2.633b", "v5p:8x8x16", 64, "train", (*ENCODER_TOO, *TABLE)),
}


PAGE = FOLDER.parent.parent.parent / "launch" / "README.md"
MARKS = ("<!-- the kept plans, by tools/aot_plan.py -->", "<!-- end -->")


def summary() -> str:
    """The kept plans as a Markdown table."""
    lines = [
        "| recipe | slice | mesh | step, requests | a chip's memory | matmuls | memory traffic | network | bound by, MFU at most |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (_, _, _, _, settings) in PLANS.items():
        plan = json.loads((FOLDER / f"{name}.json").read_text())
        mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
        others = "".join(f", `{setting}`" for setting in settings if not setting.startswith("mesh."))
        memory = f"{plan['memory']['total'] / 2**30:.1f} of {plan['memory']['usable'] / 2**30:.1f} GiB"
        times = " | ".join(f"{1000 * plan[part]:,.4g} ms" for part in ("compute_s", "memory_s", "network_s"))
        lines.append(
            f"| `{plan['recipe']}`{others} | {plan['topology']} | {mesh} | {plan['step']}, {plan['batch']:,} | {memory} | {times} "
            f"| {plan['bound']}, {plan['mfu']:.0%} |"
        )
    return "\n".join(lines)


def page_with(table: str) -> str:
    """launch/README.md with this table of plans."""
    before, rest = PAGE.read_text().split(MARKS[0])
    return before + MARKS[0] + "\n\n" + table + "\n\n" + MARKS[1] + rest.split(MARKS[1])[1]


def recipe_of(name: str) -> Recipe:
    """The recipe of a kept plan, with the simulator's own vocabulary, whatever dataset lies here."""
    recipe, _, _, _, settings = PLANS[name]
    return load_recipe(recipe, [*settings, "data.directory=no-dataset"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="", help="a part of the names of those to make")
    given = parser.parse_args()
    console = Console(width=120)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, (_, topology, each, step, _) in PLANS.items():
        if given.name not in name:
            continue
        started = time.perf_counter()
        chips = 1
        for side in topology.split(":")[1].split("x"):
            chips *= int(side)
        plan = make_plan(recipe_of(name), topology, each * chips, step)
        (FOLDER / f"{name}.json").write_text(json.dumps(plan.to_json(), indent=1) + "\n")
        console.print(tables(plan))
        console.print(f"{name}: {time.perf_counter() - started:.0f} s to compile and read")
    if all((FOLDER / f"{name}.json").exists() for name in PLANS):
        PAGE.write_text(page_with(summary()))


if __name__ == "__main__":
    main()
