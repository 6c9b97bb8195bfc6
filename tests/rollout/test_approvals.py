"""A rollout whose policy asks for two people: nobody gets a user without them, and nobody is promoted after one has gone."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
from rollout_road import CANARY, RELEASES, Recorder, World, registered
from ruamel.yaml import YAML
from test_outside import aliases, serve

from llmkit.core.digests import short
from llmkit.core.errors import KitError
from llmkit.release.approvals import give, take_back
from llmkit.release.ledger import append, read_ledger
from llmkit.release.registry import versions
from llmkit.rollout import commands
from llmkit.rollout.approve import approve
from llmkit.rollout.controller import Controller
from llmkit.rollout.keeper import MlflowRegistry
from llmkit.rollout.policy import read_rollout

URI, NAME = "sqlite:///mlflow.db", "bank-support"
ASKED = CANARY | {"approvals": {"required": 2, "distinct_from_author": True, "expires": "14d"}}


@pytest.fixture
def say(tmp_path, monkeypatch):
    "A project with two releases that Carl has registered; gives what lets somebody approve, or take it back."
    registered(tmp_path, monkeypatch, ASKED, URI, NAME)

    def word(who, of="challenger", **more):
        with monkeypatch.context() as m:
            m.setenv("LLMKIT_ACTOR", who)
            return approve(of, why="read the report", model=NAME, **more)

    return word


@pytest.fixture
def under_way(say):
    "Both releases are approved by Ann and Ben, the first is the champion, and the second does well."
    for of in "12":
        say("ann", of), say("ben", of)
    assert commands.rollout_start(NAME, canary="1", first=True) == 0
    assert commands.rollout_start(NAME, id="r") == 0
    c = Controller(commands.open_store(), "r", MlflowRegistry(URI))
    serve(c)
    return c


def test_nobody_gets_users_without_two_people_who_are_not_the_author(say, capsys):
    two = short(versions(URI, NAME)[1].release)
    assert commands.rollout_start(NAME, canary="1", first=True) == 1
    assert (
        aliases(URI) == {"challenger": 2} and "0 of 2 approvals. One more: `llmkit approve" in capsys.readouterr().out
    )
    say("ann", "1"), say("ben", "1")
    assert commands.rollout_start(NAME, canary="1", first=True) == 0
    with pytest.raises(KitError, match="whoever registered a release does not approve it"):
        say("carl")
    assert say("ann") == 0 and say("ann") == 0
    capsys.readouterr()
    assert commands.rollout_start(NAME) == 1 and not commands.open_store().ids()
    assert (
        "has 1 of 2 approvals: ann until" in (out := capsys.readouterr().out) and f"llmkit approve {two} --why" in out
    )
    say("ben")
    assert commands.rollout_start(NAME) == 0
    assert commands.rollout_status() == 0 and "2 of 2 approvals: ann until" in capsys.readouterr().out


def test_a_policy_that_was_changed_since_needs_every_word_anew(say, capsys):
    say("ann", "1"), say("ben", "1")
    YAML().dump({"rollout": ASKED | {"alpha": 0.2}}, Path("params.yaml"))
    assert commands.rollout_start(NAME, canary="1", first=True) == 1
    assert "(ann: given under another policy; ben: given under another policy)" in capsys.readouterr().out


def test_a_promotion_stands_in_the_ledger_after_those_who_agreed(under_way):
    assert commands.rollout_promote(full=True) == 0 and aliases(URI)["champion"] == 2
    said = [(e.who, e.action, e.after) for e in read_ledger("ledger.jsonl")]
    two = versions(URI, NAME)[1].release
    at = [said.index(x) for x in (("ann", "approve", two), ("ben", "approve", two), ("carl", "promote", two))]
    assert at == sorted(at)


def test_one_who_takes_it_back_in_the_middle_holds_the_promotion(under_way, say, capsys):
    c, held = under_way, aliases(URI)
    assert say("ben", withdraw=True) == 0
    capsys.readouterr()
    assert commands.rollout_status() == 0 and "(ben: withdrawn on" in capsys.readouterr().out
    assert commands.rollout_promote(full=True) == 3
    c.step()
    assert (c.state.phase, c.state.paused_by, c.state.weights) == (
        "Paused",
        "policy",
        {"canary": 20.0, "baseline": 80.0},
    )
    assert c.state.reason.startswith("not promoted: 1 of 2 approvals: ann until") and aliases(URI) == held
    assert c.state.reason in capsys.readouterr().out and not c.store.owed()
    assert c.store.replay("r").state == c.store.load("r").state == c.state
    assert commands.rollout_resume() == 0 and commands.rollout_promote(full=True) == 3  # as long as nobody agrees
    say("dee")
    assert commands.rollout_resume() == 0 and commands.rollout_promote(full=True) == 0
    assert aliases(URI)["champion"] == 2


def test_the_way_back_needs_nobody(under_way, say, capsys):
    assert commands.rollout_promote(full=True) == 0
    say("ann", withdraw=True), say("ben", withdraw=True)
    assert commands.rollout_undo() == 0 and aliases(URI)["champion"] == 1
    assert commands.rollout_retry() == 1 and "not started" in capsys.readouterr().out
    assert under_way.store.standing("r").phase == "Degraded"
    say("ann"), say("ben")
    assert commands.rollout_retry() == 0
    say("ann", withdraw=True)
    assert commands.rollout_abort() == 0


def test_a_broken_ledger_promotes_nobody_and_says_so(under_way, capsys):
    c, log = under_way, Path("ledger.jsonl")
    whole = log.read_text()
    log.write_text(whole.replace("ben", "eve"))
    before = c.state
    with pytest.raises(KitError, match="the chain is broken"):
        commands.rollout_promote(full=True)
    assert c.store.standing("r") == before and aliases(URI)["champion"] == 1
    assert commands.rollout_status() == 0 and "no promotion until approvals can be read" in capsys.readouterr().out
    assert commands.rollout_abort() == 0


class Asked(Recorder):
    "A registry with a ledger beside it."

    def __init__(self, path):
        super().__init__(path)
        self.ledger = Path(path).with_name("ledger.jsonl")

    approvals = MlflowRegistry.approvals


def world(folder, expires):
    "Ann and Ben have agreed at the beginning of time."
    section = ASKED | {"approvals": ASKED["approvals"] | {"expires": expires}}
    log, policy, born = folder / "ledger.jsonl", read_rollout(section), datetime.fromtimestamp(0, UTC)
    append(log, NAME, "challenger", RELEASES["canary"], "sha256:v", who="carl", now=born)

    def agree(who, at=0.0):
        give(log, NAME, RELEASES["canary"], "sha256:v", policy.digest, policy.approvals, "fine", who, datetime.fromtimestamp(at, UTC))  # fmt: skip

    agree("ann"), agree("ben")
    return World(folder, section, registry=Asked), agree


def test_the_policy_promotes_by_itself_while_they_agree(tmp_path):
    w, _ = world(tmp_path, "14d")
    w.traffic(20_000, every=2.0)
    assert w.c.state.phase == "Healthy" and w.registry.read()["aliases"]["champion"] == RELEASES["canary"]


@pytest.mark.parametrize("how", ["expired", "withdrawn"])
def test_the_policy_pauses_where_they_do_not_agree_any_more(tmp_path, how):
    w, agree = world(tmp_path, "2h" if how == "expired" else "14d")
    w.traffic(1000, every=2.0)
    assert w.c.state.phase == "Progressing"
    if how == "withdrawn":
        take_back(
            tmp_path / "ledger.jsonl", NAME, RELEASES["canary"], "complaints", "ben", datetime.fromtimestamp(w.now, UTC)
        )
    w.traffic(9000, every=2.0)
    s = w.c.state
    assert (s.phase, s.paused_by, s.weights["canary"]) == ("Paused", "policy", 50.0)
    assert s.reason.startswith("not promoted: ") and f"ben: {how} on 1970-01-01" in s.reason
    assert s.verdict and w.registry.read()["ledger"] == [] and w.store.replay("r1").state == s
    agree("ann", w.now), agree("ben", w.now)
    w.traffic(500, every=2.0)
    assert w.c.state == s, "it waits for a person"
    w.c.command("resume", "ann")
    w.traffic(500, every=2.0)
    assert w.c.state.phase == "Healthy" and w.registry.read()["aliases"]["champion"] == RELEASES["canary"]


def test_a_failing_challenger_is_aborted_whoever_agreed(tmp_path):
    w, _ = world(tmp_path, "1s")
    w.traffic(3000, every=2.0, errors=(0.01, 0.5))
    assert w.c.state.phase == "Degraded"
