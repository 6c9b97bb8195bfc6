"Files and streams whose lines are large, broken or mean: each gets its answer or its reason, and the others theirs."

import json
from pathlib import Path

import pytest

import llmkit.serve.batch as batch
import llmkit.serve.stream as stream
from llmkit.runtime.dummy import DummyEngine
from llmkit.serve.backend import EngineBackend
from llmkit.serve.server import Target

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
