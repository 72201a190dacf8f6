"""The page, in a real browser without a screen: it shows what the server answers to what its controls say."""

from pathlib import Path

import pytest
from chromium import Unavailable, elements, install, part, texts
from served import BEAMS, Client

from onerec_jax.serve.released import Released


@pytest.fixture(scope="module", autouse=True)
def browser():
    try:
        install()
    except Unavailable as reason:
        pytest.fail(str(reason))


def titles(html: str, identity: str) -> list[str]:
    return texts(part(html, identity), "title")


def test_the_page_shows_a_users_history_and_list(client: Client, released: Released, tmp_path: Path):
    user = released.samples[3]
    html = elements(f"http://127.0.0.1:{client.port}/#user={user.id}", tmp_path)
    expected = client.recommend(user=user.id).json["items"]
    assert titles(html, "list") == [item["title"] for item in expected] and len(expected) == 5
    assert [float(score) for score in texts(part(html, "list"), "soft small number")] == [
        round(item["score"], 2) for item in expected
    ]
    history = [event["title"] for event in client.get(f"/users/{user.id}").json["history"]]
    assert titles(html, "past") == history[::-1][:20]
    assert f"{released.name}, step {released.step}, {len(released.item_ids)} items" in html
    assert "answered in " in html and 'id="problem" role="alert" hidden' in html


def test_the_page_asks_for_what_its_address_says(client: Client, released: Released, tmp_path: Path):
    user = released.samples[2].id
    html = elements(
        f"http://127.0.0.1:{client.port}/#user={user}&k={BEAMS}&beams={BEAMS}&diversity=2&seen=in", tmp_path, "420,900"
    )
    expected = client.recommend(user=user, k=BEAMS, diversity=2, exclude_seen=False).json["items"]
    assert titles(html, "list") == [item["title"] for item in expected] and len(expected) == BEAMS


def test_the_page_says_what_went_wrong(client: Client, released: Released, tmp_path: Path, monkeypatch):
    def broken(self, queries):
        raise RuntimeError

    monkeypatch.setattr("onerec_jax.serve.engine.Engine.run", broken)
    html = elements(f"http://127.0.0.1:{client.port}/#user={released.samples[0].id}", tmp_path)
    assert "the server failed; its log says why" in html and 'role="alert" hidden' not in html
