"""What a rollout comes to: promotion, abort, pause; on broken telemetry, on silence, and by order."""

import threading
import time

import numpy as np
import pytest
from rollout_road import CANARY, RELEASES, SECTION, H, Recorder, World

from llmkit.core.errors import KitError
from llmkit.rollout.policy import read_rollout
from llmkit.rollout.rehearsal import rehearse

POLICY = CANARY | {
    "steps": [
        {"setWeight": 5}, {"analysis": {"min_duration": "1h", "max_duration": "48h", "min_samples": 1000, "require": "no_harm"}},
        {"setWeight": 50}, {"analysis": {"min_duration": "4h", "max_duration": "72h", "min_samples": 2000}},
    ],
    "canary": [{"metric": "error_rate", "margin": 0.005}, {"metric": "refusal_rate", "margin": 0.03}, {"metric": "latency_p95", "max_ratio": 1.2}],
    "validity": SECTION["validity"] | {"stale_after": "2h"},
}  # fmt: skip


def test_equal_releases_are_promoted_and_hardly_ever_aborted():
    """benchmarks/rollout_null.py does it a thousand times."""
    found = rehearse(read_rollout(POLICY), 4000, 60, every=3 * H)
    assert found.share("Degraded") <= 0.05 + 3 * (0.05 * 0.95 / 60) ** 0.5
    assert found.share("Healthy") >= 0.9


@pytest.mark.parametrize("harm", [{"errors": 0.05}, {"slower": 1.5}, {"refusals": 0.15}], ids=str)
def test_harm_is_stopped_before_a_thousand_canary_requests(harm):
    ends = rehearse(read_rollout(POLICY), 4000, 25, canary=harm, every=900).endings
    assert all(e.phase == "Degraded" for e in ends)
    assert sum(e.canary < 1000 for e in ends) >= 24


def test_a_good_canary_is_promoted_through_the_controller(tmp_path):
    w = World(tmp_path)
    w.traffic(12_000)
    assert (w.c.state.phase, w.c.state.weights) == ("Healthy", {"canary": 100.0})
    said = w.registry.read()
    assert said["aliases"] == {"champion": "sha256:b", "previous": "sha256:a"}
    assert [e[:3] for e in said["ledger"]] == [["promote", "previous", "sha256:a"], ["promote", "champion", "sha256:b"]]
    evidence = {e[3] for e in said["ledger"]}
    assert evidence == {w.c.state.verdict}
    assert w.store.rows("select count(*) from verdicts where digest = ?", w.c.state.verdict) == [(1,)]
    assert w.store.replay("r1").state == w.store.load("r1").state == w.c.state


def test_a_crashing_canary_is_stopped_at_once(tmp_path):
    w = World(tmp_path)
    w.traffic(400, step=5, errors=(0.01, 0.9))
    assert w.c.state.aborted and "error_rate" in w.c.state.reason and w.n < 100
    assert {w.c.assign(f"u{i}") for i in range(500)} == {"baseline"}
    assert w.registry.read()["aliases"] == {"champion": "sha256:a"}


def test_a_hard_stop_needs_no_comparison(tmp_path):
    w = World(tmp_path)
    w.traffic(400, step=5, errors=(0.15, 0.5))
    assert w.c.state.aborted and "hard stop" in w.c.state.reason and 30 <= w.n < 500


STALLS = CANARY | {
    "canary": [*CANARY["canary"], {"metric": "stall_rate", "margin": 0.03, "hard_stop": {"max": 0.2, "min_n": 30}}]
}


def hanging(w, share, n=4000, told=True):
    "Traffic of which the canary leaves a share without an end; how many users got no answer."
    left = 0
    for i in range(n):
        w.n, w.now = w.n + 1, w.now + 5.0
        unit, v = f"h{i}", w.c.assign(f"h{i}")
        if v == "canary" and w.rng.random() < share:
            left += 1
            stall = {"kind": "stall", "time": w.now - 10, "id": f"q{w.n}", "variant": v, "release": RELEASES[v]}
            if told:
                w.c.observe(stall | {"unit": unit, "latency": 10.0, "fallback": False})
        else:
            w.request(every=0.0, errors=(0.01, 0.01), refusals=(0.05, 0.05), unit=unit)
        if i % 10 == 9 and w.c.step().finished:
            break
    return left


