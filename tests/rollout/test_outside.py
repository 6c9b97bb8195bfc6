"""The judge on a real socket, the real registry, and the commands as a person gives them."""

import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest
from rollout_road import CANARY, World
from ruamel.yaml import YAML

from llmkit.core.errors import KitError
from llmkit.release.ledger import read_ledger
from llmkit.release.registry import register, versions
from llmkit.release.release import Release
from llmkit.rollout import commands
from llmkit.rollout.controller import Controller
from llmkit.rollout.judge_server import answer, judge_app
from llmkit.rollout.keeper import MlflowRegistry
from llmkit.rollout.state import Effect
from llmkit.rollout.store import Store


@pytest.fixture
def judge(tmp_path):
    "A judge on a free port, over a store that a controller writes."
    import uvicorn

    w = World(tmp_path)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(judge_app(World(tmp_path, begin=False).store, lambda: w.now), port=port, log_level="error"))  # fmt: skip
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not server.started and time.monotonic() < until:
        threading.Event().wait(0.02)
    yield w, f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(60)


HOOKS = ("confirm-promotion", "rollback")


def post(url):
    "The status code of an empty POST."
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=60) as r:
            return r.status
    except urllib.error.HTTPError as e:
        return e.code


def get(url):
    with urllib.request.urlopen(url, timeout=60) as r:
        return json.loads(r.read())


@pytest.mark.parametrize("how", [{}, {"errors": (0.01, 0.3)}, {"slower": 2.0}], ids=str)
def test_the_judge_says_what_the_controller_thinks_at_every_stage(judge, how):
    w, url = judge
    for _ in range(8):
        w.traffic(100, **how)
        w.c.step()
        assert get(f"{url}/v1/rollouts/r1/verdict") == answer(w.c.fold, w.now)
        assert (
            get(f"{url}/v1/rollouts/r1/verdict?at={w.now}")["digest"] == answer(w.store.replay("r1"), w.now)["digest"]
        )
    assert get(f"{url}/v1/rollouts/r1/verdict")["verdict"] == ("fail" if how else "inconclusive")
    assert [post(f"{url}/v1/rollouts/r1/{p}") for p in HOOKS] == [409, 200 if how else 409]
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(f"{url}/v1/rollouts/none/verdict")


def test_the_judge_says_pass_where_the_controller_goes_on(judge):
    "While it is paused a rollout gathers evidence, so that both are asked before it goes on."
    w, url = judge
    before, said = w.c.state.step, {"verdict": "inconclusive"}
    w.c.command("pause", "ann")
    while w.n < 6000 and said["verdict"] == "inconclusive":
        assert post(f"{url}/v1/rollouts/r1/confirm-promotion") == 409
        w.traffic(100, every=4.0)
        said = get(f"{url}/v1/rollouts/r1/verdict")
        assert said == answer(w.c.fold, w.now) and w.c.state.step == before
    assert said["verdict"] == "pass" and said["digest"] == answer(w.store.replay("r1"), w.now)["digest"]
    assert [post(f"{url}/v1/rollouts/r1/{p}") for p in HOOKS] == [200, 409]
    w.c.command("resume", "ann")
    w.c.step()
    assert w.c.state.step > before


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project with two registered releases of a model; the first is the champion."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMKIT_ACTOR", "ann")
    (tmp_path / "settings.ini").write_text("[DEFAULT]\ntracking_uri = sqlite:///mlflow.db\n")
    YAML().dump({"rollout": CANARY}, tmp_path / "params.yaml")
    for n in (1, 2):
        release = Release("bank-support", *(f"sha256:{x}{n}" for x in ("bundle", "verdict", "card")))
        register(release, "sqlite:///mlflow.db", f"file:///bundle{n}")
    return tmp_path


