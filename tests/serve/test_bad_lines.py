"Files and streams whose lines are large, broken or mean: each gets its answer or its reason, and the others theirs."

import errno
import json
import os
import socket
from pathlib import Path

import pytest

import llmkit.serve.batch as batch
import llmkit.serve.stream as stream
from llmkit.core.errors import KitError
from llmkit.runtime.dummy import DummyEngine
from llmkit.serve.backend import EngineBackend
from llmkit.serve.target import Target

DEEP = "[" * 200_000


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    "A project whose release is a dummy."
    monkeypatch.chdir(tmp_path)
    Path("settings.ini").write_text("[DEFAULT]\n")
    for module in (batch, stream):
        monkeypatch.setattr(module, "resolve", lambda *a: Target("bank", "here"))
        monkeypatch.setattr(module, "open_backend", lambda found, said=None, **how: EngineBackend(DummyEngine(), **how))


def body(**more):
    return {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "temperature": 0, **more}


def request(i, **more):
    return json.dumps({"custom_id": f"q{i}", "method": "POST", "url": "/v1/chat/completions", "body": body(**more)})


def event(i, **more):
    head = {"specversion": "1.0", "id": str(i), "source": "/t", "type": "llmkit.chat.request"}
    return json.dumps({**head, "data": body(**more)})


def run_batch(*lines):
    "The answers and the errors of a batch."
    Path("in.jsonl").write_text("\n".join(lines))
    batch.batch_run("in.jsonl", "out.jsonl", slots=2)
    found = [Path(p) for p in ("out.jsonl", "out.jsonl.errors.jsonl")]
    return [[json.loads(x) for x in p.read_text().splitlines()] if p.is_file() else [] for p in found]


def run_stream(*lines):
    "The answers and the dead letters of a stream."
    Path("in").mkdir()
    Path("in/a.ndjson").write_text("\n".join(lines))
    stream.stream_run("in", "out", once=True, slots=2, patience=0.1)
    found = [Path("out") / f"{n}.ndjson" for n in ("answers", "dead")]
    return [[json.loads(x) for x in p.read_text().splitlines()] if p.is_file() else [] for p in found]


def test_a_batch_does_not_fill_its_own_queue():
    answers, errors = run_batch(*(request(i, n=4) for i in range(40)), request(40, n=128))
    assert not errors and len(answers) == 41
    assert sorted(len(a["response"]["body"]["choices"]) for a in answers) == [4] * 40 + [128]


def test_a_stream_does_not_fill_its_own_queue():
    answers, dead = run_stream(*(event(i, n=4) for i in range(20)), event(20, n=128))
    assert not dead and len(answers) == 21


def test_the_mark_that_windows_writes_before_a_text_costs_no_first_line():
    answers, errors = run_batch("\ufeff" + request(1), request(2))
    assert not errors and sorted(a["custom_id"] for a in answers) == ["q1", "q2"]
    answers, dead = run_stream("\ufeff" + event(1), event(2), "\ufeff" + event(3))
    assert [a["id"] for a in answers] == ["/t#1", "/t#2"] and "BOM" in dead[0]["data"]["reason"]


def test_a_batch_goes_on_after_a_bad_line():
    nan, lone = request(3, temperature=float("nan")), request(4, user="\ud800")
    answers, errors = run_batch(request(1), DEEP, '{"custom_id":"\\ud800"}', nan, lone, request(2))
    assert sorted(a["custom_id"] for a in answers) == ["q1", "q2"]
    assert [e["line"] for e in errors] == [2, 3, 4, 5]
    assert all(e["error"]["message"].startswith("not JSON") for e in errors)


def test_a_stream_goes_on_after_a_bad_line():
    nan, lone = event(4, temperature=float("nan")), event("\ud800")
    answers, dead = run_stream(event(1), DEEP, lone, nan, event(2))
    assert sorted(a["id"] for a in answers) == ["/t#1", "/t#2"]
    assert sorted(d["data"]["event"] for d in dead) == sorted([DEEP, lone, nan]), "whole, to be put back"


