"""The ledger only grows, whoever writes, and shows every edit."""

import json
import multiprocessing as mp

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.core.digests import canonical_json, digest_json
from llmkit.core.errors import KitError
from llmkit.release.ledger import append, read_ledger, verify_ledger


def write_many(path, who, n, gate):
    gate.wait()
    for i in range(n):
        append(path, f"model-{i % 3}", "challenger", f"sha256:{who}{i}", "sha256:v", who=str(who))


def test_many_processes_make_one_unbroken_chain(tmp_path):
    ctx, path = mp.get_context("fork"), tmp_path / "ledger.jsonl"
    gate = ctx.Barrier(4)
    workers = [ctx.Process(target=write_many, args=(path, who, 25, gate)) for who in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(30)
    assert [w.exitcode for w in workers] == [0] * 4
    entries = read_ledger(path)
    assert [e.seq for e in entries] == list(range(1, 101))
    held = {}
    for e in entries:
        assert e.before == held.get(e.model)
        held[e.model] = e.after


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    for i in range(5):
        append(path, "bank", "challenger", f"sha256:{i}", "sha256:v", who="ana")
    return path


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_no_edit_of_a_byte_passes(chain, data):
    whole = chain.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 2))
    to = data.draw(st.integers(32, 126).filter(lambda b: b != whole[at]))
    other = chain.with_name("edited.jsonl")
    other.write_bytes(whole[:at] + bytes([to]) + whole[at + 1 :])
    with pytest.raises(KitError, match="line"):
        read_ledger(other)


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(5)).filter(lambda p: list(p) != sorted(p)))
def test_no_order_but_the_true_one_passes(chain, order):
    lines = chain.read_text().splitlines(keepends=True)
    other = chain.with_name("moved.jsonl")
    other.write_text("".join(lines[i] for i in order))
    with pytest.raises(KitError, match="line"):
        read_ledger(other)


def test_a_cut_end_is_seen_by_whoever_knows_the_head(chain, tmp_path, capsys):
    head = read_ledger(chain)[-1].digest
    cut = tmp_path / "cut.jsonl"
    cut.write_text("".join(chain.read_text().splitlines(keepends=True)[:-1]))
    assert verify_ledger(str(cut)) == 0
    assert verify_ledger(str(cut), head=head) == 1
    assert verify_ledger(str(chain), head=head) == 0


def test_a_broken_ledger_takes_no_more_entries(chain, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(chain.read_text().replace("ana", "eve", 1))
    before = bad.read_bytes()
    with pytest.raises(KitError, match="line 1"):
        append(bad, "bank", "challenger", "sha256:9", "sha256:v")
    assert bad.read_bytes() == before


def test_a_full_disk_leaves_no_half_line(chain, tmp_path, monkeypatch):
    import os

    path = tmp_path / "ledger.jsonl"
    path.write_bytes(chain.read_bytes())
    real = os.write

    def half(fd, data):
        if len(data) > 20:
            return real(fd, data[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", half)
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(KitError, match="No space left"):
        append(path, "bank", "challenger", "sha256:9", "sha256:v")
    assert path.read_bytes() == chain.read_bytes()


def test_a_name_that_stands_twice_in_a_line_is_an_edit(chain, tmp_path):
    "A reader sees the first, a parser the second."
    twice = tmp_path / "twice.jsonl"
    twice.write_text(chain.read_text().replace('{"action"', '{"who":"eve","action"', 1))
    with pytest.raises(KitError, match="the chain is broken"):
        read_ledger(twice)


def test_a_user_without_a_name_is_a_number(monkeypatch):
    import os

    from llmkit.release import ledger

    def nobody():
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.setattr(ledger.getpass, "getuser", nobody)
    assert ledger.actor({}) == f"uid {os.getuid()}" and ledger.actor({"LLMKIT_ACTOR": "ci"}) == "ci"


def resealed(chain, path, **changed):
    "The first line of a ledger with other values and the digest that they have."
    row = json.loads(chain.read_text().splitlines()[0]) | changed
    row = {k: v for k, v in row.items() if k != "digest" and v is not ...}
    path.write_text(canonical_json(row | {"digest": digest_json(row)}) + "\n")
    return path


@pytest.mark.parametrize("value", [5, True, [], {}])
@pytest.mark.parametrize("key", ["seq", "when", "who", "action", "model", "alias", "before", "after", "evidence", "previous", "terms", "signature"])  # fmt: skip
def test_a_value_of_another_type_is_named_though_the_digest_fits(chain, tmp_path, capsys, key, value):
    path = resealed(chain, tmp_path / "typed.jsonl", **{key: value})
    assert verify_ledger(str(path)) == 1
    said = capsys.readouterr().out
    if (key, value) == ("seq", 5):
        assert f"{path}: line 1: the chain is broken" in said
    elif (key, value) == ("terms", {}):
        assert f"{path}: line 1.terms.why: not a ledger entry: missing parameter. Restore the file" in said
    else:
        assert said.startswith(f"{path}: line 1.{key}: not a ledger entry: must be ")
        assert f"(got {value!r}). Restore the file from version control" in said


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"x": 1}, "line 1.x: not a ledger entry: unknown parameter (got 1)"),
        ({"who": ...}, "line 1.who: not a ledger entry: missing parameter"),
        ({"who": None}, "line 1.who: not a ledger entry: must be a str, not a NoneType (got None)"),
        ({"action": "approve"}, "line 1.action: not a ledger entry: a word has terms, a move has none (got 'approve')"),
        ({"signature": "x"}, "line 1.signature: not a ledger entry: a signature is of a word (got 'x')"),
    ],
)
def test_what_is_no_entry_says_why_and_what_to_do(chain, tmp_path, changed, said):
    path = resealed(chain, tmp_path / "odd.jsonl", **changed)
    with pytest.raises(KitError) as e:
        read_ledger(path)
    fix = "Restore the file from version control, or read it with the version that wrote it"
    assert str(e.value) == f"{path}: {said}. {fix}"
