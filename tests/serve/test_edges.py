"Values at the edge of what is allowed, asked of a real server."

import json
import socket
from functools import partial
from pathlib import Path

import httpx
import pytest
from serve_server import PATIENCE, serving

import llmkit.serve.server as server
from llmkit.core.errors import KitError
from llmkit.runtime.dummy import DummyEngine
from llmkit.runtime.sampling import Sampling
from llmkit.serve.adapters import Adapters
from llmkit.serve.backend import EngineBackend
from llmkit.serve.keys import Keys, keys_list
from llmkit.serve.limits import Limits

ASK = {"model": "bank", "prompt": "count", "max_tokens": 12, "temperature": 0}
COLD = [5e-324, 1e-300, 1e-17, 9e-7]


def post(url, path="completions", **more):
    return httpx.post(f"{url}/v1/{path}", json={**ASK, **more}, timeout=PATIENCE)


@pytest.fixture
def set_up(tmp_path, monkeypatch):
    "As `llmkit serve` does, on a dummy."
    monkeypatch.chdir(tmp_path)
    Path("settings.ini").write_text("[DEFAULT]\n")
    monkeypatch.setattr(server, "resolve", lambda *a: server.Target("bank", "here"))
    monkeypatch.setattr(server, "open_backend", lambda found, said=None, **how: EngineBackend(DummyEngine(), **how))
    return partial(server.set_up, port=0)


@pytest.mark.parametrize("more", [{}, {"top_p": 0.9}, {"top_k": 3}])
def test_a_temperature_near_zero_is_greedy(dummy, more):
    gateway, url = dummy
    engine = DummyEngine()
    greedy = engine.generate([[5, 6, 7]], Sampling(8))
    assert all(engine.generate([[5, 6, 7]], Sampling(8, t, **more)) == greedy for t in COLD)
    want = post(url).json()["choices"][0]["text"]
    for t in COLD:
        r = post(url, temperature=t, **more)
        assert r.status_code == 200 and r.json()["choices"][0]["text"] == want
    assert gateway.baseline.stats()["failed_steps"] == 0, "nobody else in the batch was touched"


def test_a_web_page_from_elsewhere_asks_nothing_of_a_server_without_keys(make_gateway, tmp_path):
    gateway, site = make_gateway(), {"origin": "https://pages.example", "content-type": "text/plain"}
    with serving(gateway, adapters=Adapters(gateway, tmp_path)) as url:
        for path, body in (("completions", ASK), ("load_lora_adapter", {"lora_name": "tone", "lora_path": "x"})):
            r = httpx.post(f"{url}/v1/{path}", content=json.dumps(body), headers=site, timeout=PATIENCE)
            assert r.status_code == 403 and r.json()["error"]["code"] == "foreign_origin"
        own = httpx.post(
            f"{url}/v1/completions", json=ASK, headers={"origin": "http://localhost:3000"}, timeout=PATIENCE
        )
        assert own.status_code == 200


def test_a_path_that_is_too_long_is_no_adapter(make_gateway, tmp_path):
    gateway = make_gateway()
    with serving(gateway, adapters=Adapters(gateway, tmp_path)) as url:
        for path in ("x" * 300, "y" * 4000, "a\0b"):
            body = {"lora_name": "tone", "lora_path": path}
            r = httpx.post(f"{url}/v1/load_lora_adapter", json=body, timeout=PATIENCE)
            assert r.status_code == 404 and "no delta at this path" in r.json()["error"]["message"]


def test_a_folder_that_may_not_be_entered_is_no_adapter(make_gateway, tmp_path, monkeypatch):
    def refuse(path):  # root may enter every folder
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("llmkit.serve.adapters.kind_of", refuse)
    gateway = make_gateway()
    with serving(gateway, adapters=Adapters(gateway, tmp_path)) as url:
        body = {"lora_name": "tone", "lora_path": str(tmp_path)}
        assert httpx.post(f"{url}/v1/load_lora_adapter", json=body, timeout=PATIENCE).status_code == 404


def test_the_first_key_closes_the_door_for_good(set_up):
    setup = set_up()
    assert "keys off until there is one" in setup.about
    with serving(setup.gateway) as url:
        assert post(url).status_code == 200
        text, key = Keys(".llmkit/serve.db").create("team")
        assert post(url).status_code == 401, "at the next request, without a restart"
        ask = {"authorization": f"Bearer {text}"}
        assert httpx.post(f"{url}/v1/completions", json=ASK, headers=ask, timeout=PATIENCE).status_code == 200
        Keys(".llmkit/serve.db").revoke(key.prefix)
        assert post(url).status_code == 401
    again = set_up()
    assert "keys required" in again.about
    with serving(again.gateway) as url:
        assert post(url).status_code == 401, "a revoked key is no open door after a restart either"


