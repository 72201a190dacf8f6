"""Dynamic batching: requests that wait together are answered together, by one thread that runs the model."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from onerec_jax.serve.engine import Answer, Engine, Kind
from onerec_jax.serve.requests import Query

Result = TypeVar("Result")


class FullError(Exception):
    """As many requests wait as may."""


@dataclasses.dataclass(frozen=True)
class _Waiting:
    query: Query
    since: float
    answer: asyncio.Future[Answer]


class Batcher:
    """Collects queries and answers them in batches; to be made and used in one event loop.

    A batch holds queries of one kind. It is run once it is full, or once the model is free and its oldest query has waited for
    `max_wait_s`; of several kinds the one whose oldest query waits longest goes first. A program that is not there yet is
    compiled in a thread of its own, while other kinds go on.

    Args:
        engine: what answers.
        max_batch: most queries of a batch.
        max_wait_s: seconds that a query may wait for others.
        queue: most queries that wait at a time.
        observe: told the size of every batch.
    """

    def __init__(self, engine: Engine, max_batch: int, max_wait_s: float, queue: int, observe: Callable[[int], None]):
        self.engine = engine
        self.depth = 0  # queries that wait for the model, or for a program
        self._max_batch, self._max_wait_s, self._queue, self._observe = max_batch, max_wait_s, queue, observe
        self._groups: dict[Kind, deque[_Waiting]] = {}
        self._arrived = asyncio.Event()
        self._free = asyncio.Lock()  # held by the batch that the model runs
        self._closing = False
        self._running: set[asyncio.Task[None]] = set()
        self._device = ThreadPoolExecutor(1, "device")
        self._compiler = ThreadPoolExecutor(1, "compiler")
        self._collecting = asyncio.create_task(self._collect())

    async def warm(self, beams: int) -> None:
        """Compiles what queries that ask for nothing special need."""
        for shape in self.engine.warm_shapes(beams):
            await _in(self._compiler, self.engine.compile, shape)

    async def answer(self, query: Query) -> Answer:
        """The list of one query.

        Raises:
            FullError: too many wait, or the server is leaving.
        """
        if self._closing or self.depth >= self._queue:
            raise FullError
        loop = asyncio.get_running_loop()
        waiting = _Waiting(query, loop.time(), loop.create_future())
        self._groups.setdefault(self.engine.kind(query), deque()).append(waiting)
        self.depth += 1
        self._arrived.set()
        return await waiting.answer

    async def close(self) -> None:
        """Answers what waits, and takes nothing more."""
        self._closing = True
        self._arrived.set()
        await self._collecting
        await asyncio.gather(*self._running)
        self._device.shutdown()
        self._compiler.shutdown(cancel_futures=True)

    async def _collect(self) -> None:
        """Takes batches as long as there are any to come."""
        while self._groups or not self._closing:
            async with self._free:
                kind = self._next()
            if kind is None:
                await self._pause()
                continue
            group = self._groups[kind]
            batch = [group.popleft() for _ in range(min(len(group), self._max_batch))]
            if not group:
                del self._groups[kind]
            task = asyncio.create_task(self._answer(batch))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            await asyncio.sleep(0)  # the batch takes the model before the next one is collected

    def _next(self) -> Kind | None:
        """The kind whose batch is due."""
        oldest = asyncio.get_running_loop().time() - self._max_wait_s
        due = [
            (group[0].since, kind)
            for kind, group in self._groups.items()
            if self._closing or len(group) >= self._max_batch or group[0].since <= oldest
        ]
        return min(due)[1] if due else None

    async def _pause(self) -> None:
        """Until something arrives, or the oldest query has waited long enough."""
        self._arrived.clear()
        until = None
        if self._groups:
            first = min(group[0].since for group in self._groups.values())
            until = max(0.0, first + self._max_wait_s - asyncio.get_running_loop().time())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(until):
                await self._arrived.wait()

    async def _answer(self, batch: list[_Waiting]) -> None:
        """Answers whoever has not gone away meanwhile."""
        try:
            answers = await self._run([waiting.query for waiting in batch])
        except Exception as error:  # of any kind: whoever waits must hear of it
            for waiting in batch:
                if not waiting.answer.done():
                    waiting.answer.set_exception(error)
            return
        for waiting, answer in zip(batch, answers, strict=True):
            if not waiting.answer.done():
                waiting.answer.set_result(answer)

    async def _run(self, queries: list[Query]) -> list[Answer]:
        shape, waits = self.engine.shape(queries), len(queries)
        try:
            if not self.engine.compiled(shape):
                await _in(self._compiler, self.engine.compile, shape)
            async with self._free:
                self.depth, waits = self.depth - waits, 0
                self._observe(len(queries))
                return await _in(self._device, self.engine.run, queries)
        finally:
            self.depth -= waits


async def _in(executor: ThreadPoolExecutor, function: Callable[..., Result], *arguments: Any) -> Result:
    return await asyncio.get_running_loop().run_in_executor(executor, function, *arguments)
