"What happens to a rollout while nobody looks: clocks that jump, files that others hold, versions that come and go."

import json
import sqlite3
import threading
import time

import pytest
from rollout_road import CANARY, SECTION, H, Recorder, World
from serve_server import PATIENCE, until
from starlette.testclient import TestClient
from test_live import QUICK, Town
from test_outside import aliases, project, serve  # noqa: F401  a fixture

from llmkit.core.errors import KitError
from llmkit.release.registry import register, registry_client, versions
from llmkit.release.release import Release
from llmkit.rollout import commands, database
from llmkit.rollout.controller import Controller
from llmkit.rollout.judge_server import judge_app
from llmkit.rollout.keeper import MlflowRegistry
from llmkit.rollout.shadow import Mirror
from llmkit.rollout.store import Store, newest
from llmkit.rollout.view import view


def test_the_last_decision_is_the_last_one_though_the_clock_was_set_back(tmp_path):
    now, logs, registry = [1000.0], Store(tmp_path / "rollouts.db"), Recorder(tmp_path / "registry.json")

    def promoted(id, old, new, jump):
        logs.create(id, CANARY)
        w = World(tmp_path, id=id, begin=False)
        w.now = now[0]
        w.c.command("start", "ann", model="bank-support", releases={"baseline": old, "canary": new})
        w.traffic(200)
        w.now += jump
        w.traffic(200)
        w.c.command("promote", "ann", full=True)
        now[0] = w.now - jump

    promoted("one", "sha256:a", "sha256:b", H)
    promoted("two", "sha256:b", "sha256:c", 0.0)
    assert registry.read()["aliases"]["champion"] == "sha256:c"
    assert newest(logs, "bank-support")[0] == commands.latest(logs) == "two" and logs.ids() == ["two", "one"]


@pytest.fixture
def begun(project):  # noqa: F811
    "A rollout that has begun, in the folder of a project."
    one, two = versions("sqlite:///mlflow.db", "bank-support")
    commands.rollout_start("bank-support", canary=one.release, first=True)
    commands.rollout_start("bank-support", canary=two.release, id="a")
    return sqlite3.connect("rollouts.db", isolation_level=None)


def test_a_rollout_whose_policy_this_version_refuses_can_be_aborted(begun, capsys):
    policy = json.loads(begun.execute("select policy from rollouts").fetchone()[0])
    policy["canary"][0]["margin"] = 1.0  # as an older version took it
    begun.execute("update rollouts set policy = ?", (json.dumps(policy),))
    for order in (commands.rollout_status, commands.rollout_promote, commands.rollout_undo):
        with pytest.raises(KitError, match="rollouts.db: the policy .* nothing fails a margin.*got 'a'.*rollout abort"):
            order()
    capsys.readouterr()
    assert commands.rollout_abort(because="after the upgrade") == 0
    assert "a: Degraded, aborted" in (said := capsys.readouterr().out) and "ann: after the upgrade" in said
    assert newest(commands.open_store(), "bank-support")[1].weights == {"baseline": 100.0}
    assert commands.rollout_start("bank-support", id="b") == 0
    with pytest.raises(KitError, match="It was aborted"):
        commands.rollout_abort("a")


def test_a_log_that_somebody_holds_can_be_looked_at_and_is_not_called_damaged(begun, monkeypatch, capsys):
    monkeypatch.setattr(database, "WAIT", 0.2)
    begun.execute("begin immediate")
    assert commands.rollout_status() == 0 and "a: Progressing" in capsys.readouterr().out
    with pytest.raises(KitError, match="locked.*Another process holds it.*Nothing is damaged") as told:
        commands.rollout_abort()
    assert "move it away" not in str(told.value)
    begun.execute("rollback")
    assert commands.rollout_abort() == 0


def test_who_resumes_out_of_a_pause_raises_no_weight_against_harm(tmp_path):
    first, last = CANARY["steps"][:2], CANARY["steps"][2:]
    w = World(tmp_path, CANARY | {"steps": [*first, {"pause": {}}, *last], "on": CANARY["on"] | {"fail": "pause"}})
    w.traffic(4000)
    assert w.c.state.paused_by == "step"
    w.traffic(3000, errors=(0.01, 0.3))
    assert w.c.state.reason.startswith("fail: canary error_rate") and w.c.state.phase == "Paused"
    for order in ("resume", "promote"):
        with pytest.raises(KitError, match="the verdict is fail.*Abort, or mend"):
            w.c.command(order, "ann")
    assert w.c.state.weights["canary"] == 20.0