def test_a_canary_that_hangs_now_and_then_is_not_promoted_by_what_it_answers(tmp_path):
    "Who hangs has no end to be counted by; 10 % are too few for the split of the users to tell."
    for name, section, told in (("deaf", CANARY, False), ("hears", STALLS, True)):
        (folder := tmp_path / name).mkdir()
        w = World(folder, section)
        left = hanging(w, 0.1, told=told)
        if told:
            assert w.c.state.aborted and "stall_rate" in w.c.state.reason and left < 100, w.c.state.reason
            assert w.store.replay("r1").state == w.c.state
        else:
            assert w.c.state.phase == "Healthy" and left > 50, "the reason for the rule"


def test_a_canary_that_hangs_for_everybody_is_stopped_and_not_paused(tmp_path):
    w = World(tmp_path, STALLS)
    left = hanging(w, 1.0)
    assert w.c.state.aborted and "stall_rate" in w.c.state.reason and left < 50


def running_on(w, share, end, told, n=4000):
    "Traffic of which the canary answers a share without an end for `end` seconds; how many users got such an answer."
    late, left = [], 0
    for i in range(n):
        unit, v = f"h{i}", w.c.assign(f"h{i}")
        if v == "canary" and w.rng.random() < share:
            left, w.n, w.now = left + 1, w.n + 1, w.now + 5.0
            e = {"id": f"q{w.n}", "time": w.now, "variant": v, "release": RELEASES[v], "unit": unit, "fallback": False, "prompt_tokens": 40}  # fmt: skip
            done = {"code": 200, "status": "ok", "ttft": 0.05, "completion_tokens": 4096, "refused": False}
            late += [(w.now + 10, e | {"kind": "running", "latency": 10.0})] if told else []
            late += [(w.now + end, e | done | {"kind": "request", "latency": end})]
        else:
            w.request(every=5.0, unit=unit)
        for _, e in (due := [x for x in late if x[0] <= w.now]):
            w.c.observe(e)
        late = [x for x in late if x not in due]
        if i % 10 == 9 and w.c.step().finished:
            break
    return left


def test_a_canary_whose_answers_do_not_end_is_not_promoted_by_those_that_do(tmp_path):
    "The latency of an answer that missed its end is known hours later; until then it is at least what it has run."
    quick = CANARY | {"steps": CANARY["steps"][2:], "canary": [g for g in CANARY["canary"] if "latency" in g["metric"]]}
    for name, told in (("deaf", False), ("hears", True)):
        (folder := tmp_path / name).mkdir()
        w = World(folder, quick)
        left = running_on(w, 0.1, 4 * H, told)
        if told:
            assert w.c.state.aborted and "latency_p95" in w.c.state.reason and left < 100, w.c.state.reason
            assert "still run" in w.c.state.reason and w.store.replay("r1").state == w.c.state
        else:
            assert w.c.state.phase == "Healthy" and left > 40, "the reason for the event"
    (folder := tmp_path / "rarely").mkdir()
    w = World(folder, quick)
    running_on(w, 0.005, 60.0, True)
    assert w.c.state.phase == "Healthy" and not w.c.fold.window.running, w.c.state.reason


REJECTS = CANARY | {"canary": [*CANARY["canary"], {"metric": "reject_rate", "margin": 0.03}]}


@pytest.mark.parametrize(
    "bad, section, ends", [(0.3, CANARY, "Healthy"), (0.3, REJECTS, "Degraded"), (0.05, REJECTS, "Healthy")]
)
def test_a_canary_that_refuses_what_the_baseline_takes_is_not_promoted(tmp_path, bad, section, ends):
    "A 4xx says nothing about a release, but that one release gives more of them than the other does. Of 5 % both refuse."
    w = World(tmp_path, section)
    for i in range(8000):
        share = bad if bad < 0.1 or w.c.assign(f"h{i}") == "canary" else 0.0
        no = {"code": 400, "status": "rejected", "ttft": None} if w.rng.random() < share else {}
        w.request(every=5.0, errors=(0.01, 0.01), unit=f"h{i}", **no)
        if i % 10 == 9 and w.c.step().finished:
            break
    assert w.c.state.phase == ends, w.c.state.reason
    assert ends == "Healthy" or "reject_rate" in w.c.state.reason and w.n < 2000


def test_a_canary_that_stalls_as_rarely_as_the_baseline_is_promoted(tmp_path):
    w = World(tmp_path, STALLS)
    assert hanging(w, 0.002) < 10 and w.c.state.phase == "Healthy", w.c.state.reason


