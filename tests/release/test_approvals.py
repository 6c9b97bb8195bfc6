"""An approval is kept, whoever writes beside it and whoever dies meanwhile; the registry's copy decides nothing."""

import json
import multiprocessing as mp
import os
import signal
import sqlite3
from datetime import UTC, datetime
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from llmkit.core.errors import KitError
from llmkit.core.params import load_params
from llmkit.release.approvals import ApprovalRule, give, take_back, tally, words
from llmkit.release.ledger import append, read_ledger, verify_ledger
from llmkit.release.registry import Unanswered, register, versions
from llmkit.release.release import Release
from llmkit.release.releases import list_releases
from llmkit.rollout import approve as command
from llmkit.rollout.approve import approve

ROOT, URI, NAME = Path(__file__).parents[2], "sqlite:///mlflow.db", "bank-support"
RULE, CTX = ApprovalRule(2), mp.get_context("fork")
ABOUT = (NAME, "sha256:r1", "sha256:v1", "sha256:p1", RULE)
# as an older version of the kit wrote them
OLD = """\
{"action":"register","after":"sha256:954553d2643564eed6f57e3c0ea270fd1c4ced3ea1c1eb1ae995ceecc8c3196f","alias":"challenger","before":null,"digest":"sha256:15df6f9db1edffc40c4772345354d8884f9e7c61ff46a244e53e89d4a4f4b4d6","evidence":"sha256:7dfdc544e0759b4ed2637fb6988437af49f1538eeb55a5a4a77dc7c6987fb3cf","model":"bank-support","previous":"","seq":1,"when":"2026-11-23T11:10:50+00:00","who":"root"}
{"action":"register","after":"sha256:4774c059cdf8b830b931bc6b57f4a943e8b545263dde9d19a8e771fe428d7ccd","alias":"challenger","before":"sha256:954553d2643564eed6f57e3c0ea270fd1c4ced3ea1c1eb1ae995ceecc8c3196f","digest":"sha256:34063c5a3880bf246654942d80a0e2302d1f2253394822accbcdb56223e73c7c","evidence":"sha256:1ee8fb8caaa91e51d99e00119c0c9add20034e60908aead038e1e3cc2363cebe","model":"bank-support","previous":"sha256:15df6f9db1edffc40c4772345354d8884f9e7c61ff46a244e53e89d4a4f4b4d6","seq":2,"when":"2026-11-23T11:33:48+00:00","who":"root"}
"""


@pytest.fixture
def ledger(tmp_path):
    "Carl has registered a release."
    append(tmp_path / "ledger.jsonl", NAME, "challenger", "sha256:r1", "sha256:v1", who="carl")
    return tmp_path / "ledger.jsonl"


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A registered release, whose promotion two people have to agree to."
    monkeypatch.chdir(tmp_path)
    Path("settings.ini").write_text(f"[DEFAULT]\ntracking_uri = {URI}\n")
    section = load_params(ROOT / "params.yaml", "rollout")
    YAML().dump({"rollout": section | {"approvals": dict(section["approvals"]) | {"required": 2}}}, Path("params.yaml"))
    monkeypatch.setenv("LLMKIT_ACTOR", "carl")
    register(Release(NAME, "sha256:b1", "sha256:v1", "sha256:c1"), URI, "file:///b1")
    monkeypatch.setenv("LLMKIT_ACTOR", "ann")
    return tmp_path


def test_an_older_ledger_is_read_and_goes_on(tmp_path):
    log = tmp_path / "ledger.jsonl"
    log.write_text(OLD)
    assert verify_ledger(str(log), head=json.loads(OLD.splitlines()[1])["digest"]) == 0
    release, verdict = "sha256:4774c059cdf8b830b931bc6b57f4a943e8b545263dde9d19a8e771fe428d7ccd", json.loads(OLD.splitlines()[1])["evidence"]  # fmt: skip
    give(log, NAME, release, verdict, "sha256:p1", RULE, "read it", who="ann")
    assert log.read_text().startswith(OLD) and verify_ledger(str(log)) == 0 and len(read_ledger(log)) == 3


def test_a_release_has_the_digest_that_it_always_had():
    release = Release("bank", "b", "v", "c", {"e": "r"}, {"base": "x"}, {"gate": "g"})
    assert release.digest == "sha256:e58824b64a936e82b4712fe2917d62979045933498032fee473ccae40b2fb2f1"


def speak(path, who, gate):
    gate.wait()
    for n in range(20):
        give(path, *ABOUT, f"look {n}", who=who)