def test_a_gateway_whose_clock_is_ahead_hides_no_silence(tmp_path):
    "The canary's clock is two hours ahead. It dies after forty minutes; an hour is what the stage takes."
    w = World(tmp_path)
    for i in range(3000):
        w.now += 3.0
        unit = f"u{i}"
        if (mine := w.c.assign(unit) == "canary") and i > 800:
            continue
        w.request(every=0.0, unit=unit, time=w.now + (2 * H if mine else 0.0))
        if i % 20 == 0:
            w.c.step()
    assert (w.c.state.stage, w.c.state.phase) == (1, "Paused") and "the telemetry is stale" in w.c.state.reason
    assert w.store.replay("r1").state == w.c.state


@pytest.mark.parametrize("ahead", [0.0, H])
def test_a_gateway_whose_clock_is_ahead_ends_nobody_s_time_for_feedback(tmp_path, ahead):
    w = World(tmp_path, CANARY | {"canary": [{"metric": "task_success_rate", "margin": 0.1}]})
    told = {"rating": None, "success": True, "label": None, "kind": "feedback"}
    coming = []
    for i in range(1500):
        at = w.now + 1 + ahead * (i % 2)
        w.request(unit=f"u{i}", time=at, status="ok", code=200)
        coming.append(told | {"id": f"q{w.n}", "time": at + 60})
        if i >= 60:
            w.c.observe(coming[i - 60])
        if i % 25 == 24:
            w.c.step()
    window = w.c.fold.window
    assert window.counts["late"] == 0 and sum(a.rates["task_success_rate"][1] for a in window.arms.values()) > 850 / (
        2 if ahead else 1
    )


def test_nobody_is_called_silent_after_the_clock_was_set_back_and_nothing_passes_then(tmp_path):
    w = World(tmp_path)
    w.traffic(100)
    w.now += H
    w.traffic(25)
    w.now -= H
    assert "the clock was set back" in str(w.c.fold.verdict(w.now)) and w.c.step().phase == "Progressing"
    w.traffic(25)
    assert "the clock was set back" not in str(w.c.fold.verdict(w.now))


def test_a_user_who_asks_a_hundred_times_is_one_who_might_have_been_the_canary_s(tmp_path):
    "Sixty regulars, one after the other, with a talk of half an hour each: the canary is silent for hours."
    w = World(tmp_path)
    users = [u for u in map(str, range(120)) if w.c.assign(u) == "baseline"][:60]
    w.traffic(25)
    for u in users[:12]:
        for _ in range(100):
            w.request(every=18.0, unit=u)
        assert w.c.step().phase == "Progressing", w.c.state.reason
    said = str(w.c.fold.verdict(w.now))
    assert "users of others have some: that may be chance" in said and w.c.state.stage == 1
    for u in users[12:]:
        w.request(every=18.0, unit=u)
    assert w.c.step().reason.startswith("error: no request of canary")


def test_feedback_that_comes_too_late_is_told_of(tmp_path):
    w = World(tmp_path, CANARY | {"canary": [{"metric": "task_success_rate", "margin": 0.1}]})
    e = w.request(errors=(0, 0))
    w.c.observe(
        {"kind": "feedback", "id": e["id"], "time": w.now + 2 * H, "rating": None, "success": True, "label": None}
    )
    w.c.step()
    assert "1 ratings and outcomes came later than 600 s" in str(view(w.c.fold, w.now))


@pytest.mark.parametrize("gone", ["canary", "baseline"])
def test_a_version_that_was_deleted_meanwhile_stops_no_undo_and_no_other_rollout(project, gone):  # noqa: F811
    uri = "sqlite:///mlflow.db"
    register(Release("bank-support", "sha256:bundle3", "sha256:verdict3", "sha256:card3"), uri, "file:///bundle3")
    one, two, three = versions(uri, "bank-support")
    commands.rollout_start("bank-support", canary=one.release, first=True)
    commands.rollout_start("bank-support", canary=two.release, id="a")
    serve(Controller(commands.open_store(), "a", MlflowRegistry(uri)))
    registry_client(uri).delete_model_version("bank-support", "2" if gone == "canary" else "1")
    if gone == "baseline":  # there is no way back, and the promotion holds
        assert commands.rollout_promote(full=True) == 0 and aliases(uri) == {"champion": 2, "challenger": 3}
        assert commands.rollout_start("bank-support", canary=three.release, id="b") == 0
        return
    assert commands.rollout_promote(full=True) == 4
    with pytest.raises(KitError, match="champion → .* is not in the registry.*rollout undo"):
        commands.rollout_start("bank-support", canary=three.release, id="b")
    assert commands.rollout_undo() == 0
    assert aliases(uri) == {"champion": 1, "previous": 1, "challenger": 3} and not commands.open_store().owed()
    assert commands.rollout_start("bank-support", canary=three.release, id="b") == 0


