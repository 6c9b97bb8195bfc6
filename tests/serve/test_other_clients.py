"What clients and tools other than OpenAI's Python client send by default, and what they expect of an answer."

import asyncio
import gzip
import json
import threading
import time

import httpx
import openai
import pytest
from serve_server import PATIENCE, serving, until

from llmkit.runtime.dummy import DummyEngine
from llmkit.serve.app import make_app
from llmkit.serve.http import listening
from llmkit.serve.keys import Keys
from llmkit.serve.limits import Limits

CARD = [{"role": "user", "content": "Where is my card?"}]
ASK = {"model": "bank", "prompt": "card", "max_tokens": 12, "temperature": 0}


def chat(url, **more):
    return httpx.post(f"{url}/v1/chat/completions", json={"model": "bank", "messages": CARD, **more}, timeout=PATIENCE)


def chunks(url, path="chat/completions", **more):
    asked = {"model": "bank", "stream": True, "temperature": 0, **more}
    text = httpx.post(f"{url}/v1/{path}", json=asked, timeout=PATIENCE).text
    return [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]


def test_clients_that_add_up_chunks_count_each_log_probability_once(dummy):
    c = openai.OpenAI(base_url=f"{dummy[1]}/v1", api_key="none", max_retries=0)
    ask = {"model": "bank", "messages": CARD, "temperature": 0, "logprobs": True, "n": 2}
    with c.chat.completions.stream(**ask) as s:
        added = s.get_final_completion()
    for choice in added.choices:  # the official client's own sum
        assert "".join(t.token for t in choice.logprobs.content[:-1]) == "Your card is on its way."
    for i in range(2):
        first, *rest = [x["choices"][0] for x in chunks(dummy[1], **{k: v for k, v in ask.items() if k != "model"})
                        if x["choices"][0]["index"] == i]  # fmt: skip
        assert first == {"index": i, "finish_reason": None, "logprobs": None,
                         "delta": {"role": "assistant", "content": "", "refusal": None}}  # fmt: skip
        assert not any("role" in x["delta"] for x in rest)
        assert [x["finish_reason"] for x in rest].count("stop") == 1 and rest[-1]["finish_reason"] == "stop"


def test_null_is_absent_whatever_it_is_called(dummy):
    params = openai.types.chat.completion_create_params.CompletionCreateParamsBase.__annotations__
    assert (
        chat(dummy[1], **{k: None for k in params if k not in ("model", "messages")}, tomorrow=None).status_code == 200
    )
    said = [{"role": "assistant", "content": "ok", "reasoning_content": None, "tool_calls": None}, *CARD]
    assert chat(dummy[1], messages=said).status_code == 200
    assert chat(dummy[1], prompt_cache_retention="24h", prompt_cache_options={"mode": "explicit"}).status_code == 200


