"""Meshes of eight devices, and where every leaf of every recipe's train state lives on them."""

from __future__ import annotations

import functools
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from onerec_jax.config import MeshConfig
from onerec_jax.errors import InputError
from onerec_jax.evaluate.board import load_board
from onerec_jax.model.onerec import build, planned_vocabulary
from onerec_jax.parallel import sharding
from onerec_jax.parallel.mesh import check_batch, data_parallel, make_mesh
from onerec_jax.parallel.sharding import (
    PARAMETERS,
    check_sharded,
    logical_axes,
    partition_spec,
    path_name,
    put_batch,
    shardings,
    unsharded,
)
from onerec_jax.recipe import CONFIGS, load_recipe
from onerec_jax.train.optimizer import make_optimizer
from onerec_jax.train.state import TrainState, init_state

RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
ROWS = ("SASRec, full softmax", "HSTU, full softmax", "TIGER")  # of Beauty's board
MESHES = {
    "data 8": MeshConfig(),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "data 2 x fsdp 2 x tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp 2 x expert 2 x tensor 2": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
}


@functools.cache
def _shapes(recipe_name: str, optimizer: str, *changes: str) -> TrainState:
    """The whole train state of a recipe or of a row of Beauty's board, as shapes."""
    row = load_board("beauty").rows[recipe_name] if recipe_name in ROWS else ()
    recipe = load_recipe("beauty_small" if row else recipe_name, [*row, f"train.optimizer={optimizer}", *changes])
    model = build(recipe.model, planned_vocabulary(recipe))
    return jax.eval_shape(lambda: init_state(model, make_optimizer(recipe.train), 0))


def _leaves(tree) -> dict[str, jax.ShapeDtypeStruct]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _bytes_per_device(tree, places) -> int:
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True)
    return sum(math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, place in pairs)


def test_there_are_eight_devices():
    assert len(jax.devices()) == 8


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("recipe", [*RECIPES, *ROWS])
def test_every_leaf_of_a_recipes_train_state_matches_one_rule_and_fits_every_mesh(recipe: str, optimizer: str):
    shapes = _shapes(recipe, optimizer)
    for name, leaf in _leaves(shapes).items():
        matching = [axes for pattern, axes in PARAMETERS if re.fullmatch(f"(.*/)?{pattern}", name)]
        assert len(matching) == 1, name
        assert len(matching[0]) + ("/stack/groups/" in name) == len(leaf.shape), name
    for config in MESHES.values():
        mesh = make_mesh(config)
        for (name, leaf), place in zip(_leaves(shapes).items(), jax.tree.leaves(shardings(shapes, mesh)), strict=True):
            used = [axis for axes in place.spec if axes for axis in ((axes,) if isinstance(axes, str) else axes)]
            assert len(used) == len(set(used)), name
            assert math.prod(place.shard_shape(leaf.shape)) * math.prod(mesh.shape[a] for a in used) == leaf.size, name


def _split_over(axes: str | tuple[str, ...] | None, mesh) -> list[str]:
    named = (axes,) if isinstance(axes, str) else axes or ()
    return [axis for axis in named if mesh.shape[axis] > 1]


def _placed(recipe_name: str) -> str:
    """Where every parameter, table row and bias of a recipe lives on each mesh that fits eight devices, as text."""
    state = _shapes(recipe_name, "adamw")
    leaves = _leaves({"params": state.params, "tables": state.tables, "bias": state.bias})
    places = {name: shardings(leaves, make_mesh(mesh)) for name, mesh in MESHES.items()}
    lines = [f"# {recipe_name}: the mesh axes of each dimension, - for none"]
    for leaf_name, leaf in leaves.items():
        lines.append(f"{leaf_name} {'x'.join(map(str, leaf.shape)) or 'scalar'}")
        for mesh, found in places.items():
            size = found[leaf_name].mesh.shape
            axes = [
                [a for a in ((over,) if isinstance(over, str) else over or ()) if size[a] > 1]
                for over in found[leaf_name].spec
            ]
            lines.append(f"    {mesh}: {' '.join('+'.join(a) or '-' for a in axes)}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("recipe", RECIPES)
def test_where_every_parameter_lives_is_as_recorded(recipe: str, golden):
    golden(f"sharding/{recipe}.txt", _placed(recipe))


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.startswith("onerec")])
@pytest.mark.parametrize("mesh", [name for name, mesh in MESHES.items() if mesh.fsdp > 1])
def test_at_most_two_percent_of_the_parameters_are_whole_on_every_device(recipe: str, mesh: str):
    state = _shapes(recipe, "adamw")
    tree, devices = {"params": state.params, "tables": state.tables}, make_mesh(MESHES[mesh])
    share, names = unsharded(tree, devices)
    assert share <= 0.02, names[:10]
    check_sharded(tree, devices)


