"""The plans in tests/golden/plans: what the issue of scale asks of them, and that they are of today's recipes."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import jax
import pytest

from onerec_jax.parallel.mesh import make_mesh
from onerec_jax.plan.compiled import for_tpu, model_of, tpu_devices
from onerec_jax.plan.plan import make_plan
from onerec_jax.train.optimizer import make_optimizer
from onerec_jax.train.state import abstract_state

ROOT = Path(__file__).parent.parent.parent
_spec = importlib.util.spec_from_file_location("aot_plan", ROOT / "tools" / "aot_plan.py")
assert _spec is not None and _spec.loader is not None
aot_plan = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(aot_plan)
NAMES = sorted(aot_plan.PLANS)


def _kept(name: str) -> dict[str, Any]:
    return json.loads((aot_plan.FOLDER / f"{name}.json").read_text())


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.fixture(scope="module", params=NAMES)
def planned(request):
    """A plan's name, its recipe, and the abstract state of today's code on its slice."""
    topology = aot_plan.PLANS[request.param][1]
    loaded = for_tpu(aot_plan.recipe_of(request.param))
    mesh = make_mesh(loaded.mesh, tpu_devices(topology))
    return request.param, loaded, abstract_state(model_of(loaded), make_optimizer(loaded.train), mesh)


def test_it_fits_and_is_of_todays_recipe(planned):
    name, recipe, state = planned
    kept = _kept(name)
    assert kept["fits"] and kept["memory"]["total"] <= kept["memory"]["usable"]
    again = f"the recipe has changed since: python tools/aot_plan.py {name}"
    assert kept["memory"]["parameters"] == _bytes((state.params, state.bias)), again
    assert kept["memory"]["tables"] == _bytes(state.tables), again
    if kept["step"] == "train":
        assert kept["memory"]["optimizer"] == _bytes(state.optimizer), again
    assert kept["remat"] == recipe.model.remat, again


def test_nothing_moves_a_whole_table_or_all_experts(planned):
    name, recipe, state = planned
    # all-to-all moves tokens to experts and rows to who reads them: no device gets what all others hold
    largest = max(c["bytes"] for c in _kept(name)["collectives"] if c["kind"] != "all-to-all")
    for table in state.tables.values():
        if table["rows"].size > 2**24:
            assert largest < table["rows"].size * table["rows"].dtype.itemsize
    moe = recipe.model.moe
    if moe.experts and recipe.mesh.expert > 1:
        assert largest < 2 * moe.experts * recipe.model.d_model * moe.hidden, "one matrix of all experts of one block"


def test_the_flops_of_a_chip_are_the_same_on_64_and_on_1024():
    few, many = _kept("0.935b_v5p_4x4x4"), _kept("0.935b_v5p_8x8x16")
    assert (few["chips"], many["chips"]) == (64, 1024) and few["batch"] * 16 == many["batch"]
    for count in ("flops", "compiler_flops"):
        assert abs(many[count] / few[count] - 1) < 0.02
    assert abs(many["traffic"] / few["traffic"] - 1) < 0.1


def test_the_launch_page_shows_them():
    assert aot_plan.page_with(aot_plan.summary()) == aot_plan.PAGE.read_text()


@pytest.fixture(scope="module")
def quickstart():
    _, topology, each, step, _ = aot_plan.PLANS["quickstart_v5e_2x2"]
    return make_plan(aot_plan.recipe_of("quickstart_v5e_2x2"), topology, 4 * each, step)


def test_a_plan_made_now_is_the_one_kept(quickstart):
    made, kept = quickstart.to_json(), _kept("quickstart_v5e_2x2")
    made, kept = json.loads(json.dumps(made)), kept
    if made["compiled_by"] == kept["compiled_by"]:
        assert made == kept, "what a step costs has changed: python tools/aot_plan.py quickstart"
    own = (
        "memory",
        "collectives",
        "traffic",
        "memory_s",
        "network_s",
        "compiler_flops",
        "seconds",
        "mfu",
        "compiled_by",
    )
    assert {k: v for k, v in made.items() if k not in own} == {k: v for k, v in kept.items() if k not in own}
    assert abs(made["traffic"] / kept["traffic"] - 1) < 0.5


def test_its_parts_add_up(quickstart):
    memory = quickstart.memory
    parts = (
        memory.parameters,
        memory.optimizer,
        memory.tables,
        memory.batch,
        memory.activations,
        memory.temporaries,
        memory.code,
    )
    assert memory.total == sum(parts) and all(part > 0 for part in parts)
    assert quickstart.seconds == max(quickstart.compute_s, quickstart.memory_s, quickstart.network_s)
    assert 0 < quickstart.mfu < 1
    assert {c.kind for c in quickstart.collectives} >= {"all-gather", "reduce-scatter"}
    assert all(c.axes == ("fsdp",) and c.devices <= 4 for c in quickstart.collectives)
