"""The HTTP server: JSON in and out, health, metrics and a page to try the model on."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import signal
import time
from collections.abc import Awaitable, Callable
from importlib import resources
from ipaddress import ip_address
from typing import Any

from onerec_jax.errors import InputError
from onerec_jax.serve.batching import Batcher, FullError
from onerec_jax.serve.engine import Answer, Engine
from onerec_jax.serve.metrics import COMPILES, Metrics
from onerec_jax.serve.released import Released
from onerec_jax.serve.requests import DIVERSITIES, Limits, Query, Refused, describe, parse, resolve, sample_user

try:
    from aiohttp import web
except ImportError:
    raise InputError("`onerec serve` needs the package aiohttp: pip install 'onerec_jax[serve]'") from None

MAX_BODY = 2 << 20  # bytes; a history of 5,000 events has about 500 kB
SMALL_BATCHES = (1, 8, 32)
LEAVING_S = 60.0  # for what is under way when the server is told to end

_log = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to serve.

    Attributes:
        host: address to listen at.
        port: 0 = any that is free.
        beams: numbers of beams to offer, the first by default; empty = that of the export.
        max_batch: most requests that one run of the model answers.
        max_wait_ms: how long a request may wait for others.
        queue: most requests that wait at a time.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    beams: tuple[int, ...] = ()
    max_batch: int = 64
    max_wait_ms: float = 5.0
    queue: int = 256

    def __post_init__(self) -> None:
        for name, least in (("port", 0), ("max_batch", 1), ("max_wait_ms", 0), ("queue", 1)):
            if getattr(self, name) < least:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)} must be {least} at least")
        if any(beams < 1 for beams in self.beams):
            raise InputError(f"--beams {','.join(map(str, self.beams))} must be numbers from 1 on")

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        return (*(size for size in SMALL_BATCHES if size < self.max_batch), self.max_batch)


def numbers(text: str) -> tuple[int, ...]:
    """`8,32` as numbers; nothing as none.

    Raises:
        InputError: there is something else in it.
    """
    try:
        return tuple(int(word) for word in text.split(",")) if text else ()
    except ValueError:
        raise InputError(f"--beams {text} must be numbers with commas between them, such as 8,32") from None


class Server:
    """The handlers of one export."""

    def __init__(self, released: Released, settings: Settings):
        self.released = released
        self.settings = settings
        self.limits = Limits(settings.beams or (released.width,), released.list_length)
        self.engine = Engine(released, settings.batch_sizes)
        self.metrics = Metrics(lambda: self.batcher.depth)
        self.ready = False
        self._page = resources.files("onerec_jax.serve").joinpath("page.html").read_text(encoding="utf-8")
        self._log_answers = _log.isEnabledFor(logging.INFO)

    def application(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY, middlewares=[self._answer_errors])
        app.add_routes(
            [
                web.get("/", self._show_page),
                web.get("/healthz", self._health),
                web.get("/metrics", self._show_metrics),
                web.get("/users", self._list_users),
                web.get("/users/{id}", self._show_user),
                web.post("/recommend", self._recommend),
            ]
        )
        app.on_startup.append(self._start)
        app.on_shutdown.append(self._stop)
        return app

    async def _start(self, _: web.Application) -> None:
        settings = self.settings
        self.batcher = Batcher(
            self.engine, settings.max_batch, settings.max_wait_ms / 1000, settings.queue, self.metrics.batch.observe
        )

    async def _stop(self, _: web.Application) -> None:
        await self.batcher.close()

    async def warm(self) -> None:
        """Compiles what common requests need; from then on the server says that it is ready."""
        await self.batcher.warm(self.limits.beams[0])
        self.ready = True

    @web.middleware
    async def _answer_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            response = await handler(request)
        except Refused as error:
            response = _problem(error.status, str(error))
        except FullError:
            response = _problem(503, "too many requests wait; try again in a second", {"Retry-After": "1"})
        except web.HTTPRequestEntityTooLarge:
            response = _problem(413, f"the body is larger than {MAX_BODY >> 20} MiB")
        except web.HTTPMethodNotAllowed as error:
            allowed = ", ".join(sorted(error.allowed_methods))
            response = _problem(405, f"{request.path} takes {allowed}, not {error.method}", {"Allow": allowed})
        except web.HTTPException as error:
            response = _problem(error.status, error.reason)
        except Exception:
            _log.exception("%s %s failed", request.method, request.path)
            response = _problem(500, "the server failed; its log says why")
        resource = request.match_info.route.resource
        self.metrics.requests.labels(resource.canonical if resource else "other", str(response.status)).inc()
        return response

    async def _recommend(self, request: web.Request) -> web.Response:
        started = time.perf_counter()
        query = resolve(parse(await request.read()), self.released, self.limits)
        answer = await self.batcher.answer(query)
        seconds = time.perf_counter() - started
        self.metrics.seconds.observe(seconds)
        return _json(self._listed(query, answer) | {"milliseconds": round(1000 * seconds, 3)})

    def _listed(self, query: Query, answer: Answer) -> dict[str, Any]:
        ids, titles = self.released.item_ids, self.released.titles
        pairs = zip(answer.items.tolist(), answer.scores.tolist(), strict=True)
        return {
            "items": [{"item": ids[row], "title": titles[row], "score": score} for row, score in pairs],
            "k": query.k,
            "beams": query.beams,
        }

    async def _health(self, _: web.Request) -> web.Response:
        state = {
            "ready": self.ready,
            "model": self.released.name,
            "step": self.released.step,
            "hash": self.released.digest,
            "items": len(self.released.item_ids),
            "beams": self.limits.beams,
            "k": self.limits.k,
            "diversity": DIVERSITIES,
            "exclude_seen": self.released.exclude_seen,
            "compiles": COMPILES.count,
        }
        return _json(state, 200 if self.ready else 503)

    async def _show_metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self.metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _list_users(self, _: web.Request) -> web.Response:
        users = [{"id": user.id, "events": len(user.events)} for user in self.released.samples]
        return _json({"users": users})

    async def _show_user(self, request: web.Request) -> web.Response:
        return _json(describe(sample_user(request.match_info["id"], self.released), self.released))

    async def _show_page(self, _: web.Request) -> web.Response:
        return web.Response(text=self._page, content_type="text/html", headers={"Cache-Control": "no-cache"})


def _json(values: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(text=json.dumps(values), status=status, content_type="application/json", headers=headers)


def _problem(status: int, sentence: str, headers: dict[str, str] | None = None) -> web.Response:
    return _json({"error": sentence}, status, headers)


async def serve_until_told(server: Server, report: Callable[[str], None]) -> None:
    """Listens, compiles, and serves until SIGTERM or SIGINT; then answers what waits, and ends.

    Raises:
        InputError: the address cannot be listened at.
    """
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    runner = web.AppRunner(server.application(), access_log=None, shutdown_timeout=LEAVING_S)
    await runner.setup()
    try:
        site = web.TCPSite(runner, server.settings.host, server.settings.port)
        try:
            await site.start()
        except OSError as error:
            raise InputError(
                f"cannot listen at {server.settings.host}, port {server.settings.port}: {error.strerror or error}; "
                "name others with --host and --port"
            ) from None
        host, port = runner.addresses[0][:2]
        shown = f"[{host}]" if ":" in host else host
        report(f"serving {server.released.name} at http://{shown}:{port}; compiling ...")
        if server.released.samples and not ip_address(host).is_loopback:
            report("warning: whoever reaches this address can read the histories of the sample users")
        started = time.perf_counter()
        warming = asyncio.create_task(server.warm())
        waiting = asyncio.create_task(told.wait())
        await asyncio.wait({warming, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if warming.done():
            warming.result()
            report(f"ready after {time.perf_counter() - started:.1f} s")
        await waiting
        report("leaving")
    finally:
        await runner.cleanup()


def serve(released: Released, settings: Settings, report: Callable[[str], None]) -> None:
    """Serves an export until the process is told to end.

    Raises:
        InputError: the address cannot be listened at.
    """
    asyncio.run(serve_until_told(Server(released, settings), report))
