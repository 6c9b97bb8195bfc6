"A batch in a process that is killed, and one whose engine fails now and then."

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from serve_server import PATIENCE, serving, until

import llmkit.serve.batch as batch
from llmkit.core.errors import KitError
from llmkit.runtime.dummy import DummyEngine
from llmkit.serve.backend import EngineBackend
from llmkit.serve.batch import Line, batch_run, run_batch
from llmkit.serve.gateway import Gateway
from llmkit.serve.target import Target

PROGRAM = """
import sys, time
import llmkit.serve.batch as batch
from llmkit.runtime.dummy import DummyEngine
from llmkit.serve.backend import EngineBackend
from llmkit.serve.target import Target

class Paced(DummyEngine):
    def next_logits(self, prompt, answer=()):
        time.sleep(0.002)
        return super().next_logits(prompt, answer)

batch.resolve = lambda *a: Target("bank", "here")
batch.open_backend = lambda found, said=None, **how: EngineBackend(Paced(replies=lambda p: "yes"), **how)
sys.exit(batch.batch_run("in.jsonl", "out.jsonl", resume=True, slots=4))
"""


def request(i):
    body = {"prompt": f"question {i}", "max_tokens": 6, "temperature": 0}
    return {"custom_id": f"q{i}", "method": "POST", "url": "/v1/completions", "body": body}


def ids(path):
    return [json.loads(line)["custom_id"] for line in path.read_text().splitlines()]


def test_kill_9_and_resume_answer_each_request_once(tmp_path):
    n = 150
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(request(i)) for i in range(n)) + "\nnonsense\n")
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    out = tmp_path / "out.jsonl"
    kills = 0
    for goal in (20, 60):
        p = subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=tmp_path, stderr=subprocess.DEVNULL)
        until(lambda goal=goal: out.exists() and out.read_text().count("\n") >= goal, "some answers")
        p.send_signal(signal.SIGKILL)
        kills += p.wait(PATIENCE) == -9
    assert kills == 2 and goal <= len(ids(out)) < n, "it was killed in the middle, twice"
    with open(out, "a") as f:
        f.write('{"custom_id": "q14')  # as a write that was cut
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 1 and f"{n + 1:,} lines" in done.stdout, done.stderr
    assert sorted(ids(out)) == sorted(f"q{i}" for i in range(n))
    assert all(json.loads(x)["response"]["body"]["choices"][0]["text"] == "yes" for x in out.read_text().splitlines())
    (error,) = [json.loads(x) for x in Path(f"{out}.errors.jsonl").read_text().splitlines()]
    assert (error["line"], error["error"]["code"]) == (n + 1, "invalid_line")