@pytest.mark.parametrize(
    "more, param, word",
    [
        ({"function_call": "auto"}, "function_call", "is not supported"),
        ({"web_search_options": {}}, "web_search_options", "is not supported"),
        ({"messages": [{"role": "tool", "tool_call_id": "1", "content": "x"}]}, "messages[0].role", "one of"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages[0].content[0].type", "one of"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "is required"),
    ],
)  # fmt: skip
def test_a_refusal_names_what_is_wrong(dummy, more, param, word):
    e = chat(dummy[1], **more).json()["error"]
    assert e["param"] == param and word in e["message"], e


def test_usage_in_each_chunk_for_load_generators(dummy):
    "guidellm asks for it in every request."
    ask = {"prompt": "card", "max_tokens": 5, "ignore_eos": True, "stop": None}
    got = chunks(dummy[1], "completions", **ask, stream_options={"include_usage": True, "continuous_usage_stats": True})
    n = got[-1]["usage"]["prompt_tokens"]
    assert [x["usage"]["completion_tokens"] for x in got] == [1, 2, 3, 4, 5, 5] and got[-1]["choices"] == []
    assert {x["usage"]["prompt_tokens"] for x in got} == {n} and n > 0
    assert all(
        x["usage"] is None for x in chunks(dummy[1], "completions", **ask, stream_options={"include_usage": True})[:-1]
    )


def test_a_prompt_that_is_too_long_is_told_in_the_words_that_clients_look_for(dummy):
    e = chat(dummy[1], messages=[{"role": "user", "content": "x" * 3000}]).json()["error"]
    assert "this model's maximum context length is" in e["message"] and e["code"] == "context_length_exceeded"


def test_health_checks_by_head(make_gateway):
    import uvicorn

    server = uvicorn.Server(listening(make_app(make_gateway(), check=False), "127.0.0.1", 0, lifespan="on"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    until(lambda: server.started, "the start")
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=PATIENCE) as c:  # one connection: nothing may be left in it
            for path, status in (
                ("/health", 200),
                ("/ready", 200),
                ("/v1/models", 200),
                ("/v1/completions", 405),
                ("/no", 404),
            ):
                head, got = c.head(path), c.get(path)
                assert (head.status_code, got.status_code) == (status, status) and head.content == b""
                assert head.headers["content-length"] == got.headers["content-length"]
    finally:
        server.should_exit = True
        thread.join(PATIENCE)


def test_a_packed_body_is_refused_as_that(dummy):
    head = {"content-encoding": "gzip", "content-type": "application/json"}
    body = gzip.compress(json.dumps(ASK).encode())
    r = httpx.post(f"{dummy[1]}/v1/completions", content=body, headers=head, timeout=PATIENCE)
    assert r.status_code == 415 and "gzip" in r.json()["error"]["message"]


def test_whoever_is_refused_can_say_which_request_it_was(make_gateway, tmp_path):
    gateway = make_gateway(limits=Limits(tmp_path / "serve.db"))
    with serving(gateway) as url:
        refused = httpx.post(f"{url}/v1/completions", json={**ASK, "model": "gpt-9"}, timeout=PATIENCE)

        def full(*_):
            raise OSError(28, "No space left on device")

        gateway.limits.reserve = full
        failed = httpx.post(f"{url}/v1/completions", json=ASK, timeout=PATIENCE)
    assert (refused.status_code, failed.status_code) == (404, 500)
    ids = [r.headers["x-request-id"] for r in (refused, failed)]
    assert [e["id"] for e in gateway.events.all("request")] == ids


def test_a_full_disk_is_told_in_the_log(make_gateway, caplog):
    gateway = make_gateway()

    def full(*_):
        raise OSError(28, "No space left on device")

    gateway.keys = Keys(gateway.events.store.path.parent / "serve.db")
    gateway.keys.check = full
    with serving(gateway) as url:
        assert httpx.post(f"{url}/v1/completions", json=ASK, timeout=PATIENCE).status_code == 500
    assert "No space left on device" in caplog.text


def test_tokenizing_and_feedback_are_requests_of_the_account(make_gateway, tmp_path):
    keys = Keys(tmp_path / "serve.db")
    text, _ = keys.create("team")
    keys.allow("team", rpm=4)
    gateway, head = make_gateway(keys=keys, limits=Limits(tmp_path / "serve.db")), {"authorization": f"Bearer {text}"}
    with serving(gateway) as url:
        post = lambda path, body: httpx.post(f"{url}{path}", json=body, headers=head, timeout=PATIENCE)
        id = post("/v1/completions", ASK).json()["id"]
        got = [
            post("/tokenize", {"prompt": "a"}),
            post("/detokenize", {"tokens": [97]}),
            post("/v1/feedback", {"id": id, "rating": 1}),
        ]
        assert [r.status_code for r in got] == [200, 200, 200]
        over = post("/tokenize", {"prompt": "a"})
        assert over.status_code == 429 and int(over.headers["retry-after"]) >= 1
        metrics = gateway.metrics.text().decode()
    assert 'llmkit_ratelimit_rejections_total{kind="requests"} 1.0' in metrics


def test_a_sampler_that_reads_for_long_holds_up_nobody(make_gateway):
    class Slow:
        def look(self, id, call, answer, write):
            time.sleep(1.0)
            return {}

    gateway = make_gateway(DummyEngine(replies={"x": "yes"}, context_length=100_000), sampler=Slow())
    done, worst = threading.Event(), 0.0
    with serving(gateway) as url:

        def ask():
            asked = {**ASK, "prompt": "x" * 30_000, "max_tokens": 2}
            assert httpx.post(f"{url}/v1/completions", json=asked, timeout=PATIENCE).status_code == 200
            done.set()

        thread = threading.Thread(target=ask)
        thread.start()
        with httpx.Client(timeout=PATIENCE) as c:
            while not done.is_set():
                start = time.monotonic()
                c.get(f"{url}/health")
                worst = max(worst, time.monotonic() - start)
        thread.join()
    assert worst < 0.9 and [e["status"] for e in gateway.events.all("request")] == ["ok"]
