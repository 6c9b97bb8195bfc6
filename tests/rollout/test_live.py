"A server with real requests while releases come and go: a bad one is stopped, a good one stays, an undo takes it back."

import asyncio
import itertools
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from rollout_road import CANARY, SECTION, Recorder
from serve_server import PATIENCE, serving, until

from llmkit.core.errors import KitError
from llmkit.release.registry import answering
from llmkit.rollout.commands import rollout_status
from llmkit.rollout.controller import Controller
from llmkit.rollout.live import Live
from llmkit.rollout.store import Store, newest
from llmkit.runtime.dummy import DummyEngine
from llmkit.serve.backend import EngineBackend
from llmkit.serve.call import parse
from llmkit.serve.events import Events
from llmkit.serve.gateway import ANYONE, Gateway

pytestmark = pytest.mark.alone

REPLIES = {"card": "lost_card: Blocked."}
SHORT = {"min_duration": "1s", "max_duration": "10m", "min_samples": 40}
RAILS = [{"metric": "error_rate", "margin": 0.4, "hard_stop": {"max": 0.3, "min_n": 20}}]
QUICK = CANARY | {"steps": [{"setWeight": 50}, {"analysis": SHORT}], "canary": RAILS}
AFTER_SHADOW = SECTION | {
    "steps": [{"shadow": {"percent": 100}}, {"analysis": SHORT}, *QUICK["steps"]],
    "shadow": [{"metric": "error_rate", "noninferiority": 0.4, "against": "baseline", "min_n": 20}],
    "canary": RAILS,
}


class Broken(DummyEngine):
    "Passes its self-test, and then fails on every question of a customer."

    def next_logits(self, prompt, answer=()):
        if "my card is gone" in self.tokenizer.decode(list(prompt)):
            raise RuntimeError("a bad release")
        return super().next_logits(prompt, answer)


class Slow(DummyEngine):
    "Takes its time to load."

    def __init__(self):
        time.sleep(0.3)
        super().__init__(replies=REPLIES, seed=1)


ENGINES = {"sha256:a": lambda: DummyEngine(replies=REPLIES), "sha256:bad": Broken, "sha256:good": Slow}
ENDLESS = SHORT | {"min_samples": 20_000}


class Town:
    "A server, customers, and somebody in another process who gives orders."

    def __init__(self, folder):
        self.folder, self.registry = folder, Recorder(folder / "registry.json")
        self.store = Store(folder / "rollouts.db")
        self.answers, self.ids, self._go = [], itertools.count(), threading.Event()

    @contextmanager
    def server(self, release="sha256:a", **options):
        "The address of a server, and what follows the rollouts there."
        gateway = Gateway("bank-support", {"baseline": self.open(release)}, events=Events(self.folder / "events.db"))
        options = {"every": 0.05} | options
        live = Live(gateway, Store(self.folder / "rollouts.db"), self.registry, self.open, **options)
        with serving(gateway, beside=live.beside()) as url:
            yield url, live

    def open(self, release):
        "A release as the server loads it."
        if release not in ENGINES:
            raise OSError("the disk has lost it")
        return EngineBackend(ENGINES[release](), release=release)

    @contextmanager
    def customers(self, url, n=4, **how):
        "Ask all the time, each time as somebody else."
        stop = threading.Event()

        def ask():
            with httpx.Client(timeout=PATIENCE) as c:
                while not stop.is_set():
                    i = next(self.ids)
                    said = [{"role": "user", "content": "my card is gone"}]
                    body = {"model": "bank-support", "user": f"u{i}", "max_tokens": 4, "messages": said} | how
                    got = c.post(f"{url}/v1/chat/completions", json=body)
                    name = got.json().get("system_fingerprint", "") if got.status_code == 200 else "error"
                    self.answers.append((i, got.status_code, name))

        threads = [threading.Thread(target=ask) for _ in range(n)]
        for t in threads:
            t.start()
        try:
            yield
        finally:
            stop.set()
            for t in threads:
                t.join(PATIENCE)

    def order(self, id, kind, **more):
        "Give an order as another process does."
        return Controller(self.store, id, self.registry).command(kind, "ann", **more)

    def begin(self, id, canary, section=QUICK, champion="sha256:a"):
        "Begin a rollout as another process does."
        self.store.create(id, section)
        return self.order(id, "start", model="bank-support", releases={"baseline": champion, "canary": canary})

    def phase(self, id):
        "Where a rollout stands."
        return self.store.load(id).state.phase

    def canary(self, id):
        "How many of the canary's answers the log knows."
        arm = self.store.load(id).window.arms.get("canary")
        return arm.n if arm else 0

    def recent(self, since):
        "Who answered from some answer on."
        return Counter(name for _, _, name in self.answers[since:])


@pytest.fixture
def town(tmp_path):
    return Town(tmp_path)


def fingerprint(release):
    return f"llmkit-{release.removeprefix('sha256:')[:12]}"


def test_a_bad_release_is_stopped_and_a_good_one_stays_until_it_is_undone(town):
    with town.server() as (url, live), town.customers(url):
        town.begin("r1", "sha256:bad")
        until(lambda: town.phase("r1") == "Degraded", "the abort")
        state = town.store.load("r1").state
        assert state.aborted and state.weights == {"baseline": 100.0}
        harmed = sum(code != 200 for _, code, _ in town.answers)
        assert 0 < harmed < 200, "some were harmed before it could be known, and no more"
        until(lambda: live.controller.state.finished, "the server's knowledge")
        time.sleep(0.2)  # requests that were under way
        mark = len(town.answers)
        until(lambda: len(town.answers) > mark + 50, "more answers")
        assert set(town.recent(mark)) == {fingerprint("sha256:a")}

        town.begin("r2", "sha256:good", AFTER_SHADOW)
        until(lambda: town.phase("r2") == "Healthy", "the promotion")
        moved = {"champion": "sha256:good", "previous": "sha256:a"}
        until(lambda: town.registry.read()["aliases"] == moved, "the promise that was kept")
        until(lambda: live.controller.state.finished, "the server's knowledge")
        assert live.sole() == "canary"
        time.sleep(0.2)
        mark = len(town.answers)
        until(lambda: len(town.answers) > mark + 50, "more answers")
        assert set(town.recent(mark)) == {fingerprint("sha256:good")}
        page = httpx.get(f"{url}/metrics").text
        assert 'llmkit_rollout_phase{model="bank-support",phase="Healthy"} 1.0' in page

        began = time.monotonic()
        town.order("r2", "undo", because="customers complain")
        until(lambda: set(town.recent(-20)) == {fingerprint("sha256:a")}, "the way back")
        assert time.monotonic() - began < 30
        assert town.registry.read()["aliases"]["champion"] == "sha256:a"
    seen = [i for i, _, _ in town.answers]
    assert len(set(seen)) == len(seen) == next(town.ids), "every request was answered, once"
    assert sum(code != 200 for _, code, _ in town.answers) < harmed + 50, "nobody was harmed by the good one"
    logged = [e for e in Events(town.folder / "events.db").all("request")]
    assert len(logged) == len(town.answers)