def test_a_service_that_fails_below_the_hard_stop_is_not_stopped_by_chance(tmp_path):
    for seed in range(8):
        (folder := tmp_path / str(seed)).mkdir()
        w = World(folder)
        w.rng = np.random.default_rng(seed)
        w.traffic(600, errors=(0.15, 0.15), refusals=(0, 0))
        assert w.c.state.phase == "Progressing", (seed, w.c.state.reason)


ALONE = {  # what a worse candidate does to one metric: of the requests of each arm, and of the feedback on them
    "fallback_rate": ({"margin": 0.03}, lambda bad, u: {"fallback": u < (0.15 if bad else 0.01)}, None),
    "cost_per_request": ({"margin": 0.001, "most": 0.02}, lambda bad, u: {"cost": (0.009 if bad else 0.004) + 0.002 * u}, None),
    "completion_tokens": ({"margin": 10, "most": 200}, lambda bad, u: {"completion_tokens": (70 if bad else 30) + int(20 * u)}, None),
    "task_success_rate": ({"margin": 0.05}, None, lambda bad, u: {"success": u < (0.6 if bad else 0.8)}),
    "user_satisfaction": ({"margin": 0.1}, None, lambda bad, u: {"rating": 1.0 if u < (0.5 if bad else 0.8) else -1.0}),
}  # fmt: skip


@pytest.mark.parametrize("worse", [True, False], ids=["worse", "equal"])
@pytest.mark.parametrize("metric", ALONE)
def test_each_metric_of_users_and_costs_stops_a_worse_candidate_by_itself(tmp_path, metric, worse):
    how, asked, said = ALONE[metric]
    w = World(tmp_path, CANARY | {"canary": [{"metric": metric, **how}]})
    for i in range(2500):
        unit = f"c{i}"
        bad = worse and w.c.assign(unit) == "canary"
        e = w.request(every=2.0, errors=(0, 0), unit=unit, **(asked(bad, w.rng.random()) if asked else {}))
        if said:
            told = {"rating": None, "success": None, "label": None} | said(bad, w.rng.random())
            w.c.observe({"kind": "feedback", "time": w.now + 1, "id": e["id"], **told})
        if i % 50 == 49 and w.c.step().finished:
            break
    assert w.c.state.aborted == worse, w.c.state.reason
    if worse:
        assert metric in w.c.state.reason and w.canary() < 1000
    else:
        assert w.c.state.stage > 1 or w.c.state.phase == "Healthy", "harm was ruled out, on this metric"


@pytest.mark.parametrize("seen", [0, 40], ids=["at the start", "under way"])
def test_a_clock_that_is_set_back_hides_no_harm_and_promotes_nothing(tmp_path, seen):
    w = World(tmp_path)
    w.traffic(seen)
    w.now -= H
    w.traffic(2000)
    assert (w.c.state.phase, w.c.state.stage, w.canary() <= seen) == ("Progressing", 1, True)
    w.traffic(1000, errors=(0.01, 1.0))
    assert w.c.state.aborted and "error_rate" in w.c.state.reason and w.n < seen + 2000 + 400
    assert w.store.replay("r1").state == w.store.load("r1").state == w.c.state


def test_an_abort_is_latched_and_retry_begins_anew(tmp_path):
    w = World(tmp_path)
    w.traffic(400, errors=(0.01, 0.9))
    w.traffic(50)
    assert w.c.step().phase == "Degraded"
    for order in ("resume", "promote", "pause", "undo"):
        with pytest.raises(KitError, match="retry starts it again"):
            w.c.command(order, "ann")
    again = w.c.command("retry", "ann", "fixed")
    assert (again.phase, again.attempt, again.aborted, again.step) == ("Progressing", 2, False, 1)
    assert w.canary() == 0  # what was measured before counts no more
    w.traffic(12_000)
    assert w.c.state.phase == "Healthy"


def test_undo_gives_the_previous_release_back(tmp_path):
    w = World(tmp_path)
    w.traffic(12_000)
    s = w.c.command("undo", "ann", "customers complain")
    assert (s.phase, s.aborted, s.weights) == ("Degraded", True, {"baseline": 100.0})
    said = w.registry.read()
    assert said["aliases"] == {"champion": "sha256:a", "previous": "sha256:b"}
    assert [e[0] for e in said["ledger"]] == ["promote", "promote", "rollback", "rollback"]


