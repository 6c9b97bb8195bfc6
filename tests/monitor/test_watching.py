"""Windows of live traffic: killed anywhere, run by several at once, on logs of older servers; rollback and retraining."""

import json
import multiprocessing as mp
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
from rollout_road import FATE, point
from watching_town import ROOT, SMALL, Ledger, Town, section

from llmkit.cli import main
from llmkit.core.errors import KitError
from llmkit.core.files import read_json, read_jsonl, write_jsonl
from llmkit.core.params import load_params
from llmkit.core.settings import Settings, load_settings
from llmkit.monitor.act import carry_out, ended
from llmkit.monitor.drift import text_features
from llmkit.monitor.measure import GROUPS
from llmkit.monitor.policy import read_monitor
from llmkit.monitor.scrape import Windows
from llmkit.monitor.state import WINDOWS, Action, Memory, overview, seen_json, unsettled
from llmkit.monitor.watch import FAULT, monitor_watch, open_monitor, run_window, settle, watch
from llmkit.monitor.window import answering
from llmkit.rollout.controller import Controller
from llmkit.rollout.store import Store
from llmkit.serve.call import parse
from llmkit.serve.events import KINDS, Events
from llmkit.serve.measured import Measured
from llmkit.serve.samples import Texts


class Mortal(Memory):
    "A memory that may die around each write."

    def add(self, *args):
        point()
        done = super().add(*args)
        point()
        return done

    def move(self, *args):
        point()
        done = super().move(*args)
        point()
        return done


class MortalLedger(Ledger):
    "A registry that may take its caller with it."

    def move(self, effect):
        point()
        super().move(effect)
        point()


def launched(home):
    "Stands in for the process of a training: at most once, as `carry_out` does."
    point()
    try:
        with open(home / "started", "x") as f:
            f.write("1")
        (home / "exit.json").write_text('{"code": 0, "note": ""}')
        with open(home.parent / "launches", "a") as f:
            f.write(f"{home.name}\n")
    except FileExistsError:
        pass
    point()


def story(folder, memory=Memory, registry=Ledger):
    "What is in the log is decided to its end; the log is there already."
    t = Town(folder, memory=memory, registry=registry, start=launched)
    t.monitor.texts = Texts(folder / "texts.db")
    t.now = read_json(folder / "now.json")
    for release in ("sha256:a", "sha256:b"):
        while run_window(t.monitor, release):
            point()
    while settle(t.monitor):
        pass
    return t


def logged(folder):
    "A log with a drift, a promotion, and a release that is unfair."
    folder.mkdir()
    t = Town(folder)
    write_jsonl(folder / "dataset/train.jsonl", [{"id": "a", "label": "fee", "split": "train", "messages": [{"role": "user", "content": "a fee?"}, {"role": "assistant", "content": "fee: Yes."}]}])  # fmt: skip
    t.send(300)
    t.send(180, refuses=0.6)
    kept = Texts(folder / "texts.db")
    kept.keep("q5", parse("chat", {"model": "m", "messages": [{"role": "user", "content": "why?"}]}), "fee: So.")
    t.events.feedback("q5", label="fee")
    t.promoted()
    t.send(300, release="sha256:b", worse=0.7, said=0.9)
    (folder / "now.json").write_text(json.dumps(t.now))


def outcome(folder):
    "Everything that was decided and done."
    m = Memory(folder / "monitor.db")
    launches = folder / "retrain/launches"
    return {
        "windows": [seen_json(w) for w in reversed(m.windows(n=99))],
        "actions": [(a.id, a.kind, a.state) for a in m.actions()],
        "ledger": Ledger(folder / "ledger.jsonl").lines(),
        "rollout": Store(folder / "r.db").load("bank-2").state.phase,
        "launches": launches.read_text() if launches.exists() else "",
    }


def test_kill_9_anywhere_ends_alike(tmp_path):
    FATE.value = -1  # whatever another test has left: this process must not die
    logged(tmp_path / "whole")
    story(tmp_path / "whole")
    want = outcome(tmp_path / "whole")
    assert [a[1:] for a in want["actions"]] == [("retrain", "done"), ("rollback", "done"), ("retrain", "held")]
    assert want["rollout"] == "Degraded" and want["launches"].count("\n") == 1
    assert [x["action"] for x in want["ledger"][1:]] == ["promote", "promote", "rollback", "rollback"]
    logged(tmp_path / "mortal")
    fork, deaths = mp.get_context("fork"), 0
    for fate in [*range(0, 40, 3), -1]:
        FATE.value = fate
        child = fork.Process(target=story, args=(tmp_path / "mortal", Mortal, MortalLedger))
        child.start()
        child.join(60)
        deaths += child.exitcode == -signal.SIGKILL
        assert child.exitcode in (0, -signal.SIGKILL)
    FATE.value = -1
    assert deaths >= 5
    assert outcome(tmp_path / "mortal") == want


def test_two_monitors_write_each_window_once(tmp_path):
    t = Town(tmp_path)
    t.send(420)
    code = "import sys; sys.path.insert(0, 'tests/monitor'); from watching_town import Town; from llmkit.monitor.watch import run_window\nt = Town(sys.argv[1]); t.now = 1e4\nwhile w := run_window(t.monitor, 'sha256:a'): print(w.number)"  # fmt: skip
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]  # fmt: skip
    assert [p.communicate()[0] is not None and p.returncode for p in both] == [0, 0]
    assert [w.number for w in reversed(t.monitor.memory.windows())] == [0, 1, 2, 3, 4]