def test_from_the_first_champion_to_a_promotion_and_back(project, capsys):
    uri = "sqlite:///mlflow.db"
    with pytest.raises(KitError, match="--first"):
        commands.rollout_start("bank-support")
    one, two = versions(uri, "bank-support")
    assert commands.rollout_start("bank-support", canary=one.release, first=True) == 0
    with pytest.raises(KitError, match="a champion already"):
        commands.rollout_start("bank-support", first=True)
    assert commands.rollout_start("bank-support", because="more intents") == 0
    assert "bank-support-2: Progressing" in capsys.readouterr().out
    with pytest.raises(KitError, match="under way"):
        commands.rollout_start("bank-support")
    with pytest.raises(KitError, match="nothing was measured"):
        commands.rollout_promote(full=True)
    store = commands.open_store()
    assert commands.active(store) == "bank-support-2"
    serve(Controller(store, "bank-support-2", MlflowRegistry(uri)))
    assert commands.rollout_pause(because="lunch") == 0 and commands.rollout_status() == 3
    assert commands.rollout_resume() == 0 and commands.rollout_status() == 0
    assert commands.rollout_promote(full=True, because="seen enough") == 0
    assert aliases(uri) == {"champion": 2, "previous": 1, "challenger": 2}
    assert commands.active(store) is None
    assert commands.rollout_undo(because="customers complain") == 0
    assert aliases(uri) == {"champion": 1, "previous": 2, "challenger": 2}
    entries = [(e.action, e.alias, e.after, e.who) for e in read_ledger("ledger.jsonl") if e.action != "register"]
    assert entries == [
        ("promote", "champion", one.release, "ann"),
        ("promote", "previous", one.release, "ann"), ("promote", "champion", two.release, "ann"),
        ("rollback", "previous", two.release, "ann"), ("rollback", "champion", one.release, "ann"),
    ]  # fmt: skip
    assert commands.rollout_status() == 1
    assert commands.rollout_retry(because="fixed") == 0
    assert commands.rollout_abort(because="not fixed") == 0
    with pytest.raises(KitError, match="retry starts it again"):
        commands.rollout_resume()
    assert "ann: not fixed" in capsys.readouterr().out


def test_an_older_rollout_is_left_alone_by_undo_and_retry(project):
    uri = "sqlite:///mlflow.db"
    one, two = versions(uri, "bank-support")
    register(Release("bank-support", "sha256:bundle3", "sha256:verdict3", "sha256:card3"), uri, "file:///bundle3")
    three = versions(uri, "bank-support")[2]

    def promote(id, release):
        assert commands.rollout_start("bank-support", canary=release, id=id) == 0
        serve(Controller(commands.open_store(), id, MlflowRegistry(uri)))
        assert commands.rollout_promote(full=True) == 0

    commands.rollout_start("bank-support", canary=one.release, first=True)
    promote("a", two.release)
    assert commands.rollout_start("bank-support", canary=three.release, id="b") == 0
    with pytest.raises(KitError, match="a rollout is under way .got 'b'"):
        commands.rollout_undo("a")
    assert commands.rollout_abort() == 0 and aliases(uri)["champion"] == 2
    assert commands.rollout_undo("a") == 0 and aliases(uri)["champion"] == 1
    with pytest.raises(KitError, match="cannot retry it: its baseline is not the champion"):
        commands.rollout_retry("b")
    assert commands.rollout_retry("a") == 0
    with pytest.raises(KitError, match="cannot retry a rollout that is Progressing"):
        commands.rollout_retry("a")
    with pytest.raises(KitError, match="a rollout is under way .got 'a'"):
        commands.rollout_retry("b")
    serve(Controller(commands.open_store(), "a", MlflowRegistry(uri)))
    assert commands.rollout_promote(full=True) == 0, "of the one that is under way"
    promote("c", three.release)
    with pytest.raises(KitError, match="cannot undo it: its canary is not the champion"):
        commands.rollout_undo("a")
    assert aliases(uri)["champion"] == 3