def test_a_stream_into_its_own_source_is_refused_however_it_is_spelt():
    Path("in").mkdir()
    Path("in/a.ndjson").write_text(event(1) + "\n")
    for out in ("in/", "./in", "in/../in"):
        with pytest.raises(KitError, match="cannot go where the questions come from"):
            stream.stream_run("in", out, once=True)
    assert [p.name for p in Path("in").iterdir()] == ["a.ndjson"], "each dead letter would be a question again"


def test_a_source_that_is_not_there_leaves_nothing_behind():
    with pytest.raises(KitError, match="no such folder"):
        stream.stream_run("inn", "out", once=True)
    assert not Path("out").exists()


def test_a_file_that_was_replaced_by_a_longer_one_is_no_file_that_grew():
    run_stream(event(1), event(2))
    Path("in/a.ndjson").write_text("\n".join(event(i) for i in (11, 12, 13)) + "\n")
    with pytest.raises(KitError, match="begins otherwise.*Give new lines a new file"):
        stream.stream_run("in", "out", once=True, slots=2)


def test_a_folder_that_is_tidied_up_is_read_to_its_end():
    answers, _ = run_stream(event(1), event(2))
    Path("in/a.ndjson").unlink()
    Path("in/b.ndjson").write_text(event(3) + "\n")
    stream.stream_run("in", "out", once=True, slots=2, patience=0.1)  # with a lag below 0 it never ended
    assert len(answers) == 2 and Path("out/answers.ndjson").read_text().count("\n") == 3


def test_a_port_that_is_taken_is_told():
    Path("in").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(KitError, match="cannot listen there.*Name another port"):
            stream.stream_run("in", "out", once=True, metrics=taken.getsockname()[1])


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_batch_does_not_go_on_with_a_file_of_requests(end):
    Path("in.jsonl").write_text(request(1) + "\n" + request(2) + end)
    before = Path("in.jsonl").read_bytes()
    with pytest.raises(KitError, match="holds a line that is no answer"):
        batch.batch_run("in.jsonl", "in.jsonl", resume=True)
    assert Path("in.jsonl").read_bytes() == before


def test_an_answer_that_finds_no_room_leaves_no_half_line_before_the_next(monkeypatch):
    a, write, room = batch.Appender("out.jsonl"), os.write, [40]

    def nearly_full(fd, data):
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        n = write(fd, data[: room[0]])
        room[0] -= n
        return n

    monkeypatch.setattr(os, "write", nearly_full)
    with pytest.raises(KitError, match="cannot write: No space left.*Free some space"):
        a.add({"custom_id": "q1", "response": {"body": "x" * 100}})
    room[0] = 1000  # somebody made some
    a.add({"custom_id": "q2", "response": None})
    a.close()
    assert batch.cut_off("out.jsonl") == ({"q2"}, set())


def test_batches_and_streams_keep_the_secrets_that_a_server_keeps(monkeypatch):
    monkeypatch.setenv("LLMKIT_CANARIES", "kestrel-7731, heron")
    engine = DummyEngine(replies=lambda p: "it is kestrel-7731")
    for module in (batch, stream):
        monkeypatch.setattr(module, "open_backend", lambda found, said=None, **how: EngineBackend(engine, **how))
    answers, _ = run_batch(request(1, max_tokens=30))
    letters, _ = run_stream(event(1, max_tokens=30))
    for body in (answers[0]["response"]["body"], letters[0]["data"]):
        assert body["choices"][0]["finish_reason"] == "content_filter" and "7731" not in json.dumps(body)


def test_what_a_question_hands_on_to_its_answer_is_text():
    bad = [event(i, **{})[:-1] + f', "partitionkey": {x}}}' for i, x in ((2, "1e999"), (3, '{"a": 1}'), (4, "7"))]
    answers, dead = run_stream(event(1)[:-1] + ', "partitionkey": "p", "subject": null}', *bad)
    assert [(a["id"], a["partitionkey"]) for a in answers] == [("/t#1", "p")] and "subject" not in answers[0]
    assert len(dead) == 3 and all("partitionkey: has to be a text" in d["data"]["reason"] for d in dead)
