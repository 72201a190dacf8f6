"""Small canonical logs and datasets made by hand; fixtures return functions so that property tests can call them."""

import numpy as np
import pyarrow as pa
import pytest

from onerec_jax.config import DataConfig
from onerec_jax.data.prepare import write_dataset
from onerec_jax.data.schema import Tables
from onerec_jax.data.store import Dataset


@pytest.fixture(scope="session")
def data_config():
    """DataConfig from keyword settings."""

    def make(**settings) -> DataConfig:
        return DataConfig.model_validate({"source": {"kind": "simulator"}, **settings})

    return make


@pytest.fixture(scope="session")
def noise_tables():
    """A random log whose timestamps tie often: seconds 0 to `span` as milliseconds since 2022."""

    def make(
        seed: int = 0,
        users: int = 6,
        items: int = 9,
        events: int = 80,
        span: int = 60,
        labels: tuple[str, ...] = ("click", "long_view", "like"),
        embedding: int = 3,
    ) -> Tables:
        rng = np.random.default_rng(seed)
        columns = {
            "user_id": pa.array([f"u{row}" for row in rng.integers(0, users, events)]),
            "item_id": pa.array(100 + rng.integers(0, items, events)),
            "timestamp_ms": pa.array(1_640_995_200_000 + 1000 * rng.integers(0, span, events)),
            "playtime_ms": pa.array(rng.integers(0, 30_000, events), mask=rng.random(events) < 0.2),
            "duration_ms": pa.array(rng.integers(1, 30_000, events), mask=rng.random(events) < 0.5),
            "request_id": pa.array(rng.integers(0, 3, events)),
        }
        columns |= {label: pa.array(rng.random(events) < 0.3) for label in labels}
        item_columns = {
            "item_id": pa.array(100 + np.arange(items)),
            "author_id": pa.array([f"a{row % 4}" if row % 5 else None for row in range(items)]),
            "tags": pa.array([[row % 3, 7] if row % 4 else [] for row in range(items)], pa.list_(pa.int64())),
            "duration_ms": pa.array([1000 * row if row % 3 else None for row in range(items)], pa.int64()),
            "upload_time_ms": pa.array([row if row else None for row in range(items)], pa.int64()),
            "text": pa.array([f"item number {row}" for row in range(items)]),
        }
        if embedding:
            values = pa.array(rng.standard_normal(items * embedding).astype(np.float32))
            item_columns["embedding"] = pa.FixedSizeListArray.from_arrays(values, embedding)
        user_columns = {
            "user_id": pa.array([f"u{row}" for row in range(users)]),
            "age": pa.array([row % 3 if row else None for row in range(users)], pa.int64()),
            "city": pa.array([f"c{row % 2}" for row in range(users)]),
        }
        return Tables(pa.table(columns), pa.table(item_columns), pa.table(user_columns), {"unreadable": 2})

    return make


@pytest.fixture(scope="session")
def write(tmp_path_factory, data_config):
    """Writes tables with the given data settings and opens the dataset."""

    def make(tables: Tables, **settings) -> Dataset:
        directory = tmp_path_factory.mktemp("dataset") / "log"
        return Dataset(write_dataset(tables, data_config(**settings), directory, 0, {"kind": "test"}))

    return make