def test_every_copy_for_the_shadow_is_accounted_for(town):
    endless = {"shadow": {"percent": 100}}, {"analysis": ENDLESS}
    with town.server() as (url, live), town.customers(url):
        town.begin("r1", "sha256:bad", AFTER_SHADOW | {"steps": [*endless, *QUICK["steps"]]})
        until(lambda: live.shadow is not None and live.shadow.counts["failed"] > 20, "copies")
        counts = live.shadow.counts
        assert counts["sent"] == counts["ok"] + counts["failed"] + counts["dropped"] + counts["waiting"]
        assert (
            float(
                httpx.get(f"{url}/metrics").text.split('llmkit_mirror_requests_total{result="failed"} ')[1].split()[0]
            )
            > 20
        )
    assert {code for _, code, _ in town.answers} == {200}, "whatever the shadow does, no user sees it"
    shadows = [e["result"] for e in Events(town.folder / "events.db").all("shadow")]
    assert len(shadows) > 20 and "failed" in shadows


COMPARED = AFTER_SHADOW | {
    "shadow": [
        {"metric": "label_agreement", "min": 0.8, "bound": "wilson", "min_n": 20},
        {"metric": "agreement", "min": 0.9, "min_n": 20},
    ]
}


@pytest.mark.parametrize("asked", [{}, {"temperature": 1.0, "top_p": 0.95, "seed": 7}], ids=["unset", "at 1"])
@pytest.mark.parametrize(("says", "ends"), [("lost_card: Blocked.", "Healthy"), ("fees: 3 EUR.", "Degraded")])
def test_answers_that_are_drawn_by_chance_are_compared_by_a_second_pair(town, monkeypatch, asked, says, ends):
    for release, said in (("sha256:a", REPLIES["card"]), ("sha256:good", says)):  # each word of it 3 in 10 times
        monkeypatch.setitem(ENGINES, release, lambda said=said: DummyEngine(replies={"card": said}, sure=1.0))
    with town.server() as (url, live), town.customers(url, max_tokens=24, **asked):
        town.begin("r1", "sha256:good", COMPARED)
        until(lambda: town.phase("r1") in ("Paused", ends), "the end")
        state = town.store.load("r1").state
        assert state.phase == ends and (ends == "Healthy" or "label_agreement" in state.reason)
        until(lambda: live.shadow is None and not live.mirrors[0].counts["waiting"], "the end of the copies")
        page = httpx.get(f"{url}/metrics").text
    counts = live.mirrors[0].counts
    assert counts["again"] >= counts["ok"] > 20 and counts["failed"] == counts["waiting"] == 0
    assert float(page.split("\nllmkit_mirror_again_total ")[1].split()[0]) == counts["again"]
    events = list(Events(town.folder / "events.db").all())
    shadows = [e for e in events if e["kind"] == "shadow" and e["result"] == "ok"]
    assert {(e["reason"], e["exact"], e["label_same"]) for e in shadows} == {("again", *2 * (ends == "Healthy",))}
    assert sum(e["kind"] == "request" for e in events) == len(town.answers), "a second answer is no request"
    assert {code for _, code, _ in town.answers} == {200}


class Waits(DummyEngine):
    "Answers one question only when it may."

    def __init__(self):
        super().__init__(replies=REPLIES)
        self.may = threading.Event()

    def next_logits(self, prompt, answer=()):
        if "slow" in self.tokenizer.decode(list(prompt)):
            assert self.may.wait(PATIENCE)
        return super().next_logits(prompt, answer)


def test_a_second_answer_takes_no_slot_that_a_user_waits_for(town):
    engine = Waits()
    backend = EngineBackend(engine, release="sha256:a", slots=1)
    town.open = lambda release: backend
    body = {"model": "bank-support", "prompt": "card", "max_tokens": 24, "temperature": 0}
    copied = {"kind": "completion", **body}
    with town.server() as (url, live):
        user = threading.Thread(target=httpx.post, args=(f"{url}/v1/completions",), kwargs={"json": body | {"prompt": "slow"}, "timeout": PATIENCE})  # fmt: skip
        user.start()
        try:
            until(lambda: backend.stats()["running"], "the user's turn")
            assert live.copies.ask_again(copied, "sha256:a") is None
            assert backend.stats()["waiting"] == 0, "nothing was queued"
        finally:
            engine.may.set()
            user.join(PATIENCE)
        until(lambda: not backend.stats()["running"], "a free slot")
        assert live.copies.ask_again(copied, "sha256:a") == REPLIES["card"]
        with pytest.raises(KitError, match="not loaded any more"):
            live.copies.ask_again(copied, "sha256:gone")


