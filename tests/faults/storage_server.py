"""S3 and Google Cloud Storage on this machine, behind a door that can fail, and runs that live in them.

    python tests/faults/storage_server.py

trains a tiny model in a bucket of each: left alone, with every fifth request answered by an error, and with nobody answering
for a minute from a save on. What must hold: the final state and the log lines of a run on a disk, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import logging
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "faults")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # asks in a way that the server here does not know

import fsspec  # noqa: E402
from kills import final_state, start  # noqa: E402
from tiny import tiny_values, untimed  # noqa: E402

from onerec_jax.config import Recipe  # noqa: E402
from onerec_jax.data.prepare import prepare  # noqa: E402
from onerec_jax.data.store import Dataset  # noqa: E402
from onerec_jax.recipe import make_recipe  # noqa: E402
from onerec_jax.tokenizer.semantic_ids import fit_semantic_ids  # noqa: E402
from onerec_jax.train.checkpoint import same_bits  # noqa: E402
from onerec_jax.train.metrics import read_metrics  # noqa: E402

BUCKET = "bucket"
KINDS = ("s3", "gs")


class Door(ThreadingHTTPServer):
    """Hands requests on to a server, or fails them: `rate` of them at random, or all while `down`."""

    daemon_threads = True

    def __init__(self, port: int):
        super().__init__(("127.0.0.1", 0), _Request)
        self.behind, self.rate, self.down = port, 0.0, False
        self.asked = self.failed = 0
        self.one_by_one = threading.Lock()
        self._random, self._lock = random.Random(0), threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fails(self) -> bool:
        with self._lock:
            failed = self.down or self._random.random() < self.rate
            self.asked += 1
            self.failed += failed
            return failed

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is no news."""


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _pass_on(self) -> None:
        door = self.server
        assert isinstance(door, Door)
        body = self._body()
        if door.fails():
            self._fail(door)
            return
        with door.one_by_one:
            generation = self._generation(door.behind)
            if self._refused(generation):
                return
            self._forward(door.behind, body, generation)

    def _generation(self, port: int) -> str | None:
        """Of the object that a request to Google's storage names: which of its contents there is, "0" for none.

        The server behind knows no conditions and does not say what it sends, and TensorStore depends on both.
        """
        url = urllib.parse.urlsplit(self.path)
        asked = urllib.parse.parse_qs(url.query)
        found = re.search(r"/b/([^/]+)/o(?:/([^/]+))?$", url.path)
        if found is None or not (
            asked.keys() & {"ifGenerationMatch", "ifGenerationNotMatch"} or "media" in asked.get("alt", ())
        ):
            return None
        name = found[2] or urllib.parse.quote(asked["name"][0], safe="")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", f"/storage/v1/b/{found[1]}/o/{name}")
        answer = connection.getresponse()
        content = answer.read()
        return str(json.loads(content)["generation"]) if answer.status == 200 else "0"

    def _refused(self, generation: str | None) -> bool:
        """Answers a request whose condition does not hold."""
        asked = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        wanted, unwanted = (asked.get(name, [None])[0] for name in ("ifGenerationMatch", "ifGenerationNotMatch"))
        if wanted not in (None, generation):
            self._answer(412)
        elif unwanted is not None and unwanted == generation:
            self._answer(304)
        else:
            return False
        return True

    def _answer(self, status: int) -> None:
        self.send_response_only(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _forward(self, port: int, body: bytes, generation: str | None) -> None:
        upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        headers = {
            k: v for k, v in self.headers.items() if k.lower() not in ("expect", "transfer-encoding", "connection")
        }
        upstream.request(self.command, self.path, body, headers)
        answer = upstream.getresponse()
        content = answer.read()
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        if generation is not None:
            self.send_header("x-goog-generation", generation)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        upstream.close()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _fail(self, door: Door) -> None:
        self.close_connection = True
        if door.down:  # as if nobody were there
            return
        content = b"<Error><Code>ServiceUnavailable</Code><Message>Please try again.</Message></Error>"
        self.send_response_only(503, "Service Unavailable")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _pass_on

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the door counts."""


@contextlib.contextmanager
def storage(kind: str) -> Iterator[tuple[Door, dict[str, str]]]:
    """A server with an empty bucket, and the environment in which a process finds it behind its door."""
    with _s3() if kind == "s3" else _gcs() as port:
        door = Door(port)
        if kind == "s3":
            environment = {
                "AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing", "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_ENDPOINT_URL": door.url, "AWS_EC2_METADATA_DISABLED": "true",
            }  # fmt: skip
        else:
            environment = {
                "STORAGE_EMULATOR_HOST": door.url, "TENSORSTORE_GCS_HTTP_URL": door.url, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "nobody",
                "FSSPEC_GCS_TOKEN": "anon", "GOOGLE_CLOUD_PROJECT": "nowhere",
            }  # fmt: skip
        try:
            yield door, environment
        finally:
            door.shutdown()
            door.server_close()


@contextlib.contextmanager
def _s3() -> Iterator[int]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/moto-api/reset")
    assert connection.getresponse().status == 200
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("PUT", f"/{BUCKET}")
    assert connection.getresponse().status == 200
    try:
        yield port
    finally:
        server.stop()


@contextlib.contextmanager
def _gcs() -> Iterator[int]:
    from gcp_storage_emulator.server import create_server

    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    server.start()
    try:
        yield port
    finally:
        server.stop()


class Bucket:
    """The objects of a server, seen from outside and through its front door."""

    def __init__(self, kind: str, port: int):
        url = f"http://127.0.0.1:{port}"
        known = {"key": "nobody", "secret": "nothing"} if kind == "s3" else {"token": "anon"}
        self.kind = kind
        self.files = fsspec.filesystem(
            kind, endpoint_url=url, use_listings_cache=False, skip_instance_cache=True, **known
        )

    def steps(self, name: str) -> list[int]:
        """The checkpoints of a run whose record is there: all of them are whole."""
        records = self.files.glob(f"{BUCKET}/runs/{name}/checkpoints_written/*.json")
        return sorted(int(record.rsplit("/", 1)[1].removesuffix(".json")) for record in records)

    def copy(self, name: str, to: Path) -> None:
        """The run in a folder of this machine."""
        self.files.get(f"{BUCKET}/runs/{name}/", f"{to}/", recursive=True)


def bucket_recipe(folder: Path) -> Recipe:
    """A tiny recipe with id tables and experts that saves after three of its six steps."""
    values = tiny_values(folder)
    values["model"] |= {"positive_length": 0, "lifelong_length": 0}
    values["train"] |= {"steps": 6, "warmup_steps": 2, "log_every": 1, "checkpoint_every": 3, "keep": 2}
    return make_recipe(values | {"runs": str(folder / "disk")})


def train(
    recipe: Path, name: str, log: Path, bucket: Bucket | None = None, environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """A run in a bucket, or else on a disk."""
    log.unlink(missing_ok=True)
    words = () if bucket is None else (f"runs={bucket.kind}://{BUCKET}/runs",)
    return start(recipe, name, log, *words, environment=environment)


def ended_well(process: subprocess.Popen[bytes], log: Path) -> str:
    """What a run printed, once it has ended."""
    try:
        assert process.wait() == 0, log.read_text()
    finally:
        process.kill()
    return log.read_text()


def until_saved(bucket: Bucket, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits for the first checkpoint of a run."""
    while not bucket.steps(name):
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)


