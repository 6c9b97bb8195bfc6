"Our server behind our server: an upstream answers as an engine does, and its failures are told as what they are."

import asyncio

import httpx
import openai
import pytest
from serve_server import PATIENCE, REPLIES, Gated, serving, until

from llmkit.core.errors import KitError
from llmkit.serve.gateway import Gateway
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