def test_a_second_run_of_the_same_batch_is_refused(tmp_path):
    n = 100
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(request(i)) for i in range(n)))
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    out = tmp_path / "out.jsonl"
    first = subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=tmp_path, stderr=subprocess.DEVNULL)
    until(lambda: out.exists() and out.read_text().count("\n") >= 10, "some answers")
    first.send_signal(signal.SIGSTOP)  # so that it is there as long as the second one needs
    command = [sys.executable, "-c", "import sys; from llmkit.cli import main; sys.exit(main(sys.argv[1:]))"]
    command += ["batch", "run", "in.jsonl", "out.jsonl"]
    for more in ([], ["--resume"]):
        second = subprocess.run(command + more, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
        assert second.returncode and "another run is writing to it" in second.stderr and "out.jsonl" in second.stderr
    first.send_signal(signal.SIGCONT)
    assert first.wait(PATIENCE) == 0
    assert sorted(ids(out)) == sorted(f"q{i}" for i in range(n)), "each once"


def test_a_batch_is_not_resumed_by_another_release(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("settings.ini").write_text("[DEFAULT]\n")
    asked = [json.dumps(request(i)) for i in range(2)] + ["nonsense"]
    Path("in.jsonl").write_text("\n".join(asked))
    monkeypatch.setattr(batch, "resolve", lambda *a: Target("bank", "here"))

    def run(release):
        monkeypatch.setattr(
            batch, "open_backend", lambda found, said=None, **how: EngineBackend(DummyEngine(), release=release, **how)
        )
        return batch_run("in.jsonl", "out.jsonl", resume=True)

    assert run("sha256:aaaa") == 1
    before = {p: p.read_text() for p in (Path("out.jsonl"), Path("out.jsonl.errors.jsonl"))}
    Path("in.jsonl").write_text("\n".join([*asked, json.dumps(request(3))]))
    with pytest.raises(KitError, match="llmkit-aaaa.*llmkit-bbbb.*another file"):
        run("sha256:bbbb")
    assert {p: p.read_text() for p in before} == before, "nothing was touched"
    assert run("sha256:aaaa") == 1 and ids(Path("out.jsonl")) == ["q0", "q1", "q3"]


def test_a_batch_is_not_resumed_by_another_server_of_unknown_release(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("settings.ini").write_text("[DEFAULT]\n")
    write = lambda n: Path("in.jsonl").write_text("\n".join(json.dumps(request(i)) for i in range(n)))
    bank = Gateway("bank", {"baseline": EngineBackend(DummyEngine())})
    run = lambda url: batch_run("in.jsonl", "out.jsonl", resume=True, target=f"{url}/v1/")
    write(2)
    with serving(bank) as one, serving(bank) as two:
        assert run(one) == 0
        before = Path("out.jsonl").read_text()
        write(4)
        with pytest.raises(KitError, match="same address and model.*another file"):
            run(two)
        monkeypatch.setattr(bank, "model", "shop")  # at the same address, as after a restart with another model
        with pytest.raises(KitError, match="holds answers of llmkit-"):
            run(one)
        assert Path("out.jsonl").read_text() == before, "nothing was touched"
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        assert run(one) == 0 and sorted(ids(Path("out.jsonl"))) == ["q0", "q1", "q2", "q3"]


def test_a_run_that_could_not_begin_leaves_the_name_free(tmp_path, monkeypatch, dummy):
    monkeypatch.chdir(tmp_path)
    Path("settings.ini").write_text("[DEFAULT]\n")
    Path("in.jsonl").write_text(json.dumps(request(1)))
    with pytest.raises(KitError):
        batch_run("in.jsonl", "out.jsonl", target="http://127.0.0.1:9/v1")
    for source, target in (("in.jsonl", "NOWHERE"), ("gone.jsonl", f"{dummy[1]}/v1")):
        with pytest.raises(KitError):
            batch_run(source, "out.jsonl", target=target)
        assert not list(tmp_path.glob("out*")), "nothing is left of it"
    Path("mine.jsonl").touch()
    with pytest.raises(KitError):
        batch_run("in.jsonl", "mine.jsonl", target="NOWHERE")
    assert Path("mine.jsonl").exists(), "somebody else made it"
    assert batch_run("in.jsonl", "out.jsonl", target=f"{dummy[1]}/v1") == 0


def test_an_existing_file_is_not_touched_unasked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text(json.dumps(request(1)))
    Path("out.jsonl").write_text("mine\n")
    with pytest.raises(KitError, match="--resume"):
        batch_run("in.jsonl", "out.jsonl")
    assert Path("out.jsonl").read_text() == "mine\n"


def test_a_server_can_answer_a_batch(tmp_path, monkeypatch, dummy):
    monkeypatch.chdir(tmp_path)
    Path("settings.ini").write_text("[DEFAULT]\n")
    Path("in.jsonl").write_text("\n".join(json.dumps(request(i)) for i in range(5)))
    assert batch_run("in.jsonl", "out.jsonl", target=f"{dummy[1]}/v1") == 0
    assert sorted(ids(Path("out.jsonl"))) == [f"q{i}" for i in range(5)]


class Moody(DummyEngine):
    "Fails on every fifth question."

    def next_logits(self, prompt, answer=()):
        if int(self.tokenizer.decode(list(prompt)).split()[-1]) % 5 == 0:
            raise RuntimeError("not today")
        return super().next_logits(prompt, answer)


def test_a_failing_request_harms_no_other_and_memory_holds_only_what_runs():
    ahead, answered, failed = [], [], []

    def lines(n=200):
        for i in range(1, n + 1):
            ahead.append(i - len(answered) - len(failed))
            yield Line(i, f"q{i}", "completion", {"prompt": f"question {i}", "max_tokens": 2})

    async def work():
        gateway = Gateway("bank", {"baseline": EngineBackend(Moody(), slots=4)})
        try:
            return await run_batch(lines(), gateway, answered.append, failed.append, together=8)
        finally:
            await gateway.close(PATIENCE)

    tally = asyncio.run(work())
    assert (tally.answered, tally.errors) == (160, 40)
    assert {int(a["custom_id"][1:]) % 5 for a in failed} == {0} and {a["response"]["status_code"] for a in failed} == {
        500
    }
    assert max(ahead) <= 9, "no more are read than are under way"
