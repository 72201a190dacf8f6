"""What a recipe costs on a TPU slice, before anyone pays for one: memory, FLOPs, traffic, collectives, and the roofline of them.

    plan = make_plan(load_recipe("onerec_0.935b", ["mesh.fsdp=8", "mesh.expert=8"]), "v5p:4x4x4", batch=1024)
    print(plan.memory.total, plan.bound, plan.mfu)

The numbers of memory, traffic and collectives are those of the compiled program; FLOPs are counted from the config
(`train.flops`). Times are lower bounds, each as if the other two were free: FLOPs at the chip's peak, bytes at its memory's
bandwidth, collectives one after the other, each over one axis of the torus at a time ("How to Scale Your Model", Austin et al.
2025, chapter 3).
"""

from __future__ import annotations

import dataclasses
import math
from importlib.metadata import version
from typing import Any

import jax
from jax.sharding import Mesh

from onerec_jax.config import Recipe
from onerec_jax.errors import InputError
from onerec_jax.model.onerec import Model
from onerec_jax.model.tables import gather
from onerec_jax.parallel.mesh import data_parallel, make_mesh, use_mesh
from onerec_jax.parallel.sharding import LAYOUT
from onerec_jax.plan.chips import Chip, parse_topology
from onerec_jax.plan.collectives import Collective, collectives
from onerec_jax.plan.compiled import (
    abstract_batch,
    abstract_training_trie,
    compile_for_tpu,
    for_tpu,
    lower_decode_step,
    lower_train_step,
    model_of,
    tpu_devices,
)
from onerec_jax.plan.program import read
from onerec_jax.plan.traffic import traffic
from onerec_jax.train.flops import request_flops
from onerec_jax.train.step import make_loss

STEPS = ("train", "decode")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip."""

    parameters: int  # with the balancing biases
    optimizer: int
    tables: int  # rows of id tables, and what their optimizer keeps
    batch: int  # and what tiles pad
    activations: int  # kept from the forward pass for the backward one
    temporaries: int
    code: int
    usable: int  # of the chip

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in dataclasses.fields(self)) - self.usable


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step of a recipe on a slice; bytes, FLOPs and seconds are those of one chip and step."""

    recipe: str
    step: str
    topology: str
    chips: int
    mesh: dict[str, int]
    batch: int
    remat: str
    memory: Memory
    flops: float  # matmuls, counted from the config; in training three times the forward pass
    recomputed: float  # of these, again in the backward pass
    compiler_flops: float  # XLA's own count, which takes the body of a loop once
    traffic: int
    collectives: list[Collective]
    compute_s: float
    memory_s: float
    network_s: float
    compiled_by: str

    @property
    def ways(self) -> int:
        """Over how many the batch is split."""
        return math.prod(self.mesh[axis] for axis in LAYOUT["batch"])

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.memory.usable

    @property
    def bound(self) -> str:
        """Which of compute, memory and network a step cannot be faster than."""
        times = {"compute": self.compute_s, "memory": self.memory_s, "network": self.network_s}
        return max(times, key=lambda name: times[name])

    @property
    def seconds(self) -> float:
        """A step takes at least this long."""
        return max(self.compute_s, self.memory_s, self.network_s)

    @property
    def mfu(self) -> float:
        """The model FLOPs utilisation that no run of this program can exceed."""
        return self.compute_s * self.flops / (self.flops + self.recomputed) / self.seconds

    def to_json(self) -> dict[str, Any]:
        derived = {"fits": self.fits, "bound": self.bound, "seconds": self.seconds, "mfu": self.mfu}
        return {
            **dataclasses.asdict(self),
            **derived,
            "memory": {**dataclasses.asdict(self.memory), "total": self.memory.total},
        }