def test_many_who_approve_at_once_are_all_heard_and_each_once(ledger):
    gate = CTX.Barrier(4)
    people = ["ann", "ben", "ben", "dee"]  # one of them twice
    workers = [CTX.Process(target=speak, args=(ledger, who, gate)) for who in people]
    for w in workers:
        w.start()
    for w in workers:
        w.join(60)
    assert [w.exitcode for w in workers] == [0] * 4
    entries = read_ledger(ledger)
    assert sorted(e.who for e in entries if e.action == "approve") == ["ann", "ben", "dee"]
    assert tally(entries, RULE, "sha256:p1", NAME, "sha256:r1", datetime.now(UTC).timestamp()).enough


@pytest.mark.parametrize(
    "edit",
    [("ann", "eve"), ("looked at it", "looked"), ("sha256:p1", "sha256:p2"), ("promote", "pro"), ("until\":\"2", "until\":\"3")],
)  # fmt: skip
def test_an_edited_approval_is_seen_and_counts_for_nothing(ledger, edit, capsys):
    give(ledger, *ABOUT, "looked at it", who="ann")
    give(ledger, *ABOUT, "me too", who="ben")
    lines = ledger.read_text().splitlines(keepends=True)
    assert edit[0] in lines[1]
    ledger.write_text(lines[0] + lines[1].replace(*edit) + lines[2])
    assert verify_ledger(str(ledger)) == 1 and "line 2" in capsys.readouterr().out
    before = ledger.read_bytes()
    for act in (lambda: give(ledger, *ABOUT, "x", who="dee"), lambda: take_back(ledger, NAME, "sha256:r1", "x", "ben")):
        with pytest.raises(KitError, match="line 2"):
            act()
    assert ledger.read_bytes() == before


def test_a_name_is_one_person_however_it_is_written(ledger):
    word, _ = give(ledger, *ABOUT, "fine", who="Ann  Lee")
    assert give(ledger, *ABOUT, "fine", who=" ann lee ") == (word, False)
    assert list(words(read_ledger(ledger), NAME, "sha256:r1")) == ["ann lee"]
    with pytest.raises(KitError, match="whoever registered"):
        give(ledger, *ABOUT, "fine", who="CARL")


def killed(**env):
    "Approve in another process, and be killed as soon as the word is written."
    os.environ.update(env)
    command.mirror_approvals = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    approve("challenger", why="read the card", model=NAME)


def test_who_is_killed_before_the_copy_has_approved(project, capsys):
    child = CTX.Process(target=killed, kwargs={"LLMKIT_ACTOR": "ann"})
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert "approvals" not in versions(URI, NAME)[0].tags
    assert list_releases(NAME) == 0 and "carl | ann until" in capsys.readouterr().out  # the ledger is the truth
    whole = Path("ledger.jsonl").read_bytes()
    assert approve("challenger", why="again", model=NAME) == 0
    assert Path("ledger.jsonl").read_bytes() == whole
    assert json.loads(versions(URI, NAME)[0].tags["approvals"]) == {"ann": read_ledger("ledger.jsonl")[-1].digest}


def test_a_registry_that_takes_no_copy_is_told_and_the_word_holds(project, monkeypatch, capsys):
    def away(*_):
        raise Unanswered("MLflow does not answer: gone")

    with monkeypatch.context() as m:
        m.setattr(command, "mirror_approvals", away)
        assert approve("1", why="read the card", model=NAME) == 4
    assert "still to be done: its copy" in capsys.readouterr().out
    assert [e.action for e in read_ledger("ledger.jsonl")] == ["register", "approve"]


def test_what_the_registry_says_of_approvals_decides_nothing(project, capsys):
    approve("1", why="read the card", model=NAME)
    with sqlite3.connect("mlflow.db") as db:
        db.execute("UPDATE model_version_tags SET value = ? WHERE key = 'llmkit.approvals'", ('{"ben":"sha256:00","ann":"sha256:11"}',))  # fmt: skip
    found = tally(read_ledger("ledger.jsonl"), RULE, read_ledger("ledger.jsonl")[-1].terms.policy, NAME, versions(URI, NAME)[0].release, 0)  # fmt: skip
    assert [e.who for e in found.good] == ["ann"] and not found.enough
    assert list_releases(NAME) == 1 and "its approval by ben, entry 00, is not in the ledger" in capsys.readouterr().out


def test_nobody_approves_inside_a_training(project, monkeypatch):
    monkeypatch.setenv("LLMKIT_RETRAIN_ID", "retrain-1")
    with pytest.raises(KitError, match="llmkit approve is refused inside it"):
        approve("1", why="it is I who trained it", model=NAME)


def test_a_verdict_that_was_changed_in_the_registry_is_not_approved(project):
    with sqlite3.connect("mlflow.db") as db:
        db.execute("UPDATE model_version_tags SET value = 'sha256:v9' WHERE key = 'llmkit.verdict'")
    with pytest.raises(KitError, match="another verdict than the ledger"):
        approve("1", why="read the card", model=NAME)
    assert len(read_ledger("ledger.jsonl")) == 1
