"""Everything a step changes, as one pytree."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from onerec_jax.model.onerec import Model
from onerec_jax.parallel.sharding import shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds of training; dropout keys follow from the recipe's seed and `step`."""

    step: Any  # int32 []
    params: Any  # nested dict, float32
    optimizer: Any  # optax state of the dense parameters
    tables: Any  # {table: {rows [R,D], accumulator [R]}}
    bias: Any  # {stack: balancing bias [G,E]}


def init_state(model: Model, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    params, tables = model.init(seed)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=optimizer.init(params),
        tables=tables,
        bias=model.init_bias(),
    )


def abstract_state(model: Model, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the state, without any memory."""
    shapes = jax.eval_shape(lambda: init_state(model, optimizer, 0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings(shapes, mesh),
    )


def create_state(model: Model, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh) -> TrainState:
    """A fresh state, made in place on the mesh."""
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, optimizer, mesh))
    make = jax.jit(lambda: init_state(model, optimizer, seed), out_shardings=places).lower()
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    # run once, so compiling fast is worth more than fast code
    options: Any = {"xla_backend_optimization_level": 0} if on_cpu else None
    return make.compile(options)()