def test_a_log_of_an_older_server(tmp_path):
    t = Town(tmp_path)
    t.send(240, lacks=("confidence", "surprisal", "label", "group"))
    run_window(t.monitor)
    seen = run_window(t.monitor)
    assert seen.outcomes == {"data": "pass", "cost": "pass", "hallucination": "skipped", "calibration": "inconclusive", "fairness": "skipped"}  # fmt: skip
    assert seen.verdict.exit_code == 3


WORSE = {  # family whose alarm asks for a rollback → what a release does
    "fairness": {"worse": 0.8, "said": 0.9},
    "data": {"refuses": 0.6},
}


def taking_back(folder, family, **more):
    "A town whose policy takes a promotion back on an alarm of one family."
    parts = {k: SMALL[k] for k in ("window", "reference", "fairness", "calibration", "retrain")}
    return Town(folder, section(**parts, rollback={"when": [family]}), **more)


@pytest.mark.parametrize("family", WORSE)
def test_rollback_only_of_what_the_last_rollout_brought(tmp_path, family):
    t = taking_back(tmp_path, family)
    t.send(180)
    t.send(240, **WORSE[family])
    t.promoted()
    for _ in range(9):
        run_window(t.monitor, "sha256:a")
    [a] = t.monitor.memory.actions(kind="rollback")
    assert a.state == "held" and "a person decides" in a.note
    assert t.registry.aliases() == {"previous": "sha256:a", "champion": "sha256:b"}


@pytest.mark.parametrize("family", WORSE)
def test_an_alarm_takes_the_promotion_back_where_the_policy_names_its_family(tmp_path, family):
    t = taking_back(tmp_path, family)
    t.promoted()
    t.send(180, release="sha256:b")
    t.send(60 * 6, release="sha256:b", **WORSE[family])
    other = {"data": "fairness", "fairness": "data"}[family]
    while (w := run_window(t.monitor, "sha256:b")) and not t.monitor.memory.actions(kind="rollback"):
        assert family not in w.alarms and t.registry.aliases()["champion"] == "sha256:b"
    assert family in w.alarms and other not in w.alarms
    [a] = t.monitor.memory.actions(kind="rollback")
    assert (a.state, a.note, a.reason.partition(":")[0].partition(" ")[0]) == ("done", "undo of bank-2", family), a
    assert t.registry.aliases() == {"previous": "sha256:b", "champion": "sha256:a"}
    assert Store(tmp_path / "r.db").load("bank-2").state.phase == "Degraded"
    quiet = taking_back(tmp_path / "quiet", other)  # the same, by a policy that names another family
    quiet.promoted()
    quiet.send(180, release="sha256:b")
    quiet.send(60 * 6, release="sha256:b", **WORSE[family])
    seen = [w for w in iter(lambda: run_window(quiet.monitor, "sha256:b"), None)]
    assert any(family in w.alarms for w in seen) and not quiet.monitor.memory.actions(kind="rollback")
    assert quiet.registry.aliases()["champion"] == "sha256:b"


def test_an_old_promotion_is_left_to_a_person(tmp_path):
    t = Town(tmp_path, section(**{k: SMALL[k] for k in ("window", "reference", "fairness")}, rollback={"within": "1m"}))
    t.promoted()
    t.send(240, release="sha256:b", worse=0.8, said=0.9)
    run_window(t.monitor, "sha256:b")
    [a] = t.monitor.memory.actions(kind="rollback")
    assert a.state == "held" and "h ago" in a.note
    assert t.registry.aliases()["champion"] == "sha256:b"


def test_a_newer_rollout_of_another_model_does_not_stand_in_the_way(tmp_path):
    t = Town(tmp_path)
    t.promoted()
    store = Store(tmp_path / "r.db")
    store.create("loan-1", load_params(ROOT / "params.yaml", "rollout"))
    loan = Controller(store, "loan-1", t.registry, lambda: t.now)
    loan.command("start", "ann", model="loan", releases={"baseline": "sha256:x", "canary": "sha256:y"})
    t.send(240, release="sha256:b", worse=0.8, said=0.9)
    while run_window(t.monitor, "sha256:b"):
        pass
    [a] = t.monitor.memory.actions(kind="rollback")
    assert (a.state, a.note) == ("done", "undo of bank-2")
    assert t.registry.aliases() == {"previous": "sha256:b", "champion": "sha256:a"}
    assert store.load("loan-1").state.phase == "Progressing"


def asked(t, *actions):
    "Requests that windows have made."
    for id, state in actions:
        t.monitor.memory.ask(Action(id, "retrain", t.now, "sha256:a", 1, "data: 2 of 3 windows drifted", state))


def test_two_releases_that_ask_at_once_get_one_training(tmp_path):
    "Each window was decided before the other had written its request, so that neither cooldown saw the other."
    t = Town(tmp_path, start=launched)
    t.monitor.texts = Texts(tmp_path / "texts.db")
    t.monitor.texts.keep("q5", parse("chat", {"model": "m", "messages": [{"role": "user", "content": "why?"}]}), "fee: So.")  # fmt: skip
    write_jsonl(tmp_path / "dataset/train.jsonl", [{"id": "a", "label": "fee", "split": "train", "messages": [{"role": "user", "content": "a fee?"}, {"role": "assistant", "content": "fee: Yes."}]}])  # fmt: skip
    t.send(10)
    t.events.feedback("q5", label="fee")
    asked(t, ("retrain-a-1", "requested"), ("retrain-b-1", "requested"))
    FATE.value = -1
    settle(t.monitor)
    one, two = t.monitor.memory.actions(kind="retrain")
    assert (one.state, two.state, two.note) == ("started", "held", "retrain-a-1 still runs")
    settle(t.monitor)
    asked(t, ("retrain-c-1", "requested"))
    settle(t.monitor)
    assert [a.state for a in t.monitor.memory.actions(kind="retrain")] == ["done", "held", "held"]
    assert (tmp_path / "retrain/launches").read_text() == "retrain-a-1\n"


