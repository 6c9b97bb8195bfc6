"""Ten thousand requests through promotion and rollback, a day of shadow, a hundred thousand events."""

import json
import sys
import threading
import tracemalloc
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from rollout_road import RELEASES, SECTION, H, World
from serve_server import PATIENCE, until
from statsmodels.stats.proportion import proportion_confint

from llmkit.core.errors import KitError
from llmkit.rollout.analysis import analyse
from llmkit.rollout.policy import read_rollout
from llmkit.rollout.shadow import Mirror
from llmkit.rollout.view import view
from llmkit.rollout.window import Window, window_json
from llmkit.serve.events import check_event


def test_ten_thousand_requests_through_a_promotion_and_an_undo(tmp_path, monkeypatch):
    w = World(tmp_path)
    answers, lock, asked = {}, threading.Lock(), iter(range(10_000))
    path: dict[str, list[str]] = {}
    halfway, stepped, decided, step = threading.Semaphore(0), threading.Condition(), [0.0], w.c.step

    def stepping():
        "A step of the controller, and the time up to which it has decided."
        at, state = w.now, step()
        with stepped:
            decided[0] = at
            stepped.notify_all()
        return state

    monkeypatch.setattr(w.c, "step", stepping)

    def client(k):
        while True:
            with lock:
                i = next(asked, None)
                if i is None:
                    return
                w.now += 1.0
                if i == 8_000:
                    halfway.release()
            with stepped:  # a stage of an hour is decided within minutes, however slow the disk is
                assert stepped.wait_for(lambda: w.now - decided[0] < 150, PATIENCE), w.c.trouble
            unit = f"user{i % 997}"
            v = w.c.assign(unit)
            with lock:
                assert f"q{i}" not in answers
                answers[f"q{i}"] = (v, RELEASES[v])
                path.setdefault(unit, []).append(v)
            w.c.observe({"kind": "request", "time": w.now, "id": f"q{i}", "variant": v, "release": RELEASES[v], "unit": unit, "code": 200, "status": "ok", "latency": 0.2, "ttft": None, "prompt_tokens": 40, "fallback": False, "refused": False})  # fmt: skip

    w.c.run(every=0.005)
    threads = [threading.Thread(target=client, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    halfway.acquire()
    try:
        phase = w.c.command("promote", "ann", full=True).phase
    except KitError:  # its verdict came first
        phase = w.c.state.phase
    undone = w.c.command("undo", "ann", "customers complain")
    for t in threads:
        t.join()
    w.c.stop()
    assert (phase, undone.phase) == ("Healthy", "Degraded") and w.c.trouble == ""
    assert len(answers) == 10_000 and w.c.counts == {"events": 10_000, "refused": 0, "overflow": 0}
    assert all(RELEASES[v] == r for v, r in answers.values())  # one variant, one release
    assert set(Counter(v for v, _ in answers.values())) == {"baseline", "canary"}
    assert {w.c.assign(u) for u in path} == {"baseline"}
    assert w.registry.read()["aliases"] == {"champion": "sha256:a", "previous": "sha256:b"}


def test_events_that_come_while_the_log_is_written_are_kept(tmp_path, monkeypatch):
    w, written = World(tmp_path), []
    usual = {"kind": "request", "time": 1.0, "variant": "baseline", "release": "sha256:a", "unit": "u", "code": 200, "status": "ok", "latency": 0.2, "prompt_tokens": 40, "fallback": False, "refused": False}  # fmt: skip
    monkeypatch.setattr("llmkit.rollout.controller.BATCH", 3)  # many batches
    monkeypatch.setattr(w.store, "append", lambda id, seq, event: written.extend(event["events"]) or True)

    def feed():
        for i in range(24_000):
            w.c.observe(usual | {"id": f"q{i}"})

    turn = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=feed)
    try:
        thread.start()
        while thread.is_alive() or w.c._queue:
            w.c._flush()
    finally:
        sys.setswitchinterval(turn)
        thread.join()
    assert [e["id"] for e in written] == [f"q{i}" for i in range(24_000)]


def test_users_move_one_way_only_until_the_end(tmp_path):
    w, seen = World(tmp_path), {}
    for i in range(9_000):
        e = w.request(unit=f"user{i % 997}")
        seen.setdefault(e["unit"], []).append(e["variant"])
        if i % 25 == 0 and w.c.step().finished:
            break
    assert w.c.state.phase == "Healthy"
    turns = Counter(sum(a != b for a, b in zip(p, p[1:], strict=False)) for p in seen.values())
    assert set(turns) <= {0, 1} and turns[1] > 100
    assert all(p[-1] == "canary" for p in seen.values() if p[0] == "canary")
    logged = [
        e for (b,) in w.store.rows("select body from events where kind = 'traffic'") for e in json.loads(b)["events"]
    ]
    assert len({e["id"] for e in logged}) == len(logged) >= i - 25  # none lost, none twice


def test_a_day_of_shadow_on_a_clock_that_is_turned(tmp_path):
    w, at = World(tmp_path, SECTION), []
    assert w.c.state.mirror == 100.0 and w.c.state.weights == {"baseline": 100.0}
    while w.c.state.stage == 1 and w.now < 80 * H:
        live = w.request(every=60.0)
        assert live["variant"] == "baseline" and w.c.mirror(live["unit"])
        w.shadow(live, failed=w.n % 97 == 0, same=w.n % 25 > 0)
        if w.n % 10 == 0:
            at.append(w.c.step().stage)
    assert w.now / H == 24.0 + 1 / 6 or 24.0 <= w.now / H <= 24.2
    assert w.c.state.stage == 2 and w.c.state.weights["canary"] == 20.0 and w.c.state.mirror == 0
    assert w.canary() == 0


def test_a_worse_shadow_is_aborted_and_nobody_was_served_by_it(tmp_path):
    w = World(tmp_path, SECTION)
    while not w.c.state.finished and w.now < 80 * H:
        live = w.request(every=60.0)
        w.shadow(live, same=w.n % 2 == 0)
        if w.n % 10 == 0:
            w.c.step()
    assert w.c.state.aborted and "label_agreement" in w.c.state.reason
    assert "canary" not in w.c.fold.window.arms


@pytest.mark.parametrize(("every", "ends"), [(1, "pause"), (2, "go on"), (0, "go on")], ids=["all", "half", "none"])
def test_sampled_answers_are_not_held_against_the_same_release(tmp_path, every, ends):
    w = World(tmp_path, SECTION)
    while w.c.state.stage == 1 and w.c.state.phase == "Progressing" and w.now < 80 * H:
        live = w.request(every=60.0)
        drawn = bool(every) and w.n % every == 0
        w.shadow(live, same=not drawn or w.n % 3 > 0, sampled=drawn)
        if w.n % 10 == 0:
            w.c.step()
    assert (w.c.state.phase, w.c.state.stage) == (("Paused", 1) if ends == "pause" else ("Progressing", 2))
    if ends == "pause":
        assert "older than this version" in w.c.state.reason and "update it and resume" in w.c.state.reason
        assert w.store.replay("r1").state == w.c.state


def test_a_shadow_that_is_silent_pauses(tmp_path):
    w = World(tmp_path, SECTION)
    for _ in range(100):
        w.request(every=60.0)
        w.c.step()
    assert w.c.state.phase == "Paused" and "stale" in w.c.state.reason and w.c.state.stage == 1


def test_looks_at_the_shadow_are_few_however_often_it_steps(tmp_path):
    w = World(tmp_path, SECTION)
    while w.c.state.stage == 1 and w.c.state.phase == "Progressing" and w.now < 80 * H:
        live = w.request(every=20.0)
        w.shadow(live, same=w.n % 20 > 2)  # 85 %: exactly at the limit, not to be decided
        if w.n % 10 == 0:
            w.c.step()
    assert w.c.state.phase == "Paused" and "no answer within" in w.c.state.reason
    assert 2 <= w.c.state.looks <= 4


def test_a_later_look_at_the_shadow_asks_for_more_certainty(tmp_path):
    w = World(tmp_path, SECTION)
    for _ in range(600):
        live = w.request(every=60.0)
        w.shadow(live, same=w.n % 20 > 0)
    w.c._flush()
    now, seen = w.now + 24 * H, []
    w.c.fold.window.arms["baseline"].last = w.c.fold.window.arms["shadow"].last = now
    for looks in range(3):
        v = analyse(w.c.fold.policy, replace(w.c.state, looks=looks), w.c.fold.window, now).verdict
        seen.append(next(r.low for r in v.reasons if r.metric == "label_agreement"))
    want = [proportion_confint(570, 600, 2 * 0.05 / 2**k, method="wilson")[0] for k in (1, 2, 3)]
    assert seen == pytest.approx(want, rel=1e-9)


def test_a_mirror_feeds_the_controller_and_accounts_for_every_copy(tmp_path):
    w = World(tmp_path, SECTION)

    def send(body):
        if body["n"] % 10 == 0:
            raise ConnectionError("down")
        return "card_lost: done"

    mirror = Mirror(send, w.c.observe, release="sha256:b", capacity=8, clock=lambda: w.now)
    for i in range(300):
        live = w.request()
        if w.c.mirror(live["unit"]):
            mirror.submit(live["id"], {"n": i}, "card_lost: done")
    counts = mirror.close(wait=60)
    w.c.step()
    assert (
        counts["failed"]
        and counts["sent"] == 300 == counts["ok"] + counts["failed"] + counts["dropped"]
        and counts["waiting"] == 0
    )
    assert {k: w.c.fold.window.counts[k] for k in ("ok", "failed", "dropped")} == {k: counts[k] for k in ("ok", "failed", "dropped")}  # fmt: skip
    assert len(w.c.fold.window.pairs) == counts["ok"] + counts["failed"]


def test_what_the_release_in_service_cannot_answer_again_is_not_held_against_the_candidate(tmp_path):
    w, asked, told = World(tmp_path, SECTION), [], []

    def again(body, by):
        assert by == RELEASES["baseline"] and body["temperature"] == 0
        if body["i"] % 5 == 0:
            raise TimeoutError("too busy")
        return None if body["i"] % 5 == 1 else "card_lost: done"

    def send(body):
        asked.append(body["i"])
        if body["i"] % 5 == 2:
            raise ConnectionError("down")
        return "card_lost: done"

    def emit(event):
        told.append(event)
        w.c.observe(event)

    mirror = Mirror(send, emit, release="sha256:b", capacity=300, label=lambda t: t.partition(":")[0], clock=lambda: w.now, again=again)  # fmt: skip
    for i in range(300):
        live = w.request(errors=(0, 0))
        mirror.submit(live["id"], {"i": i, "temperature": 1.0}, "fees: drawn by chance", live["release"])
        counts = mirror.counts
        assert counts["sent"] == i + 1 == counts["ok"] + counts["failed"] + counts["dropped"] + counts["waiting"]
    counts = mirror.close(wait=60)
    assert counts == {"sent": 300, "ok": 120, "failed": 60, "dropped": 120, "unreported": 0, "again": 180, "waiting": 0}
    assert sorted(asked) == [i for i in range(300) if i % 5 > 1]
    said = Counter((e["result"], e["reason"], e["label_same"], e["latency"] is None) for e in told)
    assert said == {("ok", "again", True, False): 120, ("failed", "ConnectionError", None, False): 60, ("dropped", "live: TimeoutError", None, True): 60, ("dropped", "users wait", None, True): 60}  # fmt: skip
    w.c.step()
    seen = w.c.fold.window
    assert len(seen.pairs) == 180 and (seen.counts["dropped"], seen.counts["sampled"]) == (120, 0)
    assert not w.c.state.finished


@pytest.mark.parametrize(("slower", "ends"), [(1.0, "go on"), (2.0, "abort")])
def test_the_time_of_a_greedy_answer_is_held_against_that_of_another_one(tmp_path, monkeypatch, slower, ends):
    "Users draw short answers; greedy ones are ten times as long, from either release."
    w, told, ticks = World(tmp_path, SECTION), [], [0.0]
    monkeypatch.setattr("llmkit.rollout.shadow.time", SimpleNamespace(monotonic=lambda: ticks[0]))
    rng = np.random.default_rng(1)

    def answer(times):
        ticks[0] += 10 * float(rng.lognormal(-1, 0.3)) * times
        return "card_lost: done"

    def emit(event):
        w.c.observe(event)
        told.append(event)

    mirror = Mirror(lambda body: answer(slower), emit, release="sha256:b", workers=1, label=lambda t: t.partition(":")[0], clock=lambda: w.now, again=lambda body, by: answer(1.0))  # fmt: skip
    while w.c.state.stage == 1 and w.c.state.phase == "Progressing" and w.now < 80 * H:
        live = w.request(every=60.0)
        mirror.submit(live["id"], {"temperature": 1.0}, "fees: drawn", live["release"])
        until(lambda: len(told) == w.n, "the event of the copy")
        if w.n % 10 == 0:
            w.c.step()
    mirror._closed.set()
    for e in told:
        check_event(e)
    assert w.now <= 25 * H and w.c.state.stage == 2
    assert w.c.state.aborted == (ends == "abort"), w.c.state.reason
    assert ends == "go on" or "latency_p95" in w.c.state.reason
    assert {e["reason"] for e in told} == {"again"} and min(e["live_latency"] for e in told) > 1.0
    assert w.store.replay("r1").state == w.c.state


def test_a_service_that_never_answers_again_pauses_its_rollout_and_aborts_nothing(tmp_path):
    w = World(tmp_path, SECTION)
    while w.c.state.phase == "Progressing" and w.now < 80 * H:
        live = w.request(every=600.0)
        said = {"kind": "shadow", "time": w.now, "id": live["id"], "variant": "shadow", "release": "sha256:b", "result": "dropped"}  # fmt: skip
        w.c.observe(said | dict.fromkeys(("latency", "agreement", "exact", "label_same")) | {"reason": "users wait"})
        w.c.step()
        if w.n == 30:
            assert "30 copies dropped, 30 of them while every slot of the release in service was taken" in str(view(w.c.fold, w.now))  # fmt: skip
    assert (w.c.state.phase, w.c.state.aborted, w.c.state.stage) == ("Paused", False, 1)
    assert "every slot of the release in service was taken (--slots)" in w.c.state.reason


def test_a_hundred_thousand_events_take_no_more_memory_than_the_bounds():
    section = SECTION | {"canary": [*SECTION["canary"], {"metric": "task_success_rate", "margin": 0.05}]}
    w = Window(read_rollout(section))
    usual = {"kind": "request", "release": "sha256:a", "code": 200, "status": "ok", "latency": 0.2, "ttft": 0.1, "prompt_tokens": 40, "fallback": False, "refused": False}  # fmt: skip

    def feed(a, b):
        for i in range(a, b):
            w.add(
                usual
                | {"time": i / 50, "id": f"q{i}", "variant": "canary" if i % 5 == 0 else "baseline", "unit": f"u{i}"}
            )
            if i % 3 == 0:
                w.add({"kind": "feedback", "time": i / 50 + 1, "id": f"q{i}", "success": i % 4 > 0})

    tracemalloc.start()
    feed(0, 60_000)
    before = tracemalloc.get_traced_memory()[0]
    feed(60_000, 100_000)
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert after - before < 2_000_000, f"{before:,} → {after:,} bytes"
    assert (
        sum(a.n for a in w.arms.values()) + w.counts["before"] == 100_000
        and len(w.units) == 20_000
        and len(w.labels) < 31_000
    )
    k, n = w.arms["canary"].rates["task_success_rate"]
    assert 4000 < n < 5000 and abs(k / n - 0.75) < 0.01
    assert len(json.dumps(window_json(w))) < 8_000_000


def test_traffic_that_never_stops_puts_no_decision_off(tmp_path, monkeypatch):
    w, written = World(tmp_path), []
    append = w.store.append

    def busy(*args):
        "A write during which one more request is answered."
        written.append(args[2]["kind"])
        if written.count("traffic") < 500:
            w.request()
        return append(*args)

    w.request()
    monkeypatch.setattr(w.store, "append", busy)
    w.c.step()
    assert written.count("traffic") == 1, "what came meanwhile waits for the next step"
    w.c.step()
    assert written.count("traffic") == 2
