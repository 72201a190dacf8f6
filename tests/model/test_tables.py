from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from tiny import VOCABULARY, random_batch, tiny_model

from onerec_jax.model.tables import (
    adagrad_rows,
    bucket_rows,
    gather,
    init_tables,
    localise,
    table_shapes,
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
