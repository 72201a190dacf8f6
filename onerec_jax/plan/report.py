"""A plan as tables."""

from __future__ import annotations

import dataclasses

from rich.console import Group
from rich.table import Table

from onerec_jax.plan.plan import Plan, seconds_of

SHOWN = 12  # collectives


def _bytes(value: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:,.2f} {unit}"
    return f"{value:,.0f} B"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.2f} ms"


def tables(plan: Plan) -> Group:
    """Memory, times and collectives of one plan."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one chip"
    title = f"{plan.recipe}, {plan.step} step on {plan.topology}: {plan.chips} chips, {mesh}, batch {plan.batch:,}"
    memory = Table("one chip's memory", "", title=title, title_justify="left")
    for name, value in dataclasses.asdict(plan.memory).items():
        if name != "usable":
            memory.add_row(name, _bytes(value))
    share = plan.memory.total / plan.memory.usable
    verdict = f"of {_bytes(plan.memory.usable)}: {share:.0%}, {'fits' if plan.fits else 'does not fit'}"
    memory.add_row("total", f"{_bytes(plan.memory.total)} {verdict}", style="bold")
    times = Table("a step's", "", "takes at least")
    recomputed = f", {plan.recomputed / plan.flops:.0%} of it again" if plan.recomputed else ""
    times.add_row("matmuls", f"{plan.flops / 1e9:,.4g} GFLOP{recomputed}", _ms(plan.compute_s))
    times.add_row("memory traffic", _bytes(plan.traffic), _ms(plan.memory_s))
    times.add_row("collectives", _bytes(sum(c.total_bytes for c in plan.collectives)), _ms(plan.network_s))
    requests = plan.batch / plan.seconds
    summary = f"bound by {plan.bound}: at most {plan.mfu:.1%} MFU, {requests:,.0f} requests/s"
    times.add_row("step", summary, _ms(plan.seconds), style="bold")
    traffic = Table("collective", "mesh axes", "chips", "bytes", "times", "takes at least")
    rows = sorted(plan.collectives, key=lambda c: -seconds_of(c, plan.topology))
    for c in rows[:SHOWN]:
        traffic.add_row(
            c.kind, ", ".join(c.axes), str(c.devices), _bytes(c.bytes), str(c.count), _ms(seconds_of(c, plan.topology))
        )
    if rows[SHOWN:]:
        rest = rows[SHOWN:]
        total = _bytes(sum(c.total_bytes for c in rest))
        seconds = sum(seconds_of(c, plan.topology) for c in rest)
        traffic.add_row(f"{len(rest)} others", "", "", total, "", _ms(seconds))
    return Group(memory, times, traffic)


def comparison(found: dict[str, Plan | None]) -> Table:
    """The largest batches that fit, by recomputation policy."""
    table = Table("model.remat", "largest batch", "a chip", "memory", "bound by", "MFU at most", "requests/s at most")
    for policy, plan in found.items():
        if plan is None:
            table.add_row(policy, "none fits")
            continue
        table.add_row(
            policy,
            f"{plan.batch:,}",
            f"{plan.batch / plan.chips:g}",
            f"{plan.memory.total / plan.memory.usable:.0%}",
            plan.bound,
            f"{plan.mfu:.1%}",
            f"{plan.batch / plan.seconds:,.0f}",
        )
    return table
