"""`llmkit smoke` and `llmkit ask` on the real thing: a base, a delta, a model, an engine and a bundle."""

import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llmkit.core.artifact import build, open_artifact, seal
from llmkit.core.errors import KitError
from llmkit.core.files import read_json, write_json, write_jsonl
from llmkit.release.smoke import ask, await_ready, run_smoke, system_of

PLACES = {
    "base": "artifacts/base/base",
    "model": "artifacts/merge/model",
    "engine": "artifacts/quantize/engine",
    "bundle": "artifacts/package/bundle",
    "delta": "artifacts/finetune/delta",
}


@pytest.mark.parametrize("kind", PLACES)
def test_every_kind_answers_in_time(packaged, kind, capsys):
    base = PLACES["base"] if kind == "delta" else ""
    assert run_smoke(PLACES[kind], base=base) == 0
    out = capsys.readouterr().out
    assert "FAILED" not in out and ("self-test" in out) == (kind == "bundle")
    assert ask(PLACES[kind], "question about my card", base=base, max_tokens=4) == 0


def test_what_was_trained_behind_a_system_message_knows_it(packaged, capsys):
    told = "You sort questions."
    assert {k: system_of(p) for k, p in PLACES.items()} == dict.fromkeys(PLACES, "") | {"bundle": told, "delta": told}
    body = read_json("artifacts/package/bundle/bundle.json")
    assert system_of("http://127.0.0.1:9/v1") == ""
    for prompts, said in ((body["self_test"]["prompts"], told), ([], "")):  # from before bundles said so
        write_json("old/bundle.json", {"self_test": {"prompts": prompts}})
        seal("old", "bundle")
        assert system_of("old") == said
    asked = "question about my card"
    for place in (PLACES["delta"], PLACES["bundle"]):
        answers = []
        for more in ({}, {"system": told}, {"system": ""}, {"system": "-"}):
            assert ask(place, asked, max_tokens=8, **more) == 0
            answers.append(capsys.readouterr().out)
        assert answers[0] == answers[1] != answers[2] == answers[3]


def test_a_plain_folder_without_manifest_is_a_base(project, capsys):
    shutil.copytree(PLACES["base"], "plain")
    (project / "plain/manifest.json").unlink()
    assert run_smoke("plain") == 0


def test_own_questions(project, capsys):
    write_jsonl(
        "mine.jsonl", [{"messages": [{"role": "user", "content": "mine"}, {"role": "assistant", "content": "x"}]}]
    )
    assert run_smoke(PLACES["engine"], questions="mine.jsonl") == 0
    assert "'mine' →" in capsys.readouterr().out


def test_questions_may_be_prompts(project, capsys):
    write_jsonl("mine.jsonl", [{"prompt": "mine", "completion": "x"}, {"system": "brief", "prompt": "yours"}])
    assert run_smoke(PLACES["engine"], questions="mine.jsonl") == 0
    assert "'mine' →" in (out := capsys.readouterr().out) and "'yours' →" in out
    for row in ({"text": "mine"}, {"messages": []}, {"messages": "mine"}, {"messages": [3]}):
        write_jsonl("mine.jsonl", [{"prompt": "mine"}, row])
        with pytest.raises(KitError, match="mine.jsonl: line 2: no question"):
            run_smoke(PLACES["engine"], questions="mine.jsonl")


def test_a_delta_finds_the_base_that_it_was_made_for(project, capsys):
    assert run_smoke(PLACES["delta"]) == 0
    assert "FAILED" not in capsys.readouterr().out


def test_a_delta_is_refused_without_its_base_and_with_another(project):
    shutil.copytree(PLACES["delta"], "elsewhere/far/delta")
    with pytest.raises(KitError, match="needs its base"):
        run_smoke("elsewhere/far/delta")
    with build("other", "base") as folder:
        for p in (project / PLACES["base"]).iterdir():
            if p.name != "manifest.json":
                shutil.copy(p, folder)
        write_json(folder / "extra.json", {})
    with pytest.raises(KitError, match="made for the base"):
        run_smoke(PLACES["delta"], base="other")


def test_a_truncated_weight_file_is_named(packaged):
    weights = max((packaged / PLACES["bundle"] / "engine").iterdir(), key=lambda p: p.stat().st_size)
    data = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(KitError, match=weights.name):
        run_smoke(PLACES["bundle"])


def test_other_answers_than_the_bundle_promised_fail(packaged, capsys):
    bundle = open_artifact(PLACES["bundle"])
    body = read_json(bundle / "bundle.json")
    body["self_test"]["prompts"][1]["tokens"][0] += 1
    write_json(bundle / "bundle.json", body)
    seal(bundle.path, "bundle", bundle.parents, bundle.recipe)
    assert run_smoke(PLACES["bundle"]) == 1
    assert "FAILED self-test: prompt 1 differs from token 0 on" in capsys.readouterr().out


def test_too_slow_is_a_failure(project, capsys):
    assert run_smoke(PLACES["engine"], seconds=1e-6) == 1
    assert "FAILED quick" in capsys.readouterr().out


def test_a_question_waits_until_the_server_is_ready(capsys):
    seen = []

    class Late(BaseHTTPRequestHandler):
        "Not ready at first; then ready."

        def do_GET(self):
            seen.append(self.path)
            self.send_response(200 if len(seen) > 2 else 503)
            self.end_headers()

        def log_message(self, *_):
            "Says nothing."

    with ThreadingHTTPServer(("127.0.0.1", 0), Late) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        await_ready(f"http://127.0.0.1:{server.server_port}/v1", 20)
        server.shutdown()
    assert seen == ["/ready"] * 3
    began = time.monotonic()
    await_ready("http://127.0.0.1:9/v1", 0.6)
    assert 0.5 < time.monotonic() - began < 5
    assert "waiting for http://127.0.0.1:9/ready, 0.6 s at most (--wait)" in capsys.readouterr().err
