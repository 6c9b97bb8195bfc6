"Somebody moves the champion by hand while a rollout is under way, or after it: nothing is overwritten in silence."

import threading

import pytest
from test_live import QUICK, town, until  # noqa: F401
from test_outside import aliases, project, serve  # noqa: F401

from llmkit.core.errors import KitError
from llmkit.release.ledger import read_ledger
from llmkit.release.registry import register, registry_client, versions
from llmkit.release.release import Release
from llmkit.rollout import commands, keeper
from llmkit.rollout.controller import Controller
from llmkit.rollout.keeper import MlflowRegistry

URI, NAME = "sqlite:///mlflow.db", "bank-support"


def by_hand(version):
    "Move the champion, or take the alias away."
    client = registry_client(URI)
    if version is None:
        return client.delete_registered_model_alias(NAME, "champion")
    client.set_registered_model_alias(NAME, "champion", str(version))


@pytest.fixture
def under_way(project):  # noqa: F811
    "Version 2 is held against version 1, the champion, and does well; version 3 has nothing to do with it."
    register(Release(NAME, "sha256:bundle3", "sha256:verdict3", "sha256:card3"), URI, "file:///bundle3")
    one, two, _ = versions(URI, NAME)
    commands.rollout_start(NAME, canary=one.release, first=True)
    commands.rollout_start(NAME, canary=two.release, id="r")
    c = Controller(commands.open_store(), "r", MlflowRegistry(URI))
    serve(c)
    return c


@pytest.mark.parametrize("to", [3, None])
def test_no_promotion_over_a_champion_that_somebody_else_moved(under_way, to, capsys):
    c, before = under_way, under_way.state
    by_hand(to)
    held, entries = aliases(URI), read_ledger("ledger.jsonl")
    s = c.command("promote", full=True)  # as the policy does it
    assert (s.phase, s.paused_by, s.slots, s.step) == ("Paused", "policy", before.slots, before.step)
    assert aliases(URI) == held and read_ledger("ledger.jsonl") == entries and not c.store.owed()
    assert s.reason.startswith(f"not promoted: {'version 3' if to else 'nobody'}") and "again and resume" in s.reason
    assert c.store.replay("r").state == c.store.load("r").state == s
    assert commands.rollout_status() == 3 and s.reason in capsys.readouterr().out
    by_hand(1)
    commands.rollout_resume()
    serve(c)
    assert commands.rollout_promote(full=True) == 0 and aliases(URI)["champion"] == 2


def test_a_person_who_promotes_is_told_before_any_user_moves(under_way, capsys):
    by_hand(3)
    with pytest.raises(KitError, match="cannot promote it: its baseline is not the champion"):
        commands.rollout_promote(full=True)
    assert under_way.store.standing("r") == under_way.state
    by_hand(None)  # whom the registry names is then found out by the move
    assert commands.rollout_promote(full=True) == 3
    assert "not promoted: nobody is champion" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("to", [3, None])
def test_an_undo_leaves_a_champion_that_was_moved_since(under_way, to, capsys):
    c = under_way
    assert commands.rollout_promote(full=True) == 0
    by_hand(to)
    if to:
        with pytest.raises(KitError, match="cannot undo it: its canary is not the champion"):
            commands.rollout_undo()
    s = c.command("undo", "ann", "complaints")  # it was moved after that question
    assert (s.phase, s.weights) == ("Degraded", {"baseline": 100.0}) and not c.store.owed()
    assert aliases(URI) == {
        "challenger": 3,
        **({"champion": 3, "previous": 1} if to else {"champion": 1, "previous": 2}),
    }
    assert s.reason.startswith("ann: complaints") and ("version 3" in s.reason) == bool(to)


@pytest.mark.parametrize("dies", ["before previous", "before champion", "before its line", "after it"])
def test_a_promotion_that_died_half_way_is_finished_and_not_refused(under_way, dies, monkeypatch):
    c, seen = under_way, []
    done = keeper.append_ledger

    def ledger(*args):
        seen.append(args[2])
        if dies == "before champion" and seen == ["previous"]:
            done(*args)
            raise KeyboardInterrupt
        if seen[-1] == "champion" and dies in ("before its line", "after it"):
            if dies == "after it":
                done(*args)
            raise KeyboardInterrupt
        done(*args)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(keeper, "append_ledger", ledger)
        if dies == "before previous":
            m.setattr(MlflowRegistry, "move", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        c.command("promote", full=True)
    again = Controller(commands.open_store(), "r", MlflowRegistry(URI))
    assert again.step().phase == "Healthy" and not again.store.owed()
    assert aliases(URI) == {"champion": 2, "previous": 1, "challenger": 3}
    assert [e.alias for e in read_ledger("ledger.jsonl")][-2:] == ["previous", "champion"]


def test_users_are_split_as_before_and_the_server_goes_on(town):  # noqa: F811
    usual, theirs = town.registry.move, threading.Event()

    def move(effect):
        if theirs.is_set():
            raise keeper.Displaced("version 3 is champion by now")
        usual(effect)

    town.registry.move = move
    theirs.set()
    steps = [{"setWeight": 50}, {"analysis": {"min_duration": "1s", "max_duration": "10m", "min_samples": 20_000}}]
    with town.server() as (url, live), town.customers(url):
        town.begin("r1", "sha256:good", QUICK | {"steps": steps})
        until(lambda: town.canary("r1") > 10, "numbers in the log")
        Controller(town.store, "r1", town.registry).command("promote", full=True)
        until(lambda: live.state.phase == "Paused", "the way back")
        since = len(town.answers)
        until(lambda: len(town.recent(since + 10)) == 2, "both answer")
        assert live.state.weights == {"canary": 50.0, "baseline": 50.0} and not live.trouble
        theirs.clear()
        town.order("r1", "resume")
        until(lambda: town.canary("r1") > 10, "new numbers")
        town.order("r1", "promote", full=True)
        until(lambda: town.registry.read()["aliases"]["champion"] == "sha256:good", "the promotion")
