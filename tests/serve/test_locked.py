"Another process holds a database of the server: nobody else waits, and nothing is lost."

import sqlite3
import threading
import time

import httpx
import pytest
from serve_server import PATIENCE, serving, until

from llmkit.serve.events import Events
from llmkit.serve.keys import Keys
from llmkit.serve.limits import Limits
from llmkit.serve.store import hurried

ASK = {"model": "bank", "prompt": "count", "max_tokens": 12, "temperature": 0}


@pytest.fixture
def limited(make_gateway, tmp_path):
    "A server with a key whose account has limits: its gateway, its address and the header."
    keys = Keys(tmp_path / "serve.db")
    text, _ = keys.create("team")
    keys.allow("team", rpm=1000, tpm=100_000)
    gateway = make_gateway(keys=keys, limits=Limits(tmp_path / "serve.db"))
    with serving(gateway) as url:
        yield gateway, url, {"authorization": f"Bearer {text}"}


def hold(path):
    "Another process's lock."
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    db.execute("BEGIN IMMEDIATE")
    return db


def longest_health(url, end):
    "The longest time that /health took until something ended, in seconds."
    worst = 0.0
    while not end.is_set():
        start = time.monotonic()
        assert httpx.get(f"{url}/health", timeout=PATIENCE).status_code == 200
        worst = max(worst, time.monotonic() - start)
    return worst


def test_a_locked_serve_db_is_a_503_and_holds_up_nobody(limited, tmp_path):
    gateway, url, key = limited
    db, end, got = hold(tmp_path / "serve.db"), threading.Event(), []

    def ask():
        got.append(httpx.post(f"{url}/v1/completions", json=ASK, headers=key, timeout=PATIENCE))
        end.set()

    thread = threading.Thread(target=ask)
    thread.start()
    assert longest_health(url, end) < 1.5
    thread.join()
    assert got[0].status_code == 503 and int(got[0].headers["retry-after"]) >= 1
    assert got[0].json()["error"]["code"] == "database_busy"
    db.execute("COMMIT")
    assert httpx.post(f"{url}/v1/completions", json=ASK, headers=key, timeout=PATIENCE).status_code == 200


def test_a_locked_events_db_takes_no_answer_away_and_loses_no_event(limited, tmp_path):
    gateway, url, key = limited
    db, start = hold(tmp_path / "events.db"), time.monotonic()
    ids = [httpx.post(f"{url}/v1/completions", json=ASK, headers=key, timeout=PATIENCE).json()["id"] for _ in range(3)]
    assert time.monotonic() - start < 5 and not gateway.events.since()
    said = {"id": ids[0], "rating": 1}
    assert httpx.post(f"{url}/v1/feedback", json=said, headers=key, timeout=PATIENCE).status_code in (404, 503)
    db.execute("COMMIT")
    until(lambda: len(gateway.events.since()) == 3, "the events")
    assert [e["id"] for _, e in gateway.events.since()] == ids, "in their order"
    assert httpx.post(f"{url}/v1/feedback", json=said, headers=key, timeout=PATIENCE).status_code == 200


def test_a_damaged_events_db_is_a_failure_of_the_server_and_names_no_file(make_gateway, tmp_path, caplog):
    event = {"kind": "feedback", "rating": 1, "success": None, "label": None, "time": 1.0}
    log = Events(tmp_path / "events.db")
    log.append(*({**event, "id": f"a{i:05}"} for i in range(900)))
    log.store.checkpoint()
    log.store.close()
    with open(tmp_path / "events.db", "r+b") as f:
        f.seek(4 * 4096)
        f.write(b"x" * (f.seek(0, 2) - f.seek(4 * 4096)))
    with serving(make_gateway()) as url:
        got = httpx.post(f"{url}/v1/feedback", json={"id": "a00450", "rating": 1}, timeout=PATIENCE)
    assert got.status_code == 500 and "events.db" not in got.text
    assert "events.db: is damaged: database disk image is malformed" in caplog.text


def test_others_write_while_old_events_are_deleted(tmp_path, monkeypatch):
    log, between = Events(tmp_path / "e.db", clock=lambda: 100.0), []
    old = {"kind": "feedback", "id": "a", "rating": 1, "success": None, "label": None}
    log.append(*({**old, "time": float(i)} for i in range(60)))

    def pause(seconds):
        with hurried():  # nobody waits for the database here
            log.append({**old, "time": 99.0, "id": "new"})
        between.append(seconds)

    monkeypatch.setattr("llmkit.serve.store.PORTION", 20)
    monkeypatch.setattr("llmkit.serve.store.time.sleep", pause)
    assert log.expire(50.0) == 50 and len(between) == 2
    assert [e["id"] for e in log.all()] == ["a"] * 10 + ["new"] * 2