def test_an_action_that_raises_stops_no_other_and_a_rollback_comes_first(tmp_path, monkeypatch, capsys):
    t = Town(tmp_path, start=launched)
    t.monitor.texts = Texts(tmp_path / "texts.db")
    t.promoted()
    cut = tmp_path / "dataset/train.jsonl"
    write_jsonl(cut, [{"id": "a", "label": "fee", "split": "train", "messages": [{"role": "user", "content": "a fee?"}, {"role": "assistant", "content": "fee: Yes."}]}])  # fmt: skip
    whole = cut.read_text()
    cut.write_text(whole[:20])  # by a full disk
    t.now += 10
    back = lambda id: t.monitor.memory.ask(Action(id, "rollback", t.now, "sha256:b", 3, "it is worse", "requested"))
    asked(t, ("retrain-b-1", "requested"))
    back("rollback-b-3")
    state = lambda: {a.id: a.state for a in t.monitor.memory.actions()}
    note = lambda id: next(a.note for a in t.monitor.memory.actions() if a.id == id)
    with pytest.raises(KitError, match="train.jsonl") as told:
        settle(t.monitor)
    assert state() == {"retrain-b-1": "requested", "rollback-b-3": "done"}
    assert t.registry.aliases()["champion"] == "sha256:a" and note("retrain-b-1") == f"{FAULT}{told.value}"

    def unread(*_):
        raise KeyError("messages")

    with monkeypatch.context() as m:  # the window cannot be judged: what waits is done, and that error is raised
        m.setattr("llmkit.monitor.watch.next_window", unread)
        back("rollback-b-4")
        with pytest.raises(KeyError, match="messages"):
            run_window(t.monitor, "sha256:b")
        assert state()["rollback-b-4"] == "done"
    cut.write_text(whole)
    settle(t.monitor)
    assert FAULT not in note("retrain-b-1") and "new labelled records" in note("retrain-b-1")
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) > 2:
            raise KeyboardInterrupt

    asked(t, ("retrain-b-5", "started"))
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr("llmkit.monitor.watch.ended", full)
        watch(t.monitor, "sha256:b", sleep=sleep)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("ERROR: ") for line in lines) == 1
    assert [line for line in lines if "retrain-b-5" in line] == [f"retrain started: retrain-b-5 ({FAULT}OSError: no space), because data: 2 of 3 windows drifted"]  # fmt: skip
    with monkeypatch.context() as m:  # its note ends with its cause
        m.setattr("llmkit.monitor.watch.ended", lambda home: ("started", ""))
        settle(t.monitor)
        assert (state()["retrain-b-5"], note("retrain-b-5")) == ("started", "")


def full(*_):
    raise OSError("no space")


def test_kill_9_of_a_training_is_lost_when_its_command_is_over(tmp_path):
    "The command outlives the process that started it: it is still a training until it has ended."
    home = tmp_path / "retrain-1"
    go = tmp_path / "go"
    wait = f"import pathlib, time\nwhile not pathlib.Path({str(go)!r}).exists(): time.sleep(0.05)"
    home.mkdir()
    (home / "request.json").write_text(json.dumps({"id": "retrain-1", "command": [sys.executable, "-c", wait]}))
    run = "import sys; from llmkit.monitor.act import carry_out; carry_out(sys.argv[1])"
    process = subprocess.Popen([sys.executable, "-c", run, str(home)], cwd=ROOT)
    until = time.monotonic() + 60
    while not (home / "log.txt").exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert ended(home)[0] == "started"
    go.touch()
    while ended(home)[0] == "started" and time.monotonic() < until:
        time.sleep(0.05)
    assert ended(home)[0] == "lost" and carry_out(home) == 0


def test_a_training_whose_folder_is_gone_is_lost(tmp_path):
    started = []
    t = Town(tmp_path, start=started.append)
    asked(t, ("retrain-1", "started"))
    settle(t.monitor)
    assert (t.monitor.memory.actions()[0].state, started) == ("lost", [])


def test_what_a_damaged_or_full_database_says(tmp_path, monkeypatch, capsys):
    t = Town(tmp_path)
    (tmp_path / "params.yaml").write_text(json.dumps({"monitor": SMALL}))
    monkeypatch.chdir(tmp_path)
    t.send(300)
    run_window(t.monitor)
    with monkeypatch.context() as mp_:
        mp_.setattr("llmkit.serve.store.Store.write", full_disk)
        with pytest.raises(KitError, match="monitor.db: cannot be written: database or disk is full"):
            run_window(t.monitor)
    assert run_window(t.monitor).number == 1
    with t.monitor.memory.store.write() as db:
        db.execute("UPDATE windows SET body = '{}'")
        db.execute("UPDATE streams SET body = '{\"number\": 2}'")
    for command in ("run", "status"):
        assert main(["monitor", command]) == 2
        assert "monitor.db: cannot be read" in capsys.readouterr().err
    measured = Measured(lambda: {}, {"window": Windows(Settings("DEFAULT", {"monitor_db": "monitor.db"}, tmp_path / "s.ini"))})  # fmt: skip
    [bad] = [f for f in measured.collect() if f.name == "llmkit_report_unreadable"]
    assert [s.value for s in bad.samples] == [1]