def test_a_429_says_what_is_left(make_gateway, tmp_path):
    keys = Keys(tmp_path / "serve.db")
    text, _ = keys.create("team")
    keys.allow("team", rpm=1, tpm=1000)
    with serving(make_gateway(keys=keys, limits=Limits(tmp_path / "serve.db"))) as url:
        ask = {"authorization": f"Bearer {text}"}
        got = [httpx.post(f"{url}/v1/completions", json=ASK, headers=ask, timeout=PATIENCE) for _ in range(2)]
    h = got[1].headers
    assert [r.status_code for r in got] == [200, 429] and int(h["retry-after"]) >= 1
    assert (h["x-ratelimit-limit-requests"], h["x-ratelimit-remaining-requests"]) == ("1", "0")
    assert h["x-ratelimit-limit-tokens"] == "1000" and h["x-ratelimit-reset-tokens"]


@pytest.mark.parametrize("more", [{"echo": True}, {"prompt": ["count", "card number"]}, {"n": 2}, {}])
def test_offsets_in_a_stream_are_those_of_the_whole_answer(dummy, more):
    ask = {"logprobs": 1, "max_tokens": 20, **more}
    want = {c["index"]: c for c in post(dummy[1], **ask).json()["choices"]}
    got = {i: {"text": "", "offsets": [], "tokens": []} for i in want}
    for line in post(dummy[1], stream=True, **ask).text.splitlines():
        for c in json.loads(line[6:])["choices"] if line.startswith("data: {") else ():
            mine, lp = got[c["index"]], c["logprobs"]
            assert lp is None or lp["text_offset"][0] == len(mine["text"]), "a token comes with its text"
            mine["text"] += c["text"]
            mine["offsets"] += lp["text_offset"] if lp else []
            mine["tokens"] += lp["tokens"] if lp else []
    for i, c in want.items():
        lp = c["logprobs"]
        assert got[i] == {"text": c["text"], "offsets": lp["text_offset"], "tokens": lp["tokens"]}


def test_what_changes_no_answer_is_accepted(dummy):
    more = {"metadata": {"group": "a", "ticket": "7"}, "stream": True, "stream_options": {"include_obfuscation": False}}
    assert post(dummy[1], **more).status_code == 200
    assert post(dummy[1], metadata={"group": 3}).status_code == 400
    assert post(dummy[1], stream_options={"include_usages": True}).status_code == 400


def test_tokens_of_a_model_that_is_not_here(dummy):
    for path, body in (("tokenize", {"prompt": "a"}), ("detokenize", {"tokens": [97]})):
        ask = lambda **more: httpx.post(f"{dummy[1]}/{path}", json={**body, **more}, timeout=PATIENCE)  # noqa: B023
        assert ask().status_code == ask(model="bank").status_code == 200
        r = ask(model="another")
        assert r.status_code == 404 and r.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("never", [float("nan"), float("inf"), 1e300])
def test_a_key_without_an_end_is_never_made_by_accident(tmp_path, monkeypatch, capsys, never):
    monkeypatch.chdir(tmp_path)
    Path("settings.ini").write_text("[DEFAULT]\n")
    keys = Keys(".llmkit/serve.db")
    _, old = keys.create("team", expires=86400.0)
    for refused in (
        lambda: keys.rotate(old.prefix, never),
        lambda: keys.rotate(old.prefix, -1.0),
        lambda: keys.create("team", expires=never),
    ):
        with pytest.raises(KitError, match="below a hundred years"):
            refused()
    assert keys.find() == [old], "nothing has changed"
    with keys.store.write() as db:  # as an older version made it
        db.execute("UPDATE keys SET expires = 9e999")
    keys_list()
    assert "| 9999-12-31 |" in capsys.readouterr().out


def test_what_looks_like_the_end_of_a_line_ends_none(make_gateway):
    answer = "one\u2028two\x85three\u2029"
    with serving(make_gateway(DummyEngine(replies={"count": answer}))) as url:
        ask = {**ASK, "max_tokens": 60, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=ask, timeout=PATIENCE) as r:
            lines = [line[6:] for line in r.iter_lines() if line and line != "data: [DONE]"]
    assert "".join(json.loads(x)["choices"][0]["text"] for x in lines) == answer


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(set_up, monkeypatch):
    monkeypatch.setattr(server, "open_backend", lambda *a, **how: pytest.fail("it was loaded"))
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(KitError, match="cannot listen.*another --host"),
    ):
        set_up(port=taken.getsockname()[1])
    Keys(".llmkit/serve.db").create("team")  # others may try to reach it
    with pytest.raises(KitError, match="cannot listen.*no.such.host.invalid:0"):
        set_up(host="no.such.host.invalid")