def killed_once(bucket: Bucket, recipe: Path, name: str, log: Path, environment: dict[str, str]) -> str:
    """A run that is killed after its first checkpoint and started again."""
    process = train(recipe, name, log, bucket, environment)
    try:
        until_saved(bucket, name, process, log)
    finally:
        process.kill()
        process.wait()
    return ended_well(train(recipe, name, log, bucket, environment), log)


def left_alone_by_the_server(
    bucket: Bucket, door: Door, seconds: float, recipe: Path, name: str, log: Path, environment: dict[str, str]
) -> str:
    """A run whose server is gone for some seconds from a save on."""
    process = train(recipe, name, log, bucket, environment)
    try:
        while not bucket.files.exists(f"{BUCKET}/runs/{name}/config.yaml"):
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        while not any("/3/" in found for found in bucket.files.find(f"{BUCKET}/runs/{name}/checkpoints")):
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        door.down = True
        time.sleep(seconds)
        door.down = False
        return ended_well(process, log)
    finally:
        door.down = False
        process.kill()


def same_as_on_disk(recipe: Recipe, bucket: Bucket, name: str, folder: Path) -> None:
    """Raises AssertionError unless a run in a bucket has the lines and, bit for bit, the final state of the one on disk."""
    bucket.copy(name, folder / "copies" / name)
    copy = recipe.model_copy(update={"runs": str(folder / "copies"), "name": name})
    disk = recipe.model_copy(update={"name": "disk"})
    there, here = ([untimed(line) for line in read_metrics(of.run_directory)] for of in (copy, disk))
    assert there == here, f"the lines of {name} differ"
    assert same_bits(final_state(copy), final_state(disk)), f"the final state of {name} differs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=KINDS, help="s3 and gs")
    parser.add_argument("--rate", type=float, default=0.2, help="of the requests that fail")
    parser.add_argument("--seconds", type=float, default=60.0, help="for which nobody answers")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = bucket_recipe(folder)
        prepare(recipe)
        ids = fit_semantic_ids(Dataset(recipe.dataset_directory), recipe.tokenizer, recipe.seed)
        ids.save(recipe.tokenizer_directory)
        path, log = folder / "recipe.yaml", folder / "log.txt"
        path.write_text(recipe.to_yaml())
        ended_well(train(path, "disk", log), log)
        for kind in asked.kinds:
            with storage(kind) as (door, environment):
                bucket = Bucket(kind, door.behind)
                began = time.perf_counter()
                ended_well(train(path, "plain", log, bucket, environment), log)
                same_as_on_disk(recipe, bucket, "plain", folder / kind)
                print(
                    f"{kind}: {door.asked} requests, bit-identical to a run on a disk ({time.perf_counter() - began:.0f} s)"
                )
                door.rate, door.asked, door.failed, began = asked.rate, 0, 0, time.perf_counter()
                killed_once(bucket, path, "failing", log, environment)
                same_as_on_disk(recipe, bucket, "failing", folder / kind)
                seconds = time.perf_counter() - began
                print(
                    f"{kind}: {door.failed} of {door.asked} requests failed, and a SIGKILL: bit-identical ({seconds:.0f} s)"
                )
                door.rate, door.asked, door.failed, began = 0.0, 0, 0, time.perf_counter()
                told = left_alone_by_the_server(bucket, door, asked.seconds, path, "down", log, environment)
                same_as_on_disk(recipe, bucket, "down", folder / kind)
                seconds = time.perf_counter() - began
                print(
                    f"{kind}: nobody there for {asked.seconds:.0f} s at a save, {door.failed} requests unanswered: ",
                    end="",
                )
                print(f"bit-identical, {told.count('warning')} warnings ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