@contextmanager
def full_disk(store):
    "A transaction, in place of one on a disk that is full."
    raise sqlite3.OperationalError("database or disk is full")
    yield


def test_ten_thousand_names_of_groups_are_no_ten_thousand_series(tmp_path):
    t = Town(tmp_path)
    t.send(180)
    rng = np.random.default_rng(0)
    base = dict.fromkeys(KINDS["request"].split()) | {"kind": "request", "status": "ok", "code": 200, "variant": "baseline", "release": "sha256:a", "refused": False, "prompt_tokens": 20, "completion_tokens": 5}  # fmt: skip
    for i in range(600):
        t.now += 1
        t.events.append(base | {"time": t.now, "id": f"g{i}", "group": f"user{i}", "confidence": 0.8})
        t.events.feedback(f"g{i}", success=bool(rng.random() < 0.8))
    t.now += 100
    while w := run_window(t.monitor):
        last = w
    m = t.monitor.memory
    assert last.outcomes["fairness"] == "inconclusive"
    assert len(m.stream("sha256:a")["groups"]) == GROUPS and {"65+", "18-30"} <= set(m.stream("sha256:a")["groups"])
    assert len(m.reports("sha256:a", last.number)["fairness"].measurements) < 3 * GROUPS


@pytest.mark.parametrize("texts", [["same"] * 25, [""] * 25, ["x" * 1_000_000, *(f"card {i}" for i in range(24))]])
def test_texts_that_are_no_texts(texts):
    known = [f"my {a} card is {b}" for a in ("old", "new", "blue", "lost") for b in ("here", "gone", "late", "mine", "his", "ours")]  # fmt: skip
    found = {f.name: f for f in text_features(known, texts, 19)}
    assert all(0 <= f.p <= 1 and f.value == f.value for f in found.values())
    assert found["length_psi"].p <= 0.05


def test_a_registry_that_is_away_is_asked_again(tmp_path):
    class Away(Ledger):
        down = True

        def move(self, effect):
            if self.down and effect.action == "rollback":
                raise OSError("no route to the registry")
            super().move(effect)

    t = Town(tmp_path, registry=Away)
    t.promoted()
    t.send(240, release="sha256:b", worse=0.8, said=0.9)
    run_window(t.monitor, "sha256:b")
    [a] = t.monitor.memory.actions(kind="rollback")
    assert a.state == "requested" and "no route" in a.note
    assert Store(tmp_path / "r.db").load("bank-2").state.phase == "Degraded"  # users are back already
    t.registry.down, t.now = False, t.now + 60
    settle(t.monitor)
    assert t.monitor.memory.actions(kind="rollback")[0].state == "done"
    assert t.registry.aliases() == {"previous": "sha256:b", "champion": "sha256:a"}


def test_watch_follows_a_clock(tmp_path, capsys):
    t = Town(tmp_path)
    t.send(200)

    def sleep(seconds):
        t.now += seconds
        if t.now < 2000:
            t.send(60)

    assert watch(t.monitor, every=30.0, windows=4, sleep=sleep) == 0
    assert [w.number for w in t.monitor.memory.windows()] == [3, 2, 1, 0]
    told = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("window ") for line in told) == 3
    assert "monitor.texts.share is 0" in told[0]  # a training would be held, and it is said before it is


def test_commands_and_their_exit_codes(tmp_path, monkeypatch, capsys):
    t = Town(tmp_path)
    (tmp_path / "params.yaml").write_text(json.dumps({"monitor": SMALL}))
    monkeypatch.chdir(tmp_path)
    t.send(180)
    t.send(60)
    codes = [main(["monitor", "run"]), main(["monitor", "run"]), main(["monitor", "run"])]
    assert codes == [3, 0, 3]  # the reference, a quiet window, none that is due
    t.send(120, refuses=0.7)
    assert main(["monitor", "run", "--all"]) == 1 and main(["monitor", "status"]) == 1
    assert "data fail" in capsys.readouterr().out
    (tmp_path / "params.yaml").write_text(json.dumps({"monitor": section(alarms={"budget": 1e-9})}))
    assert main(["monitor", "run"]) == 2 and "drift.fdr" in capsys.readouterr().err
    seen = overview(str(t.settings))
    assert seen.latest.alarms == ["data"] and {s.metric for s in seen.latest.scores if s.drifted} == {"refusal_rate"}


