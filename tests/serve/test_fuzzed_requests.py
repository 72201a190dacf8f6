"""Five hundred requests that make no sense: each is refused with a sentence, and the server is none the worse."""

import json
import socket

import numpy as np
from served import Client

from onerec_jax.serve.released import Released
from onerec_jax.serve.server import MAX_BODY

NONSENSE = (
    None, True, -1, 0, 10**30, 1.5, -0.0, 1e308, "", "x" * 5000, "\ud800", "\x00", [], [[]], {}, {"a": 1}, [None], [1, "2", {}],
    "NaN", "1e999", [10**9] * 3, {"item": 1},
)  # fmt: skip


def mutated(rng: np.random.Generator, body: dict) -> bytes:
    """A good body with a few fields replaced, removed, added or nested, or with its bytes damaged."""
    body = json.loads(json.dumps(body))
    for _ in range(int(rng.integers(1, 4))):
        place = body
        if "history" in body and isinstance(body["history"], list) and body["history"] and rng.random() < 0.5:
            place = body["history"][int(rng.integers(len(body["history"])))]
        if not isinstance(place, dict) or not place:
            place = body
        name = list(place)[int(rng.integers(len(place)))] if place else "k"
        value = NONSENSE[int(rng.integers(len(NONSENSE)))]
        what = int(rng.integers(4))
        if what == 0:
            place[name] = value
        elif what == 1:
            place.pop(name, None)
        elif what == 2:
            place[f"{name}_"] = value
        else:
            place[name] = [place.get(name)]
    raw = bytearray(json.dumps(body).encode())
    if rng.random() < 0.3:
        for _ in range(int(rng.integers(1, 6))):
            raw[int(rng.integers(len(raw)))] = int(rng.integers(256))
    return bytes(raw) if rng.random() > 0.1 else bytes(raw[: int(rng.integers(len(raw)))])


def test_five_hundred_bodies_that_make_no_sense_are_all_refused(client: Client, released: Released):
    """Of mutations those that still make sense are left out: a server may answer these."""
    rng = np.random.default_rng(0)
    good = [
        {"user": released.samples[0].id, "k": 3, "beams": 8, "exclude_seen": True, "exclude": [1, 2], "diversity": 0.0},
        {
            "history": [
                {"item": 3, "timestamp_ms": 5, "playtime_s": 1.5, "duration_s": 3.0, "feedback": ["click"]},
                {"item": 4, "timestamp_ms": 6, "playtime_s": None, "duration_s": None, "feedback": []},
            ],
            "user_features": [0, 0],
            "request_ms": 10,
            "allow": [5, 6],
        },
    ]
    for body in good:
        assert client.recommend(**body).status == 200
    refused = answered = 0
    while refused < 500:
        reply = client.ask("POST", "/recommend", mutated(rng, good[(refused + answered) % 2]))
        if reply.status == 200:
            answered += 1
            assert answered < 250, "mutations are too mild"
            continue
        assert reply.status in (400, 404, 422), reply
        assert reply.json.keys() == {"error"} and "Traceback" not in reply.text and len(reply.text) < 2000
        refused += 1
    assert client.recommend(**good[0]).status == 200


def test_bodies_that_are_too_large_are_refused_however_they_come(client: Client):
    large = json.dumps({"user": "x" * (MAX_BODY + 1)}).encode()
    for _ in range(3):
        assert client.ask("POST", "/recommend", large).status == 413
    assert client.get("/healthz").status == 200


def test_what_is_not_even_http_does_not_harm(client: Client, released: Released):
    rng = np.random.default_rng(1)
    for n in range(30):
        with socket.create_connection(("127.0.0.1", client.port), timeout=10) as connection:
            connection.sendall((b"POST /recommend HTTP/1.1\r\n" if n % 2 else b"") + rng.bytes(200) + b"\r\n\r\n")
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(65536)
        assert not answer or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), answer
    assert client.recommend(user=released.samples[0].id).status == 200