def test_a_promotion_is_undone_while_the_registry_is_away(project, monkeypatch):
    uri = "sqlite:///mlflow.db"
    one = versions(uri, "bank-support")[0]
    commands.rollout_start("bank-support", canary=one.release, first=True)
    commands.rollout_start("bank-support")
    serve(Controller(commands.open_store(), "bank-support-2", MlflowRegistry(uri)))

    def away(*_):
        raise OSError("nobody answers")

    with monkeypatch.context() as m:
        m.setattr("llmkit.rollout.keeper.registry_client", away)
        assert commands.rollout_promote(full=True) == 4 and aliases(uri)["champion"] == 1
        m.setattr("llmkit.rollout.commands.versions", away)
        assert commands.rollout_undo() == 4
    Controller(commands.open_store(), "bank-support-2", MlflowRegistry(uri)).step()
    assert aliases(uri)["champion"] == 1 and not commands.open_store().promises("bank-support-2")


def test_no_rollout_begins_before_what_another_one_promised_is_done(project, monkeypatch, capsys):
    uri = "sqlite:///mlflow.db"
    one, two = versions(uri, "bank-support")
    register(Release("bank-support", "sha256:bundle3", "sha256:verdict3", "sha256:card3"), uri, "file:///bundle3")
    three = versions(uri, "bank-support")[2]
    commands.rollout_start("bank-support", canary=one.release, first=True)
    commands.rollout_start("bank-support", canary=two.release, id="a")
    assert commands.rollout_abort("a") == 0
    commands.rollout_start("bank-support", canary=two.release, id="b")
    serve(Controller(commands.open_store(), "b", MlflowRegistry(uri)))

    def away(*_):
        raise OSError("nobody answers")

    with monkeypatch.context() as m:
        m.setattr("llmkit.rollout.keeper.registry_client", away)
        assert commands.rollout_promote(full=True) == 4
        for order in (
            lambda: commands.rollout_start("bank-support", canary=three.release, id="c"),
            lambda: commands.rollout_start("bank-support", canary=three.release, first=True),
            lambda: commands.rollout_retry("a"),
        ):
            with pytest.raises(
                KitError, match=r"still to be done: .* champion → \w+ of b: nobody answers.*order again"
            ):
                order()
        capsys.readouterr()
        assert commands.rollout_status("a") == 1 and commands.rollout_status("b") == 0
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("still")]
        assert len(said) == 4 and said[0].startswith("still to be done by b: promote: previous → ")
        assert said[0].endswith(": nobody answers") and said[2].startswith("still to be done: promote")
    assert commands.open_store().ids() == ["b", "a"] and aliases(uri)["champion"] == 1
    assert commands.rollout_start("bank-support", canary=three.release, id="c") == 0
    state = commands.open_store().load("c").state
    assert state.releases == {"baseline": two.release, "canary": three.release}
    assert aliases(uri)["champion"] == 2 and aliases(uri)["previous"] == 1 and not commands.open_store().owed()


def test_of_four_that_start_at_once_one_does(project, monkeypatch):
    commands.rollout_start(
        "bank-support", canary=versions("sqlite:///mlflow.db", "bank-support")[0].release, first=True
    )
    ready, read = threading.Barrier(4), commands.load_params

    def read_together(*args):
        ready.wait(60)
        return read(*args)

    def start(i):
        try:
            return commands.rollout_start("bank-support", id=f"r{i}")
        except KitError as e:
            return e.problem

    monkeypatch.setattr(commands, "load_params", read_together)
    with ThreadPoolExecutor(4) as pool:
        assert Counter(pool.map(start, range(4))) == {0: 1, "a rollout is under way": 3}
    assert len(commands.open_store().rows("select id from rollouts")) == 1


def test_a_start_that_dies_half_way_leaves_nothing(project, monkeypatch):
    commands.rollout_start(
        "bank-support", canary=versions("sqlite:///mlflow.db", "bank-support")[0].release, first=True
    )

    def dies(*_):
        raise MemoryError

    with monkeypatch.context() as m, pytest.raises(MemoryError):
        m.setattr(Store, "append", dies)
        commands.rollout_start("bank-support")
    assert not commands.open_store().rows("select id from rollouts")
    commands.rollout_start("bank-support", id="r1")
    commands.open_store().create("empty", CANARY)  # as older versions may have left it
    assert commands.rollout_abort() == 0 and commands.rollout_status() == 1
    with pytest.raises(KitError, match="no such rollout"):
        commands.rollout_abort("empty")


