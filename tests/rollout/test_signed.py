"""A policy that wants signed approvals: nobody gets users, and nobody is promoted, on a word that was not signed by whom it names."""

import json
import shutil
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rollout_road import CANARY, registered
from test_outside import aliases, serve

from llmkit.core.digests import canonical_json
from llmkit.core.errors import KitError
from llmkit.release.approvals import give, tally
from llmkit.release.ledger import Terms, adding, append, read_ledger, verify_ledger
from llmkit.release.registry import versions
from llmkit.release.releases import list_releases
from llmkit.release.sign import APPROVAL, RELEASE, sign
from llmkit.rollout import commands
from llmkit.rollout.approve import approve
from llmkit.rollout.controller import Controller
from llmkit.rollout.keeper import MlflowRegistry
from llmkit.rollout.policy import read_rollout

pytestmark = pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="no ssh-keygen: apt-get install openssh-client")
URI, NAME = "sqlite:///mlflow.db", "bank-support"
ASKED = CANARY | {
    "approvals": {
        "required": 2,
        "distinct_from_author": True,
        "expires": "14d",
        "signers": "signers",
        "revoked": "revoked",
    }
}
RULES = read_rollout(ASKED)


def public(name):
    return " ".join(Path(f"{name}.pub").read_text().split()[:2])


def listed(**lines):
    "The list of allowed signers: a name, or all before a key, and whose key."
    Path("signers").write_text("".join(f"{k if v == k else v} {public(k)}\n" for k, v in lines.items()))