def make_plan(recipe: Recipe, topology: str, batch: int = 0, step: str = "train", *, thorough: bool = False) -> Plan:
    """Compiles a step for a slice and reads what it costs.

    Args:
        recipe: its `mesh` is laid over the chips of the slice.
        topology: such as `v5p:4x4x8`.
        batch: requests of a step, all chips together; the recipe's own batch by default.
        step: `train`, or `decode`: one beam search, from requests to beams.
        thorough: compile as for a real run, several times as long; memory and traffic come out a little lower.

    Raises:
        InputError: no such slice, or a mesh or batch that does not fit it.
        DoesNotFit: the compiler cannot make the program fit into a chip's memory.
    """
    if step not in STEPS:
        raise InputError(f"step '{step}' is none of {', '.join(STEPS)}")
    chip, _ = parse_topology(topology)
    recipe = for_tpu(recipe)
    mesh = make_mesh(recipe.mesh, tpu_devices(topology))
    batch = batch or (recipe.train.batch_size if step == "train" else recipe.evaluate.batch_size)
    model = model_of(recipe)
    lower = lower_train_step if step == "train" else lower_decode_step
    lowered, state = lower(recipe, model, mesh, batch)
    compiled = compile_for_tpu(lowered, mesh, thorough=thorough)
    program = read(compiled.as_text())
    found = collectives(program, mesh)
    flops, recomputed = _flops(recipe, model, batch / mesh.devices.size, step)
    moved = traffic(program)
    kept = _activations(recipe, model, mesh, batch) if step == "train" else 0
    return Plan(
        recipe=recipe.name,
        step=step,
        topology=topology,
        chips=mesh.devices.size,
        mesh=dict(mesh.shape),
        batch=batch,
        remat=recipe.model.remat,
        memory=_memory(compiled.memory_analysis(), state, kept, chip, step),
        flops=flops,
        recomputed=recomputed,
        compiler_flops=float((compiled.cost_analysis() or {}).get("flops", 0.0)),
        traffic=moved,
        collectives=found,
        compute_s=(flops + recomputed) / chip.flops,
        memory_s=moved / chip.hbm_bandwidth,
        network_s=sum(seconds_of(c, topology) for c in found),
        compiled_by=f"jax {jax.__version__}, libtpu {version('libtpu')}{', thorough' if thorough else ''}",
    )


def seconds_of(collective: Collective, topology: str) -> float:
    """All runs of a collective: rings in both directions along one axis of the torus, for all-to-all one axis after the other."""
    chip, sides = parse_topology(topology)
    n, size = collective.devices, collective.total_bytes
    ring = size * (n - 1) / n / chip.ici_bandwidth
    if collective.kind == "all-reduce":
        return 2 * ring
    if collective.kind == "all-to-all":
        return size * sum(_rings(n, sides)) / 4 / chip.ici_bandwidth
    if collective.kind == "collective-permute":
        return size / (chip.ici_bandwidth / 2)
    return ring


def _rings(devices: int, sides: tuple[int, ...]) -> list[int]:
    """Sides of the torus, the longest first, until so many devices lie in their product; the last may be a part of one."""
    found = []
    for side in sorted(sides, reverse=True):
        found.append(min(side, -(-devices // math.prod(found))))
        if math.prod(found) >= devices:
            break
    return found


def _flops(recipe: Recipe, model: Model, requests: float, step: str) -> tuple[float, float]:
    """Matmul FLOPs of so many requests with full pathways, and those recomputed under `model.remat`."""
    config, targets = recipe.model, recipe.data.targets
    counted = request_flops(
        config,
        model.vocabulary,
        short=config.short_length,
        positive=config.positive_length,
        lifelong=config.lifelong_length,
        targets=targets if step == "train" else recipe.evaluate.beam_width,
        sampled_items=recipe.train.sampled_items,
        decoded=recipe.train.code_targets or None if step == "train" else None,
    )
    if step == "decode":
        return requests * counted.forward, 0.0
    again = counted.encoder + counted.decoder if config.remat == "block" else 0.0
    return requests * counted.training, requests * again


def _activations(recipe: Recipe, model: Model, mesh: Mesh, batch: int) -> int:
    """Bytes a chip keeps from the forward pass: the residuals of the loss that grow with the batch."""
    train = recipe.train
    loss = make_loss(model, train.label_smoothing, train.sampled_items, train.item_weight, train.code_targets)
    params, tables = jax.eval_shape(lambda: model.init(0))
    trie = abstract_training_trie(recipe, model.vocabulary, mesh)

    def pull_back(params: Any, tables: Any, bias: Any, batch: Any, trie: Any) -> Any:
        local, touched = model.localise(batch, touched_only=True)
        rows = gather(tables, touched, model.config.tables)
        return jax.vjp(lambda p, r: loss(p, r, bias, local, None, trie), params, rows, has_aux=True)[1]

    def kept(size: int) -> int:
        with use_mesh(mesh):
            found = jax.eval_shape(
                pull_back,
                params,
                tables,
                jax.eval_shape(model.init_bias),
                abstract_batch(recipe, model.vocabulary, size),
                trie,
            )
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(found))

    ways = data_parallel(mesh)
    return (kept(2 * ways) - kept(ways)) * (batch // train.accumulation) // ways**2


def _memory(analysis: Any, state: Any, activations: int, chip: Chip, step: str) -> Memory:
    def own(tree: Any) -> int:
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    parameters, optimizer = own((state.params, state.bias)), own(state.optimizer) if step == "train" else 0
    activations = min(activations, analysis.temp_size_in_bytes)
    return Memory(
        parameters=parameters,
        optimizer=optimizer,
        tables=own(state.tables),
        batch=analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        - (parameters + optimizer + own(state.tables)),
        activations=activations,
        temporaries=analysis.temp_size_in_bytes - activations,
        code=analysis.generated_code_size_in_bytes,
        usable=chip.usable,
    )
