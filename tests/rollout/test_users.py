"""Users who differ, and a challenger that is slow rather than wrong."""

import json

import numpy as np
import pytest
from fastapi.testclient import TestClient
from rollout_road import CANARY, RELEASES, H, World

from llmkit.core.errors import KitError
from llmkit.gate.sequential import rate_excess
from llmkit.rollout.judge_server import answer, judge_app
from llmkit.rollout.policy import read_rollout
from llmkit.rollout.rehearsal import rehearse
from llmkit.rollout.store import Store
from llmkit.rollout.traffic import Traffic
from llmkit.rollout.view import view
from llmkit.rollout.window import read_window, window_json

USERS = CANARY | {"unit": "user", "settle": "30s", "canary": [*CANARY["canary"], {"metric": "task_success_rate", "margin": 0.1}]}  # fmt: skip


@pytest.mark.parametrize("unit", ["request", "user"])
def test_judge_embedded_and_replay_agree_on_who_was_counted(tmp_path, unit):
    section = {k: v for k, v in USERS.items() if unit == "user" or k not in ("unit", "settle")}
    (tmp_path / "apart").mkdir()
    alone, judged = World(tmp_path, section), World(tmp_path / "apart", section)
    http, pods, rng = TestClient(judge_app(judged.store, lambda: alone.now, keys=lambda header: None)), {"a": [], "b": []}, np.random.default_rng(1)  # fmt: skip

    under_way = []
    for i in range(1210):
        alone.now += 2.0
        user = f"user{int(rng.integers(200))}"
        v, hung = alone.c.assign(user), i % 40 == 7
        how = {"latency": 25.0, "code": 504, "status": "error"} if hung else {"latency": 0.4, "code": 200, "status": "ok"}  # fmt: skip
        under_way.append({"kind": "request", "time": alone.now, "id": f"q{i}", "variant": v, "release": RELEASES[v], "unit": user, "ttft": None, "prompt_tokens": 40, "fallback": False, "refused": i % 20 == 0, **how})  # fmt: skip
        done = [e for e in under_way if e["time"] + e["latency"] <= alone.now or i >= 1200]  # told of when they end
        under_way = [e for e in under_way if e not in done]
        for e in done:
            said = {"kind": "feedback", "time": alone.now, "id": e["id"], "rating": None, "success": i % 4 > 0, "label": None}  # fmt: skip
            pod = pods["ab"[int(rng.integers(2))]]  # a user is here and there
            for x in (e, said) if i % 3 == 0 else (e,):
                alone.c.observe(x)
                pod.append({"number": len(pod) + 1, "event": x})
        if i % 10 == 9:
            for name in "ba":
                http.post("/v1/events", json={"source": name, "model": "bank-support", "events": pods[name][-40:]})
        if i == 700:
            alone.c._flush()
            alone.store.snapshot("r1", alone.c.fold)
            assert http.get("/v1/rollouts/r1/verdict").status_code == 200
    alone.c._flush()
    one, other = alone.c.fold, judged.store.load("r1")
    assert {v: (a.n, a.rates) for v, a in one.window.arms.items()} == {v: (a.n, a.rates) for v, a in other.window.arms.items()}  # fmt: skip
    counted = sum(a.n for a in one.window.arms.values())
    known = len({u for u in one.window.units}) - len(one.window.held)
    assert counted == (1210 if unit == "request" else known) and known > 190
    said, wanted = http.get("/v1/rollouts/r1/verdict").json(), answer(one, alone.now)
    assert [(r["sentence"], r["outcome"]) for r in said["reasons"]] == [(r["sentence"], r["outcome"]) for r in wanted["reasons"]]  # fmt: skip
    assert any(f"{unit}s of each variant" in r["sentence"] for r in said["reasons"])
    # after a restart, and decided anew: the same people
    restarted, anew = Store(alone.store.path).load("r1"), alone.store.replay("r1")
    for fold in (restarted, anew):
        assert window_json(fold.window) == window_json(one.window)
    again = read_window(json.loads(json.dumps(window_json(one.window))), one.policy)
    for w in (one.window, again):
        before = sum(a.n for a in w.arms.values())
        for k in range(200):
            w.add({"kind": "request", "time": alone.now + 100 + k, "id": f"x{k}", "variant": "canary", "release": RELEASES["canary"], "unit": f"user{k}", "code": 200, "status": "ok", "latency": 0.1, "ttft": None, "prompt_tokens": 9, "fallback": False, "refused": False})  # fmt: skip
        new = sum(a.n for a in w.arms.values()) - before
        assert new == 200 if unit == "request" else new <= 10  # who was held, or has not come before


def test_few_users_with_habits_find_no_harm_in_an_equal_challenger_when_users_are_counted():
    section = CANARY | {"canary": [{"metric": "error_rate", "margin": 0.03}], "alpha": 0.05 / 12, "steps": CANARY["steps"][2:]}  # fmt: skip
    habits = Traffic(errors=0.05, users=60, habits=0.3)
    wrong = {u: rehearse(read_rollout(section | {"unit": u}), 1000, 8, habits, every=7200.0).share("Degraded") for u in ("request", "user")}  # fmt: skip
    assert wrong["user"] == 0 < wrong["request"]


