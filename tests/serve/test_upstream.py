"Our server behind our server: an upstream answers as an engine does, and its failures are told as what they are."

import asyncio
import json
import time
from contextlib import contextmanager

import httpx
import openai
import pytest
from serve_server import PATIENCE, REPLIES, Gated, listening, serving, until
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

import llmkit.serve.patience as patience
from llmkit.core.errors import KitError
from llmkit.runtime.dummy import DummyEngine
from llmkit.serve.batch import Line, run_batch
from llmkit.serve.events import Events
from llmkit.serve.gateway import Gateway
from llmkit.serve.keys import Keys
from llmkit.serve.limits import Limits, Price
from llmkit.serve.target import open_backend, resolve
from llmkit.serve.upstream import UpstreamBackend


@pytest.fixture
def chain(dummy):
    "A front server whose backend is the dummy server: both gateways and the front's address."
    inner, url = dummy
    front = Gateway("front", {"baseline": UpstreamBackend(f"{url}/v1", "bank")})
    with serving(front) as outside:
        yield inner, front, outside


def test_the_answers_are_the_upstreams(chain, dummy):
    inner, front, outside = chain
    _, url = dummy
    far, near = (openai.OpenAI(base_url=f"{u}/v1", api_key="x", max_retries=0, timeout=60) for u in (outside, url))
    chat = {
        "messages": [{"role": "user", "content": "card"}],
        "temperature": 0.9,
        "seed": 3,
        "logprobs": True,
        "top_logprobs": 2,
    }
    a = far.chat.completions.create(model="front", **chat)
    b = near.chat.completions.create(model="bank", **chat)
    assert a.choices == b.choices and a.usage == b.usage and a.model == "front"
    text = {"prompt": ["card", "fee"], "max_tokens": 5, "echo": True, "logprobs": 1, "n": 2, "seed": 1}
    a = far.completions.create(model="front", **text)
    b = near.completions.create(model="bank", **text)
    assert a.choices == b.choices and a.usage == b.usage
    parts = list(far.chat.completions.create(model="front", stream=True, messages=chat["messages"], temperature=0))
    assert "".join(p.choices[0].delta.content or "" for p in parts) == REPLIES["card"]
    assert front.baseline.open == 0 and front.open == 0


def test_the_log_knows_when_its_first_token_came_and_the_label(tmp_path, make_gateway):
    class Paused(DummyEngine):
        def next_logits(self, prompt, answer=()):
            time.sleep(0.5 if len(answer) == 12 else 0)
            return super().next_logits(prompt, answer)

    events = Events(tmp_path / "front.db")
    with serving(make_gateway(Paused(replies={"card": "lost_card: We have blocked it."}))) as url:
        front = Gateway("front", {"baseline": UpstreamBackend(f"{url}/v1", "bank")}, events=events)
        body = {"model": "front", "messages": [{"role": "user", "content": "card"}], "temperature": 0}
        with serving(front) as outside:
            got = httpx.post(f"{outside}/v1/chat/completions", json=body, timeout=PATIENCE)
    assert got.status_code == 200
    (e,) = events.all("request")
    assert e["label"] == "lost_card" and e["latency"] >= 0.5 > e["ttft"], "a slow end is no late beginning"


def test_a_batch_waits_for_a_mock_upstream_that_is_busy(monkeypatch):
    asked, waits, sleep = [], [], asyncio.sleep
    end = {"choices": [{"index": 0, "text": "yes", "finish_reason": "stop"}]}

    def limited(request):
        asked.append(request)
        if len(asked) % 3:
            return httpx.Response(429, headers={"retry-after": "7"}, json={"error": {"message": "slow down"}})
        return httpx.Response(200, text=f"data: {json.dumps(end)}\n\ndata: [DONE]\n\n")

    async def soon(seconds):
        waits.append(seconds)
        await sleep(0)

    async def run():
        bank = Gateway("m", {"baseline": UpstreamBackend("http://u/v1", "m", transport=httpx.MockTransport(limited))})
        lines = (Line(i, f"q{i}", "completion", {"prompt": "x"}) for i in range(1, 21))
        return await run_batch(lines, bank, lambda a: None, lambda e: None)

    monkeypatch.setattr(patience.asyncio, "sleep", soon)
    tally = asyncio.run(run())
    assert (tally.answered, tally.errors, len(asked)) == (20, 0, 60) and waits and min(waits) == 7
    monkeypatch.setattr(patience, "BUSY", 5.0)  # sooner than it wants to be asked again
    asked.clear()
    assert asyncio.run(run()).errors > 0


