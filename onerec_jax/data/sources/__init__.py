"""One adapter per log format, each from its files to canonical Arrow tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onerec_jax.config import Source
from onerec_jax.data.schema import Tables
from onerec_jax.data.sources import amazon, kuairand, parquet, simulator

_SOURCES: dict[str, Callable[[Any, int], Tables]] = {
    "simulator": simulator.tables,
    "kuairand": kuairand.tables,
    "amazon": amazon.tables,
    "parquet": parquet.tables,
}


def load_tables(source: Source, seed: int) -> Tables:
    """The canonical tables of any source; only the simulator reads the seed."""
    return _SOURCES[source.kind](source, seed)
