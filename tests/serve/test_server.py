"""The server over HTTP: what it answers, what it refuses and how, and how it leaves."""

import concurrent.futures
import importlib
import json
import math
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from served import BEAMS, Client, offline_lists, serving
from tiny import COMPILED

from onerec_jax.errors import InputError
from onerec_jax.generate.recommender import Recommender
from onerec_jax.generate.step import ListOptions
from onerec_jax.serve import server as server_module
from onerec_jax.serve.released import Released


def metric(client: Client, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", client.get("/metrics").text, re.M)
    return float(found[1]) if found else 0.0


def items(reply) -> list:
    assert reply.status == 200, reply.text
    return [item["item"] for item in reply.json["items"]]


def test_a_list_has_the_ids_titles_and_scores_of_the_list_offline(
    client: Client, released: Released, recommender: Recommender
):
    user = released.samples[1]
    expected = offline_lists(recommender, [user.row], ListOptions(BEAMS, BEAMS), None)
    reply = client.recommend(user=user.id, k=6)
    rows = expected.items[0, :6].tolist()
    assert items(reply) == [int(recommender.dataset.item_ids[row]) for row in rows]
    assert [i["title"] for i in reply.json["items"]] == [recommender.dataset.items.text[row] for row in rows]
    np.testing.assert_allclose([i["score"] for i in reply.json["items"]], expected.scores[0, :6], atol=1e-4)
    assert (reply.json["k"], reply.json["beams"]) == (6, BEAMS) and reply.json["milliseconds"] > 0


def test_lists_hold_what_is_allowed_and_not_excluded_or_seen(client: Client, released: Released):
    user = released.samples[0]
    seen = {released.item_ids[row] for row in user.seen}
    usual = items(client.recommend(user=user.id, k=BEAMS))
    assert len(usual) == BEAMS and not seen & set(usual)
    less = items(client.recommend(user=user.id, k=BEAMS, exclude=usual[:3]))
    assert not set(usual[:3]) & set(less) and less[0] == usual[3]
    assert items(client.recommend(user=user.id, k=BEAMS, allow=usual[4:7])) == usual[4:7]
    assert set(items(client.recommend(user=user.id, allow=[*seen][:2], exclude_seen=False))) == {*[*seen][:2]}
    assert items(client.recommend(user=user.id, allow=[])) == []
    assert items(client.recommend(user=user.id, k=2)) == usual[:2]


def test_a_history_may_be_asked_for_with_ids_as_text_and_nothing_known_of_its_events(
    client: Client, released: Released
):
    history = [{"item": str(item), "timestamp_ms": 1000 * n} for n, item in enumerate(released.item_ids[:3])]
    reply = client.recommend(history=history, request_ms=10_000)
    assert reply.status == 200 and not {0, 1, 2} & set(items(reply))
    assert items(client.recommend(history=[])) != items(reply)


def test_health_users_and_page_say_what_is_served(client: Client, released: Released):
    health = client.get("/healthz")
    assert health.status == 200 and health.json["ready"]
    assert (health.json["model"], health.json["step"], health.json["hash"]) == ("tiny", 6, released.digest)
    listed = client.get("/users").json["users"]
    assert listed == [{"id": user.id, "events": len(user.events)} for user in released.samples]
    user = client.get(f"/users/{listed[0]['id']}").json
    first = user["history"][0]
    assert len(user["history"]) == listed[0]["events"]
    assert first["title"] == released.titles[released.item_row[str(first["item"])]]
    page = client.get("/")
    assert page.status == 200 and page.headers["Content-Type"].startswith("text/html")
    assert not re.search(r"https?://|@import|src=", page.text), "the page loads nothing from anywhere"


def test_metrics_count_answers_batches_and_compiles(client: Client):
    ok, waited = 'onerec_requests_total{path="/recommend",status="200"}', "onerec_recommend_seconds_count"
    before = [metric(client, name) for name in (ok, waited, "onerec_batch_size_sum", "onerec_compiles_total")]
    user = client.get("/users").json["users"][0]["id"]
    for _ in range(3):
        assert client.recommend(user=user).status == 200
    assert client.recommend(user=user, k=-1).status == 422
    after = [metric(client, name) for name in (ok, waited, "onerec_batch_size_sum", "onerec_compiles_total")]
    assert [b - a for a, b in zip(before, after, strict=True)] == [3, 3, 3, 0]
    assert metric(client, "onerec_queue_depth") == 0
    assert metric(client, 'onerec_requests_total{path="/recommend",status="422"}') >= 1


ME = "the first sample user"
EVENT = {"item": 3, "timestamp_ms": 5}
REFUSED = {
    "nothing": ({}, 422, "user: give either"),
    "two ways to name a user": ({"user": ME, "history": []}, 422, "user: give either"),
    "an unknown user": ({"user": "nobody"}, 404, "user: no sample user 'nobody'"),
    "a user that is a list": ({"user": [1]}, 422, "user: an id is an integer or a string"),
    "a user that is true": ({"user": True}, 422, "user: an id is"),
    "an unknown field": ({"user": ME, "kk": 3}, 422, "kk: there is no such field"),
    "a field that is called as a type": ({"user": ME, "int": 3}, 422, "int: there is no such field"),
    "no items": ({"user": ME, "k": 0}, 422, "k: input should be greater than or equal to 1"),
    "half an item": ({"user": ME, "k": 1.5}, 422, "k: input should be a valid integer"),
    "more items than beams": ({"user": ME, "k": BEAMS + 1}, 422, f"k: {BEAMS} beams lead to lists of {BEAMS}"),
    "beams that are not on offer": ({"user": ME, "beams": 7}, 422, "beams: this server searches with 8 beams, not 7"),
    "a diversity that is not on offer": ({"user": ME, "diversity": 0.3}, 422, "diversity: choose one of 0, 0.25"),
    "an item nobody knows": ({"user": ME, "exclude": [3, "x"]}, 422, "exclude[1]: no item 'x'"),
    "an item of no type": ({"user": ME, "allow": [None]}, 422, "allow[0]: an id is an integer or a string"),
    "a long list": ({"user": ME, "exclude": [3] * 1025}, 422, "exclude: list should have at most 1024 items"),
    "a long history": ({"history": [EVENT] * 5001}, 422, "history: list should have at most 5000 items"),
    "an unknown item in a history": ({"history": [EVENT, {**EVENT, "item": 10**6}]}, 422, "history[1].item: no item"),
    "an unknown label": ({"history": [{**EVENT, "feedback": ["love"]}]}, 422, "history[0].feedback: no label 'love'"),
    "an event without a time": ({"history": [{"item": 3}]}, 422, "history[0].timestamp_ms: field required"),
    "a negative time": ({"history": [{**EVENT, "timestamp_ms": -5}]}, 422, "history[0].timestamp_ms: input should"),
    "a request before its history": ({"history": [EVENT], "request_ms": 4}, 422, "request_ms: the history holds"),
    "an unknown field of an event": ({"history": [{**EVENT, "title": ""}]}, 422, "history[0].title: there is no such"),
    "too few features": ({"history": [], "user_features": [1]}, 422, "user_features: the model reads 2 features"),
    "a feature past the last": ({"history": [], "user_features": [1, 99]}, 422, "user_features[1]: must be from 0"),
}


@pytest.mark.parametrize(("body", "status", "sentence"), REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_be_answered_is_refused_by_name(client: Client, released: Released, body, status, sentence):
    if body.get("user") == ME:
        body = {**body, "user": released.samples[0].id}
    reply = client.ask("POST", "/recommend", json.dumps(body).encode())
    assert reply.status == status
    assert reply.json["error"].startswith(sentence) and "\n" not in reply.json["error"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/recommend", b"", 400),
        ("POST", "/recommend", b"{", 400),
        ("POST", "/recommend", b'{"user": NaN}', 400),
        ("POST", "/recommend", b"\xff\xfe", 400),
        ("POST", "/recommend", b"[" * 100_000, 400),
        ("POST", "/recommend", b'{"k": ' + b"9" * 5000 + b"}", 400),
        ("POST", "/recommend", b"[1]", 422),
        ("POST", "/recommend", b" " * (server_module.MAX_BODY + 1), 413),
        ("GET", "/recommend", None, 405),
        ("POST", "/healthz", b"", 405),
        ("GET", "/users/nobody", None, 404),
        ("GET", "/nowhere", None, 404),
        ("GET", "/%00", None, 404),
    ],
)
def test_what_is_no_request_is_refused_in_json(client: Client, method: str, path: str, body: bytes, status: int):
    reply = client.ask(method, path, body)
    assert reply.status == status and reply.json.keys() == {"error"}


def test_a_full_queue_sends_away_with_a_time_to_come_back(released: Released, monkeypatch: pytest.MonkeyPatch):
    run, may_run = server_module.Engine.run, threading.Event()

    def held(self, queries):
        assert may_run.wait(60)
        return run(self, queries)

    user = released.samples[0].id
    with (
        serving(released, max_batch=1, queue=2, max_wait_ms=0) as client,
        concurrent.futures.ThreadPoolExecutor(3) as pool,
    ):
        monkeypatch.setattr(server_module.Engine, "run", held)
        first = pool.submit(client.recommend, user=user)
        deadline = time.monotonic() + 30
        while metric(client, "onerec_batch_size_count") < 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        waiting = [pool.submit(client.recommend, user=user) for _ in range(2)]
        while metric(client, "onerec_queue_depth") < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        refused = client.recommend(user=user)
        assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
        may_run.set()
        assert [job.result().status for job in (first, *waiting)] == [200] * 3
        assert client.recommend(user=user).status == 200


def test_a_failure_of_the_model_is_told_without_its_traceback(client: Client, released: Released, monkeypatch):
    def broken(self, queries):
        raise RuntimeError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(server_module.Engine, "run", broken)
        reply = client.recommend(user=released.samples[0].id)
    assert reply.status == 500 and "secret" not in reply.text
    assert client.recommend(user=released.samples[0].id).status == 200


def test_a_server_that_is_told_to_end_answers_what_it_has_and_ends_well(export: Path, released: Released):
    """With `onerec serve`, which waits two seconds for others; requests are under way when the signal comes."""
    cache = f"import jax; jax.config.update('jax_compilation_cache_dir', {str(COMPILED)!r})"
    program = f"{cache}; import sys; from onerec_jax import cli; sys.argv[0] = 'onerec'; cli.main()"
    words = ["serve", str(export), "--port", "0", "--max-batch", "4", "--max-wait-ms", "2000"]
    process = subprocess.Popen([sys.executable, "-c", program, *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())[1])  # type: ignore[index]
        assert process.stdout.readline().startswith("ready after ")
        client = Client(port)
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(client.recommend, user=user.id) for user in released.samples[:3]]
            deadline = time.monotonic() + 20
            while metric(client, "onerec_queue_depth") < 3 and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            assert [job.result().status for job in asked] == [200] * 3
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def test_settings_and_folders_that_make_no_sense_are_refused_in_one_sentence(onerec, export: Path, tmp_path: Path):
    for words, sentence in (
        ([str(tmp_path)], f"onerec: {tmp_path} is no export directory"),
        ([str(export), "--beams", "8;9"], "onerec: --beams 8;9 must be numbers with commas between them"),
        ([str(export), "--beams", "0"], "onerec: --beams 0 must be numbers from 1 on"),
        ([str(export), "--max-batch", "0"], "onerec: --max-batch 0 must be 1 at least"),
        ([str(export), "--queue", "0"], "onerec: --queue 0 must be 1 at least"),
        ([str(export), "--host", "256.0.0.1"], "onerec: cannot listen at 256.0.0.1, port 8000"),
    ):
        answer = onerec("serve", *words)
        assert answer.code == 2 and answer.err.startswith(sentence), answer
        assert answer.err.count("\n") == 1


def test_without_aiohttp_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "onerec_jax.serve.server")
    with pytest.raises(InputError, match=r"pip install 'onerec_jax\[serve\]'"):
        importlib.import_module("onerec_jax.serve.server")


def test_scores_are_log_probabilities_of_lists_that_fall(client: Client, released: Released):
    scores = [item["score"] for item in client.recommend(user=released.samples[2].id, k=BEAMS).json["items"]]
    assert scores == sorted(scores, reverse=True) and all(math.isfinite(s) and s <= 0 for s in scores)
