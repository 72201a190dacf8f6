"""Canonical tables that break the contract are refused in one sentence; those that keep it pass unchanged."""

from __future__ import annotations

import dataclasses

import pyarrow as pa
import pytest

from onerec_jax.data.schema import Tables
from onerec_jax.data.validate import validate
from onerec_jax.errors import InputError


def good() -> Tables:
    return Tables(
        events=pa.table(
            {
                "user_id": ["a", "a", "b"],
                "item_id": [7, 8, 7],
                "timestamp_ms": [10, 20, 15],
                "playtime_ms": pa.array([5, None, 3], pa.int64()),
                "like": [True, False, False],
            }
        ),
        items=pa.table(
            {
                "item_id": pa.array([7, 8], pa.int32()),
                "tags": [["x"], []],
                "embedding": pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32(), 2)),
            }
        ),
        users=pa.table({"user_id": ["a", "b", "c"], "age": ["18", None, "25"]}),
    )


def with_column(table: pa.Table, name: str, values: object) -> pa.Table:
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, pa.array(values))
    return table.append_column(name, pa.array(values))


def test_tables_that_keep_the_contract_come_back_unchanged() -> None:
    tables = good()
    assert validate(tables, "log") is tables


@pytest.mark.parametrize(
    ("part", "column", "values", "sentence"),
    [
        ("events", "timestamp_ms", [10, -20, 15], "log: events: column 'timestamp_ms' row 1 is -20, expected integer"),
        ("events", "playtime_ms", [1, 2, -3], "log: events: column 'playtime_ms' row 2 is -3, expected integer"),
        (
            "events",
            "timestamp_ms",
            [1.0, 2.0, 3.0],
            "column 'timestamp_ms' is of type double .row 0 is 1.0., expected int",
        ),
        ("events", "like", [1, 0, 0], "column 'like' is of type int64 .row 0 is 1., expected true or false"),
        ("events", "like", [True, None, False], "column 'like' row 1 is null, expected true or false"),
        ("events", "user_id", ["a", "b", None], "log: events: column 'user_id' row 2 is null"),
        (
            "events",
            "user_id",
            ["a", "z", "b"],
            "log: events: column 'user_id' row 1 is 'z', expected an id of the users",
        ),
        ("events", "user_id", [1, 2, 3], "column 'user_id' is of type int64, expected string as in the users table"),
        ("events", "item_id", [7, 8, 9], "log: events: column 'item_id' row 2 is 9, expected an id of the items table"),
        ("items", "item_id", [7, 7], "log: items: column 'item_id' row 1 repeats 7, expected unique ids"),
        ("items", "tags", ["x", "y"], "log: items: column 'tags' is of type string .row 0 is 'x'., expected list"),
        (
            "items",
            "embedding",
            [[1.0], [2.0]],
            "column 'embedding' is of type list<item: double> .*expected fixed-size",
        ),
        ("users", "user_id", ["a", "b", "a"], "log: users: column 'user_id' row 2 repeats 'a', expected unique ids"),
        (
            "users",
            "age",
            [[1], [2], [3]],
            "log: users: column 'age' is of type list<item: int64>, expected a string, number",
        ),
    ],
)
def test_a_broken_column_is_named_with_its_row_and_what_was_expected(
    part: str, column: str, values: object, sentence: str
) -> None:
    tables = good()
    broken = dataclasses.replace(tables, **{part: with_column(getattr(tables, part), column, values)})
    with pytest.raises(InputError, match=sentence):
        validate(broken, "log")


@pytest.mark.parametrize(("part", "column"), [("events", "timestamp_ms"), ("items", "item_id"), ("users", "user_id")])
def test_a_missing_required_column_is_named_with_those_that_are_there(part: str, column: str) -> None:
    tables = good()
    table = getattr(tables, part).drop_columns([column])
    with pytest.raises(InputError, match=f"log: {part}: column '{column}' is missing, .*; columns there: ") as caught:
        validate(dataclasses.replace(tables, **{part: table}), "log")
    assert table.column_names[0] in str(caught.value)


def test_an_embedding_that_is_not_finite_is_found_at_its_row_and_position() -> None:
    tables = good()
    vectors = pa.array([[1.0, 2.0], [3.0, float("nan")]], pa.list_(pa.float32(), 2))
    with pytest.raises(InputError, match="column 'embedding' row 1 has nan at position 1, expected finite numbers"):
        validate(dataclasses.replace(tables, items=with_column(tables.items, "embedding", vectors)), "log")


def test_a_log_without_events_is_refused() -> None:
    tables = good()
    with pytest.raises(InputError, match="log: events: no rows, expected at least one event"):
        validate(dataclasses.replace(tables, events=tables.events.slice(0, 0)), "log")