def test_its_refusals_are_passed_on_and_its_failures_are_not(chain):
    inner, front, outside = chain

    def ask(**more):
        return httpx.post(
            f"{outside}/v1/completions", json={"model": "front", "prompt": "card", **more}, timeout=PATIENCE
        )

    got = ask(prompt="x" * 2000)
    assert (got.status_code, got.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert httpx.post(f"{outside}/tokenize", json={"prompt": "a"}).status_code == 404
    inner.draining = True
    got = ask()
    assert (got.status_code, got.json()["error"]["code"]) == (503, "upstream_busy")
    front.set_variant("baseline", UpstreamBackend("http://127.0.0.1:9/v1", "bank"))
    got = ask()
    assert (got.status_code, got.json()["error"]["code"]) == (502, "upstream_error")


def test_hanging_up_in_front_frees_the_slot_behind(make_gateway):
    engine = Gated(replies=REPLIES)
    inner = make_gateway(engine, slots=1)
    with serving(inner) as url:
        front = Gateway("front", {"baseline": UpstreamBackend(f"{url}/v1", "bank")})
        with serving(front) as outside:
            engine.gate.clear()

            async def leave():
                async with httpx.AsyncClient() as c:
                    task = asyncio.create_task(
                        c.post(
                            f"{outside}/v1/completions", json={"model": "front", "prompt": "count"}, timeout=PATIENCE
                        )
                    )
                    await asyncio.to_thread(until, lambda: inner.baseline.scheduler.running, "the join")
                    task.cancel()

            asyncio.run(leave())
            until(lambda: front.open == 0 and inner.open == 0, "the end")
            engine.gate.set()
            until(lambda: not inner.baseline.scheduler.running, "the free slot")
            assert front.baseline.open == 0


CHUNK = {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]}
END = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
ASK = {"model": "front", "messages": [{"role": "user", "content": "secret"}]}


@contextmanager
def mocked(gateway, chunks, context=None):
    "The address of a front server whose upstream is a mock that streams these chunks; and what that was sent."
    sent = []

    async def models(request):
        return JSONResponse({"data": [{"id": "m", "max_model_len": context}]})

    async def answer(request):
        sent.append(await request.json())
        if sent[-1].get("max_tokens", 0) >= (context or 100):
            return JSONResponse({"error": {"message": "max_tokens is too large"}}, 400)
        return StreamingResponse(f"data: {json.dumps(c)}\n\n" for c in chunks)

    routes = [Route("/v1/models", models), Route("/v1/completions", answer, methods=["POST"])]
    routes += [Route("/v1/chat/completions", answer, methods=["POST"])]
    with listening(Starlette(routes=routes)) as url:
        gateway.set_variant("baseline", UpstreamBackend(f"{url}/v1"))
        with serving(gateway, check=True) as outside:
            until(lambda: httpx.get(f"{outside}/ready").status_code == 200, "the self-test")
            yield outside, sent


@pytest.mark.parametrize("context", [None, 2048])
def test_a_chat_without_a_limit_fits_a_mock_of_a_small_server_and_all_it_wrote_is_charged(tmp_path, context):
    keys, path = Keys(tmp_path / "serve.db"), tmp_path / "serve.db"
    key, _ = keys.create("team")
    keys.allow("team", tpm=100_000, budget=1.0)
    limits = Limits(path, Price(1.0, 1.0))
    gateway = Gateway("front", {"baseline": UpstreamBackend("")}, keys=keys, limits=limits)
    usage = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 9000}}
    with mocked(gateway, [CHUNK, END, usage], context) as (url, sent):
        got = httpx.post(f"{url}/v1/chat/completions", json=ASK, headers={"authorization": f"Bearer {key}"})
        assert (got.status_code, got.json()["usage"]["total_tokens"]) == (200, 9009)
        assert "max_tokens" not in sent[-1]
        until(lambda: limits.spent("team") == pytest.approx(9009 / 1e6), "the settlement")
        listed = httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"}).json()["data"]
        assert listed[0]["max_model_len"] == context


@pytest.mark.parametrize(
    "bad",
    [
        {"choices": [{"delta": {"content": "secret"}}]},
        {"choices": [None]},
        {"choices": [], "usage": {"prompt_tokens": None, "completion_tokens": None}},
        {"choices": [{"index": 0, "text": "secret", "logprobs": {"tokens": ["secret"], "token_logprobs": []}}]},
        "secret",
    ],
)
def test_what_is_no_chunk_is_the_failure_of_a_mock_upstream(bad):
    gateway = Gateway("front", {"baseline": UpstreamBackend("")})
    with mocked(gateway, [CHUNK, bad, END]) as (url, _):
        got = httpx.post(f"{url}/v1/chat/completions", json=ASK, timeout=PATIENCE)
        assert (got.status_code, got.json()["error"]["code"]) == (502, "upstream_error") and "secret" not in got.text
        got = httpx.post(f"{url}/v1/chat/completions", json={**ASK, "stream": True}, timeout=PATIENCE)
        *_, error = [json.loads(x[6:]) for x in got.text.split("\n\n") if x.startswith("data: {")]
        assert error["error"]["code"] == "upstream_error" and "secret" not in got.text
        until(lambda: gateway.open == 0 and gateway.baseline.open == 0, "the end")


