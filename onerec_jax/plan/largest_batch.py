"""The largest batch that fits, by recomputation policy: a few compilations each, since memory grows by the request."""

from __future__ import annotations

import dataclasses

from onerec_jax.config import Recipe
from onerec_jax.plan.compiled import DoesNotFit
from onerec_jax.plan.plan import Plan, make_plan
from onerec_jax.train.loop import Report

POLICIES = ("none", "dots", "block")
MOST = 4096  # requests a chip


def largest_batches(
    recipe: Recipe, topology: str, ways: int, report: Report = lambda line: None, *, thorough: bool = False
) -> dict[str, Plan | None]:
    """By `model.remat` the plan of the largest batch that fits, in eighths of a power of two a chip; None where not even one does.

    Args:
        ways: over how many ways the mesh splits a batch.
        report: is told of each compilation, which takes a minute or more.
    """
    return {policy: _largest(_Search(_with(recipe, policy), topology, ways, report, thorough)) for policy in POLICIES}


def _with(recipe: Recipe, policy: str) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"remat": policy})})


@dataclasses.dataclass
class _Search:
    recipe: Recipe
    topology: str
    ways: int
    report: Report
    thorough: bool

    def plan(self, each: int) -> Plan | None:
        """With so many requests a way, or None if the program does not fit."""
        batch = each * self.ways * self.recipe.train.accumulation
        try:
            plan = make_plan(self.recipe, self.topology, batch, thorough=self.thorough)
        except DoesNotFit:
            self.report(f"remat {self.recipe.model.remat}, batch {batch:,}: does not fit")
            return None
        share = plan.memory.total / plan.memory.usable
        self.report(f"remat {self.recipe.model.remat}, batch {batch:,}: {share:.0%} of a chip's memory")
        return plan if plan.fits else None


def _largest(search: _Search) -> Plan | None:
    few, many = (1, search.plan(1)), (8, search.plan(8))
    if few[1] is None:
        return None
    if many[1] is None:
        many = (4, search.plan(4))
        if many[1] is None:
            return search.plan(2) or few[1]
    each = (many[1].memory.total - few[1].memory.total) / (many[0] - few[0])
    room = many[1].memory.usable - many[1].memory.total
    best, size = many[1], rounded(min(MOST, many[0] + int(room / max(1.0, each))))
    while size > many[0]:
        found = search.plan(size)
        if found is not None:
            return found
        size = rounded(size - 1)
    return best


def rounded(size: int) -> int:
    """Down to an eighth of the power of two below: 1..8, 9..16, 18, 20, .. 32, 36, .."""
    step = max(1, 2 ** (size.bit_length() - 4))
    return size // step * step