def test_whoever_names_no_user_is_told_of(tmp_path):
    w = World(tmp_path, USERS)
    for _ in range(50):
        w.request(unit="")
    w.c._flush()
    assert w.c.fold.window.counts["nobody"] == 50 and w.canary() == 0
    assert answer(w.c.fold, w.now)["left_out"] == [
        "50 requests name no user, and each user counts once: they are not judged"
    ]


SLOW = CANARY | {
    "canary": [{"metric": "error_rate", "margin": 0.03}, {"metric": "latency_p95", "max_ratio": 1.6}, {"metric": "ttft_p95", "max_ratio": 3.0}],
    "validity": CANARY["validity"] | {"stale_after": "6m"},
}  # fmt: skip
HOW = {
    "hangs until the server gives up": ({"latency": 300.0, "ttft": None, "code": 504, "status": "error"}, "error_rate"),
    "hangs until users give up": ({"latency": 20.0, "ttft": None, "code": 499, "status": "cancelled"}, "latency_p95"),
    "first token late": ({"ttft": 0.3}, "ttft_p95"),
    "stalls after the first token, and users give up": ({"latency": 20.0, "code": 499, "status": "cancelled"}, "latency_p95"),
}  # fmt: skip


@pytest.mark.parametrize("unit", ["request", "user"])
@pytest.mark.parametrize("how", HOW)
def test_a_challenger_that_is_slow_and_not_wrong_is_stopped(tmp_path, how, unit):
    odd, metric = HOW[how]
    w = World(tmp_path, SLOW | {"unit": unit})
    late = []  # what ends later is told of later
    for i in range(4000):
        w.now += 0.25
        v = w.c.assign(f"u{w.n}")
        bad = v == "canary" and i % 4 == 0 or how.startswith("first") and v == "canary"
        e = {"kind": "request", "time": w.now, "id": f"q{i}", "variant": v, "release": RELEASES[v], "unit": f"u{w.n}", "code": 200, "status": "ok", "latency": float(w.rng.lognormal(-1, 0.3)), "ttft": 0.05, "prompt_tokens": 40, "fallback": False, "refused": False}  # fmt: skip
        w.n += 1
        late.append(e | (odd if bad else {}))
        done = [x for x in late if x["time"] + x["latency"] <= w.now]
        late = [x for x in late if x["time"] + x["latency"] > w.now]
        for x in done:
            w.c.observe(x)
        if i % 200 == 0 and w.c.step().finished:
            break
    assert w.c.state.aborted and metric in w.c.state.reason, w.c.state.reason
    assert w.now < H / 4


def test_a_challenger_that_hangs_for_everybody_from_the_first_request_on_is_stopped(tmp_path):
    stop = {"metric": "error_rate", "margin": 0.03, "hard_stop": {"max": 0.2, "min_n": 30}}
    w = World(tmp_path, SLOW | {"canary": [stop]})
    hung = []
    for i in range(3000):
        e = w.request(every=0.25, unit=f"u{i}") if w.c.assign(f"u{i}") == "baseline" else None
        if e is None:
            w.now += 0.25
            hung.append({"kind": "request", "time": w.now, "id": f"h{i}", "variant": "canary", "release": RELEASES["canary"], "unit": f"u{i}", "code": 504, "status": "error", "latency": 300.0, "ttft": None, "prompt_tokens": 0, "fallback": False, "refused": False})  # fmt: skip
        while hung and hung[0]["time"] + 300 <= w.now:
            w.c.observe(hung.pop(0))
        if i % 40 == 0 and w.c.step().finished:
            break
    assert w.c.state.aborted and "error_rate" in w.c.state.reason and w.now < 400


@pytest.mark.parametrize("unit", ["request", "user"])
@pytest.mark.parametrize("often", [2, 50])
def test_one_user_who_makes_much_of_the_traffic_is_told_of_where_requests_are_counted(tmp_path, unit, often):
    w = World(tmp_path, CANARY | {"unit": unit})
    for i in range(600):
        w.request(every=1.0, unit="robot" if i % often == 0 else None)
    w.c.step()
    told = "One of them made at least" in str(view(w.c.fold, w.now))
    assert told == (unit == "request" and often == 2)
    assert str(view(w.store.load("r1"), w.now)) == str(view(w.c.fold, w.now))
    w.store.snapshot("r1", w.c.fold)
    assert str(view(w.store.load("r1"), w.now)) == str(view(w.c.fold, w.now))


