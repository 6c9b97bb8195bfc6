"The official client against a real server: every feature that its users would try first."

import asyncio

import openai
import pytest
from serve_server import serving

from llmkit.runtime.dummy import DummyEngine
from llmkit.serve.call import Asked
from llmkit.serve.keys import Keys
from llmkit.serve.limits import Limits, Price


def client(url, key="none", kind=openai.OpenAI):
    return kind(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


CARD = [{"role": "user", "content": "Where is my card?"}]


def test_chat(dummy):
    gateway, url = dummy
    got = client(url).chat.completions.create(model="bank", messages=CARD, temperature=0)
    assert got.choices[0].message.content == "Your card is on its way."
    assert got.choices[0].finish_reason == "stop" and got.object == "chat.completion"
    n = len(gateway.baseline.tokenizer.chat(CARD))
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (n, 25, n + 25)
    assert got.system_fingerprint.startswith("llmkit-") and got._request_id == got.id


def test_models(dummy):
    _, url = dummy
    assert [m.id for m in client(url).models.list()] == ["bank"]
    assert client(url).models.retrieve("bank").owned_by == "llmkit"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client(url).models.retrieve("gpt-4")


def test_stream_with_usage_is_the_same_answer(dummy):
    _, url = dummy
    ask = {"model": "bank", "messages": CARD, "temperature": 0}
    whole = client(url).chat.completions.create(**ask)
    chunks = list(client(url).chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in client(url).chat.completions.create(**ask, stream=True))


def test_async_client_many_at_a_time(dummy):
    gateway, url = dummy

    async def main():
        async with client(url, kind=openai.AsyncOpenAI) as c:
            asks = [c.completions.create(model="bank", prompt=f"{w} {i}", max_tokens=60, temperature=0)
                    for i in range(15) for w in ("card", "fee")]  # fmt: skip
            done = await asyncio.gather(*asks)
            stream = await c.chat.completions.create(model="bank", messages=CARD, temperature=0, stream=True)
            return [d.choices[0].text for d in done], [x.choices[0].delta.content async for x in stream]

    texts, parts = asyncio.run(main())
    assert texts == ["Your card is on its way.", "That was the monthly fee."] * 15
    assert "".join(p or "" for p in parts) == texts[0]
    assert len(list(gateway.events.all("request"))) == 31


def test_seed_temperature_and_n(dummy):
    gateway, url = dummy
    ask = {"model": "bank", "prompt": [1, 2, 3], "max_tokens": 12, "temperature": 1.2, "logprobs": 0}
    run = lambda **more: client(url).completions.create(**ask, **more).choices
    a, b, three = run(seed=7), run(seed=7), run(seed=7, n=3)
    assert a[0].logprobs.token_logprobs == b[0].logprobs.token_logprobs == three[0].logprobs.token_logprobs
    assert len({str(c.logprobs.token_logprobs) for c in three}) == 3 and [c.index for c in three] == [0, 1, 2]
    assert run(seed=8)[0].logprobs.token_logprobs != a[0].logprobs.token_logprobs
    assert len({str(run()[0].logprobs.token_logprobs) for _ in range(4)}) > 1, "without a seed it is random"
    alone = DummyEngine().generate([[1, 2, 3]], Asked(max_tokens=12, temperature=1.2, seed=7))[0]
    assert a[0].logprobs.token_logprobs == pytest.approx(alone.logprobs)


def test_stop_and_max_tokens(dummy):
    _, url = dummy
    run = lambda **more: client(url).completions.create(model="bank", prompt="count", temperature=0, **more).choices[0]
    c = run(max_tokens=60, stop=[" five", "nothing"])
    assert (c.text, c.finish_reason) == ("one two three four", "stop")
    c = run(max_tokens=7)
    assert (c.text, c.finish_reason) == ("one two", "length")
    assert len(run().text) == 16, "OpenAI's default for completions"
    text = "".join(
        c.choices[0].text
        for c in client(url).completions.create(
            model="bank", prompt="count", temperature=0, max_tokens=60, stop=" five", stream=True
        )
    )
    assert text == "one two three four"


def test_logprobs_of_chats_and_completions(dummy):
    _, url = dummy
    got = client(url).chat.completions.create(model="bank", messages=CARD, temperature=0, logprobs=True, top_logprobs=3)
    content = got.choices[0].logprobs.content
    assert "".join(t.token for t in content[:-1]) == got.choices[0].message.content
    for t in content:
        assert len(t.top_logprobs) == 3 and t.top_logprobs[0].logprob == pytest.approx(t.logprob, abs=1e-5)
        assert [x.logprob for x in t.top_logprobs] == sorted((x.logprob for x in t.top_logprobs), reverse=True)
    c = client(url).completions.create(model="bank", prompt="card", logprobs=2, max_tokens=3, temperature=0).choices[0]
    assert c.logprobs.tokens == ["Y", "o", "u"] and c.logprobs.text_offset == [0, 1, 2]
    assert all(max(t.values()) == t[tok] for t, tok in zip(c.logprobs.top_logprobs, c.logprobs.tokens, strict=True))
    c = client(url).completions.create(model="bank", prompt="card", logprobs=0, max_tokens=3, temperature=0).choices[0]
    assert c.logprobs.top_logprobs == [
        {t: p} for t, p in zip(c.logprobs.tokens, c.logprobs.token_logprobs, strict=True)
    ], "the token itself is always told"
    plain = client(url).chat.completions.create(model="bank", messages=CARD, temperature=0)
    assert plain.choices[0].logprobs is None


def test_echo_and_lists_of_prompts(dummy):
    gateway, url = dummy
    ask = {"model": "bank", "max_tokens": 2, "temperature": 0, "echo": True, "logprobs": 1}
    got = client(url).completions.create(prompt=["card", "fee"], **ask).choices
    assert [c.text for c in got] == ["cardYo", "feeTh"] and [c.index for c in got] == [0, 1]
    ids = client(url).completions.create(prompt=[list(b"card"), list(b"fee")], **ask).choices
    assert [c.logprobs for c in ids] == [c.logprobs for c in got]
    want = gateway.baseline.engine.score([[99]], [list(b"ard")])[0]
    assert got[0].logprobs.token_logprobs[0] is None
    assert got[0].logprobs.token_logprobs[1:4] == pytest.approx(list(map(float, want)))
    parts = list(client(url).completions.create(prompt="card", stream=True, **ask))
    assert "".join(p.choices[0].text for p in parts) == "cardYo"
    assert sum((p.choices[0].logprobs.tokens for p in parts if p.choices[0].logprobs), []) == list("cardYo")


@pytest.mark.parametrize(
    "more, param",
    [
        ({"temperature": 3}, "temperature"),
        ({"logit_bias": {"5": 3}}, "logit_bias"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"extra_body": {"no_such_thing": 1}}, "no_such_thing"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, "messages"),
    ],
)
def test_what_would_change_the_answer_is_refused(dummy, more, param):
    _, url = dummy
    with pytest.raises(openai.BadRequestError) as e:
        client(url).chat.completions.create(**{"model": "bank", "messages": CARD, **more})
    assert e.value.param == param and e.value.type == "invalid_request_error"


