"""The matmul backends of the experts, behind one function: y[m] = sum_a gates[m,a] * SwiGLU of expert chosen[m,a](x[m]).

A choice outside 0..E-1 is nobody's: it adds nothing, has no gradient, and the faster backends do not compute it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import jax
from jax import Array

from onerec_jax.config import MoEConfig
from onerec_jax.model.moe.ragged import ragged_experts
from onerec_jax.model.moe.reference import reference_experts
from onerec_jax.model.moe.tiles import tiled_experts
from onerec_jax.parallel.mesh import platform

Experts = Callable[[Array, Array, Array, Array, Array, Array], Array]  # x, chosen, gates, gate, up, down -> y


def backend_name(config: MoEConfig) -> str:
    """`auto` resolved: tiles on a CPU, tokamax where it is installed, else ragged."""
    if config.backend != "auto":
        return config.backend
    if platform() == "cpu":
        return "tiles"
    return "tokamax" if importlib.util.find_spec("tokamax") else "ragged"


def experts_of(config: MoEConfig) -> Experts:
    """The backend of a config; tokamax, when called, raises InputError where it is not installed."""
    name = backend_name(config)
    if name == "reference":
        return reference_experts
    if name == "tiles":
        return lambda *arguments: tiled_experts(*arguments, tile=config.tile)
    if name == "ragged":
        return lambda *arguments: ragged_experts(jax.lax.ragged_dot, *arguments)
    from onerec_jax.model.moe.tokamax import grouped_matmul

    return lambda *arguments: ragged_experts(grouped_matmul, *arguments)