def test_an_undo_is_obeyed_while_the_registry_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr("llmkit.rollout.keeper.SLOW", 0.3)
    town, go = Town(tmp_path), threading.Event()
    usual, away = town.registry.move, Recorder(tmp_path / "registry.json")

    def hangs(effect):
        go.wait(PATIENCE)
        usual(effect)

    def order(kind, **more):
        Controller(town.store, "r1", away).command(kind, "ann", **more)

    def refuses(effect):
        raise OSError("the person's own client gave up")

    town.registry.move, away.move = hangs, refuses
    steps = [{"setWeight": 50}, {"analysis": {"min_duration": "1s", "max_duration": "10m", "min_samples": 20_000}}]
    with town.server() as (url, live), town.customers(url):
        town.begin("r1", "sha256:good", QUICK | {"steps": steps})
        until(lambda: town.canary("r1") > 10, "numbers in the log")
        began = time.monotonic()
        order("promote", full=True)
        until(lambda: live.state.phase == "Healthy", "the promotion")
        until(lambda: "the registry has not answered for" in live.trouble, "the trouble")
        order("undo")
        until(lambda: live.state.phase == "Degraded", "the undo")
        assert time.monotonic() - began < 10
        since = len(town.answers)
        until(lambda: len(town.answers) > since + 20, "more answers")
        assert town.recent(since + 10).keys() <= {"llmkit-a"}
        go.set()
        until(lambda: not town.store.owed() and not live.trouble, "the moves")
    assert town.registry.read()["aliases"] == {"champion": "sha256:a", "previous": "sha256:good"}


def test_an_undo_waits_a_while_for_a_registry_that_hangs_and_is_given(project, monkeypatch):  # noqa: F811
    uri, go = "sqlite:///mlflow.db", threading.Event()
    one = versions(uri, "bank-support")[0]
    commands.rollout_start("bank-support", canary=one.release, first=True)
    commands.rollout_start("bank-support")
    serve(Controller(commands.open_store(), "bank-support-2", MlflowRegistry(uri)))
    assert commands.rollout_promote(full=True) == 0
    monkeypatch.setattr(commands, "ASKED", 0.2)
    monkeypatch.setattr(commands, "versions", lambda *_: (go.wait(60), [])[1])
    assert commands.rollout_undo() == 0 and aliases(uri)["champion"] == 1
    go.set()


def test_a_judge_that_is_asked_all_the_time_looks_at_the_shadow_as_rarely_as_a_controller(tmp_path):
    w = World(tmp_path, SECTION | {"shadow": [SECTION["shadow"][0] | {"min_n": 10}]})
    seen = set()
    for i in range(1100):
        w.shadow(w.request(every=150.0))
        w.c._flush()
        if i >= 700:
            found = w.c.fold.verdict(w.now)
            seen.add(tuple((r.n, r.sentence) for r in found.reasons if r.metric == "error_rate"))
    assert {n for rows in seen for n, _ in rows} == {500, 1000} and len(seen) == 2
    assert len(w.c.fold.window.pairs) == 1100 and w.c.state.looks == 0


def test_a_judge_whose_file_is_gone_takes_no_events_and_says_so(tmp_path):
    w = World(tmp_path)
    asked = TestClient(judge_app(Store(tmp_path / "rollouts.db"), lambda: w.now, keys=lambda header: None))
    sent = {"source": "pod", "model": "bank-support", "events": []}
    assert asked.get("/v1/rollouts/r1/verdict").status_code == 200
    assert asked.get("/v1/rollouts/r2/verdict").status_code == 404
    assert asked.post("/v1/events", json=sent).json()["rollout"] == "r1"
    w.store.close()
    for path in tmp_path.glob("rollouts.db*"):
        path.rename(tmp_path / f"away-{path.name}")
    World(tmp_path, id="r2")
    for ask in ("/v1/rollouts", "/v1/rollouts/r1", "/v1/rollouts/r1/verdict"):
        assert (got := asked.get(ask)).status_code == 503 and "not here any more" in got.json()["detail"]
    got = asked.post("/v1/events", json=sent)
    assert got.status_code == 503 and "start again what holds it" in got.json()["error"]["message"]


def test_whoever_is_woken_reads_which_orders_there_are(tmp_path):
    w = World(tmp_path)
    say = lambda: str(view(w.c.fold, w.now)).splitlines()[-1]
    assert say().startswith("INCONCLUSIVE")
    for order, line in (
        ("pause", "`llmkit rollout resume` goes on"),
        ("abort", "`llmkit rollout retry` begins it again"),
    ):
        w.c.command(order, "ann")
        assert say().startswith(line)


def test_a_mirror_is_closed_when_the_last_event_was_told():
    told = []

    def emit(event):
        time.sleep(0.1)
        told.append(event["id"])

    mirror = Mirror(lambda body: "fees: done", emit)
    for i in range(3):
        mirror.submit(str(i), {}, "fees: done")
    assert mirror.close(wait=PATIENCE)["ok"] == len(told) == 3