def test_a_request_starts_dvc_and_promotes_nobody(tmp_path):
    rules = section(**{k: SMALL[k] for k in ("window", "reference", "retrain")}, texts={"share": 1.0})
    rules["retrain"]["action"] = ["dvc", "exp", "run", "-n", "{id}", "-S", "prepare.source=jsonl", "-S", "prepare.path={records}"]  # fmt: skip
    t = Town(tmp_path, rules)
    run = lambda *cmd: subprocess.run(cmd, cwd=tmp_path, check=True, capture_output=True, text=True)
    (tmp_path / "params.yaml").write_text("prepare: {source: bank, path: ''}\n")
    (tmp_path / "dvc.yaml").write_text("stages:\n  prepare:\n    cmd: echo prepared > out.txt\n    params: [prepare]\n    outs: [out.txt]\n")  # fmt: skip
    (tmp_path / ".gitignore").write_text("*.db*\n/retrain\n/latest\n/dataset\n")
    run("git", "init", "-q")
    run("dvc", "init", "-q")
    run("git", "add", "-A")
    run("git", "-c", "user.name=a", "-c", "user.email=a@example.com", "commit", "-qm", "begin")
    write_jsonl(tmp_path / "dataset/train.jsonl", [{"id": "a", "label": "fee", "split": "train", "messages": [{"role": "user", "content": "a fee?"}, {"role": "assistant", "content": "fee: Yes."}]}])  # fmt: skip
    t.monitor.texts = Texts(tmp_path / "texts.db")
    t.monitor.texts.keep("q5", parse("chat", {"model": "m", "messages": [{"role": "user", "content": "I am ann@example.com"}]}), "fee: So.")  # fmt: skip
    t.send(180)
    t.events.feedback("q5", label="fee")
    t.send(120, refuses=0.6)
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        while run_window(t.monitor):
            pass
    finally:
        os.chdir(here)
    [a] = t.monitor.memory.actions(kind="retrain")
    assert a.state == "started", a
    home, end = tmp_path / "retrain" / a.id, time.monotonic() + 120
    while ended(home)[0] == "started" and time.monotonic() < end:
        time.sleep(0.2)
    assert ended(home) == ("done", ""), (home / "log.txt").read_text()
    assert (tmp_path / "out.txt").is_file() and str(home / "records.jsonl") in (tmp_path / "params.yaml").read_text()
    rows = list(read_jsonl(home / "records.jsonl"))
    assert [r["id"] for r in rows] == ["a", "traffic-q5"] and "<EMAIL_ADDRESS>" in rows[1]["messages"][0]["content"]
    settle(t.monitor)
    assert t.monitor.memory.actions(kind="retrain")[0].state == "done"
    assert t.registry.aliases() == {}  # nobody was promoted


def test_the_policy_of_the_project_opens(tmp_path):
    t = Town(tmp_path)
    m = open_monitor(str(ROOT / "params.yaml"), str(t.settings))
    assert m.texts is None and m.policy.k == 2


@pytest.mark.parametrize(
    "action", [["llmkit", "rollout", "start", "--first"], ["sh", "-c", "mlflow set-alias champion"]]
)
def test_a_training_that_would_promote_is_refused(action):
    from llmkit.core.params import ParamsError
    from llmkit.monitor.policy import read_monitor

    with pytest.raises(ParamsError, match="never promotes"):
        read_monitor(section(retrain={"action": action}))


IN_A_TRAINING = """
import sys
from llmkit.cli import main
from llmkit.core.errors import KitError
from llmkit.rollout.commands import open_registry, open_store
from llmkit.rollout.controller import Controller
from llmkit.rollout.state import Effect
from llmkit.core.settings import load_settings
from llmkit.release.registry import register
from llmkit.release.release import Release

for order in (["start", "--model", "bank"], ["start", "--model", "bank", "--first"], ["promote", "--full"], ["pause"], ["resume"], ["status"], ["abort"], ["retry"], ["undo"]):
    print("order", *order, main(["rollout", *order]), flush=True)
registry, store = open_registry(load_settings("settings.ini")), open_store()
new = Release("bank", "sha256:b3", "sha256:v3", "sha256:c3")
for name, promote in {
    "move": lambda: registry.move(Effect("champion", sys.argv[1], "promote", "v", "bank", "me")),
    "register": lambda: register(new, registry.uri, "x", "champion"),
    "command": lambda: Controller(store, "bank-2", registry).command("retry", "me"),
}.items():
    try:
        promote()
        print("call", name, "done")
    except KitError as e:
        print("call", name, e)
"""