@pytest.fixture
def say(tmp_path, monkeypatch):
    "Two releases that Carl has registered, keys of four people, and what lets somebody approve with a key."
    registered(tmp_path, monkeypatch, ASKED, URI, NAME)
    for name in ("ann", "ben", "carl", "eve"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", name], check=True)
    listed(ann="ann", ben="ben", carl="carl")
    Path("revoked").write_text("")

    def word(who, of="2", key=None, **more):
        with monkeypatch.context() as m:
            m.setenv("LLMKIT_ACTOR", who)
            return approve(of, why="read the report", model=NAME, key=who if key is None else key, **more)

    return word


def two():
    return versions(URI, NAME)[1].release


def stands(now=None):
    return tally(read_ledger("ledger.jsonl"), RULES.approvals, RULES.digest, NAME, two(), (now or datetime.now(UTC)).timestamp())  # fmt: skip


def by_hand(who, signature="", like=None, **changed):
    "A line that somebody who may write the ledger writes, with a chain that is whole."
    like = like or {}
    until = (datetime.now(UTC) + timedelta(days=9)).isoformat(timespec="seconds")
    about = {"model": NAME, "alias": "", "before": None, "after": two(), "evidence": "sha256:verdict2"} | changed
    with adding("ledger.jsonl") as (_, add):
        text = signature if callable(signature) else (lambda _: signature) if signature else None
        return add(
            "approve", who, datetime.now(UTC), text, **about, terms=Terms("fine", "promote", until, RULES.digest)
        )


def test_two_signed_approvals_start_a_rollout_and_promote_it(say, capsys):
    for of in "12":
        say("ann", of), say("ben", of)
    assert "signed with key SHA256:" in capsys.readouterr().out
    assert commands.rollout_start(NAME, canary="1", first=True) == 0 and commands.rollout_start(NAME, id="r") == 0
    serve(Controller(commands.open_store(), "r", MlflowRegistry(URI)))
    assert commands.rollout_promote(full=True) == 0 and aliases(URI)["champion"] == 2


def test_a_key_that_is_revoked_in_the_middle_holds_the_promotion(say, capsys):
    for of in "12":
        say("ann", of), say("ben", of)
    commands.rollout_start(NAME, canary="1", first=True), commands.rollout_start(NAME, id="r")
    c = Controller(commands.open_store(), "r", MlflowRegistry(URI))
    serve(c)
    subprocess.run(["ssh-keygen", "-k", "-q", "-f", "revoked", "ben.pub"], check=True)
    capsys.readouterr()
    assert commands.rollout_promote(full=True) == 3 and aliases(URI)["champion"] == 1
    c.step()
    assert c.state.reason.startswith("not promoted: 1 of 2 approvals: ann until") and "which revoked revokes" in c.state.reason  # fmt: skip
    Path("signers").unlink()  # nobody is promoted by a list that is not there
    assert commands.rollout_resume() == 0
    with pytest.raises(KitError, match="signers: no such file"):
        commands.rollout_promote(full=True)
    assert commands.rollout_status() == 0 and "no promotion until approvals can be read: signers" in capsys.readouterr().out  # fmt: skip
    assert aliases(URI)["champion"] == 1 and commands.rollout_abort() == 0


def test_who_has_no_key_or_another_ones_does_not_approve(say):
    for key, why in (("", "no key is named"), ("eve", "does not allow"), ("ben", "signed with the key of ben"), ("none", "no such file")):  # fmt: skip
        with pytest.raises(KitError, match=why):
            say("ann", key=key)
    with pytest.raises(KitError, match="whoever registered a release"):
        say("carl")
    assert len(read_ledger("ledger.jsonl")) == 2


def test_the_key_may_stand_in_the_settings_or_the_environment(say, monkeypatch):
    Path("settings.ini").write_text(f"[DEFAULT]\ntracking_uri = {URI}\nsigning_key = ann\n")
    say("ann", key="")
    monkeypatch.setenv("LLMKIT_SIGNING_KEY", "ben")
    say("ben", key="")
    assert stands().enough


def test_a_key_in_an_agent_signs_by_its_public_half(say, monkeypatch):
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", "a passphrase", "-f", "ann"], check=True)
    with pytest.raises(KitError, match="Give it to an ssh-agent: ssh-add ann"):
        say("ann")
    sock = str(Path("agent").resolve())
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", sock], stdout=subprocess.PIPE)
    try:
        agent.stdout.readline()
        monkeypatch.setenv("SSH_AUTH_SOCK", sock)
        Path("ask").write_text("#!/bin/sh\necho 'a passphrase'\n")
        Path("ask").chmod(0o755)
        env = {"SSH_AUTH_SOCK": sock, "SSH_ASKPASS": "./ask", "SSH_ASKPASS_REQUIRE": "force", "PATH": "/usr/bin:/bin"}
        subprocess.run(["ssh-add", "-q", "ann"], check=True, env=env, capture_output=True)
        Path("ann").unlink()
        say("ann", key="ann.pub")
    finally:
        agent.terminate()
        agent.wait(10)
    assert [e.who for e in stands().good] == ["ann"]


def test_a_word_that_nobody_signed_counts_for_nothing_though_the_chain_is_whole(say, capsys):
    by_hand("ann"), by_hand("ben")
    assert verify_ledger() == 0 and dict(stands().flaws) == {"ann": "not signed", "ben": "not signed"}
    assert commands.rollout_start(NAME, canary="2", first=True) == 1
    assert "has 0 of 2 approvals (ann: not signed; ben: not signed)" in capsys.readouterr().out
    say("ann"), say("ben")  # and keeps nobody from a better one
    assert stands().enough


def test_a_signature_belongs_to_its_line(say):
    "Taken to another release, model, time or name, or given for another purpose, it is not what was signed."
    say("ann", "1")
    signed = read_ledger("ledger.jsonl")[-1]
    by_hand("ann", signed.signature)
    assert stands().flaws == {"ann": "not what was signed"}
    by_hand("ben", signed.signature)
    assert stands().flaws["ben"] == "not what was signed"
    by_hand("ann", lambda e: sign(e.statement, "ann", RELEASE))
    assert stands().flaws["ann"] == "signed for another purpose than llmkit-approval"
    by_hand("ann", lambda e: sign(replace(e, model="other").statement, "ann", APPROVAL))
    assert stands().flaws["ann"] == "not what was signed"
    by_hand("ann", "-----BEGIN SSH SIGNATURE-----\nAAAA\n-----END SSH SIGNATURE-----\n")
    assert stands().flaws["ann"].startswith("no SSH signature")
    assert not stands().good


def rewritten(change):
    "The ledger with some rows changed, and every digest of the chain counted anew."
    rows = [json.loads(line) for line in Path("ledger.jsonl").read_text().splitlines()]
    Path("ledger.jsonl").unlink()
    for row in change(rows):
        with adding("ledger.jsonl") as (_, add):
            terms, text = row.get("terms"), row.get("signature")
            said = {k: row[k] for k in ("model", "alias", "before", "after", "evidence")}
            add(row["action"], row["who"], datetime.fromisoformat(row["when"]), (lambda _, t=text: t) if text else None, **said, terms=terms and Terms(**terms))  # fmt: skip
    assert verify_ledger() == 0


def test_a_replay_after_a_withdrawal_does_not_count(say):
    say("ann")
    row = json.loads(Path("ledger.jsonl").read_text().splitlines()[-1])
    say("ann", withdraw=True)
    rewritten(lambda rows: [*rows, row])
    assert stands().flaws == {"ann": "not what was signed"}


def test_history_before_a_signed_word_cannot_be_rewritten(say):
    say("ann"), say("ben")
    assert stands().enough
    whole = Path("ledger.jsonl").read_text()
    rewritten(lambda rows: [{**r, "who": "dan"} if r["action"] == "register" else r for r in rows])
    assert dict(stands().flaws) == dict.fromkeys(("ann", "ben"), "not what was signed")
    Path("ledger.jsonl").write_text(whole)
    later = (datetime.now(UTC) + timedelta(days=900)).isoformat(timespec="seconds")
    rewritten(lambda rows: [{**r, "terms": {**r["terms"], "until": later}} if r["who"] == "ben" else r for r in rows])
    assert dict(stands().flaws) == {"ben": "not what was signed"}


def test_a_withdrawal_needs_no_key_and_one_in_her_name_is_answered_by_her(say):
    say("ann"), say("ben")
    say("ann", key="", withdraw=True)
    assert stands().flaws["ann"].startswith("withdrawn on")
    say("ann")
    assert stands().enough
    say("ben", withdraw=True)
    assert read_ledger("ledger.jsonl")[-1].signature.startswith("-----BEGIN SSH SIGNATURE")
    assert not stands().enough


def test_one_key_is_one_person(say):
    listed(ann="ann,ben", eve="*", carl="carl,dee")
    say("ann")
    by_hand("ben", lambda e: sign(e.statement, "ann", APPROVAL))
    assert stands().flaws == {"ben": "signed with the key that signed for ann"}
    by_hand("dee", lambda e: sign(e.statement, "carl", APPROVAL))
    assert stands().flaws["dee"] == "signed with a key of carl, who registered it"
    for who in ("fay", "*"):
        by_hand(who, lambda e: sign(e.statement, "eve", APPROVAL))
        assert "under a pattern, *, which names nobody" in stands().flaws[who]


def test_a_key_counts_at_the_time_it_signed(say):
    "One that has retired since still counts; one that had retired before does not."
    born = datetime.now(UTC) - timedelta(days=30)
    for n, name in enumerate(("ann", "ben")):
        Path("signers").write_text(f'{name} valid-before="{born + timedelta(days=1 - 2 * n):%Y%m%d%H%M%S}Z" {public(name)}\n')  # fmt: skip
        about = (NAME, two(), "sha256:verdict2", RULES.digest, RULES.approvals, "fine", name, born)
        if n == 0:
            give("ledger.jsonl", *about, key=name)
            assert [e.who for e in stands(born + timedelta(days=9)).good] == ["ann"]
        else:
            with pytest.raises(KitError, match="key has expired"):
                give("ledger.jsonl", *about, key=name)


def test_a_policy_without_signers_reads_a_ledger_with_them_and_a_key_signs_what_was_not(say):
    "And an older line has the digest that it always had."
    rule = replace(RULES.approvals, signers="", revoked="")
    about = (NAME, two(), "sha256:verdict2", RULES.digest, rule, "fine", "ann")
    plain, new = give("ledger.jsonl", *about)
    assert new and "signature" not in plain.body and give("ledger.jsonl", *about) == (plain, False)
    signed, new = give("ledger.jsonl", *about, key="ann")
    assert new and signed.signature and give("ledger.jsonl", *about) == give("ledger.jsonl", *about, key="ann") == (signed, False)  # fmt: skip
    assert canonical_json({**signed.body, "digest": signed.digest}) == Path("ledger.jsonl").read_text().splitlines()[-1]
    append("ledger.jsonl", NAME, "champion", two(), "sha256:verdict2", "promote")
    assert verify_ledger() == 0


def test_the_history_tells_which_words_are_signed_and_whether_that_holds(say, capsys):
    by_hand("ben")
    say("ann")
    capsys.readouterr()
    assert list_releases(NAME, history=True) == 0
    ben, ann = capsys.readouterr().out.splitlines()[-2:]
    assert ben.endswith("ben: approve: " + ben.partition("approve: ")[2]) and ben.endswith("; not signed")
    assert "; signed with key SHA256:" in ann and ann.endswith(", of ann")
    by_hand("ben", read_ledger("ledger.jsonl")[-1].signature)
    assert list_releases(NAME, history=True) == 1
    assert "entry 5: its signature: not what was signed" in capsys.readouterr().out