def test_another_server_goes_on_where_the_first_one_was(town):
    waits = QUICK | {"steps": [{"setWeight": 50}, {"pause": {}}, *QUICK["steps"][1:]]}
    town.begin("r1", "sha256:good", waits)
    with town.server() as (url, live):
        until(lambda: live.controller is not None and live.controller.state.phase == "Paused", "the pause")
        first = live.controller.state
        who = {u: live.assign(u) for u in map(str, range(200))}
    with town.server() as (url, live):
        until(lambda: live.controller is not None, "the second server")
        assert live.controller.state == first and {u: live.assign(u) for u in who} == who
        assert set(who.values()) == {"baseline", "canary"} and live.sole() == ""
        town.order("r1", "resume")
        with town.customers(url):
            until(lambda: town.phase("r1") == "Healthy", "the promotion")
    with town.server("sha256:good") as (url, live):  # the champion now
        town.order("r1", "undo")
        until(lambda: live.gateway.baseline.release == "sha256:a", "the way back without a rollout in hand")


def test_who_came_while_the_candidate_was_being_loaded_is_counted_and_harms_nobody(town, capsys):
    "A server is killed in a rollout; the next one is asked while it still loads the canary."
    start = """
import threading
from test_live import ENGINES, Slow
gate = threading.Event()
def late():
    while not Path(sys.argv[1], "go").exists():
        gate.wait(0.02)
    return Slow()
ENGINES["sha256:good"] = late
"""
    rails = [{"metric": "fallback_rate", "margin": 0.05, "hard_stop": {"max": 0.1, "min_n": 5}}]
    a, good = fingerprint("sha256:a"), fingerprint("sha256:good")
    town.begin("r1", "sha256:good", QUICK | {"steps": [{"setWeight": 50}, {"analysis": ENDLESS}], "canary": rails})
    with killed_at_the_end(town.folder) as url:
        until(lambda: set(ask_all(url)) == {a, good}, "the canary")
        before = ask_all(url)
        until(lambda: town.store.load("r1").window.arms.get("canary"), "its numbers in the log")
    events = Events(town.folder / "events.db")
    last = max(seq for seq, _ in events.since())
    with killed_at_the_end(town.folder, start) as url:
        away = lambda since=last: [e for _, e in events.since(since) if e.get("unloaded")]
        until(lambda: set(ask_all(url)) == {a} and away(), "questions of the canary's users")
        assert {(e["variant"], e["fallback"], e["unloaded"]) for e in away()} == {("baseline", False, "canary")}
        line = 'llmkit_unloaded_total{model="bank-support",variant="canary"} '
        until(lambda: f"{line}{len(away())}.0" in httpx.get(f"{url}/metrics").text, "the same number in the metrics")
        (town.folder / "go").touch()
        until(lambda: ask_all(url) == before, "everybody where they were")
        counted = lambda: town.store.load("r1").window.counts["unloaded"]
        until(
            lambda: counted() == len(away(0)) >= before.count(good),
            "the count in the log, with that of the first start",
        )
        until(lambda: town.store.load("r1").window.arms["canary"].n > 10, "answers of the canary")
    fold = town.store.load("r1")
    arm = fold.window.arms["canary"]
    assert arm.rates["fallback_rate"] == [0, arm.n] and fold.state.phase == "Progressing"
    (town.folder / "settings.ini").write_text(
        f"[DEFAULT]\ntracking_uri = sqlite:///none.db\nrollouts = {town.folder}/rollouts.db\n"
    )
    assert rollout_status(settings=str(town.folder / "settings.ini")) == 0
    assert (
        f"  {len(away(0))} requests of this stage came while their variant was being loaded" in capsys.readouterr().out
    )


def test_a_release_that_cannot_be_loaded_is_aborted(town):
    town.begin("r1", "sha256:lost")
    with town.server() as (url, live), town.customers(url, 1):
        until(lambda: town.phase("r1") == "Degraded", "the abort")
        assert "the disk has lost it" in town.store.load("r1").state.reason
        until(lambda: len(town.answers) > 10, "answers")
    assert {name for _, _, name in town.answers} == {fingerprint("sha256:a")}


def test_a_retry_after_a_release_could_not_be_loaded_loads_it_again(town, monkeypatch):
    with town.server() as (url, live):
        town.begin("r1", "sha256:lost")
        until(lambda: town.phase("r1") == "Degraded", "the abort")
        assert "the disk has lost it" in town.store.load("r1").state.reason
        monkeypatch.setitem(ENGINES, "sha256:lost", Slow)
        town.order("r1", "retry")
        until(lambda: live.controller is not None and not live.trouble, "the second try")
        assert live.gateway.variants["canary"].release == "sha256:lost" and town.phase("r1") == "Progressing"


@pytest.mark.parametrize("at", ["append", "snapshot"])
def test_an_abort_that_could_not_be_written_is_tried_again_without_another_load(town, monkeypatch, at):
    tries, closed = [], []
    now = [time.time()]
    monkeypatch.setitem(ENGINES, "sha256:lost", lost(tries, closed))
    with town.server(every=PATIENCE, clock=lambda: now[0], hold=600.0) as (url, live):
        page = lambda name: httpx.get(f"{url}/metrics").text.split(f"\nllmkit_rollout_{name} ")[1].split()[0]
        degraded = lambda: page('phase{model="bank-support",phase="Degraded"}')
        until(lambda: "file" in live.faults, "the first look")
        town.begin("r1", "sha256:lost")
        with monkeypatch.context() as m:
            m.setattr(live.store, at, full_disk)
            with pytest.raises(KitError, match="the disk is full"):
                live.look()
        assert town.phase("r1") == ("Progressing" if at == "append" else "Degraded")
        assert "a part of it is missing" in live.trouble and page("trouble") == "1.0"
        live.look()
        state = town.store.load("r1").state
        assert state.phase == "Degraded" and "cannot be served: RuntimeError: a part of it is missing" in state.reason
        assert len(tries) == 1 and not live.trouble and page("trouble") == "0.0"
        until(lambda: len(closed) == 1, "the memory of the try")
        assert degraded() == "1.0", "the state of the rollout tells of it"
        now[0] += 600
        live.look()
        assert degraded() == "1.0" and page("trouble") == "0.0", "let go by the server, and still told of"
        monkeypatch.setitem(ENGINES, "sha256:lost", Slow)
        town.order("r1", "retry")
        live.look()
        assert town.phase("r1") == "Progressing" and live.gateway.variants["canary"].release == "sha256:lost"