def test_whatever_script_a_training_runs_it_moves_no_traffic(tmp_path, monkeypatch):
    "A real child process, with the registry and the rollouts of a project; the words of the command are innocent."
    from llmkit.release.registry import register, versions
    from llmkit.release.release import Release
    from llmkit.rollout.commands import open_registry
    from llmkit.rollout.state import Effect

    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/m.db"
    keys = {"tracking_uri": uri, "rollouts": tmp_path / "r.db", "ledger": tmp_path / "ledger.jsonl"}
    (tmp_path / "settings.ini").write_text("\n".join(["[DEFAULT]", *(f"{k} = {v}" for k, v in keys.items()), ""]))
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    made = [Release("bank", f"sha256:b{i}", f"sha256:v{i}", f"sha256:c{i}") for i in (1, 2)]
    for r in made:
        register(r, uri, "x", ledger=tmp_path / "ledger.jsonl")
    registry = open_registry(Settings("DEFAULT", {k: str(v) for k, v in keys.items()}, tmp_path / "settings.ini"))
    registry.move(Effect("champion", made[0].digest, "promote", "v", "bank", "ann"))
    store = Store(tmp_path / "r.db")
    store.create("bank-2", load_params(ROOT / "params.yaml", "rollout"))
    c = Controller(store, "bank-2", registry)
    c.command("start", "ann", model="bank", releases={"baseline": made[0].digest, "canary": made[1].digest})

    (tmp_path / "train.py").write_text(IN_A_TRAINING)
    (tmp_path / "run.sh").write_text(
        f"llmkit rollout promote --full\necho shell $?\n{sys.executable} train.py {made[1].digest}\n"
    )
    monkeypatch.setenv("PATH", f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    home = tmp_path / "retrain-1"
    home.mkdir()
    action = ["sh", "run.sh"]
    assert read_monitor(section(retrain={"action": action})).retrain.action == tuple(action)
    (home / "request.json").write_text(json.dumps({"id": "retrain-1", "command": action}))
    assert carry_out(home) == 0
    said = (home / "log.txt").read_text()
    for line in (
        "shell 2", "order start --model bank 2", "order start --model bank --first 2", "order promote --full 2", "order pause 0",
        "order resume 2", "order status 3", "order abort 0", "order retry 2", "order undo 2",
    ):  # fmt: skip
        assert f"{line}\n" in said, said
    refused = "a training never promotes: {} is refused inside it"
    for what in ("llmkit rollout start", "llmkit rollout promote", "llmkit rollout resume", "llmkit rollout retry", "llmkit rollout undo", "the alias champion", "retry of a rollout"):  # fmt: skip
        assert refused.format(what) in said, said
    assert "(got 'retrain-1')" in said, said
    assert "a person runs `llmkit rollout start`" in said and "done" not in [x.split()[-1] for x in said.splitlines() if x.startswith("call")]  # fmt: skip
    assert [(v.version, v.aliases) for v in versions(uri, "bank")] == [(1, ("champion",)), (2, ("challenger",))]
    assert (c.store.standing("bank-2").phase, len(c.store.history("bank-2"))) == ("Degraded", 3)  # start, pause, abort


def test_the_command_of_the_project_is_one_that_the_kit_understands(tmp_path, capsys):
    "With records that are not there: that is what it must complain about."
    words = read_monitor(load_params(ROOT / "params.yaml", "monitor")).retrain.action
    fill = {"{records}": str(tmp_path / "new.jsonl"), "{id}": "retrain-1"}
    assert words[0] == "llmkit" and set(fill) < set(words)
    assert main([fill.get(w, w) for w in words[1:]]) == 2
    said = capsys.readouterr()
    assert "new.jsonl: no such file" in said.out + said.err


def test_it_waits_for_a_server_that_was_never_started(tmp_path, monkeypatch, capsys):
    "Started together with its server, it must not be gone when the server has its first request."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nevents_db = log/events.db\n")
    looked = []

    def sleep(seconds):
        looked.append(seconds)
        if len(looked) == 3:
            Events(tmp_path / "log/events.db")

    monkeypatch.setattr("llmkit.monitor.watch.time.sleep", sleep)
    monkeypatch.setattr("llmkit.monitor.watch.watch", lambda m, *_: 7 if m.events else 0)
    assert monitor_watch(every=10.0, policy=str(ROOT / "params.yaml")) == 7
    assert looked == [1.0, 1.0, 1.0]
    assert capsys.readouterr().out == "waiting for log/events.db: llmkit serve writes it\n"


def test_what_the_gateway_writes(tmp_path):
    "Confidence against the log-probabilities that the API itself gives; label, group, energy and claims."
    import asyncio
    import math

    from llmkit.runtime.dummy import DummyEngine
    from llmkit.serve.backend import EngineBackend
    from llmkit.serve.events import Events
    from llmkit.serve.gateway import ANYONE, Gateway
    from llmkit.serve.samples import Sampler, Shares

    log = Events(tmp_path / "e.db")
    engine = DummyEngine(
        replies={"card": "card_lost: We send 2 cards.", "hello": "Good morning", "euros": "It costs 9."}
    )
    gate = Gateway("bank", {"baseline": EngineBackend(engine)}, events=log, sampler=Sampler(Shares(claims=1.0)))

    async def ask(text, **more):
        body = {"model": "bank", "messages": [{"role": "user", "content": text}], "logprobs": True, "max_tokens": 60}
        return (await (await gate.open_exchange(parse("chat", body | more), ANYONE)).whole())["choices"][0]

    async def run():
        try:
            return [
                await ask("card?", metadata={"group": "65+"}),
                await ask("hello"),
                await ask("It costs 4 euros.\n\nQuestion: What does it cost?"),
            ]
        finally:
            await gate.close()

    said = asyncio.run(run())
    first, second, third = list(log.all("request"))
    tokens = [(t["token"], t["logprob"]) for t in said[0]["logprobs"]["content"]]
    upto = next(i for i in range(1, len(tokens) + 1) if ":" in "".join(t for t, _ in tokens[:i]))
    assert math.isclose(first["confidence"], math.exp(sum(p for _, p in tokens[:upto])), rel_tol=1e-9)
    assert (first["label"], first["group"]) == ("card_lost", "65+") and "claim" not in first
    whole = [t["logprob"] for t in said[1]["logprobs"]["content"]]
    assert math.isclose(second["confidence"], math.exp(sum(whole)), rel_tol=1e-9) and "label" not in second
    assert math.isclose(second["surprisal"], -sum(whole) / len(whole), abs_tol=1e-9)
    assert third["claim"] is True and third["scorer"] == "unsupported@2"
    assert all(e["joules"] >= 0 and e["meter"] for e in (first, second, third))


def test_a_log_that_was_made_anew_is_an_error_and_no_silence(tmp_path):
    "Its numbers begin again, below that of the last window: no request would ever be seen."
    t = Town(tmp_path)
    for n in (180, 60):
        t.send(n)
        assert run_window(t.monitor)
    t.events.store.close()
    for end in ("", "-wal", "-shm"):
        (tmp_path / f"events.db{end}").unlink(missing_ok=True)
    t.events = t.monitor.events = Events(tmp_path / "events.db", lambda: t.now)
    t.send(100)
    with pytest.raises(KitError, match="another log of requests"):
        run_window(t.monitor)
    (tmp_path / "monitor.db").unlink()
    t.monitor.memory = Memory(tmp_path / "monitor.db")
    t.send(80)
    assert run_window(t.monitor).number == 0


def test_a_clock_that_was_ahead_for_a_moment_stops_nothing(tmp_path):
    "Three requests are dated in the year 2096, then the clock is put right; later a whole window is."
    t, base = Town(tmp_path), dict.fromkeys(KINDS["request"].split()) | {"kind": "request", "status": "ok"}
    ahead = lambda n, at: [t.events.append(base | {"variant": "v", "release": "sha256:a", "time": at + i, "id": f"{at}-{i}"}) for i in range(n)]  # fmt: skip
    t.send(180)
    run_window(t.monitor)
    ahead(3, 4e9)
    t.send(57)
    w = run_window(t.monitor)
    assert (w.number, w.requests) == (1, 60) and w.end < t.now, (
        "it is the window's time that cooldowns and alerts go by"
    )
    ahead(60, 5e9)
    assert run_window(t.monitor) is None, "nothing says yet that the clock was put right"
    t.send(60)
    assert [run_window(t.monitor).number for _ in range(2)] == [2, 3]
    assert t.monitor.memory.windows(n=1)[0].end < t.now


def test_a_long_log_is_read_once_for_a_release_that_is_new(tmp_path, monkeypatch):
    from llmkit.monitor import watch as module

    t = Town(tmp_path)
    t.send(100), t.send(30, release="sha256:b")
    asked, real = [], module.next_window
    monkeypatch.setattr(module, "next_window", lambda e, p, r, n, after, *x: asked.append(after) or real(e, p, r, n, after, *x))  # fmt: skip
    assert [run_window(t.monitor, "sha256:b") for _ in range(2)] == [None, None]
    log = t.events.since(0)
    assert len(set(asked)) == 1 and next(e["release"] for s, e in log if s > asked[0]) == "sha256:b"
    t.send(150, release="sha256:b")
    assert run_window(t.monitor, "sha256:b").requests == 180


def test_a_window_that_waits_is_not_read_anew_at_every_look(tmp_path, monkeypatch):
    from llmkit.monitor import window as module

    t, read, real = Town(tmp_path), [], module._requests
    monkeypatch.setattr(module, "_requests", lambda e, after, r, *x: read.append(r) or real(e, after, r, *x))
    looks = lambda n: [run_window(t.monitor, "sha256:b") for _ in range(n)]
    t.send(100), t.send(30, release="sha256:b")
    assert looks(5) == [None] * 5 and read == ["sha256:b"]
    t.send(149, release="sha256:b")  # one is missing
    assert looks(5) == [None] * 5 and len(read) == 1
    t.send(1, release="sha256:b")
    t.now = t.events.since(0)[-1][1]["time"] + 1
    assert looks(5) == [None] * 5 and len(read) == 2  # it waits for its labels
    t.now -= 1e6  # a clock that is set back makes it look again
    assert looks(2) == [None] * 2 and len(read) == 3
    t.now += 1e6 + t.monitor.policy.label_lag
    assert looks(1)[0].requests == 180
    t.events.store.read("DELETE FROM sqlite_sequence")
    with pytest.raises(KitError, match="is another log"):
        looks(1)


def test_the_hours_of_traffic_are_taken_from_the_log_by_their_time(tmp_path, monkeypatch, capsys):
    from llmkit.monitor import check

    t = Town(tmp_path)
    monkeypatch.setattr(check.time, "time", lambda: t.now)
    t.send(7200), t.send(1, seed=1)
    read = []
    monkeypatch.setattr(Events, "all", lambda *_: read.append(1) or iter(()))
    assert check.monitor_traffic(hours=1.0, before=0.5, settings=str(t.settings)) == 0 and not read
    assert "n = 3" in (said := capsys.readouterr().out), said
    assert check.monitor_traffic(hours=0.001, settings=str(t.settings)) == 3


def test_numbers_that_are_none_are_refused():
    from llmkit.monitor.check import monitor_traffic
    from llmkit.monitor.watch import monitor_watch

    odd = float("nan")
    for call, key, value in (
        (monitor_watch, "every", odd), (monitor_watch, "every", -1.0), (monitor_traffic, "hours", odd), (monitor_traffic, "before", -1.0),
        (monitor_traffic, "limit", 0), (monitor_traffic, "alpha", odd),
    ):  # fmt: skip
        with pytest.raises(KitError, match=key):
            call(**{key: value}, settings="nowhere.ini")


def mixed(t, n, seed, **of):
    "Requests of two releases half and half, by chance; of each what it does otherwise."
    rng = np.random.default_rng(seed)
    for _ in range(n):
        v, r = ("canary", "b") if rng.random() < 0.5 else ("baseline", "a")
        t.send(1, release=f"sha256:{r}", variant=v, seed=seed, **of.get(r, {}))
        t.now -= 100
    t.now += 100


def test_half_and_half_both_releases_are_watched_and_the_alert_on_one_stays(tmp_path):
    "Whose window is the newest is chance; what is told of either is its own."
    t = Town(tmp_path)
    page, seen, failed = Windows(load_settings(str(t.settings))), [], []
    t.monitor.clock = lambda: t.now
    mixed(t, 400, 1)
    for k in range(12):
        mixed(t, 60, 2 + k, b={"refuses": 0.6})
        while w := run_window(t.monitor):
            seen.append((w.release, w.number))
            told = {s.labels["release"]: s.value for f in page.families() if f.name == "llmkit_window_outcome" for s in f.samples if (s.labels["family"], s.labels["outcome"]) == ("data", "fail")}  # fmt: skip
            failed.append(told.get("b", 0.0))
            assert not told.get("a")
            assert {f.name for f in page.found()} and read_json(tmp_path / "latest/verdict.json")["outcome"] != "fail"
    assert {n for r, n in seen if r == "sha256:a"} >= set(range(5)) and {n for r, n in seen if r == "sha256:b"} >= set(range(5))  # fmt: skip
    first = failed.index(1.0)
    assert set(failed[first:]) == {1.0} and len(failed) > first + 5
    asked = t.monitor.memory.actions()[0]
    assert asked.release == "sha256:b" and asked.state == "held"
    for newest in ("a", "b"):  # open whoever has the newest window, as long as both answer
        while t.monitor.memory.windows(n=1)[0].release != f"sha256:{newest}":
            mixed(t, 10, int(t.now), b={"refuses": 0.6})
            run_window(t.monitor)
        assert [a.release for a in unsettled(t.monitor.memory, answering(t.events))] == ["sha256:b"]
    t.now += 2 * 86400  # nobody is sent to it any more
    t.send(60)
    while run_window(t.monitor):
        pass
    assert answering(t.events) == ["sha256:a"] and not unsettled(t.monitor.memory, ["sha256:a"])
    assert {s.labels["release"] for f in page.families() if f.name == "llmkit_window_outcome" for s in f.samples} == {
        "a"
    }


def test_a_release_whose_labels_come_weeks_after_it_was_replaced_is_judged(tmp_path):
    "A new release each week, labels after three; a monitor that is started again has not forgotten."
    week = 7 * 86400.0
    t = Town(tmp_path, section(**{k: SMALL[k] for k in ("reference", "fairness", "calibration")}, window={"requests": 60, "min_n": 30, "label_lag": "21d"}))  # fmt: skip
    answers = []
    for k in range(5):
        began = t.now
        t.send(250, release=f"sha256:{k}", said=0)
        answers += [(began + 3 * week, f"q{began + i:.0f}") for i in range(1, 251)]
        for due, id in [x for x in answers if x[0] <= t.now + week]:
            t.events.clock = lambda due=due: due
            t.events.feedback(id, success=True)
        answers = [x for x in answers if x[0] > t.now + week]
        t.now = began + week
        while run_window(t.monitor):
            pass
        t.monitor.spans, t.monitor.idle = {}, set()  # started again
    judged = [(w.release, w.number, w.labelled) for w in reversed(t.monitor.memory.windows(n=99))]
    assert judged[:2] == [("sha256:0", 0, 180), ("sha256:0", 1, 60)] and ("sha256:1", 1, 60) in judged


def test_what_is_kept_is_bounded_by_number_whatever_the_clock_says(tmp_path, capsys):
    "Ten thousand windows and more, a clock that was a year ahead, and the policy in `status`."
    t = Town(tmp_path)
    t.send(240)
    assert [run_window(t.monitor).number for _ in range(2)] == [0, 1]
    memory = t.monitor.memory
    [row] = memory.store.read("SELECT body, reports FROM windows WHERE number = 1")
    with memory.store.write() as db:
        old = (("sha256:a", k, 1.0 * k, row["body"], row["reports"]) for k in range(2, WINDOWS + 2))
        db.executemany("INSERT INTO windows VALUES (?, ?, ?, ?, ?)", old)
        stream = json.loads(db.execute("SELECT body FROM streams").fetchone()["body"]) | {"number": WINDOWS + 2}
        db.execute("UPDATE streams SET body = ?", (json.dumps(stream),))
    assert memory.kept() == (WINDOWS + 2, 1)
    t.now += 365 * 86400
    t.send(60)
    t.now -= 365 * 86400 - 60
    t.send(60)
    while run_window(t.monitor):
        pass
    assert memory.kept() == (WINDOWS, 1) and memory.window("sha256:a", 0) is None and memory.window("sha256:a", 5)
    assert len(memory.stream("sha256:a")["reference"]) == 180  # the next window is compared all the same
    main(["monitor", "status", "--policy", str(ROOT / "params.yaml"), "--settings", str(t.settings)])
    assert "kept: 10000 windows of 1 releases, at most 10,000 of 500" in capsys.readouterr().out


def test_nobody_is_told_a_refusal_rate_of_answers_that_cannot_be_read(tmp_path):
    "A service in Thai: `refused` is null in its events; a few of them among others leave the rate measured."
    t = Town(tmp_path / "thai")
    t.send(240, lacks=("refused",))
    run_window(t.monitor)
    w = run_window(t.monitor)
    data = t.monitor.memory.reports(w.release, 1)["data"]
    assert data.get("refusal_rate") is None and data.get("unknown_language_rate").value == 1
    assert w.outcomes["data"] == "inconclusive" and any("language whose refusals are not known" in r.sentence for r in w.verdict.reasons)  # fmt: skip
    without = Town(tmp_path / "without", section(**{k: SMALL[k] for k in ("window", "reference")}, drift={"methods": ["tokens", "errors"]}))  # fmt: skip
    without.send(240, lacks=("refused",))
    run_window(without.monitor)
    assert run_window(without.monitor).outcomes["data"] == "pass"
    few = Town(tmp_path / "few")
    few.send(180)
    few.send(40), few.send(20, lacks=("refused",))
    run_window(few.monitor)
    w = run_window(few.monitor)
    data = few.monitor.memory.reports(w.release, 1)["data"]
    assert (
        w.outcomes["data"] == "pass" and data.get("refusal_rate") and data.get("unknown_language_rate").value == 1 / 3
    )
