"""Which requests are answered together, and when, with a stand-in for the model."""

import asyncio
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from onerec_jax.serve.batching import Batcher, FullError


class Model:
    """Answers with the query's own number, one batch at a time, as slowly as it is told to."""

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds
        self.batches: list[list[int]] = []
        self.shapes: set[str] = set()
        self.may_compile = threading.Event()
        self.may_compile.set()
        self.running = 0

    def kind(self, query: Any) -> str:
        return query.kind

    def shape(self, queries: list[Any]) -> str:
        return queries[0].kind

    def warm_shapes(self, beams: int) -> list[str]:
        return ["plain"]

    def compiled(self, shape: str) -> bool:
        return shape in self.shapes

    def compile(self, shape: str) -> None:
        assert self.may_compile.wait(10)
        self.shapes.add(shape)

    def run(self, queries: list[Any]) -> list[int]:
        assert len({query.kind for query in queries}) == 1 and queries[0].kind in self.shapes
        self.running += 1
        assert self.running == 1, "one run at a time"
        time.sleep(self.seconds)
        self.running -= 1
        self.batches.append([query.number for query in queries])
        if any(query.number < 0 for query in queries):
            raise ValueError("no such query")
        return [query.number for query in queries]


def query(number: int, kind: str = "plain") -> Any:
    return SimpleNamespace(number=number, kind=kind)


def with_batcher(model: Model, story, *, max_batch: int = 4, max_wait_s: float = 0.02, queue: int = 100) -> Any:
    async def run() -> Any:
        batcher = Batcher(model, max_batch, max_wait_s, queue, lambda size: None)  # type: ignore[arg-type]
        await batcher.warm(1)
        try:
            return await asyncio.wait_for(story(batcher), 20)
        finally:
            await batcher.close()
            assert batcher.depth == 0

    return asyncio.run(run())


def test_requests_that_come_together_are_answered_in_full_batches_in_order():
    model = Model()

    async def story(batcher: Batcher):
        return await asyncio.gather(*(batcher.answer(query(n)) for n in range(10)))

    assert with_batcher(model, story) == list(range(10))
    assert model.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_full_batch_does_not_wait_and_a_lone_request_waits_no_longer_than_it_may():
    model = Model()

    async def story(batcher: Batcher):
        started = time.monotonic()
        await asyncio.gather(*(batcher.answer(query(n)) for n in range(4)))
        full = time.monotonic() - started
        await batcher.answer(query(4))
        return full, time.monotonic() - started - full

    full, alone = with_batcher(model, story, max_wait_s=1.0)
    assert full < 0.9 <= alone < 5


def test_requests_gather_while_the_model_is_busy():
    model = Model(seconds=0.2)

    async def story(batcher: Batcher):
        first = asyncio.create_task(batcher.answer(query(0)))
        await asyncio.sleep(0.1)
        others = [asyncio.create_task(batcher.answer(query(n))) for n in (1, 2, 3)]
        await asyncio.gather(first, *others)

    with_batcher(model, story, max_wait_s=0.0)
    assert model.batches == [[0], [1, 2, 3]]


def test_requests_of_different_kinds_are_answered_apart_the_longest_waiting_first():
    model = Model()
    model.shapes.add("wide")

    async def story(batcher: Batcher):
        return await asyncio.gather(*(batcher.answer(query(n, "wide" if n % 2 else "plain")) for n in range(6)))

    assert with_batcher(model, story) == list(range(6))
    assert model.batches == [[0, 2, 4], [1, 3, 5]]


def test_requests_of_a_kind_that_is_compiled_go_on_while_another_compiles():
    model = Model()

    async def story(batcher: Batcher):
        model.may_compile.clear()
        rare = asyncio.create_task(batcher.answer(query(0, "rare")))
        await asyncio.sleep(0.1)
        assert await batcher.answer(query(1)) == 1
        assert not rare.done() and batcher.depth == 1
        model.may_compile.set()
        return await rare

    assert with_batcher(model, story) == 0


def test_more_requests_than_may_wait_are_sent_away_and_those_that_wait_are_answered():
    model = Model(seconds=0.3)

    async def story(batcher: Batcher):
        running = asyncio.create_task(batcher.answer(query(0)))
        await asyncio.sleep(0.1)
        waiting = [asyncio.create_task(batcher.answer(query(n))) for n in (1, 2)]
        await asyncio.sleep(0)
        with pytest.raises(FullError):
            await batcher.answer(query(3))
        return await asyncio.gather(running, *waiting)

    assert with_batcher(model, story, max_wait_s=0.0, queue=2) == [0, 1, 2]


def test_what_fails_in_the_model_reaches_those_who_asked_and_nobody_else():
    model = Model()

    async def story(batcher: Batcher):
        with pytest.raises(ValueError, match="no such query"):
            await batcher.answer(query(-1))
        return await batcher.answer(query(1))

    assert with_batcher(model, story) == 1


def test_somebody_who_goes_away_keeps_nobody_else_from_an_answer():
    model = Model(seconds=0.1)

    async def story(batcher: Batcher):
        first, *others = [asyncio.create_task(batcher.answer(query(n))) for n in range(3)]
        await asyncio.sleep(0.05)
        first.cancel()
        return await asyncio.gather(*others)

    assert with_batcher(model, story) == [1, 2]


def test_closing_answers_what_waits_without_waiting_for_more_and_takes_nothing_new():
    model = Model(seconds=0.05)

    async def story(batcher: Batcher):
        asked = [asyncio.create_task(batcher.answer(query(n))) for n in range(6)]
        await asyncio.sleep(0)
        started = time.monotonic()
        await batcher.close()
        assert time.monotonic() - started < 5
        with pytest.raises(FullError):
            await batcher.answer(query(9))
        return await asyncio.gather(*asked)

    assert with_batcher(model, story, max_wait_s=10.0, max_batch=8) == list(range(6))