def full_disk(*args, **kwargs):
    "What a store does that cannot write."
    raise KitError("the disk is full")


def lost(tries, closed):
    "An engine that passes no self-test; each try and each close is noted."

    class Lost(DummyEngine):
        def next_logits(self, prompt, answer=()):
            raise RuntimeError("a part of it is missing")

        def close(self):
            closed.append(self)

    def load():
        tries.append("open")
        return Lost()

    return load


def undone(town):
    "A release was promoted, its server stopped, and then the order came."
    town.begin("r1", "sha256:good", QUICK | {"steps": [{"setWeight": 50}, {"analysis": ENDLESS}]})
    with town.server() as (url, live), town.customers(url):
        until(lambda: town.canary("r1") > 10, "numbers in the log")
        town.order("r1", "promote", full=True)
    town.order("r1", "undo")


@pytest.mark.parametrize("way", ["undone", "named by a rollout"])
def test_a_champion_that_cannot_be_loaded_is_tried_again_with_growing_waits(town, monkeypatch, way):
    tries, closed = [], []
    trouble = lambda url: httpx.get(f"{url}/metrics").text.split("\nllmkit_rollout_trouble ")[1].split()[0]
    a, good = fingerprint("sha256:a"), fingerprint("sha256:good")
    if way == "undone":
        undone(town)
    now = [time.time()]
    monkeypatch.setitem(ENGINES, "sha256:a", lost(tries, closed))
    with town.server("sha256:good", every=PATIENCE, clock=lambda: now[0]) as (url, live):
        if way != "undone":
            town.begin("r1", "sha256:good")  # its baseline is not what the server has
            live.look()
            assert town.phase("r1") == "Degraded"
            assert "a part of it is missing" in town.store.load("r1").state.reason
        until(lambda: live.faults.get("champion"), "the first look") if way == "undone" else None
        live.look()
        first = len(tries)
        assert "RuntimeError: a part of it is missing; good goes on serving" in live.faults["champion"]
        assert live.faults["champion"] in live.trouble and live.trouble.endswith("after 10 s")
        for wait in (10, 20, 40, 80, 160, 320, 600, 600):
            now[0] += wait - 0.5
            live.look()
            assert len(tries) == first and trouble(url) == "1.0" and set(ask_all(url, 2)) == {good}
            now[0] += 0.5
            live.look()
            live.look()
            first += 1
            assert len(tries) == first
        until(lambda: len(closed) == len(tries), "the memory of each try")
        now[0] -= 3600  # a clock that is set back delays nothing
        live.look()
        assert len(tries) == first + 1
        monkeypatch.setitem(ENGINES, "sha256:a", lambda: DummyEngine(replies=REPLIES))
        now[0] += 600
        live.look()
        assert set(ask_all(url, 2)) == {a} and not live.trouble and trouble(url) == "0.0"
        now[0] += 600
        live.look()
        assert len(tries) == first + 1 and town.phase("r1") == "Degraded"


def test_a_champion_that_cannot_be_loaded_is_left_alone_when_another_one_is_champion(town, monkeypatch):
    tries = []
    undone(town)
    now = [time.time()]
    monkeypatch.setitem(ENGINES, "sha256:a", lost(tries, []))
    with town.server("sha256:good", every=PATIENCE, clock=lambda: now[0]) as (url, live):
        until(lambda: live.trouble, "the trouble")
        town.begin("r2", "sha256:b", champion="sha256:good")  # which is not there
        live.look()
        assert "the disk has lost it" in town.store.load("r2").state.reason and town.phase("r2") == "Degraded"
        for _ in range(4):
            now[0] += 600
            live.look()
        assert len(tries) == 1 and not live.faults["champion"], "good is champion, and served"
        assert town.store.load("r2").state.attempt == 1, "the abort of a candidate stands"


@pytest.mark.parametrize("holder", ["sha256:good", "", "sha256:a"])
def test_whom_somebody_made_champion_since_the_last_rollout_is_served_after_a_restart(town, caplog, holder):
    undone(town)  # it ended with a; without a word of the registry, or with a's, everybody gets a
    asked = []
    with town.server("sha256:good", champion=lambda: asked.append(1) or holder) as (url, live), town.customers(url):
        want = "sha256:good" if holder == "sha256:good" else "sha256:a"
        until(
            lambda: asked and not live.loader.loading and set(town.recent(-20)) == {fingerprint(want)}, "the champion"
        )
        for _ in range(3):
            live.look()
        assert len(asked) == 1 and not live.trouble and town.phase("r1") == "Degraded"
        assert ("is champion by now" in caplog.text) == (holder == "sha256:good")


def test_a_promise_that_is_still_to_be_done_counts_more_than_the_registry(town):
    undone(town)
    state = town.store.load("r1").state
    promise = next(iter(town.store.rows("select seq, n from outbox where rollout = 'r1' order by seq desc, n desc")))
    with town.store._transaction() as db:
        db.execute("update outbox set done = 0 where rollout = 'r1' and seq = ? and n = ?", promise)
    town.registry.move = lambda effect: (_ for _ in ()).throw(OSError("nobody answers"))
    with town.server("sha256:good", champion=lambda: "sha256:good") as (url, live), town.customers(url):
        until(lambda: set(town.recent(-20)) == {fingerprint("sha256:a")}, "the way back")
        assert town.store.owed(state.model)


@pytest.mark.parametrize("hold", [0.2, 600.0])
def test_an_older_rollout_is_undone_or_retried_after_a_newer_one_was_aborted(town, hold):
    waits = QUICK | {"steps": [{"setWeight": 50}, {"analysis": ENDLESS}]}
    with town.server(hold=hold) as (url, live), town.customers(url):
        town.begin("r1", "sha256:good", waits)
        until(lambda: town.canary("r1") > 10, "numbers in the log")
        town.order("r1", "promote", full=True)
        town.begin("r2", "sha256:bad", waits, champion="sha256:good")
        until(lambda: live.controller and live.controller.id == "r2", "the next rollout")
        town.order("r2", "abort")
        town.order("r1", "undo")
        until(lambda: set(town.recent(-20)) == {fingerprint("sha256:a")}, "the way back")
        town.order("r1", "retry")
        until(lambda: live.controller and live.controller.id == "r1", "the retry")
        until(lambda: town.recent(-20)[fingerprint("sha256:good")] > 3, "answers of its candidate")