@pytest.mark.parametrize(("on_no_data", "after"), [("inconclusive", 24 * H), ("error", 0.2 * H)])
def test_silence_pauses_and_never_promotes(tmp_path, on_no_data, after):
    w = World(tmp_path, CANARY | {"validity": CANARY["validity"] | {"on_no_data": on_no_data}})
    while w.c.step().phase == "Progressing" and w.now < 80 * H:
        w.now += 60
    assert (w.c.state.phase, w.c.state.aborted, w.c.state.weights["canary"]) == ("Paused", False, 20.0)
    assert w.now == pytest.approx(after, abs=120)
    w.now += 1000 * H
    assert w.c.step().phase == "Paused"


def test_traffic_that_ends_in_the_middle_does_not_promote(tmp_path):
    w = World(tmp_path)
    w.traffic(3000, every=0.2)  # plenty, and too soon
    assert w.c.state.phase == "Progressing" and w.canary() > 400
    w.now += 2 * H  # long enough now, and silent
    assert (w.c.step().phase, w.c.state.stage) == ("Progressing", 1)
    w.now += 30 * H
    assert w.c.step().phase == "Paused"


def test_a_wrong_split_is_an_error_and_pauses(tmp_path):
    w = World(tmp_path)
    for i in range(2000):
        w.now += 1
        v = "canary" if i % 3 == 0 else "baseline"  # a third, where a fifth was asked for
        w.c.observe({"kind": "request", "time": w.now, "id": f"x{i}", "variant": v, "release": "sha256:b", "unit": f"y{i}", "code": 200, "status": "ok", "latency": 0.2, "ttft": None, "prompt_tokens": 9, "fallback": False, "refused": False})  # fmt: skip
        if i % 50 == 0:
            w.c.step()
    assert (w.c.state.phase, w.c.state.aborted) == ("Paused", False)
    assert "otherwise than intended" in w.c.state.reason and w.c.fold.verdict(w.now).outcome == "error"


def test_a_silent_arm_is_stale_and_an_error(tmp_path):
    w = World(tmp_path)
    w.traffic(500)
    users = [u for u in (f"v{i}" for i in range(120)) if w.c.assign(u) == "baseline"]
    for i, u in enumerate(users * 20):  # few of them, so that the split of the users is not yet doubted
        w.request(unit=u)
        if i % 20 == 0:
            w.c.step()
    assert (w.c.state.phase, w.c.state.aborted) == ("Paused", False) and "stale" in w.c.state.reason
    w.traffic(25)  # it is heard of again
    assert w.c.command("resume", "ann").phase == "Progressing"


def test_harm_ends_a_paused_rollout_too(tmp_path):
    w = World(tmp_path)
    w.c.command("pause", "ann", "lunch")
    w.traffic(2000, errors=(0.01, 0.15))
    assert w.c.state.phase == "Degraded"


def test_a_busy_user_is_one_draw_of_the_split(tmp_path):
    w = World(tmp_path)
    robot = next(u for u in (f"robot{i}" for i in range(100)) if w.c.assign(u) == "canary")
    for i in range(3000):
        w.request(unit=robot if i % 2 else None)
    w.c.step()
    assert w.c.fold.verdict(w.now).outcome != "error"


def test_an_order_takes_effect_within_a_step_of_another_process(tmp_path):
    w = World(tmp_path)
    w.c.clock = time.time
    w.c.run(every=0.01)
    try:
        World(tmp_path, begin=False).c.command("abort", "ben")
        until = time.monotonic() + 60
        while not w.c.state.finished and time.monotonic() < until:
            threading.Event().wait(0.01)
        assert w.c.state.phase == "Degraded" and w.c.assign("u1") == "baseline"
    finally:
        w.c.stop()
    assert w.c.trouble == ""


