"""Exports of tiny models with random weights, what their lists should be, and a running server over one."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from aiohttp import web

from onerec_jax.config import ModelConfig, Recipe
from onerec_jax.data.batch import make_batch
from onerec_jax.data.schema import Batch
from onerec_jax.data.store import Dataset
from onerec_jax.export.artifact import write_artifact
from onerec_jax.export.contents import contents_of
from onerec_jax.generate.recommender import Recommender
from onerec_jax.generate.step import ListOptions, Lists, make_catalogue, make_recommend_step
from onerec_jax.model.onerec import build
from onerec_jax.serve.released import Released
from onerec_jax.serve.server import Server, Settings
from onerec_jax.tokenizer.semantic_ids import SemanticIds

BEAMS = 8


def recommender_of(recipe: Recipe, config: ModelConfig) -> Recommender:
    """A model of random weights, large enough for scores that are far apart."""
    dataset, ids = Dataset(recipe.dataset_directory), SemanticIds.load(recipe.tokenizer_directory)
    model = build(config, dataset.vocabulary(ids.codebook_sizes))
    params, tables = model.init(0)
    scaled = {name: jax.tree.map(lambda x: 5 * x, params[name]) for name in ("decoder", "head") if name in params}
    state = SimpleNamespace(params=params | scaled, tables=tables, bias=model.init_bias(), step=np.int32(6))
    changed = recipe.model_copy(update={"model": config})
    return Recommender(Path("runs/tiny"), changed, dataset, ids, model, state)  # type: ignore[arg-type]


def exported(recommender: Recommender, directory: Path, users: int = 20) -> Path:
    """Its export, without the StableHLO functions, which take long to make and are not served."""
    with mock.patch("onerec_jax.export.artifact.write_functions"):
        write_artifact(contents_of(recommender, "float32", 5, BEAMS, users), directory)
    return directory


def offline_features(recommender: Recommender, rows: list[int]) -> Batch:
    """Contexts of users after all that the log knows of them."""
    counts = [len(recommender.dataset.history(row).item) for row in rows]
    examples = np.array([[row, n, n, n] for row, n in zip(rows, counts, strict=True)])
    return make_batch(recommender.dataset, recommender.ids.codes, recommender.recipe.model, examples, 1, frozen=True)


def offline_lists(recommender: Recommender, rows: list[int], options: ListOptions, allow: list[int] | None) -> Lists:
    """Lists for users, without what they have seen."""
    dataset, ids, state = recommender.dataset, recommender.ids, recommender.state
    catalogue = make_catalogue(ids.trie, recommender.recipe.model, dataset.items.author, dataset.items.tag)
    exclude = np.full((len(rows), dataset.num_items), -1, np.int32)
    for n, row in enumerate(rows):
        seen = dataset.history(row).item
        exclude[n, : len(seen)] = seen
    step = make_recommend_step(recommender.model, options)
    kept = None if allow is None else np.tile(np.array(allow, np.int32), (len(rows), 1))
    batch = offline_features(recommender, rows)
    return jax.device_get(step(state.params, state.tables, state.bias, catalogue, batch, exclude, kept))


class Reply(NamedTuple):
    status: int
    json: Any
    text: str
    headers: dict[str, str]


class Client:
    """Requests to a port of this machine, one connection each."""

    def __init__(self, port: int):
        self.port = port

    def ask(self, method: str, path: str, body: bytes | None = None) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body)
            answer = connection.getresponse()
            text = answer.read().decode()
            found = json.loads(text) if answer.headers.get_content_type() == "application/json" else None
            return Reply(answer.status, found, text, dict(answer.headers))
        finally:
            connection.close()

    def get(self, path: str) -> Reply:
        return self.ask("GET", path)

    def recommend(self, **body: Any) -> Reply:
        return self.ask("POST", "/recommend", json.dumps(body).encode())


@contextlib.contextmanager
def serving(released: Released, **settings: Any) -> Iterator[Client]:
    """A server that is ready, in a thread."""
    server = Server(released, Settings(**{"max_batch": 4, **settings}))
    started, told = threading.Event(), asyncio.Event()
    found: list[Any] = []

    async def run() -> None:
        runner = web.AppRunner(server.application(), access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        await server.warm()
        found.extend([asyncio.get_running_loop(), runner.addresses[0][1]])
        started.set()
        await told.wait()
        await runner.cleanup()

    thread = threading.Thread(target=asyncio.run, args=[run()])
    thread.start()
    assert started.wait(300)
    try:
        yield Client(found[1])
    finally:
        found[0].call_soon_threadsafe(told.set)
        thread.join()