class Away(Recorder):
    "A registry that nobody reaches while a file is there."

    def move(self, effect):
        if self.path.with_suffix(".away").exists():
            raise OSError("nobody answers")
        super().move(effect)


def test_a_promise_is_kept_however_long_after_the_rollout_the_registry_is_back(town):
    town.registry = Away(town.folder / "registry.json")
    away = town.folder / "registry.away"
    trouble = lambda url: httpx.get(f"{url}/metrics").text.split("\nllmkit_rollout_trouble ")[1].split()[0]
    champion, good = lambda: town.registry.read()["aliases"]["champion"], {fingerprint("sha256:good")}
    town.begin("r1", "sha256:good", QUICK | {"steps": [{"setWeight": 50}, {"analysis": ENDLESS}]})
    with town.server(hold=0.3) as (url, live), town.customers(url):
        until(lambda: town.canary("r1") > 10, "numbers in the log")
        away.touch()
        town.order("r1", "promote", full=True)
        until(lambda: live.controller is None and live.gateway.baseline.release == "sha256:good", "the end of the hold")
        assert trouble(url) == "1.0" and "nobody answers" in live.trouble
    with town.server() as (url, live):  # begun with what the registry calls champion
        until(lambda: set(ask_all(url, 2)) == good, "the winner")
        until(lambda: trouble(url) == "1.0", "the trouble")
        assert champion() == "sha256:a" and "nobody answers" in live.trouble
        away.unlink()
        until(lambda: champion() == "sha256:good", "the promise that was kept")
        until(lambda: trouble(url) == "0.0", "the end of the trouble")
        assert not town.store.owed() and set(ask_all(url, 2)) == good


