"""Where every array lives: one table from parameter path to logical axes, one from logical axis to mesh axis.

Someone new should be able to say where any parameter lives after reading this file. Every leaf must match exactly one
rule; blocks of a stack get the leading axis `layers` by themselves.
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax
from jax import Array
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from onerec_jax.errors import InputError

# parameter path (regular expression, matched at the end of the path) -> logical axes
PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"\w*attention(/\d+)?/(query|key|value)/kernel", ("embed", "heads")),
    (r"\w*attention(/\d+)?/out/kernel", ("heads", "embed")),
    (r"(ffn(/\d+)?|dense|mlp|projection/\w+)/up/kernel", ("embed", "hidden")),
    (r"(ffn(/\d+)?|dense|mlp|projection/\w+)/down/kernel", ("hidden", "embed")),
    (r"(mlp|projection/\w+)/up/bias", ("hidden",)),
    (r"(mlp|projection/\w+)/down/bias", (None,)),
    (r"mix/kernel", ("embed", "heads")),
    (r"blocks/\d+/out/kernel", ("heads", "embed")),
    (r"(distance|time)_bias", (None,)),
    (r"moe/(gate|up)", ("expert", "embed", "hidden")),
    (r"moe/down", ("expert", "hidden", "embed")),
    (r"moe/router", ("embed", None)),
    (r"moe/shared/(gate|up)", ("embed", "hidden")),
    (r"moe/shared/down", ("hidden", "embed")),
    (r"(codes|items|memory_in|memory_out)/embedding", ("codes", "embed")),
    (r"heads/\d+/kernel", ("embed", "codes")),
    (r"(author|tag|age|playtime|duration|feedback|features/\d+)/embedding", (None, "embed")),
    (r"(\w+_norm(/\d+)?|norm)/scale", (None,)),
    (r"(position|queries)", (None, "embed")),
    (r"decoder/bos", (None,)),
    (r"tables/\w+/rows", ("rows", None)),
    (r"tables/\w+/(accumulator|last_step|appearances)", ("rows",)),
    (r"bias/(encoder|decoder)", (None, None)),
    (r"(step|count)", ()),
    (r"ns_coeffs", (None,)),  # of Muon
)

# logical axis -> mesh axes
LAYOUT: dict[str | None, tuple[str, ...]] = {
    "layers": (),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "hidden": ("tensor",),
    "expert": ("expert",),
    "codes": ("tensor",),
    "rows": ("data", "fsdp", "expert", "tensor"),
    "batch": ("data", "fsdp", "expert"),
    None: (),
}

_RULES = tuple((re.compile(rf"(?:^|.*/){pattern}$"), axes) for pattern, axes in PARAMETERS)


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as `decoder/stack/groups/..`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def logical_axes(name: str) -> tuple[str | None, ...]:
    """The logical axes of the leaf of this path.

    Raises:
        ValueError: no rule matches the path, or more than one does.
    """
    found = [axes for pattern, axes in _RULES if pattern.match(name)]
    if len(found) != 1:
        raise ValueError(
            f"{len(found)} sharding rules match '{name}', exactly one must: see PARAMETERS in parallel/sharding.py"
        )
    return ("layers", *found[0]) if "/stack/groups/" in name else found[0]


def partition_spec(name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Mesh axes of each dimension; an axis that does not divide its dimension is left out there."""
    axes = logical_axes(name)
    if len(axes) != len(shape):
        raise ValueError(f"the sharding rule of '{name}' has {len(axes)} axes, its shape {shape} has {len(shape)}")
    spec = []
    for size, axis in zip(shape, axes, strict=True):
        over = LAYOUT[axis]
        if not over or size % math.prod(mesh.shape[a] for a in over):
            spec.append(None)
        else:
            first, *others = over
            spec.append(over if others else first)
    return PartitionSpec(*spec)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedShardings for a tree of parameters or of a whole train state."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(path_name(path), leaf.shape, mesh)), tree
    )


MOST_UNSHARDED = 0.02
SMALL = 2**22  # numbers that every device may hold whatever share they are


def unsharded(tree: Any, mesh: Mesh) -> tuple[float, list[str]]:
    """The share of a tree's numbers that every device holds, and the names of these leaves, the largest first."""
    sizes = {path_name(path): (leaf.shape, leaf.size) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    whole = {}
    for name, (shape, size) in sizes.items():
        axes = [a for axis in partition_spec(name, shape, mesh) for a in (axis if isinstance(axis, tuple) else (axis,))]
        if math.prod(mesh.shape[axis] for axis in axes if axis) == 1:
            whole[name] = size
    share = sum(whole.values()) / max(1, sum(size for _, size in sizes.values()))
    return share, sorted(whole, key=lambda name: -whole[name])


def check_sharded(tree: Any, mesh: Mesh) -> None:
    """Raises InputError where fsdp is on and leaves more than 2 %, and not just a few, of the parameters on every device."""
    if mesh.shape["fsdp"] == 1:
        return
    share, names = unsharded(tree, mesh)
    if share > MOST_UNSHARDED and share * sum(leaf.size for leaf in jax.tree.leaves(tree)) > SMALL:
        raise InputError(
            f"mesh.fsdp {mesh.shape['fsdp']} leaves {share:.1%} of the parameters unsharded: {', '.join(names[:5])}"
            f"{' and others' if len(names) > 5 else ''}; "
            "make their sizes (model.d_model, rows of tables) multiples of the mesh axes, or mesh.fsdp smaller"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis of every batch array, over all data-parallel devices."""
    return NamedSharding(mesh, PartitionSpec(LAYOUT["batch"]))


def several_devices() -> AbstractMesh | None:
    """The mesh of `jax.set_mesh`, None without one and on a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.size < 2 else mesh


def in_place(params: Any) -> Any:
    """Parameters as they are on the mesh of `jax.set_mesh`, so that their gradients are summed straight into the same places."""
    mesh = several_devices()
    if mesh is None:
        return params
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.lax.with_sharding_constraint(leaf, partition_spec(path_name(path), leaf.shape, mesh)),
        params,
    )


def by_batch(x: Array) -> Array:
    """`x` [B,..] with B over the data axes of `jax.set_mesh` and all else whole: activations stay where their requests are.

    Without it the partitioner may split them as the weights are, and gather them whole at every product.
    """
    mesh = several_devices()
    if mesh is None or x.shape[0] % math.prod(mesh.shape[axis] for axis in LAYOUT["batch"]):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(LAYOUT["batch"]))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of a global batch, as one global array per field."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
