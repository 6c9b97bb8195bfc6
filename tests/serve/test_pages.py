"A web page of another origin asks a real server, first by preflight and then in earnest, as a browser does."

from pathlib import Path

import httpx
import pytest
from serve_server import PATIENCE, serving

import llmkit.serve.server as server
from llmkit.runtime.dummy import DummyEngine
from llmkit.serve.adapters import Adapters
from llmkit.serve.app import make_app
from llmkit.serve.backend import EngineBackend
from llmkit.serve.keys import Keys
from llmkit.serve.limits import Limits
from llmkit.serve.pages import CLOSED, EXPOSED

SITE = "https://app.example"
ASK = {"model": "bank", "messages": [{"role": "user", "content": "card"}], "temperature": 0}
ALLOWED = "access-control-allow-origin"


def preflight(
    url, site=SITE, path="/v1/chat/completions", method="POST", wants="authorization,content-type,x-stainless-os"
):
    asks = {"access-control-request-method": method, "access-control-request-headers": wants}
    return httpx.options(f"{url}{path}", headers={"origin": site, **asks}, timeout=PATIENCE)


def chat(url, site=SITE, **headers):
    return httpx.post(f"{url}/v1/chat/completions", json=ASK, headers={"origin": site, **headers}, timeout=PATIENCE)


def test_nobody_is_allowed_who_is_not_named(dummy):
    got = preflight(dummy[1])
    assert got.status_code == 405 and ALLOWED not in got.headers
    assert chat(dummy[1]).status_code == 403


@pytest.mark.parametrize("origins", [(SITE, "http://10.0.0.5:3000"), ("*",)])
def test_a_page_with_a_key(make_gateway, tmp_path, origins):
    keys = Keys(tmp_path / "serve.db")
    key, _ = keys.create("team")
    keys.allow("team", rpm=2)
    with serving(make_gateway(keys=keys, limits=Limits(tmp_path / "serve.db")), origins=origins) as url:
        said = preflight(url)
        assert said.status_code == 200 and said.headers[ALLOWED] in (SITE, "*")
        assert said.headers["access-control-allow-headers"] == "authorization,content-type,x-stainless-os"
        codes = []
        for _ in range(3):
            got = chat(url, authorization=f"Bearer {key}")
            shown = got.headers["access-control-expose-headers"].split(", ")
            told = {h for h in got.headers if h.startswith(("x-ratelimit", "retry-after", "x-request"))}
            assert got.headers[ALLOWED] in (SITE, "*") and told and told <= set(shown) == set(EXPOSED)
            assert "access-control-allow-credentials" not in {*got.headers, *said.headers}
            codes.append(got.status_code)
        assert codes == [200, 200, 429]
        lost = chat(url, authorization="Bearer no")
        assert lost.status_code == 401 and ALLOWED in lost.headers, "a page can read why it was refused"
        foreign = preflight(url, "https://evil.example")
        assert (ALLOWED in foreign.headers) == (origins == ("*",))


def test_without_keys_a_named_page_asks_and_one_from_anywhere_does_not(make_gateway):
    for origins, code in (((SITE,), 200), (("*",), 403)):
        with serving(make_gateway(), origins=origins) as url:
            assert chat(url).status_code == code and chat(url, "https://evil.example").status_code == 403
            with httpx.stream("POST", f"{url}/v1/chat/completions", json={**ASK, "stream": True},
                              headers={"origin": "http://localhost:3000"}, timeout=PATIENCE) as got:  # fmt: skip
                assert got.read().endswith(b"data: [DONE]\n\n")


def test_no_page_is_an_administrator(make_gateway, tmp_path):
    gateway = make_gateway()
    with serving(gateway, origins=(SITE,), adapters=Adapters(gateway, tmp_path)) as url:
        for path in CLOSED:
            assert ALLOWED not in preflight(url, path=path).headers
        load = {"lora_name": "tone", "lora_path": "x"}
        got = httpx.post(f"{url}/v1/load_lora_adapter", json=load, headers={"origin": SITE}, timeout=PATIENCE)
        assert got.status_code == 403 and got.json()["error"]["code"] == "foreign_origin" and ALLOWED not in got.headers
    paths = make_app(gateway, check=False).openapi()["paths"]
    assert set(CLOSED) == {p for p in paths if "lora" in p or "metrics" in p}, "each is a path that is there"


def test_the_settings_name_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("settings.ini").write_text(f"[DEFAULT]\norigins = {SITE}\n")
    monkeypatch.setattr(server, "resolve", lambda *a: server.Target("bank", "here"))
    monkeypatch.setattr(server, "open_backend", lambda found, said=None, **how: EngineBackend(DummyEngine(), **how))
    got, made = {}, server.set_up(port=0)
    monkeypatch.setattr(server, "run", lambda *a, **more: got.update(more) or 0)
    assert server.run_setup(made) == 0 and got["origins"] == (SITE,)
    monkeypatch.setenv("LLMKIT_ORIGINS", "*")
    assert server.set_up(port=0).origins == ("*",)