def damaged(path):
    "Write nonsense over the whole file."
    path.write_bytes(b"nonsense" * (path.stat().st_size // 8))


def gone(path):
    "Take the file away."
    path.rename(path.with_suffix(".away"))


@pytest.mark.parametrize("harm", [damaged, gone])
def test_a_log_that_is_damaged_or_gone_is_told_and_costs_no_answer(town, harm, tmp_path):
    path = town.folder / "rollouts.db"
    trouble = lambda: httpx.get(f"{url}/metrics").text.split("\nllmkit_rollout_trouble ")[1].split()[0]
    town.begin("r1", "sha256:good", QUICK | {"steps": [{"setWeight": 50}, {"analysis": ENDLESS}]})
    with town.server() as (url, live):
        until(
            lambda: live.controller is not None and set(live.gateway.variants) == {"baseline", "canary"}, "the canary"
        )
        town.store.rows("pragma wal_checkpoint(truncate)")
        assert trouble() == "0.0"
        harm(path)
        until(lambda: trouble() == "1.0", "the trouble")
        assert str(path) in live.trouble and set(ask_all(url)) <= {fingerprint("sha256:a"), fingerprint("sha256:good")}
        if harm is gone:
            path.with_suffix(".away").rename(path)
            until(lambda: trouble() == "0.0", "the end of the trouble")


def test_a_server_starts_with_a_damaged_log_and_goes_on_when_it_is_put_right(town):
    path = town.folder / "other" / "rollouts.db"
    path.parent.mkdir()
    path.write_bytes(b"nonsense" * 999)
    town.folder = path.parent
    with town.server() as (url, live):
        until(lambda: "cannot open the rollouts" in live.trouble, "the trouble")
        assert set(ask_all(url)) == {fingerprint("sha256:a")}
        path.unlink()
        until(lambda: not live.trouble, "the end of the trouble")


def test_memory_is_given_back_after_a_while(town):
    with town.server(hold=0.5) as (url, live), town.customers(url):
        town.begin("r1", "sha256:good")
        until(lambda: set(live.gateway.variants) == {"baseline", "canary"}, "the canary")
        until(lambda: set(live.gateway.variants) == {"baseline"}, "one that is left")
        assert live.gateway.baseline.release == "sha256:good" and live.controller is None
        mark = len(town.answers)
        until(lambda: len(town.answers) > mark + 20, "answers")
        assert set(town.recent(mark + 10)) == {fingerprint("sha256:good")}
        assert newest(live.store, "bank-support")[1].phase == "Healthy"
    assert {code for _, code, _ in town.answers} == {200}


@pytest.mark.parametrize("ended", ["aborted", "promoted"])
@pytest.mark.parametrize("drill", [0.0, 0.2])
def test_releases_that_are_still_held_serve_the_next_rollout(town, ended, drill):
    waits = QUICK | {"steps": [{"setWeight": 50}, {"analysis": ENDLESS}]}
    with town.server(drill=drill) as (url, live), town.customers(url):
        town.begin("r1", "sha256:good", waits)
        until(lambda: town.recent(-20)[fingerprint("sha256:good")] > 3, "answers of the candidate")
        until(lambda: town.canary("r1") > 10, "its numbers in the log")
        town.order("r1", "abort") if ended == "aborted" else town.order("r1", "promote", full=True)
        until(lambda: live.controller.state.finished, "the server's knowledge")
        now, new = ("sha256:a", "sha256:good") if ended == "aborted" else ("sha256:good", "sha256:a")
        town.begin("r2", new, waits, champion=now)
        until(lambda: live.controller.id == "r2", "the next rollout")
        mark = len(town.answers)
        until(lambda: town.recent(mark)[fingerprint(new)] > 20, "answers of the next candidate")
        until(lambda: town.canary("r2") > 20, "its numbers in the log")
    events = [e for e in Events(town.folder / "events.db").all("request") if e["variant"] == "canary"]
    assert not any(e["fallback"] for e in events)
    assert {e["reason"] for e in events if e["status"] != "ok"} == ({"drill"} if drill else set())


def test_a_drill_stops_a_good_release(town):
    with town.server(drill=0.5) as (url, live), town.customers(url):
        town.begin("r1", "sha256:good")
        until(lambda: town.phase("r1") == "Degraded", "the abort")
        until(lambda: live.controller.state.finished, "the server's knowledge")
    events = list(Events(town.folder / "events.db").all("request"))
    failed = [e for e in events if e["status"] == "error"]
    assert failed and {(e["variant"], e["reason"]) for e in failed} == {("canary", "drill")}
    answered = [e for e in events if e["variant"] == "canary" and e["status"] == "ok"]
    assert abs(len(answered) - len(failed)) <= 8, "half of them, but for those under way"


class Hangs(DummyEngine):
    "Passes its self-test, and then never answers a customer."

    free = threading.Event()

    def next_logits(self, prompt, answer=()):
        if "my card is gone" in self.tokenizer.decode(list(prompt)):
            self.free.wait(PATIENCE)
        return super().next_logits(prompt, answer)


def test_a_release_that_hangs_is_stopped_while_it_hangs(town, monkeypatch):
    monkeypatch.setitem(ENGINES, "sha256:hangs", Hangs)
    stop = {"metric": "stall_rate", "margin": 0.4, "hard_stop": {"max": 0.3, "min_n": 4}}
    section = QUICK | {"canary": [stop], "stall_after": "0.3s"}
    with town.server() as (url, live), town.customers(url, n=12):
        town.begin("r1", "sha256:hangs", section)
        try:
            until(lambda: town.phase("r1") == "Degraded", "the abort")
            hanging = live.gateway.open
        finally:
            Hangs.free.set()
    assert "stall_rate" in town.store.load("r1").state.reason and hanging >= 4
    told = list(Events(town.folder / "events.db").all("stall"))
    assert len(told) >= 4 and {e["variant"] for e in told} == {"canary"}
    ended = {e["id"]: e for e in Events(town.folder / "events.db").all("request")}
    assert all(ended[e["id"]]["stalled"] for e in told) and len(ended) == len(town.answers)


class Rambles(DummyEngine):
    "Passes its self-test, and then finds no end for a customer; now and then a token comes."

    free = threading.Event()

    def __init__(self):
        super().__init__(replies={"card": "lost_card: and " + "so on " * 2000})

    def next_logits(self, prompt, answer=()):
        if "my card is gone" in self.tokenizer.decode(list(prompt)) and len(answer) > 4:
            self.free.wait(0.05)
        return super().next_logits(prompt, answer)


def test_a_release_whose_answers_do_not_end_is_stopped_while_they_run(town, monkeypatch):
    monkeypatch.setitem(ENGINES, "sha256:rambles", Rambles)
    section = QUICK | {"canary": [{"metric": "latency_p95", "max_ratio": 2.0}], "stall_after": "0.3s", "steps": [{"setWeight": 10}, *QUICK["steps"][1:]]}  # fmt: skip
    with town.server() as (url, live), town.customers(url, n=24, max_tokens=400):
        town.begin("r1", "sha256:rambles", section)
        try:
            until(lambda: town.phase("r1") == "Degraded", "the abort")
        finally:
            Rambles.free.set()
    reason = town.store.load("r1").state.reason
    assert "latency_p95" in reason and "still run" in reason
    told = list(Events(town.folder / "events.db").all("running"))
    assert len(told) >= 4 and "canary" in {e["variant"] for e in told}
    assert len({e["id"] for e in told}) == len(told), "each once"


class Stuck(EngineBackend):
    "A stand-in for a release that hangs while it is loaded, or while it tests itself."

    go, closed = threading.Event(), []  # replaced by `stuck`

    async def check(self):
        while not self.go.is_set():
            await asyncio.sleep(0.01)

    async def close(self, timeout=30.0):
        self.closed.append(timeout)
        await super().close(timeout)


@pytest.fixture(params=["loaded", "tested"])
def stuck(town, monkeypatch, request):
    "A town whose release `stuck` hangs; lets it go on, and what was closed."
    go, closed, usual = threading.Event(), [], town.open

    def opened(release):
        if release != "sha256:stuck":
            return usual(release)
        if request.param == "loaded":
            go.wait(PATIENCE)
        return Stuck(DummyEngine(replies=REPLIES), release=release)

    monkeypatch.setattr(Stuck, "go", go)
    monkeypatch.setattr(Stuck, "closed", closed)
    monkeypatch.setattr(town, "open", opened)
    yield go, closed
    go.set()


def test_an_abort_is_heard_while_a_release_hangs_before_it_serves(town, stuck, monkeypatch):
    go, closed = stuck
    waits = QUICK | {"steps": [{"setWeight": 50}, {"analysis": ENDLESS}]}
    monkeypatch.setattr("llmkit.rollout.loader.SLOW", 0.2)
    with town.server() as (url, live):
        town.begin("r1", "sha256:stuck", waits)
        until(lambda: live.trouble.startswith("loading stuck since "), "the trouble")
        assert set(ask_all(url, 4)) == {fingerprint("sha256:a")}
        town.order("r1", "abort", because="it hangs")
        town.begin("r2", "sha256:good", waits)
        until(lambda: live.controller and live.controller.id == "r2", "the next rollout")
        assert not live.trouble and town.store.load("r1").state.reason.endswith("it hangs")
        go.set()
        until(lambda: closed == [0.0], "the end of what came too late")
        assert live.gateway.variants["canary"].release == "sha256:good" and town.phase("r2") == "Progressing"


def test_a_candidate_that_hangs_before_it_serves_is_refused_after_a_while(town, stuck):
    go, closed = stuck
    town.begin("r1", "sha256:stuck")
    with town.server(load=0.5) as (url, live):
        until(lambda: town.phase("r1") == "Degraded", "the abort")
        assert "stuck: was not loaded and tested within 0.5 s" in town.store.load("r1").state.reason
        until(lambda: not live.trouble, "the end of the trouble")
        go.set()
        until(lambda: closed == [0.0], "the end of what came too late")
        assert set(ask_all(url, 4)) == {fingerprint("sha256:a")}


def test_a_champion_that_hangs_before_it_serves_is_tried_again(town, stuck, monkeypatch):
    go, closed = stuck
    monkeypatch.setattr("llmkit.rollout.live.FIRST", 0.2)
    monkeypatch.setitem(ENGINES, "sha256:stuck", ENGINES["sha256:good"])
    with monkeypatch.context() as m:
        m.delattr(town, "open")  # it was well once
        town.begin("r1", "sha256:stuck", QUICK | {"steps": [{"setWeight": 50}, {"analysis": ENDLESS}]})
        with town.server() as (url, live), town.customers(url):
            until(lambda: town.canary("r1") > 10, "numbers in the log")
            town.order("r1", "promote", full=True)
    with town.server(load=0.5) as (url, live):
        until(lambda: "within 0.5 s; a goes on serving, and it is tried again" in live.trouble, "the trouble")
        go.set()
        until(lambda: live.gateway.baseline.release == "sha256:stuck", "the champion")
        until(lambda: not live.trouble, "the end of the trouble")
        assert set(ask_all(url, 4)) == {fingerprint("sha256:stuck")}
        until(lambda: closed and set(closed) == {0.0}, "the end of what came too late")


def test_a_server_stops_at_once_while_a_release_hangs_before_it_serves(town, stuck):
    go, closed = stuck
    town.begin("r1", "sha256:stuck")
    with town.server() as (url, live):
        until(lambda: live.loader.loading, "the loading")
        began = time.monotonic()
    assert time.monotonic() - began < 5 and town.phase("r1") == "Progressing"
    go.set()
    until(lambda: closed == [0.0], "the end of what came too late")


def test_a_server_stops_soon_though_another_process_holds_the_log(town, caplog):
    with town.server() as (url, live):
        town.begin("r1", "sha256:good", QUICK | {"steps": [{"setWeight": 50}, {"analysis": ENDLESS}]})
        until(lambda: live.controller, "the rollout")
        other = sqlite3.connect(town.folder / "rollouts.db", isolation_level=None, check_same_thread=False)
        other.execute("begin immediate")
        with town.customers(url):
            until(lambda: live.controller._queue, "a request that cannot be written down")
        began = time.monotonic()
    assert time.monotonic() - began < 40 and "what was seen last is not in the log" in caplog.text
    other.execute("rollback")
    with town.server() as (url, live):
        until(lambda: live.controller and live.state.phase == "Progressing", "the rollout, by the next server")


def test_an_abort_is_felt_within_a_second_and_costs_no_request(town):
    with town.server() as (url, live), town.customers(url):
        town.begin("r1", "sha256:good", QUICK | {"steps": [{"setWeight": 50}, {"analysis": ENDLESS}]})
        good = fingerprint("sha256:good")
        until(lambda: town.recent(-20)[good] > 3, "answers of the candidate")
        ordered = time.time()
        town.order("r1", "abort", because="it is too friendly")
        until(lambda: set(town.recent(-30)) == {fingerprint("sha256:a")}, "the way back")
    events = list(Events(town.folder / "events.db").all("request"))
    last = max(e["time"] for e in events if e["variant"] == "canary")
    assert last - ordered < 1.0, "nobody was sent to the candidate later than that"
    assert {code for _, code, _ in town.answers} == {200} and len(events) == len(town.answers)


def test_ten_thousand_answers_through_a_promotion_and_a_rollback(town):
    """As in test_traffic, and here the answers are real ones: engines come and go under the requests."""
    gateway = Gateway("bank-support", {"baseline": town.open("sha256:a")}, events=Events(town.folder / "events.db"))
    live = Live(gateway, Store(town.folder / "rollouts.db"), town.registry, town.open, every=0.05, hold=0.3)
    numbers, answers = itertools.count(), {}
    said = [{"role": "user", "content": "my card is gone"}]

    async def client():
        for i in numbers:
            if i >= 10_000:
                return
            body = {"model": "bank-support", "user": f"u{i % 997}", "max_tokens": 1, "messages": said}
            x = await gateway.open_exchange(parse("chat", body), ANYONE)
            got = await x.whole()
            assert got["id"] not in answers
            answers[got["id"]] = (x.variant, x.release, got["system_fingerprint"])

    async def reached(n):
        while len(answers) < n:
            await asyncio.sleep(0.01)

    async def director():
        order = lambda *a, **k: asyncio.to_thread(town.order, "r1", *a, **k)
        await reached(1_000)
        await asyncio.to_thread(
            town.begin, "r1", "sha256:good", QUICK | {"steps": [{"setWeight": 50}, {"analysis": ENDLESS}]}
        )
        await reached(4_000)
        await order("promote", full=True)
        await reached(7_000)
        await order("undo", because="customers complain")

    async def main():
        async with live.beside():
            await asyncio.gather(director(), *(client() for _ in range(8)))
        await gateway.close()

    asyncio.run(main())
    assert len(answers) == 10_000
    assert {a[1:] for a in answers.values()} == {(r, fingerprint(r)) for r in ("sha256:a", "sha256:good")}
    logged = list(Events(town.folder / "events.db").all("request"))
    assert [e["status"] for e in logged].count("ok") == 10_000
    assert {e["id"]: (e["variant"], e["release"]) for e in logged} == {k: v[:2] for k, v in answers.items()}
    path: dict[str, list[str]] = {}
    for e in logged:
        path.setdefault(e["unit"], []).append(e["release"])
    turns = Counter(sum(a != b for a, b in itertools.pairwise(p)) for p in path.values())
    assert len(path) == 997 and set(turns) == {2}, "everybody went over once, and came back once"
    assert town.registry.read()["aliases"] == {"champion": "sha256:a", "previous": "sha256:good"}


SERVER = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_live import Events, Gateway, Live, Store, Town
from llmkit.serve.running import run
town = Town(Path(sys.argv[1]))
# more
now = town.registry.read()["aliases"]["champion"]
gateway = Gateway("bank-support", {"baseline": town.open(now)}, events=Events(town.folder / "events.db"))
live = Live(gateway, Store(town.folder / "rollouts.db"), town.registry, town.open, every=0.05)
sys.exit(run(gateway, port=0, beside=live.beside(), started=lambda line: print(line, flush=True)))
"""


@contextmanager
def killed_at_the_end(folder, more=""):
    "The address of a server in a process of its own, with some more code at its start, which is killed with -9."
    here = Path(__file__).parent
    args = [sys.executable, "-c", SERVER.replace("# more\n", more), folder, here, here.parent / "serve"]
    p = subprocess.Popen(list(map(str, args)), stdout=subprocess.PIPE, text=True, cwd=here.parents[1])
    try:
        url = p.stdout.readline().split(" on ")[1].strip().removesuffix("/v1")
        until(lambda: httpx.get(f"{url}/ready").status_code == 200, "readiness")
        yield url
    finally:
        p.send_signal(signal.SIGKILL)
        assert p.wait(PATIENCE) == -9
        p.stdout.close()


def ask_all(url, n=24):
    "Who answers each of some users; everybody is answered."
    said = [{"role": "user", "content": "my card is gone"}]
    with httpx.Client(timeout=PATIENCE) as c:
        body = {"model": "bank-support", "max_tokens": 2, "messages": said}
        got = [c.post(f"{url}/v1/chat/completions", json=body | {"user": f"k{i}"}) for i in range(n)]
    assert {g.status_code for g in got} == {200}
    return [g.json()["system_fingerprint"] for g in got]


def test_a_server_that_is_killed_in_every_step_goes_on_there(town):
    a, good = fingerprint("sha256:a"), fingerprint("sha256:good")
    steps = [{"shadow": {"percent": 100}}, {"analysis": ENDLESS}, {"setWeight": 50}, {"analysis": ENDLESS}]
    town.begin("r1", "sha256:good", AFTER_SHADOW | {"steps": steps})
    with killed_at_the_end(town.folder) as url:
        copied = lambda: list(Events(town.folder / "events.db").all("shadow"))
        until(lambda: set(ask_all(url)) == {a} and copied(), "copies")
        until(lambda: town.store.load("r1").window.pairs, "their numbers in the log")
    town.order("r1", "promote")  # nobody serves: the order waits in the log
    with killed_at_the_end(town.folder) as url:
        until(lambda: set(ask_all(url)) == {a, good}, "the canary")
        before = ask_all(url)
        until(lambda: town.store.load("r1").window.arms.get("canary"), "its numbers in the log")
    with killed_at_the_end(town.folder) as url:
        until(lambda: good in ask_all(url, 24), "the canary again")
        assert ask_all(url) == before, "every user is where they were"
        town.order("r1", "pause", because="lunch")
    with killed_at_the_end(town.folder) as url:
        until(lambda: good in ask_all(url, 24), "the canary once more")
        assert ask_all(url) == before and town.phase("r1") == "Paused", "a pause outlives its server"
        town.order("r1", "resume")
        town.order("r1", "promote", full=True)
    assert town.phase("r1") == "Healthy"
    with killed_at_the_end(town.folder) as url:
        until(lambda: set(ask_all(url)) == {good}, "the new champion")
        town.order("r1", "undo", because="customers complain")
    with killed_at_the_end(town.folder) as url:
        until(lambda: set(ask_all(url)) == {a}, "the old one")
    said = town.registry.read()
    assert said["aliases"] == {"champion": "sha256:a", "previous": "sha256:good"}
    assert [e[:2] for e in said["ledger"]] == [["promote", "previous"], ["promote", "champion"], ["rollback", "previous"], ["rollback", "champion"]]  # fmt: skip
    events = list(Events(town.folder / "events.db").all("request"))
    assert len({e["id"] for e in events}) == len(events) and {e["status"] for e in events} == {"ok"}


def test_an_abort_outlives_the_server_that_is_killed_after_it(town):
    town.begin("r1", "sha256:good", QUICK | {"steps": [{"setWeight": 50}, {"analysis": ENDLESS}]})
    with killed_at_the_end(town.folder) as url:
        until(lambda: fingerprint("sha256:good") in ask_all(url), "the canary")
        town.order("r1", "abort", because="a complaint")
        until(lambda: set(ask_all(url)) == {fingerprint("sha256:a")}, "the way back")
    for _ in range(2):
        with killed_at_the_end(town.folder) as url:
            assert set(ask_all(url)) == {fingerprint("sha256:a")} and town.store.load("r1").state.aborted
    assert town.registry.read()["aliases"] == {"champion": "sha256:a"}


def test_a_registry_that_does_not_answer_for_a_moment_aborts_no_rollout(town, monkeypatch, capsys):
    monkeypatch.setattr("llmkit.rollout.loader.AGAIN", 0.05)
    monkeypatch.setattr("llmkit.rollout.commands.open_store", lambda *_: town.store)
    tries, usual, away = [], town.open, threading.Event()

    def open(release):
        tries.append(release)
        if away.is_set():
            with answering():
                raise OSError("database is locked")
        return usual(release)

    town.open = open
    with town.server() as (url, live):
        away.set()
        town.begin("r1", "sha256:good", QUICK | {"steps": [{"setWeight": 50}, {"analysis": ENDLESS}]})
        until(lambda: len(tries) > 3, "some tries")
        until(lambda: town.store.hindrance("r1"), "the reason in the log")
        assert town.phase("r1") == "Progressing" and "database is locked" in live.trouble
        assert rollout_status() == 0
        assert "database is locked" in capsys.readouterr().out.splitlines()[-1]
        away.clear()
        until(lambda: fingerprint("sha256:good") in ask_all(url), "the canary's answers")
        until(lambda: not town.store.hindrance("r1") and not live.trouble, "the end of it")
        away.set()
        monkeypatch.setitem(ENGINES, "sha256:other", lambda: DummyEngine(replies=REPLIES))
        town.order("r1", "abort")
        live.loader.limit = 0.3
        town.begin("r2", "sha256:other")
        until(lambda: town.phase("r2") == "Degraded", "the end of its patience")
        assert "within 0.3 s: MLflow does not answer: database is locked" in town.store.load("r2").state.reason
        until(lambda: not town.store.hindrance("r2"), "nobody waits")
