from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import VOCABULARY, random_batch, tiny_model

from onerec_jax.config import TablesConfig
from onerec_jax.model import tables as spread
from onerec_jax.model.onerec import build, count_parameters
from onerec_jax.model.table_rows import adagrad_rows, from_step_zero, round_stochastically, update_rows
from onerec_jax.model.tables import (
    bucket_rows,
    gather,
    init_tables,
    localise,
    stored_rows,
    stripe,
    table_shapes,
    this_step,
    update_tables,
)  # fmt: skip


def test_touched_rows_equal_a_dense_reference_and_the_others_keep_every_bit():
    config, rate = tiny_model(), 0.1
    shapes = {"item": (1000, 4), "author": (5000, 3), "user": (700, 2)}
    tables = init_tables(shapes, jax.random.key(0))
    before = jax.tree.map(np.asarray, tables)
    rows = {name: t["rows"].astype(np.float64) for name, t in before.items()}
    accumulator = {name: np.zeros(shape[0]) for name, shape in shapes.items()}
    touched_ever = {name: np.zeros(shape[0], bool) for name, shape in shapes.items()}
    for step in range(3):
        batch = random_batch(config, VOCABULARY, seed=step)
        local, touched = localise(batch, shapes, VOCABULARY, touched_only=True)
        assert all(ids is not None for ids in touched.values())
        gathered = gather(tables, touched)

        def loss(gathered, local=local):
            used = [
                jnp.where(e.item[..., None] >= 0, gathered["item"][e.item], 0) for e in (local.short, local.positive)
            ]
            return sum(jnp.sum(jnp.sin(u * 3)) for u in used) + jnp.sum(gathered["user"][local.user[:, 0]] ** 3)

        tables, _ = update_tables(tables, touched, jax.grad(loss)(gathered), rate)
        dense = {name: np.zeros(shape) for name, shape in shapes.items()}
        for events in (batch.short, batch.positive):
            ids = events.item[events.item >= 0]
            np.add.at(dense["item"], ids, 3 * np.cos(3 * rows["item"][ids]))
        np.add.at(dense["user"], batch.user[:, 0], 3 * rows["user"][batch.user[:, 0]] ** 2)
        for name in shapes:
            accumulator[name] += (dense[name] ** 2).mean(axis=1)
            rows[name] -= rate * dense[name] / (np.sqrt(accumulator[name])[:, None] + 1e-8)
            touched_ever[name] |= dense[name].any(axis=1)
    for name in shapes:
        np.testing.assert_allclose(tables[name]["rows"], rows[name], rtol=2e-4, atol=1e-5)
        same = np.asarray(tables[name]["rows"])[~touched_ever[name]] == before[name]["rows"][~touched_ever[name]]
        assert same.all()


def test_the_whole_table_is_used_where_that_is_smaller_with_the_same_result():
    table = {"rows": jnp.arange(12.0).reshape(6, 2), "accumulator": jnp.zeros(6)}
    ids = jnp.asarray([1, 4, 6])  # 6 fills up
    gradient = jnp.asarray([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]])
    dense = jnp.zeros((6, 2)).at[ids].set(gradient, mode="drop")
    one, other = adagrad_rows(table, ids, gradient, 0.1), adagrad_rows(table, None, dense, 0.1)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), one, other)


def test_local_ids_read_the_rows_of_the_ids_they_stand_for():
    config = tiny_model()
    batch = random_batch(config)
    shapes = table_shapes(config, VOCABULARY)
    tables = init_tables(shapes, jax.random.key(1))
    for touched_only in (False, True):
        local, touched = localise(batch, shapes, VOCABULARY, touched_only=touched_only)
        rows = gather(tables, touched)
        valid = batch.lifelong.item >= 0
        found = np.asarray(rows["item"])[np.asarray(local.lifelong.item)[valid]]
        np.testing.assert_array_equal(found, np.asarray(tables["item"]["rows"])[batch.lifelong.item[valid]])
        assert (np.asarray(local.lifelong.item)[~valid] == -1).all()


def test_hash_buckets_spread_ids_evenly_and_leave_them_alone_when_each_has_a_row():
    ids = jnp.arange(100_000, dtype=jnp.int32)
    assert (bucket_rows(ids, 100_000, 100_000) == ids).all()
    counts = np.bincount(np.asarray(bucket_rows(ids, 64, 100_000)), minlength=64)
    assert counts.min() > 0.8 * counts.mean() and counts.max() < 1.2 * counts.mean()


