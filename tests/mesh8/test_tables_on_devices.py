"""Id tables that are spread over a mesh are the tables of one device: against NumPy, whatever the load, mesh and room."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_batch, tiny_model

from onerec_jax.config import MeshConfig, TablesConfig
from onerec_jax.data.schema import LABELS, Batch, Vocabulary
from onerec_jax.model import table_exchange, tables
from onerec_jax.model.tables import gather, init_tables, localise, lookup, stored_rows, stripe, this_step, update_tables
from onerec_jax.parallel.mesh import make_mesh, on_mesh
from onerec_jax.parallel.sharding import put_batch, shardings
from onerec_jax.plan.collectives import collectives
from onerec_jax.plan.program import read

MESHES = {
    "data 8": MeshConfig(),
    "data 2 x fsdp 4": MeshConfig(data=2, fsdp=4),
    "fsdp 2 x expert 2 x tensor 2": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
}
SHAPES = {"item": (20_000, 4), "author": (5000, 3), "user": (700, 2)}
VOCABULARY = Vocabulary(
    users=700, items=20_000, authors=5000, tags=7, user_features=(3, 4), labels=LABELS, codebook_sizes=(16,)
)
B, STEPS, RATE = 16, 3, 0.1
PATHWAYS = ("short", "positive")
CONFIG = tiny_model(lifelong_length=0)
PLAIN = TablesConfig()


@pytest.fixture(autouse=True)
def small_tables_are_spread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tables, "SPREAD_ROWS", 500)
    monkeypatch.setattr(tables, "STRIPES", 48)
    yield


def _owned_by(device: int, name: str) -> np.ndarray:
    """The ids whose rows one of eight devices owns."""
    rows = SHAPES[name][0]
    ids = np.arange(rows)
    return ids[np.asarray(stripe(ids, rows)) // (stored_rows(rows) // 8) == device]


def _with_ids(batch: Batch, draw) -> Batch:
    """The batch with ids of `draw(table, shape)`; padding stays what it is."""
    changed: dict[str, Any] = {}
    for pathway in PATHWAYS:
        events = getattr(batch, pathway)
        item = np.where(events.item >= 0, draw("item", events.item.shape), -1).astype(np.int32)
        author = draw("author", events.item.shape).astype(np.int32)
        changed[pathway] = dataclasses.replace(events, item=item, author=author)
    user = np.array(batch.user)
    user[:, 0] = draw("user", (B,))
    return dataclasses.replace(batch, user=user, **changed)


def _batches(load: str) -> list[Batch]:
    """One batch per step; only with `ids that come back` are those of the first and last steps not in between."""
    rng = np.random.default_rng(len(load))
    if load == "ids that come back":
        sets = [{name: rng.integers(0, rows, 9) for name, (rows, _) in SHAPES.items()} for _ in range(2)]
        return [
            _with_ids(
                random_batch(CONFIG, VOCABULARY, B, seed=i), lambda name, shape, i=i: rng.choice(sets[i][name], shape)
            )
            for i in (0, 0, 1, 1, 1, 0)
        ]
    few = {name: rng.integers(0, rows, 5) for name, (rows, _) in SHAPES.items()}
    draws = {
        "random ids": lambda name, shape: rng.integers(0, SHAPES[name][0], shape),
        "few ids": lambda name, shape: rng.choice(few[name], shape),
        "one id": lambda name, shape: np.full(shape, SHAPES[name][0] - 1),
        "all rows of one owner": lambda name, shape: rng.choice(_owned_by(3, name), shape),
        "nothing but padding": lambda name, shape: np.full(shape, -1 if name == "item" else 7),
    }
    return [_with_ids(random_batch(CONFIG, VOCABULARY, B, seed=step), draws[load]) for step in range(STEPS)]


LOADS = ("random ids", "few ids", "one id", "all rows of one owner", "nothing but padding")


def _weights(step: Any, shape: tuple[int, ...]) -> Any:
    """What each position adds to the loss: all differ, none is negative, so that no sum of gradients cancels out."""
    return 1.5 + jnp.cos(jnp.arange(np.prod(shape), dtype=jnp.float32) + step).reshape(shape)


def _step(settings: TablesConfig, state: Any, batch: Batch, step: Any) -> Any:
    now = this_step(0, step)
    local, touched = localise(batch, SHAPES, VOCABULARY, settings, touched_only=True)
    rows = gather(state, touched, settings, now)

    def loss(rows: dict[str, jax.Array]) -> jax.Array:
        total = jnp.sum(jnp.sin(3 * lookup(rows["user"], local.user[:, 0], jnp.float32)) * _weights(step, (B, 1)))
        for pathway in PATHWAYS:
            events = getattr(local, pathway)
            weights = _weights(step, events.item.shape)[..., None]
            for name in ("item", "author"):
                vectors = lookup(rows[name], getattr(events, name), jnp.float32)
                total += jnp.sum(jnp.where(events.item[..., None] >= 0, jnp.sin(3 * vectors) * weights, 0))
        return total

    return *update_tables(state, touched, jax.grad(loss)(rows), RATE, settings, now), rows


@functools.cache
def _compiled(mesh_name: str | None, most: int | None, settings: TablesConfig = PLAIN):
    """The step on a mesh (None: one device), with room for `most` ids between two devices: (mesh, places, compiled)."""
    config = MESHES[mesh_name] if mesh_name else MeshConfig()
    mesh = make_mesh(config, jax.devices() if mesh_name else jax.devices()[:1])
    shapes = jax.eval_shape(lambda: {"tables": init_tables(SHAPES, jax.random.key(0), settings)})
    places = shardings(shapes, mesh)["tables"]
    batch = put_batch(_batches("random ids")[0], mesh)
    run = jax.jit(
        functools.partial(_step, settings), in_shardings=(places, None, None), out_shardings=(places, None, None),
        donate_argnums=0,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        if most:
            patch.setattr(table_exchange, "room", lambda ids, owners: most)
        compiled = on_mesh(mesh, run.lower)(shapes["tables"], batch, jnp.int32(0)).compile()
    return mesh, places, compiled


def _fresh(places: Any, settings: TablesConfig = PLAIN) -> Any:
    return jax.device_put(jax.jit(lambda: init_tables(SHAPES, jax.random.key(0), settings))(), places)


def _by_id(state: Any) -> dict[str, dict[str, np.ndarray]]:
    """Rows and accumulators in the order of the ids."""
    place = {name: np.asarray(stripe(np.arange(rows), rows)) for name, (rows, _) in SHAPES.items()}
    return {
        name: {leaf: np.asarray(x.astype(jnp.float32))[place[name]] for leaf, x in table.items()}
        for name, table in state.items()
    }


def _reference(start: dict[str, dict[str, np.ndarray]], batches: list[Batch]) -> tuple[Any, Any]:
    """Dense tables after all steps in float64, and which rows were ever touched."""
    rows = {name: start[name]["rows"].astype(np.float64) for name in SHAPES}
    accumulator = {name: np.zeros(n) for name, (n, _) in SHAPES.items()}
    touched = {name: np.zeros(n, bool) for name, (n, _) in SHAPES.items()}
    for step, batch in enumerate(batches):
        gradient = {name: np.zeros(shape) for name, shape in SHAPES.items()}
        read = [("user", batch.user[:, 0], np.ones(B, bool))]
        for pathway in PATHWAYS:
            events = getattr(batch, pathway)
            read += [(name, getattr(events, name), events.item >= 0) for name in ("item", "author")]
        for name, ids, valid in read:
            weights = np.asarray(_weights(step, ids.shape), np.float64)[valid]
            np.add.at(gradient[name], ids[valid], 3 * np.cos(3 * rows[name][ids[valid]]) * weights[:, None])
            touched[name][ids[valid]] = True
        for name in SHAPES:
            accumulator[name] += (gradient[name] ** 2).mean(axis=1)
            rows[name] -= RATE * gradient[name] / (np.sqrt(accumulator[name])[:, None] + 1e-8)
    return {name: {"rows": rows[name], "accumulator": accumulator[name]} for name in SHAPES}, touched


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("most", [None, 1, 3])
@pytest.mark.parametrize("mesh", MESHES)
def test_touched_rows_equal_a_dense_reference_and_the_others_keep_every_bit(mesh: str, most: int | None, load: str):
    devices, places, compiled = _compiled(mesh, most)
    state, batches = _fresh(places), _batches(load)
    start = _by_id(state)
    expected, touched = _reference(start, batches)
    for step, batch in enumerate(batches):
        state, _, _ = compiled(state, put_batch(batch, devices), jnp.int32(step))
    found = _by_id(state)
    for name in SHAPES:
        for leaf in ("rows", "accumulator"):
            np.testing.assert_allclose(found[name][leaf], expected[name][leaf], rtol=1e-5, atol=1e-5)
            same = found[name][leaf][~touched[name]] == start[name][leaf][~touched[name]]
            assert same.all()


OPTIONS = TablesConfig(dtype="bfloat16", evict_after=2, admit_after=1)


@functools.cache
def _with_options(mesh: str | None) -> tuple[Any, list[dict[str, tuple[float, float]]]]:
    """Tables and metrics of six steps with all options on."""
    devices, places, compiled = _compiled(mesh, 2 if mesh else None, OPTIONS)
    state, lines = _fresh(places, OPTIONS), []
    for step, batch in enumerate(_batches("ids that come back")):
        state, metrics, _ = compiled(state, put_batch(batch, devices), jnp.int32(step))
        lines.append({name: (float(total), float(weight)) for name, (total, weight) in metrics.items()})
    return _by_id(state), lines


@pytest.mark.parametrize("mesh", MESHES)
def test_rounding_eviction_and_admission_are_those_of_one_device(mesh: str):
    (found, lines), (expected, expected_lines) = _with_options(mesh), _with_options(None)
    assert lines == expected_lines
    assert (
        lines[-1]["tables/item_evicted"][0] > 0
        and lines[0]["tables/item_waiting"][0] == lines[0]["tables/item_waiting"][1]
    )
    for name in SHAPES:
        for leaf in ("last_step", "appearances"):
            np.testing.assert_array_equal(found[name][leaf], expected[name][leaf])
        np.testing.assert_allclose(found[name]["accumulator"], expected[name]["accumulator"], rtol=0.05, atol=1e-5)
        rows = found[name]["rows"] == expected[name]["rows"]
        assert rows.mean() > 0.999  # sums in another order may round to the other neighbour
        np.testing.assert_allclose(found[name]["rows"], expected[name]["rows"], rtol=0.05, atol=1e-4)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_step_moves_what_it_touches_and_nothing_that_grows_with_the_table(mesh: str):
    devices, _, compiled = _compiled(mesh, None)
    found = collectives(read(compiled.as_text()), devices)
    split = tuple(axis for axis in devices.axis_names if devices.shape[axis] > 1)
    rows, width = SHAPES["item"]
    for collective in found:
        assert collective.bytes < 4 * rows * width / 8 / 8
        over_all = collective.kind in ("all-to-all", "all-reduce") and collective.axes == split
        assert over_all or (collective.kind == "all-gather" and collective.axes == ("tensor",)), collective
        assert collective.kind != "all-reduce" or collective.bytes == 4
    assert any(collective.kind == "all-to-all" for collective in found)
    memory = compiled.memory_analysis()
    own = sum(4 * stored_rows(rows) * (width + 1) for rows, width in SHAPES.values()) / 8
    assert memory.alias_size_in_bytes >= own > 2 * memory.temp_size_in_bytes, "the table is copied"


def test_a_device_has_room_for_what_even_ids_need():
    """Six standard deviations of a Poisson number: 1,024 devices with 1,024 others overflow once in many steps."""
    rng = np.random.default_rng(0)
    for ids, owners in ((1_000, 1024), (20_000, 1024), (400_000, 1024), (5_000, 8)):
        counts = rng.poisson(ids / owners, (200, owners))
        assert counts.max() <= table_exchange.room(ids, owners) <= ids
    assert table_exchange.room(400_000, 1024) < 2 * 400_000 / 1024
    assert table_exchange.room(3, 8) == 3


def test_where_the_devices_do_not_divide_the_rows_the_compiler_splits_the_step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tables, "STRIPES", 50)
    _compiled.cache_clear()
    devices, places, compiled = _compiled("data 8", None)
    _compiled.cache_clear()
    state, batches = _fresh(places), _batches("random ids")
    expected, _ = _reference(_by_id(state), batches)
    for step, batch in enumerate(batches):
        state, _, _ = compiled(state, put_batch(batch, devices), jnp.int32(step))
    for name, table in _by_id(state).items():
        np.testing.assert_allclose(table["rows"], expected[name]["rows"], rtol=1e-5, atol=1e-5)
