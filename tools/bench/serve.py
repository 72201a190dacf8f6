"""Load on a served export: is every answer right under it, how long do they take, and is anything compiled meanwhile?

    python tools/bench/serve.py DIR                                     2,000 requests, 64 at a time
    python tools/bench/serve.py DIR --requests 500 --concurrency 8 --max-batch 16

Starts `onerec serve DIR` on a free port. Clients of one process ask for sample users, by id or by their history in JSON, for
lists of different lengths and without items chosen at random. Every answer is compared with the list that the step makes in this
process; items whose scores are equal to 1e-4 may stand in another order, since sums of a batch of another size round otherwise.
Client and server share this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from onerec_jax.errors import InputError  # noqa: E402
from onerec_jax.serve.engine import Answer, Engine  # noqa: E402
from onerec_jax.serve.released import Released, load_released  # noqa: E402
from onerec_jax.serve.requests import Limits, describe, parse, resolve  # noqa: E402

TIE = 1e-4  # scores that may change places
CLOSE = 1e-3  # scores of one item, served and offline
OFFLINE_BATCH = 16


@dataclasses.dataclass(frozen=True)
class Asked:
    """A body and what its answer should be."""

    body: bytes
    expected: Answer


@dataclasses.dataclass
class Load:
    """What a run of the load came to; times in seconds."""

    statuses: dict[int, int]
    wrong: list[str]
    errors: list[str]
    latencies: list[float]
    seconds: float
    compiles: int  # while it ran
    batch: float  # mean size


def made_up_requests(released: Released, count: int, seed: int) -> list[bytes]:
    """Bodies for sample users in turn, half of them by their history."""
    rng = np.random.default_rng(seed)
    bodies = []
    for n in range(count):
        user = released.samples[n % len(released.samples)]
        body: dict[str, Any] = {"k": int(rng.integers(1, released.width + 1))}
        if rng.random() < 0.5:
            body["user"] = user.id
        else:
            told = describe(user, released)
            body["history"] = [{k: v for k, v in event.items() if k != "title"} for event in told["history"]]
            body["user_features"] = told["user_features"]
        if rng.random() < 0.5:
            rows = rng.integers(0, len(released.item_ids), 20).tolist()
            body["exclude"] = [released.item_ids[row] for row in rows]
        bodies.append(json.dumps(body).encode())
    return bodies


def with_answers(released: Released, bodies: list[bytes]) -> list[Asked]:
    """The same with the lists of the step in this process, in batches of a size that the server does not use."""
    engine, limits = Engine(released, (OFFLINE_BATCH,)), Limits((released.width,), released.list_length)
    queries = [resolve(parse(body), released, limits) for body in bodies]
    answers: list[Answer] = []
    for first in range(0, len(queries), OFFLINE_BATCH):
        part = queries[first : first + OFFLINE_BATCH]
        engine.compile(engine.shape(part))
        answers += engine.run(part)
    return [Asked(body, answer) for body, answer in zip(bodies, answers, strict=True)]


def difference(listed: list[dict[str, Any]], expected: Answer, released: Released) -> str | None:
    """What is wrong with an answer, or None."""
    if len(listed) != len(expected.items):
        return f"{len(listed)} items instead of {len(expected.items)}"
    scores = np.array([item["score"] for item in listed])
    if not np.allclose(scores, expected.scores, atol=CLOSE):
        return f"scores off by {np.abs(scores - expected.scores).max():.2g}"
    places = {released.item_row[str(item["item"])]: place for place, item in enumerate(listed)}
    for place, row in enumerate(expected.items.tolist()):
        other = places.get(row)
        if other is None and expected.scores[place] - expected.scores[-1] > TIE:
            return f"item row {row} is missing"
        if other is not None and abs(expected.scores[place] - expected.scores[other]) > TIE:
            return f"item row {row} stands at {other}, not at {place}"
    return None


async def _metrics(session: aiohttp.ClientSession) -> dict[str, float]:
    async with session.get("/metrics") as answer:
        lines = (await answer.text()).splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


async def _load(port: int, asked: list[Asked], concurrency: int, released: Released) -> Load:
    found, pending = Load({}, [], [], [], 0.0, 0, 0.0), iter(asked)

    async def client(session: aiohttp.ClientSession) -> None:
        for one in pending:
            started = time.perf_counter()
            try:
                async with session.post("/recommend", data=one.body) as answer:
                    told = await answer.json()
            except (aiohttp.ClientError, ValueError) as error:
                found.errors.append(f"{error!r}")
                continue
            found.latencies.append(time.perf_counter() - started)
            found.statuses[answer.status] = found.statuses.get(answer.status, 0) + 1
            if answer.status != 200:
                found.errors.append(f"{answer.status} {told}")
            elif wrong := difference(told["items"], one.expected, released):
                found.wrong.append(wrong)

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", connector=connector) as session:
        before, started = await _metrics(session), time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(concurrency)))
        found.seconds, after = time.perf_counter() - started, await _metrics(session)
    found.compiles = int(after["onerec_compiles_total"] - before["onerec_compiles_total"])
    sums, counts = (after[n] - before[n] for n in ("onerec_batch_size_sum", "onerec_batch_size_count"))
    found.batch = sums / max(1, counts)
    return found


def measure(directory: str | Path, requests: int, concurrency: int, options: list[str], seed: int = 0) -> Load:
    """Starts a server with these options, puts the load on it, and ends it.

    Raises:
        InputError: no export, or one without sample users.
        RuntimeError: the server did not start.
    """
    released = load_released(directory)
    if not released.samples:
        raise InputError(f"{directory} has no sample users to ask for; export it with --users 50")
    asked = with_answers(released, made_up_requests(released, requests, seed))
    command = [sys.executable, "-m", "onerec_jax.cli", "serve", str(directory), "--port", "0", *options]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path})
    assert server.stdout is not None
    try:
        port = re.search(r":(\d+);", server.stdout.readline())
        if port is None or not server.stdout.readline().startswith("ready"):
            raise RuntimeError("the server did not start; what it says is above")
        return asyncio.run(_load(int(port[1]), asked, concurrency, released))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def report(found: Load, requests: int, concurrency: int) -> Table:
    table = Table(title=f"{requests} requests, {concurrency} at a time, {os.cpu_count()} CPU cores")
    for column in ("answers", "errors", "wrong", "p50 ms", "p99 ms", "per s", "batch", "compiles"):
        table.add_column(column, justify="right")
    p50, p99 = np.percentile(found.latencies, [50, 99]) * 1000
    rate = len(found.latencies) / found.seconds
    table.add_row(
        str(len(found.latencies)), str(len(found.errors)), str(len(found.wrong)), f"{p50:.1f}", f"{p99:.1f}",
        f"{rate:.0f}", f"{found.batch:.1f}", str(found.compiles),
    )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("--requests", type=int, default=2_000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    given, options = parser.parse_known_args()
    try:
        found = measure(given.directory, given.requests, given.concurrency, options, given.seed)
    except InputError as error:
        raise SystemExit(f"{error}") from None
    console = Console()
    console.print(report(found, given.requests, given.concurrency))
    for line in [*found.errors, *found.wrong][:5]:
        console.print(line, highlight=False)
    raise SystemExit(bool(found.errors or found.wrong))


if __name__ == "__main__":
    main()