@pytest.mark.parametrize("rows", [65_536, 100_000, 300_001])
def test_stripes_are_a_bijection_that_deals_any_range_of_ids_out_evenly(rows: int):
    stored = stored_rows(rows)
    assert rows <= stored < rows + spread.STRIPES and stored % spread.STRIPES == 0
    place = np.asarray(stripe(jnp.arange(rows, dtype=jnp.int32), rows))
    assert len(np.unique(place)) == rows and place.min() >= 0 and place.max() < stored
    for devices in (2, 8, 12, 256, 768, 1024):
        for first, last in ((0, 12_288), (5_000, 35_720)):
            owned = np.bincount(place[first:last] // (stored // devices), minlength=devices)
            assert owned.max() - owned.min() <= spread.STRIPES // devices
            assert owned.max() <= 1.5 * owned.mean()


def test_stripes_of_the_largest_table_stay_within_int32():
    rows = 2**31 - 2 * spread.STRIPES
    ids = jnp.asarray([0, 1, spread.STRIPES - 1, spread.STRIPES, rows - 1], jnp.int32)
    exact = [int(r) % spread.STRIPES * (stored_rows(rows) // spread.STRIPES) + int(r) // spread.STRIPES for r in ids]
    assert np.asarray(stripe(ids, rows)).tolist() == exact and max(exact) < 2**31


def test_a_small_table_is_stored_as_it_is_and_padding_is_no_parameter(monkeypatch: pytest.MonkeyPatch):
    assert stored_rows(65_535) == 65_535 and stripe(7, 65_535) == 7
    model = build(tiny_model(), VOCABULARY)
    before = count_parameters(model)
    monkeypatch.setattr(spread, "SPREAD_ROWS", 64)
    assert count_parameters(model) == before
    assert jax.eval_shape(lambda: model.init(0)[1])["item"]["rows"].shape[0] == spread.STRIPES


@pytest.mark.parametrize("touched_only", [False, True])
def test_a_spread_table_on_one_device_is_read_by_touched_rows(monkeypatch: pytest.MonkeyPatch, touched_only: bool):
    monkeypatch.setattr(spread, "SPREAD_ROWS", 1_000)
    shapes, batch = {"item": (4_000, 4)}, random_batch(tiny_model())
    tables = init_tables(shapes, jax.random.key(1))
    local, touched = localise(batch, shapes, VOCABULARY, touched_only=touched_only)
    rows, valid = gather(tables, touched)["item"], batch.lifelong.item >= 0
    assert len(rows) < 200
    place = np.asarray(stripe(batch.lifelong.item[valid], 4_000))
    assert (place != batch.lifelong.item[valid]).any()
    found = np.asarray(rows)[np.asarray(local.lifelong.item)[valid]]
    np.testing.assert_array_equal(found, np.asarray(tables["item"]["rows"])[place])


@pytest.mark.parametrize(("evict", "admit"), [(2, 0), (0, 2), (2, 2), (1, 1)])
def test_eviction_and_admission_are_those_of_a_restatement_in_numpy(evict: int, admit: int):
    rows, width, rate, padded = 12, 3, 0.1, 6
    settings = TablesConfig(evict_after=evict, admit_after=admit)
    tables = init_tables({"item": (rows, width)}, jax.random.key(0), settings)
    row, accumulator = np.asarray(tables["item"]["rows"], np.float64), np.zeros(rows)
    last, count, fresh = np.full(rows, -1), np.zeros(rows, int), {}
    rng, evictions, again = np.random.default_rng(evict), 0, 0
    step_of = jax.jit(
        lambda tables, found, gradient, step: (
            gather(tables, found, settings, this_step(3, step)),
            *update_tables(tables, found, gradient, rate, settings, this_step(3, step)),
        )
    )
    for step in range(40):
        ids = np.sort(rng.choice(rows, rng.integers(1, 5), replace=False))
        touched = {"item": jnp.asarray(np.concatenate([ids, np.full(padded - len(ids), rows)]), jnp.int32)}
        some = rng.random((padded, 1)) < 0.8  # a gradient of zero touches as well
        gradient = rng.normal(size=(padded, width)).astype(np.float32) * some
        read, tables, metrics = step_of(tables, touched, {"item": gradient}, jnp.int32(step))
        evicted = [r for r in ids if evict and last[r] >= 0 and step - last[r] > evict]
        for r in evicted:
            seen = np.asarray(tables["item"]["rows"])[r] if admit else np.asarray(read["item"])[ids.tolist().index(r)]
            assert r in fresh or (np.abs(seen - row[r]).max() > 1e-4 and np.abs(seen).max() < 0.1)
            again += r in fresh
            np.testing.assert_array_equal(fresh.setdefault(r, seen), seen)
            row[r], accumulator[r], count[r] = seen, 0, 0
        waiting = [r for r in ids if count[r] < admit]
        for n, r in enumerate(ids):
            np.testing.assert_allclose(read["item"][n], 0 if r in waiting else row[r], atol=1e-6)
            if r not in waiting:
                accumulator[r] += (gradient[n].astype(np.float64) ** 2).mean()
                row[r] -= rate * gradient[n] / (np.sqrt(accumulator[r]) + 1e-8)
            count[r], last[r] = min(admit, count[r] + 1), step
        np.testing.assert_allclose(tables["item"]["rows"], row, atol=1e-5)
        np.testing.assert_allclose(tables["item"]["accumulator"], accumulator, rtol=1e-5)
        if evict:
            assert float(metrics["tables/item_evicted"][0]) == len(evicted)
        if admit:
            assert tuple(map(float, metrics["tables/item_waiting"])) == (len(waiting), len(ids))
        assert len(metrics) == bool(evict) + bool(admit)
        evictions += len(evicted)
    assert not evict or (evictions > 5 and again)


def test_padding_touches_no_row_where_touching_counts():
    config, shapes = tiny_model(), {"item": (100, 4)}
    batch = random_batch(config)
    some = set(np.concatenate([e.item[e.item >= 0] for e in (batch.short, batch.positive, batch.lifelong)]).tolist())
    for settings in (TablesConfig(evict_after=1), TablesConfig(admit_after=1), TablesConfig(dtype="bfloat16")):
        for touched_only in (False, True):
            _, touched = localise(batch, shapes, VOCABULARY, settings, touched_only=touched_only)
            assert set(np.asarray(touched["item"]).tolist()) == some | {100}


def test_outside_of_training_a_row_is_read_as_it_was_left_and_not_before_it_is_admitted():
    settings = TablesConfig(evict_after=1, admit_after=2)
    tables = init_tables({"item": (4, 2)}, jax.random.key(0), settings)
    tables["item"] |= {"last_step": jnp.asarray([-1, 0, 0, 9]), "appearances": jnp.asarray([0, 1, 2, 2], jnp.uint8)}
    found = gather(tables, {"item": jnp.arange(4)}, settings)["item"]
    assert not np.asarray(found[:2]).any()
    np.testing.assert_array_equal(found[2:], tables["item"]["rows"][2:])


def test_tables_of_another_run_count_as_touched_when_a_run_begins():
    settings = TablesConfig(evict_after=3)
    tables = init_tables({"item": (3, 2)}, jax.random.key(0), settings)
    tables["item"]["last_step"] = jnp.asarray([-1, 500, 0])
    assert np.asarray(from_step_zero(tables)["item"]["last_step"]).tolist() == [-1, 0, 0]
    plain = init_tables({"item": (3, 2)}, jax.random.key(0))
    assert from_step_zero(plain)["item"] is plain["item"]


def test_stochastic_rounding_gives_a_neighbour_and_is_right_in_the_mean():
    x = jnp.asarray([1.0, 1.003, -1.003, 0.1, -3e-5, 0.0, 255.3], jnp.float32)
    bits = jax.random.bits(jax.random.key(0), (40_000, len(x)), jnp.uint16)
    found = np.asarray(jax.vmap(lambda b: round_stochastically(x, b))(bits), np.float64)
    for n, value in enumerate(np.asarray(x, np.float64)):
        kinds = np.unique(found[:, n])
        spacing = 2.0 ** (np.floor(np.log2(abs(value))) - 7) if value else 0
        assert len(kinds) == (1 if value in (0.0, 1.0) else 2) and np.abs(kinds - value).max() <= spacing
        assert abs(found[:, n].mean() - value) <= 4 * spacing * 0.5 / np.sqrt(40_000)
    special = round_stochastically(jnp.asarray([np.inf, -np.inf, np.nan]), jnp.full(3, 65_535, jnp.uint16))
    assert np.isposinf(special[0]) and np.isneginf(special[1]) and np.isnan(special[2])


def test_many_small_updates_of_bfloat16_rows_add_up_as_in_float32():
    """Each is 1/50 of the spacing of bfloat16 at 1, which rounding to nearest would lose altogether."""
    rows, width, steps = 64, 16, 200
    settings = TablesConfig(dtype="bfloat16")
    table = {"rows": jnp.ones((rows, width), jnp.bfloat16), "accumulator": jnp.full(rows, 1e6)}
    ids, small = jnp.arange(rows), 2.0**-7 / 50

    def step(table, n):
        gradient = jnp.full((rows, width), -1.0)
        return update_rows(table, ids, ids, gradient, small * 1e3, settings, this_step(0, n))[0], None

    end = jax.jit(lambda table: jax.lax.scan(step, table, jnp.arange(steps))[0])(table)
    moved = np.asarray(end["rows"], np.float64) - 1
    assert end["rows"].dtype == jnp.bfloat16 and len(np.unique(moved)) > 3
    assert moved.mean() == pytest.approx(steps * small, rel=0.05)
    same = jax.jit(lambda table: jax.lax.scan(step, table, jnp.arange(steps))[0])(table)
    np.testing.assert_array_equal(end["rows"], same["rows"])


def test_options_of_tables_are_refused_where_there_is_no_table():
    none = {"item_input": "sid", "user_id": False, "event_features": []}
    tiny_model(**none)
    with pytest.raises(ValueError, match=r"model.tables is of id tables and this model has none"):
        tiny_model(**none, tables={"evict_after": 5})


def test_a_table_that_no_pathway_reads_stays_as_it_is():
    batch = random_batch(tiny_model(short_length=0, positive_length=0, lifelong_length=0))
    tables = init_tables({"item": (100, 4), "user": (50, 4)}, jax.random.key(0))
    _, touched = localise(batch, {"item": (100, 4), "user": (50, 4)}, VOCABULARY, touched_only=True)
    new, _ = update_tables(tables, touched, gather(tables, touched), 0.1)
    assert new["item"] is tables["item"] and (new["user"]["rows"] != tables["user"]["rows"]).any()