def test_other_errors(dummy):
    _, url = dummy
    with pytest.raises(openai.NotFoundError) as e:
        client(url).chat.completions.create(model="gpt-9", messages=CARD)
    assert e.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as e:
        client(url).completions.create(model="bank", prompt="x" * 2000)
    assert e.value.code == "context_length_exceeded"
    huge = {"role": "user", "content": "x" * 900_000}  # its beginning is enough to see it
    with pytest.raises(openai.BadRequestError, match="more than [0-9]+ tokens") as e:
        client(url).chat.completions.create(model="bank", messages=[huge])
    assert e.value.code == "context_length_exceeded" and e.value.param == "messages"


def test_keys_and_limits(make_gateway, tmp_path):
    keys = Keys(tmp_path / "serve.db")
    text, key = keys.create("team")
    weak, _ = keys.create("other", ("metrics",))
    gateway = make_gateway(keys=keys, limits=Limits(tmp_path / "serve.db", Price(1.0, 1.0)))
    with serving(gateway) as url:
        ask = lambda k=text, **more: client(url, k).completions.with_raw_response.create(
            model="bank", prompt="card", max_tokens=30, temperature=0, **more
        )
        with pytest.raises(openai.AuthenticationError):
            ask("llk_00000000_" + "x" * 43)
        with pytest.raises(openai.AuthenticationError):
            ask(text[:-1] + ("A" if text[-1] != "A" else "B"))
        with pytest.raises(openai.PermissionDeniedError):
            ask(weak)
        assert "x-ratelimit-limit-requests" not in ask().headers
        keys.allow("team", rpm=3, tpm=1000)
        h = ask().headers
        assert (h["x-ratelimit-limit-requests"], h["x-ratelimit-remaining-requests"]) == ("3", "2")
        assert (h["x-ratelimit-limit-tokens"], h["x-ratelimit-remaining-tokens"]) == ("1000", "966")
        assert h["x-ratelimit-reset-requests"] == "20s" and h["x-ratelimit-reset-tokens"]
        ask(stream=True).parse().close()
        ask()
        with pytest.raises(openai.RateLimitError) as e:
            ask()
        assert e.value.code == "rate_limit_exceeded" and int(e.value.response.headers["retry-after"]) >= 1
        keys.allow("team", budget=1e-9)
        with pytest.raises(openai.RateLimitError) as e:
            ask()
        assert e.value.code == "insufficient_quota"
        keys.allow("team", guards="input_pii=block")
        with pytest.raises(openai.BadRequestError) as e:
            client(url, text).completions.create(model="bank", prompt="write to ann@example.com")
        assert e.value.code == "content_filter" and "ann@" not in str(e.value)
        keys.revoke(key.prefix)
        with pytest.raises(openai.AuthenticationError):
            ask()
    events = list(gateway.events.all("request"))
    assert [e["status"] for e in events].count("rejected") == 3 and all(e["key"] == key.prefix for e in events)


def test_feedback_joins_the_answer(dummy):
    gateway, url = dummy
    c = client(url)
    got = c.chat.completions.create(model="bank", messages=CARD, temperature=0, user="ann@example.com")
    c.post("/feedback", body={"id": got.id, "rating": 1, "label": "card_arrival"}, cast_to=object)
    [(_, request, said)] = gateway.events.joined()
    assert said["rating"] == 1 and said["label"] == "card_arrival"
    assert (request["variant"], request["status"], request["finish"], request["refused"]) == (
        "baseline",
        "ok",
        "stop",
        False,
    )
    assert request["release"] == gateway.baseline.release and len(request["unit"]) == 32
    assert request["latency"] >= request["ttft"] > 0 and "ann" not in str(request)
    with pytest.raises(openai.NotFoundError):
        c.post("/feedback", body={"id": "nothing", "rating": 1}, cast_to=object)