def stage(folder, unit, n, users, rates, heavy=0.0, seed=0, every=20):
    "Where a stage ends in which users have their own error rates, and one of them may make much of the traffic."
    rule = {"metric": "error_rate", "margin": 0.03, "alpha": 0.05}
    steps = [{"setWeight": 40}, {"analysis": {"min_duration": "4h", "max_duration": "48h", "min_samples": 400}}]
    w = World(folder, CANARY | {"unit": unit, "canary": [rule], "alpha": 0.05 / 12, "steps": steps})
    rng = np.random.default_rng(seed)
    own = rng.beta(0.95, 18.05, users) / 0.05
    for i in range(n):
        who = 0 if rng.random() < heavy else int(rng.integers(users))
        rate = [min(1.0, r * own[who]) for r in rates] if who or not heavy else (0.6, 0.6)
        w.request(errors=rate, unit=f"u{who}")
        if i % every == 0 and w.c.step().finished:
            return w.c.state, i
    return w.c.state, n


def test_users_who_repeat_themselves_show_harm_sooner_than_their_first_requests_would(tmp_path):
    state, asked = stage(tmp_path, "user", 4000, 400, (0.05, 0.2))
    assert state.aborted and asked < 2500
    assert "users as clusters" in state.reason
    # the first requests of four hundred users show nothing
    assert rate_excess((12, 240), (32, 160), 0.03, 0.05 / 12).low < 0.03


@pytest.mark.parametrize("salt", range(3))
def test_one_user_with_two_fifths_of_the_traffic_does_not_abort_an_equal_challenger(tmp_path, salt):
    state, _ = stage(tmp_path, "user", 1500, 60, (0.03, 0.03), heavy=0.4, seed=salt, every=100)
    assert not state.aborted


OUTAGES = {"both alike": (0.5, 0.5, 20, False), "the challenger worse": (0.25, 0.6, 20, True), "a baseline with little traffic": (0.5, 0.5, 90, False), "the challenger alone": (0.01, 0.5, 20, True)}  # fmt: skip


@pytest.mark.parametrize("unit", ["request", "user"])
@pytest.mark.parametrize("what", OUTAGES)
def test_an_outage_of_both_arms_pauses_and_one_of_the_challenger_aborts(tmp_path, what, unit):
    base, cand, weight, aborts = OUTAGES[what]
    steps = [{"setWeight": weight}, *CANARY["steps"][1:]]
    w = World(tmp_path, CANARY | {"unit": unit, "steps": steps})
    w.traffic(300)  # all is well
    w.traffic(3000, step=5, errors=(base, cand))
    assert w.c.state.aborted == aborts, w.c.state.reason
    if not aborts:
        assert w.c.state.phase == "Paused" and w.c.state.reason.startswith("error: ") and "both have in common" in w.c.state.reason  # fmt: skip
        w.traffic(2000, step=5, errors=(0.01, 0.5))  # it is over, and the challenger still fails: not in a pause either
        assert w.c.state.aborted


@pytest.mark.parametrize("unit", ["request", "user"])
@pytest.mark.parametrize("salt", range(4))
def test_a_challenger_that_fails_everybody_keeps_no_user_however_few_there_are(tmp_path, salt, unit):
    "Of twenty users it has two to six: too few to accuse it by, and reason enough to take them back."
    w = World(tmp_path, CANARY | {"unit": unit}, id=f"few{salt}")
    for i in range(1500):
        w.request(errors=(0.01, 1.0), unit=f"u{int(w.rng.integers(20))}")
        if i % 5 == 0 and w.c.step().weights == {"baseline": 100.0}:
            break
    assert w.canary() == 0 and i < 1000, (w.c.state.reason, i)
    assert w.c.state.aborted or unit == "user" and "few users" in w.c.state.reason, w.c.state.reason
    assert w.store.replay(f"few{salt}").state == w.store.load(f"few{salt}").state == w.c.state


def test_users_that_were_taken_back_come_again_by_a_resume_and_are_counted_anew(tmp_path):
    w = World(tmp_path, CANARY | {"unit": "user"})
    people = [f"u{k}" for k in range(60)]
    mine, others = ([u for u in people if w.c.assign(u) == v] for v in ("canary", "baseline"))
    for i in range(200):  # one user fails, whoever answers
        w.request(errors=(0.0, 1.0), unit=mine[0] if i % 5 == 0 else others[i % len(others)])
        w.c.step()
    for bad in (mine[:1], mine[:3]):
        for i in range(400):
            w.request(errors=(0.0, 1.0), unit=bad[i % len(bad)] if i % 4 == 0 else others[i % len(others)])
            if w.c.step().phase == "Paused":
                break
    assert w.c.state.phase == "Paused" and not w.c.state.aborted and "few users" in w.c.state.reason
    assert not [u for u in people if w.c.assign(u) == "canary"]
    with pytest.raises(KitError, match="nothing was measured"):
        w.c.command("promote", "ann", full=True)
    s = w.c.command("resume", "ann")
    assert [u for u in people if w.c.assign(u) == "canary"] == mine and w.canary() == 0
    assert (s.phase, s.step, s.step_since) == ("Progressing", 1, w.now)
    assert w.store.replay("r1").state == s