def test_what_fsdp_cannot_split_is_listed_before_training(monkeypatch: pytest.MonkeyPatch):
    mesh = make_mesh(MESHES["fsdp 8"])
    tree = {
        "params": {
            "decoder": {"position": np.zeros((3, 12)), "bos": np.zeros(40)},
            "encoder": {"position": np.zeros((9, 8))},
        }
    }
    share, names = unsharded(tree, mesh)
    assert share == pytest.approx(76 / 148) and names == ["params/decoder/bos", "params/decoder/position"]
    check_sharded(tree, mesh)  # too few to matter
    monkeypatch.setattr(sharding, "SMALL", 10)
    with pytest.raises(
        InputError, match=r"mesh.fsdp 8 leaves 51.4% .* unsharded: params/decoder/bos, params/decoder/pos"
    ):
        check_sharded(tree, mesh)
    check_sharded(tree, make_mesh(MESHES["data 8"]))


def test_every_rule_is_that_of_some_leaf():
    names = [
        name for recipe in [*RECIPES, *ROWS] for kind in ("adamw", "muon") for name in _leaves(_shapes(recipe, kind))
    ]
    names += _leaves(_shapes("quickstart", "adamw", "model.moe.shared=1"))
    unused = [p for p, _ in PARAMETERS if not any(re.fullmatch(f"(.*/)?{p}", name) for name in names)]
    assert unused == []


@pytest.mark.parametrize(
    ("mesh", "most"),
    [("fsdp 8", 1.01), ("data 2 x fsdp 2 x tensor 2", 1.01), ("fsdp 2 x expert 2 x tensor 2", 1.15)],
)
def test_the_largest_recipe_is_split_over_all_axes_but_data_and_its_tables_over_all(mesh: str, most: float):
    """`most`, in even shares: norms, biases and routers are replicated, and the expert axis splits experts only."""
    shapes = _shapes("onerec_2.633b", "adamw")
    devices = make_mesh(MESHES[mesh])

    def size(tree) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    of_tables = size(shapes.tables) / devices.size
    assert _bytes_per_device(shapes.tables, shardings(shapes, devices).tables) == of_tables
    share = of_tables + (size(shapes) - size(shapes.tables)) * devices.shape["data"] / devices.size
    assert share <= _bytes_per_device(shapes, shardings(shapes, devices)) < most * share


def test_the_axes_of_an_expert_follow_from_the_two_tables():
    mesh = make_mesh(MESHES["fsdp 2 x expert 2 x tensor 2"])
    spec = partition_spec("params/decoder/stack/groups/moe/up", (3, 4, 32, 16), mesh)
    assert spec == PartitionSpec(None, "expert", "fsdp", "tensor")
    odd = partition_spec("params/decoder/stack/groups/moe/up", (3, 5, 32, 16), mesh)
    assert odd == PartitionSpec(None, None, "fsdp", "tensor")
    everyone = ("data", "fsdp", "expert", "tensor")
    assert partition_spec("tables/item/rows", (80, 4), mesh) == PartitionSpec(everyone, None)


def test_a_leaf_without_a_rule_or_with_two_or_of_another_rank_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="0 sharding rules match 'params/decoder/surprise'"):
        logical_axes("params/decoder/surprise")
    with pytest.raises(ValueError, match="has 3 axes, its shape"):
        partition_spec("params/decoder/moe/up", (4, 8), make_mesh(MeshConfig()))
    monkeypatch.setattr(sharding, "_RULES", (*sharding._RULES, (re.compile(r".*router$"), ("embed", None))))
    with pytest.raises(ValueError, match="2 sharding rules match 'params/decoder/moe/router'"):
        logical_axes("params/decoder/moe/router")


@pytest.mark.parametrize(
    ("axes", "needed"),
    [({"fsdp": 3}, 6), ({"data": 4}, 4), ({"data": 2, "fsdp": 2, "tensor": 4}, 16), ({"expert": 16}, 16)],
)
def test_a_mesh_that_is_not_the_devices_says_how_many_it_needs(axes: dict[str, int], needed: int):
    with pytest.raises(InputError, match=f"needs {needed} devices but 8 are there"):
        make_mesh(MeshConfig(**axes))


def test_the_data_axis_takes_the_devices_that_the_others_leave():
    assert dict(make_mesh(MeshConfig(fsdp=2, tensor=2)).shape) == {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}
    assert dict(make_mesh(MeshConfig(tensor=2), jax.devices()[:2]).shape)["data"] == 1


def test_a_batch_that_does_not_divide_over_the_data_axes_is_refused():
    mesh = make_mesh(MESHES["data 2 x fsdp 2 x tensor 2"])
    assert data_parallel(mesh) == 4
    check_batch(mesh, 16, 2)
    with pytest.raises(InputError, match=r"train.batch_size 16 in 8 micro-batches .* use a multiple of 32"):
        check_batch(mesh, 16, 8)
    with pytest.raises(InputError, match=r"train.batch_size 6 .* use a multiple of 4"):
        check_batch(mesh, 6, 1)


def test_each_device_gets_its_own_rows_of_the_batch():
    rows = np.arange(24).reshape(8, 3)
    placed = put_batch({"rows": rows}, make_mesh(MESHES["data 2 x fsdp 2 x tensor 2"]))["rows"]
    starts = sorted(shard.index[0].start or 0 for shard in placed.addressable_shards)
    assert starts == [0, 0, 2, 2, 4, 4, 6, 6]
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(shard.data, rows[shard.index])
