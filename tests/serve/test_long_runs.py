"What happens around a server that runs for months: files that are moved away, rows that get old, a disk that stays full."

import asyncio
import os
import sqlite3
import time

import httpx
import pytest
from serve_server import PATIENCE, serving, until

from llmkit.runtime.dummy import DummyEngine
from llmkit.serve import app
from llmkit.serve.samples import Sampler, Shares, Texts

ASK = {"model": "bank", "prompt": "card", "max_tokens": 4}


def ask(url):
    return httpx.post(f"{url}/v1/completions", json=ASK, timeout=PATIENCE).status_code


def lost(gateway):
    return gateway.metrics.registry.get_sample_value("llmkit_event_failures_total")


def test_a_log_that_somebody_moved_away_is_told_of_and_costs_no_answer(make_gateway, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(app, "CHECKPOINT", 0.05)
    gateway = make_gateway()
    with serving(gateway) as url:
        assert ask(url) == 200 and lost(gateway) == 0
        os.rename(tmp_path / "events.db", tmp_path / "old.db")
        assert (ask(url), ask(url), lost(gateway)) == (200, 200, 2)
        until(lambda: "events.db: the file that was opened is not here any more" in caplog.text, "a line in the log")
        time.sleep(0.5)
        assert len([r for r in caplog.records if r.name == "llmkit.serve"]) == 1, "once, and not at each look"
        os.rename(tmp_path / "old.db", tmp_path / "events.db")
        assert (ask(url), lost(gateway), len(gateway.events.since())) == (200, 2, 2)


@pytest.fixture
def sampled(make_gateway, tmp_path):
    "A server that keeps every text."
    gateway = make_gateway(sampler=Sampler(Shares(texts=1.0), Texts(tmp_path / "texts.db")))
    with serving(gateway) as url:
        yield gateway, url


def test_a_text_waits_while_another_process_holds_its_database(sampled, tmp_path):
    gateway, url = sampled
    db = sqlite3.connect(tmp_path / "texts.db", isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    ids = [httpx.post(f"{url}/v1/completions", json=ASK, timeout=PATIENCE).json()["id"] for _ in range(2)]
    assert not gateway.sampler.texts.get(*ids)
    db.execute("COMMIT")
    until(lambda: len(gateway.sampler.texts.get(*ids)) == 2, "the texts")
    assert lost(gateway) == 0


def test_old_texts_go_in_portions_and_by_an_index(tmp_path, monkeypatch):
    texts, between = Texts(tmp_path / "texts.db", clock=lambda: 100.0), []
    with texts.store.write() as db:
        db.executemany("INSERT INTO texts VALUES (?, ?, '')", [(f"a{i}", float(i)) for i in range(60)])
    monkeypatch.setattr("llmkit.serve.store.PORTION", 20)
    monkeypatch.setattr(
        "llmkit.serve.store.time.sleep", lambda s: (texts.put(f"n{len(between)}", ""), between.append(s))
    )
    assert texts.expire(50.0) == 50 and len(between) == 2
    plan = texts.store.read("EXPLAIN QUERY PLAN SELECT rowid FROM texts WHERE time < 1 LIMIT 9")
    assert "texts_time" in plan[0]["detail"]


def test_what_fails_every_second_is_logged_when_it_is_new(caplog):
    faults = [OSError("disk full")] * 4 + [None, OSError("disk full"), KeyError("a secret"), None]

    def work():
        if faults and (fault := faults.pop(0)) is not None:
            raise fault

    async def main():
        task = asyncio.create_task(app._again(work, 0.001))
        while faults:
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(main())
    said = [r.getMessage().split(": ", 1)[1] for r in caplog.records if r.name == "llmkit.serve"]
    assert said == ["OSError: disk full", "OSError: disk full", "KeyError"]


def test_a_refusal_in_a_language_that_is_not_known_is_nobodys_to_deny(make_gateway):
    replies = {"card": "Your card is on its way.", "thai": "ขออภัย ฉันไม่สามารถช่วยเรื่องนี้ได้"}
    gateway = make_gateway(DummyEngine(replies=replies))
    with serving(gateway) as url:
        for prompt in replies:
            said = httpx.post(
                f"{url}/v1/completions", json={**ASK, "prompt": prompt, "max_tokens": 60}, timeout=PATIENCE
            )
            assert said.status_code == 200
    assert [e["refused"] for e in gateway.events.all("request")] == [False, None]
