"Traffic that is right and looks wrong: small shadows, long days, slow answers, odd clocks, odd numbers."

import numpy as np
import pytest
from fastapi.testclient import TestClient
from rollout_road import CANARY, RELEASES, SECTION, H, World

from llmkit.rollout.assign import assign
from llmkit.rollout.fold import Fold
from llmkit.rollout.judge_server import judge_app
from llmkit.rollout.policy import read_rollout
from llmkit.rollout.validity import check_freshness

STAGE = {"min_duration": "1m", "max_duration": "1h", "min_samples": 400}
ONE = CANARY | {
    "steps": [{"setWeight": 50}, {"analysis": STAGE}], "strata": [],
    "canary": [{"metric": "error_rate", "margin": 0.03, "hard_stop": {"max": 0.2, "min_n": 30}}, {"metric": "latency_p95", "max_ratio": 2.0}],
}  # fmt: skip


@pytest.mark.parametrize(("percent", "every"), [(5, 30.0), (0.1, 2.0)])
def test_a_shadow_of_few_requests_is_not_called_stale(tmp_path, percent, every):
    w = World(tmp_path, SECTION | {"steps": [{"shadow": {"percent": percent}}, *SECTION["steps"][1:]]})
    while w.now < 3 * H:
        live = w.request(every=every)
        if w.c.mirror(live["unit"]):
            w.shadow(live)
        if w.n % 20 == 0:
            w.c.step()
    assert w.c.state.phase == "Progressing", w.c.state.reason


def test_a_long_stage_is_not_called_stale_by_chance():
    "A day of two users a second, of whom one in a hundred is the canary's: 1,700 silences, each of them by chance."
    fold = Fold(read_rollout(CANARY))
    w, rng, wrong = fold.window, np.random.default_rng(0), 0
    w.arm("baseline").last, w.arm("canary").last = 1000.0, 0.0
    for _ in range(40):
        for w.silences["canary"], n in enumerate(rng.geometric(0.01, 1700)):
            w.without["canary"] = range(n)
            if check_freshness(fold.policy, w, {"baseline": 0.99, "canary": 0.01}, 1000.0).outcome == "error":
                wrong += 1
                break
    assert wrong <= 1
    w.without["canary"] = range(3000)  # and one that chance does not explain is seen at once
    assert check_freshness(fold.policy, w, {"baseline": 0.99, "canary": 0.01}, 1000.0).outcome == "error"


def first_seconds(seed, rate, answers, failures, until):
    "The beginning of a stage, told of as it comes: medians of the answers in seconds; failures take a moment."
    rng, fold, told = np.random.default_rng(seed), Fold(read_rollout(ONE)), []
    start = {"kind": "start", "time": 0.0, "id": "r", "model": "m", "releases": RELEASES}
    fold.adopt(fold.plan(start)[0])
    for i, at in enumerate(np.cumsum(rng.exponential(1 / rate, int(rate * until)))):
        variant, bad = assign(fold.state.slots, "r", f"{seed}.{i}"), rng.random() < failures
        takes = 0.05 if bad else answers[variant == "canary"] * float(np.exp(0.2 * rng.standard_normal()))
        e = {"kind": "running", "time": float(at), "id": f"q{i}", "variant": variant, "release": RELEASES[variant], "unit": f"u{i}", "latency": 10.0, "prompt_tokens": 40, "fallback": False}  # fmt: skip
        told += [(at + 10.0, e)] if takes > 10 else []
        end = {"latency": takes, "code": 500 if bad else 200, "status": "error" if bad else "ok", "ttft": None, "refused": False}  # fmt: skip
        told.append((at + takes, e | end | {"kind": "request"}))
    look = 0.5
    for at, e in sorted(told, key=lambda x: x[0]):
        while look < min(at, until):
            fold.window.told(look)
            fold.adopt(fold.plan({"kind": "tick", "time": look})[0])
            look += 0.5
        if at > until or fold.state.phase != "Progressing":
            return fold.state
        fold.window.add(e)
    return fold.state


@pytest.mark.parametrize(("rate", "answers", "failures"), [(100, (5.0, 8.0), 0.01), (50, (20.0, 30.0), 0.02)])
def test_a_slower_candidate_is_neither_a_wrong_split_nor_a_failing_one(rate, answers, failures):
    "Its first answers come later than the champion's, and its failures as soon; both are within the policy."
    for seed in range(4):
        s = first_seconds(seed, rate, answers, failures, 1.5 * answers[1])
        assert s.phase == "Progressing", s.reason


def test_a_user_from_the_far_future_holds_nobody_up(tmp_path):
    w = World(tmp_path, CANARY | {"unit": "user", "settle": "30s"})
    for i in range(2000):
        w.now += 1.0
        w.request(every=0.0, time=w.now + (24 * H if i == 100 else 0.0))
        if i % 100 == 99:
            w.c._flush()
    assert sum(a.n for a in w.c.fold.window.arms.values()) > 1900


def test_a_number_that_is_none_is_refused_and_costs_neither_the_log_nor_the_sender(tmp_path):
    w = World(tmp_path)
    good = w.request()
    http = TestClient(judge_app(w.store, lambda: w.now, keys=lambda header: None), raise_server_exceptions=False)
    odd = [good | x for x in ({"time": 10**400}, {"time": 1e308, "latency": 1e308}, {"joules": 77.5}, {"code": True})]
    for n, e in enumerate(odd, 1):
        body = http.build_request("POST", "/v1/events", json={"source": "g", "model": "bank-support", "events": [{"number": n, "event": e}]})  # fmt: skip
        said = http.post("/v1/events", content=body.content.replace(b"77.5", b"1e400"))
        assert (said.status_code, said.json()["seen"], said.json()["refused"]) == (200, n, int(n < 4))
    w.c.step()
    assert http.get("/v1/rollouts/r1/verdict").status_code == 200
    assert w.store.replay("r1").state == w.store.load("r1").state == w.c.state