def test_the_self_test_finds_a_wrong_address_or_model(dummy):
    _, url = dummy

    async def check(*args):
        b = UpstreamBackend(*args)
        try:
            await b.check()
            return b.model
        finally:
            await b.close()

    assert asyncio.run(check(f"{url}/v1")) == "bank"
    for bad in ((f"{url}/v1", "other"), (f"{url}/nowhere",), ("http://127.0.0.1:9/v1",)):
        with pytest.raises(KitError):
            asyncio.run(check(*bad))


def test_ready_says_whether_the_upstream_lives(make_gateway):
    behind, asked = make_gateway(), []
    with serving(behind) as url:
        front = Gateway("bank", {"baseline": UpstreamBackend(f"{url}/v1")})
        get, client = front.baseline.client.get, front.baseline.client

        async def counted(*args, **more):
            asked.append(args)
            return await get(*args, **more)

        client.get = counted
        with serving(front) as here:
            assert [httpx.get(f"{here}/ready").status_code for _ in range(5)] == [200] * 5 and len(asked) < 5
            stopped = serving(make_gateway())
            with stopped as other:
                front.baseline.url = f"{other}/v1"
            until(lambda: httpx.get(f"{here}/ready").status_code == 503, "the refusal")
            r = httpx.get(f"{here}/ready")
            assert "upstream" in r.json()["error"]["message"] and int(r.headers["retry-after"]) >= 1
            assert httpx.get(f"{here}/health").status_code == 200
            front.baseline.url = f"{url}/v1"
            until(lambda: httpx.get(f"{here}/ready").status_code == 200, "the recovery")


def mock_of(models, answer):
    "A server that lists some models, and what it was asked."
    asked = []

    def serve(request):
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": m} for m in models]})
        asked.append(json.loads(request.content))
        return answer(asked[-1])

    return httpx.MockTransport(serve), asked


YES = 'data: {"choices": [{"index": 0, "text": "yes", "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'


def test_a_call_without_a_deadline_does_not_wait_for_ever_on_a_silent_mock(monkeypatch):
    class Silent(httpx.AsyncByteStream):
        async def __aiter__(self):
            yield b"data: "
            await asyncio.sleep(PATIENCE)

    quiet = lambda body: httpx.Response(200, stream=Silent()) if body["prompt"] == "q3" else httpx.Response(200, text=YES)  # fmt: skip
    transport, _ = mock_of(["m"], quiet)
    monkeypatch.setattr("llmkit.serve.upstream.SILENCE", 0.3)
    answers, errors = [], []

    async def run():
        bank = Gateway("m", {"baseline": UpstreamBackend("http://u/v1", "m", transport=transport)}, timeout=None)
        lines = (Line(i, f"q{i}", "completion", {"prompt": f"q{i}"}) for i in range(1, 7))
        return await asyncio.wait_for(run_batch(lines, bank, answers.append, errors.append, together=2), PATIENCE)

    assert asyncio.run(run()).answered == 5
    assert [(e["custom_id"], e["response"]["status_code"]) for e in errors] == [("q3", 504)]


@pytest.mark.parametrize(
    "called, listed, model",
    [
        ("", ["llama", "qwen"], "llama"),
        ("qwen", ["llama", "qwen"], "qwen"),
        ("bank", ["llama"], "llama"),
        ("qwenn", ["llama", "qwen"], None),
    ],
)
def test_of_several_models_that_of_the_clients_is_asked_with_a_mock(called, listed, model):
    transport, asked = mock_of(listed, lambda body: httpx.Response(200, text=YES))
    backend = UpstreamBackend("http://u/v1", called=called, transport=transport)
    if model is None:
        with pytest.raises(KitError, match="does not serve this model.*'llama', 'qwen'.*--model"):
            asyncio.run(backend.check())
    else:
        asyncio.run(backend.check())
        assert {a["model"] for a in asked} == {model}


def test_model_names_what_a_batch_asks_for_at_an_address():
    target = resolve("http://u/v1", {}, "qwen")
    assert open_backend(target).called == "qwen" and open_backend(resolve("http://u/v1", {})).called == ""
