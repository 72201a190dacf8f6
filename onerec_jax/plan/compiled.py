"""The real train and decode steps of a recipe, compiled for a TPU slice on a machine that has none (DESIGN 5)."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from onerec_jax.config import Recipe, SimulatorSource
from onerec_jax.data.schema import Batch, ItemFeatures, Vocabulary
from onerec_jax.errors import InputError
from onerec_jax.generate.beam import make_beam_search
from onerec_jax.model.onerec import Model, build, planned_vocabulary
from onerec_jax.model.prefixes import DeviceTrie
from onerec_jax.parallel.mesh import check_batch, use_mesh
from onerec_jax.parallel.sharding import batch_sharding, check_sharded
from onerec_jax.train.loop import load_inputs
from onerec_jax.train.optimizer import make_optimizer
from onerec_jax.train.state import TrainState, abstract_state
from onerec_jax.train.step import make_train_step

# Without the first, a second process that plans fails on libtpu's lock file; without the second, libtpu asks the network.
_ENVIRONMENT = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}


# how jax 0.10 and 0.12 ask the compiler to spend less time
_HURRY = {"exec_time_optimization_effort": -1.0} if jax.__version_info__ < (0, 11) else {"optimization_level": "O1"}


class DoesNotFit(InputError):
    """The compiler found no way to fit a program into a chip's memory."""


def tpu_devices(topology: str) -> list[Any]:
    """The devices of a slice, to compile for.

    Raises:
        InputError: libtpu is not installed, or knows no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("a plan needs the TPU compiler, which also runs without a TPU: pip install libtpu")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        with _quiet():
            return list(topologies.get_topology_desc(topology_name=topology, platform="tpu").devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise InputError(f"topology '{topology}': {' '.join(str(error).split())}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what libtpu says of missing cloud metadata, past Python, off stderr."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def for_tpu(recipe: Recipe) -> Recipe:
    """The recipe with the experts' backend that a TPU's `auto` stands for without tokamax.

    Tokamax chooses its kernel by the devices of this machine, so that it cannot be compiled for others; `lax.ragged_dot` is a
    kernel of the same kind.
    """
    if recipe.model.moe.backend != "auto":
        return recipe
    moe = recipe.model.moe.model_copy(update={"backend": "ragged"})
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"moe": moe})})


def abstract_batch(recipe: Recipe, vocabulary: Vocabulary, size: int, mesh: Mesh | None = None) -> Batch:
    """The shapes of a global batch with all pathways full, split over a mesh if there is one."""
    sharding = None if mesh is None else batch_sharding(mesh)
    model, levels, labels, targets = recipe.model, vocabulary.levels, len(vocabulary.labels), recipe.data.targets

    def array(kind: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *shape), kind, sharding=sharding)

    def events(length: int) -> ItemFeatures:
        ints, floats = array(np.int32, length), array(np.float32, length)
        return ItemFeatures(
            item=ints, codes=array(np.int32, length, levels), author=ints, tag=ints, age_s=floats, playtime_s=floats,
            duration_s=floats, feedback=array(np.uint8, length, labels),
        )  # fmt: skip

    return Batch(
        user=array(np.int32, 1 + len(vocabulary.user_features)),
        short=events(model.short_length),
        positive=events(model.positive_length),
        lifelong=events(model.lifelong_length),
        targets=array(np.int32, targets, levels),
        target_item=array(np.int32, targets),
        target_weight=array(np.float32, targets),
        visible=array(np.int32, targets),
        feedback=array(np.uint8, targets, labels),
        playtime_s=array(np.float32, targets),
    )


def abstract_trie(recipe: Recipe, vocabulary: Vocabulary, mesh: Mesh) -> DeviceTrie:
    """Shapes of a trie of one semantic ID per item, spread as evenly as its codes allow."""
    whole = NamedSharding(mesh, PartitionSpec())

    def ints(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=whole)

    nodes, branching = [1], []
    for size in vocabulary.codebook_sizes:
        nodes.append(min(vocabulary.items, nodes[-1] * size))
        branching.append(min(size, max(1, -(-4 * nodes[-1] // nodes[-2]))))  # the fullest node, four times the mean
    return DeviceTrie(
        tuple(ints(n + 1) for n in nodes[:-1]),
        tuple(ints(n) for n in nodes[1:]),
        tuple(branching),
        ints(vocabulary.items, vocabulary.levels) if recipe.model.coded_items else None,
    )


def abstract_training_trie(recipe: Recipe, vocabulary: Vocabulary, mesh: Mesh) -> DeviceTrie | None:
    """As `model.prefixes.training_trie`, of shapes."""
    needed = recipe.model.softmax == "legal" or recipe.model.coded_items
    return abstract_trie(recipe, vocabulary, mesh) if needed else None


def model_of(recipe: Recipe) -> Model:
    """The recipe's model, with the vocabulary of its dataset where that is there, else with the simulator's.

    Raises:
        InputError: the log is not simulated and its dataset or semantic IDs are not there.
    """
    if (recipe.tokenizer_directory / "card.json").exists():
        return load_inputs(recipe)[2]
    if not isinstance(recipe.data.source, SimulatorSource):
        raise InputError(
            f"a plan needs to know how many items, authors and users there are, and {recipe.tokenizer_directory} is not there; "
            "run onerec data and onerec tokenize first"
        )
    return build(recipe.model, planned_vocabulary(recipe))


def lower_train_step(recipe: Recipe, model: Model, mesh: Mesh, batch_size: int) -> tuple[Any, TrainState]:
    """The train step, ready to be compiled, and the state that it keeps on the mesh.

    Raises:
        InputError: the batch does not divide over the mesh, or too much of the model is whole on every device.
    """
    check_batch(mesh, batch_size, recipe.train.accumulation)
    optimizer = make_optimizer(recipe.train, recipe.model.width_share)
    state = abstract_state(model, optimizer, mesh)
    check_sharded({"params": state.params, "tables": state.tables}, mesh)
    trie = abstract_training_trie(recipe, model.vocabulary, mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jax.jit(make_train_step(model, recipe, optimizer), out_shardings=(places, None), donate_argnums=0)
    with use_mesh(mesh):
        return step.lower(state, abstract_batch(recipe, model.vocabulary, batch_size, mesh), trie), state


def lower_decode_step(recipe: Recipe, model: Model, mesh: Mesh, batch_size: int) -> tuple[Any, TrainState]:
    """One beam search, encoder and all, ready to be compiled; of the state only parameters, tables and biases."""
    check_batch(mesh, batch_size, 1)
    state = abstract_state(model, make_optimizer(recipe.train, recipe.model.width_share), mesh)
    search = make_beam_search(model, recipe.evaluate.beam_width)
    batch = abstract_batch(recipe, model.vocabulary, batch_size, mesh)
    with use_mesh(mesh):
        lowered = search.lower(
            state.params, state.tables, state.bias, batch, abstract_trie(recipe, model.vocabulary, mesh)
        )
    return lowered, state


def compile_for_tpu(lowered: Any, mesh: Mesh, *, thorough: bool = False) -> Any:
    """Compiles; a `thorough` one takes several times as long, as it does before a real run, and leaves less for temporaries.

    Raises:
        DoesNotFit: no way was found to fit it into a chip's memory.
    """
    options: Any = None if thorough else _HURRY
    try:
        with use_mesh(mesh), _quiet():
            return lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).split("RESOURCE_EXHAUSTED:")[-1].strip().split("\n")[0]
        raise DoesNotFit(f"{reason} Use a smaller batch, model.remat=block, or more of mesh.fsdp.") from None