def test_two_candidates_are_judged_side_by_side(tmp_path):
    section = CANARY | {"steps": [{"setWeight": {"canary": 20, "other": 20}}, CANARY["steps"][1] | {}, {"setWeight": {"canary": 20, "other": 20}}, CANARY["steps"][3]]}  # fmt: skip
    policy = read_rollout(section)
    assert policy.variants == ("canary", "other")
    from llmkit.rollout.controller import Controller
    from llmkit.rollout.store import Store

    store, clock = Store(tmp_path / "two.db"), [0.0]
    store.create("r1", section)
    w = Controller(store, "r1", Recorder(tmp_path / "registry.json"), lambda: clock[0])
    w.command("start", "ann", model="m", releases={"baseline": "sha256:a", "canary": "sha256:b", "other": "sha256:c"})
    for i in range(1500):
        clock[0] += 1
        v = w.assign(f"u{i}")
        bad = v == "other" and i % 4 == 0
        w.observe({"kind": "request", "time": clock[0], "id": f"x{i}", "variant": v, "release": v, "unit": f"u{i}", "code": 500 if bad else 200, "status": "error" if bad else "ok", "latency": 0.2, "ttft": None, "prompt_tokens": 9, "fallback": False, "refused": False})  # fmt: skip
        if i % 20 == 0:
            w.step()
    assert w.state.phase == "Degraded" and "other error_rate" in w.state.reason


def test_a_shadow_that_is_paused_spends_no_looks(tmp_path):
    "Each look halves alpha: some looks a second, and after minutes nothing could be shown any more, nor computed."
    steps = [
        {"shadow": {"percent": 100}},
        {"analysis": {"min_duration": "1h", "max_duration": "2h", "min_samples": 300}},
    ]
    w = World(tmp_path, SECTION | {"steps": [*steps, *SECTION["steps"][2:]]})

    def copied(n, same):
        for i in range(n):
            w.shadow(w.request(every=10.0), same=w.rng.random() < same)
            if i % 10 == 9:
                w.c.step()
        return w.c.state

    assert copied(750, 0.85).reason.startswith("inconclusive: no answer within 7200 s")
    before = w.c.state.looks
    assert copied(2000, 0.85).looks <= before + 2 and w.c.state.phase == "Paused"
    w.c.command("resume", "ann")
    assert copied(2000, 1.0).step > 1, w.c.state.reason
    assert w.store.replay("r1").state == w.c.state


def test_who_resumes_in_a_pause_goes_on_though_the_telemetry_was_stale_at_its_end(tmp_path):
    steps = [CANARY["steps"][0], {"pause": {"duration": "2h"}}, *CANARY["steps"][2:]]
    w = World(tmp_path, CANARY | {"steps": steps})
    w.now += 2.5 * H
    for u in [u for u in map(str, range(99)) if w.c.assign(u) == "baseline"][:50]:
        w.request(unit=u)
    assert w.c.step().reason.startswith("error: no request of canary") and w.c.state.paused_by == "policy"
    w.c.command("resume", "ann")
    assert (w.c.step().phase, w.c.state.weights["canary"]) == ("Progressing", 50.0), w.c.state.reason


def test_a_small_service_is_not_paused_because_its_canary_was_quiet_by_chance(tmp_path):
    "A request a minute, a fifth of them the canary's: ten minutes without one are common, a hundred are not."
    for seed in range(5):
        (folder := tmp_path / str(seed)).mkdir()
        w = World(folder)
        w.rng, w.n, quiet = np.random.default_rng(seed), seed * 10**6, 0
        for _ in range(240):
            w.request(every=60.0 * float(w.rng.exponential()))
            w.c.step()
            quiet += "chance" in str(w.c.fold.verdict(w.now))
        assert w.c.state.phase == "Progressing" and quiet, w.c.state.reason
    for u in [u for u in map(str, range(200)) if w.c.assign(u) == "baseline"][:60]:
        w.request(every=60.0, unit=u)
    assert w.c.step().reason.startswith("error: no request of canary")


def test_nobody_promotes_against_the_last_look_at_the_shadow(tmp_path):
    "Between two looks nothing is known, and a policy that pauses on a finding leaves it to a person."
    w = World(tmp_path, SECTION | {"on": SECTION["on"] | {"fail": "pause"}})

    def copied(failed, until):
        while not until(w.c.state):
            for _ in range(10):
                w.shadow(w.request(every=150.0), failed=bool(w.rng.random() < failed))
            w.c.step()

    copied(0.3, lambda s: s.looks)
    assert w.c.state.reason.startswith("fail: shadow error_rate")
    for order in ("promote", "resume", "promote"):
        if order == "resume":
            w.c.command(order, "ann")
            continue
        with pytest.raises(KitError, match="the last look at the shadow says fail"):
            w.c.command(order, "ann")
    assert (w.c.state.stage, w.store.replay("r1").state) == (1, w.c.state)