@pytest.mark.parametrize("order", [commands.rollout_status, commands.rollout_abort])
def test_a_log_that_is_damaged_is_named_and_one_that_is_missing_is_not_made(project, order):
    path = project / "rollouts.db"
    with pytest.raises(KitError, match="no rollout was begun"):
        order()
    assert not path.exists()
    store = commands.open_store()
    store.create("r1", CANARY)
    store.close()
    for start, size in ((0, 100), (4096, path.stat().st_size - 4096)):
        whole = path.read_bytes()
        path.write_bytes(whole[:start] + b"\xff" * size + whole[start + size :])
        with pytest.raises(KitError, match=r"rollouts\.db: cannot .* the rollouts: .* put a copy back"):
            order()
        path.write_bytes(whole)


def serve(c, n=300):
    "Requests in the current second, all answered well."
    for i in range(n):
        v = c.assign(f"u{i}")
        c.observe({"kind": "request", "time": datetime.now(UTC).timestamp() + 1, "id": f"q{i}", "variant": v, "release": v, "unit": f"u{i}", "code": 200, "status": "ok", "latency": 0.001, "ttft": None, "prompt_tokens": 40, "fallback": False, "refused": False})  # fmt: skip
    c.step()


def aliases(uri):
    return {a: v.version for v in versions(uri, "bank-support") for a in v.aliases}


def test_a_move_that_was_done_is_done_again_without_a_trace(project):
    registry = MlflowRegistry("sqlite:///mlflow.db")
    release = versions("sqlite:///mlflow.db", "bank-support")[0].release
    effect = Effect("champion", release, "promote", "sha256:v", "bank-support")
    registry.move(effect)
    before = open("ledger.jsonl", "rb").read()
    registry.move(effect)
    assert open("ledger.jsonl", "rb").read() == before
    with pytest.raises(KitError, match="not in the registry"):
        registry.move(Effect("champion", "sha256:none", "promote", "sha256:v", "bank-support"))


def test_the_registry_forgot_the_ledger_in_a_crash(project):
    "MLflow was told, and the process died before the ledger was: the next try writes it down."
    from llmkit.release.registry import registry_client

    uri = "sqlite:///mlflow.db"
    release = versions(uri, "bank-support")[1].release
    registry_client(uri).set_registered_model_alias("bank-support", "champion", "2")
    MlflowRegistry(uri).move(Effect("champion", release, "promote", "sha256:v", "bank-support"))
    assert [(e.action, e.who) for e in read_ledger("ledger.jsonl")][-1] == ("promote", "policy")


def test_judging_needs_neither_a_server_nor_a_registry():
    "The decision is made with numpy and scipy: none of the extras is imported for it."
    code = "import sys, llmkit.rollout.store, llmkit.rollout.commands, llmkit.rollout.judge_server; print([m for m in ('fastapi', 'mlflow', 'pydantic', 'torch', 'matplotlib') if m in sys.modules])"  # fmt: skip
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.parametrize("id", ["a/b", "..", "a b", "a?b", "a%2Fb", ""])
def test_an_id_that_no_address_can_name_is_refused(tmp_path, id):
    with pytest.raises(KitError, match="letters, digits"):
        Store(tmp_path / "r.db").create(id, CANARY)


@pytest.mark.parametrize("id", ["bank-support-2", "überblick_2.1~x"])
def test_every_id_can_be_asked_for(tmp_path, id):
    from starlette.testclient import TestClient

    w = World(tmp_path, id=id)
    assert TestClient(judge_app(w.store, lambda: w.now)).get(f"/v1/rollouts/{id}").json()["id"] == id


def test_a_model_with_a_blank_in_its_name_gets_an_id_too(project):
    for n in (1, 2):
        release = Release("bank support", *(f"sha256:{x}{n}" for x in ("bundle", "verdict", "card")))
        register(release, "sqlite:///mlflow.db", f"file:///bundle{n}")
    one, _ = versions("sqlite:///mlflow.db", "bank support")
    commands.rollout_start("bank support", canary=one.release, first=True)
    assert commands.rollout_start("bank support") == 0
    assert commands.open_store().ids() == ["bank-support-2"]
