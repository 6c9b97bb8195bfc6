"Where tokens stand in a completion's text, over the server: characters of several tokens, an echoed prompt, stop strings, an upstream."

import json

import httpx
import pytest
from serve_server import PATIENCE, serving

from llmkit.runtime.dummy import DummyEngine
from llmkit.serve.backend import EngineBackend
from llmkit.serve.gateway import Gateway
from llmkit.serve.upstream import UpstreamBackend

TEXT = "5 € für 🙂."  # a byte is a token: characters of 1, 2, 3 and 4 tokens


def places(text):
    "The character at which each byte of a text stands."
    return [i for i, c in enumerate(text) for _ in c.encode()]


@pytest.fixture
def gateway():
    return Gateway("m", {"baseline": EngineBackend(DummyEngine(replies={"Gebühr": TEXT}))})


def whole(url, **ask):
    body = {"model": "m", "prompt": "Gebühr", "max_tokens": len(TEXT.encode()), "logprobs": 0, **ask}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE).json()["choices"][0]


def streamed(url, **ask):
    body = {"model": "m", "prompt": "Gebühr", "max_tokens": len(TEXT.encode()), "logprobs": 0, "stream": True, **ask}
    text, offsets = "", []
    for line in httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE).text.splitlines():
        for c in json.loads(line[6:])["choices"] if line.startswith("data: {") else ():
            text += c["text"]
            offsets += c["logprobs"]["text_offset"] if c["logprobs"] else []
    return text, offsets


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("upstream", [False, True])
def test_tokens_of_one_character_stand_at_that_character(gateway, echo, upstream):
    want = ("Gebühr" if echo else "") + TEXT
    with serving(gateway) as first:
        second = Gateway("m", {"baseline": UpstreamBackend(f"{first}/v1", "m")})
        with serving(second if upstream else Gateway("m", gateway.variants)) as url:
            got, stream = whole(url, echo=echo), streamed(url, echo=echo)
    lp = got["logprobs"]
    assert got["text"] == want and lp["text_offset"] == places(want)
    assert "token_id:226" in lp["tokens"], "a part of a character is named as such"
    assert stream == (want, lp["text_offset"])
    for at, token in zip(lp["text_offset"], lp["tokens"], strict=True):
        assert token.startswith("token_id:") or want[at:].startswith(token)


def test_a_prompt_of_ids_and_a_text_that_is_held_back(gateway):
    with serving(gateway) as url:
        got = whole(url, prompt=list("Gebühr".encode()), echo=True, stop=["€ für 🙂!"])
        assert got["text"] == "Gebühr" + TEXT and got["logprobs"]["text_offset"] == places("Gebühr" + TEXT)
        assert streamed(url, stop=["€ für 🙂!"]) == (TEXT, places(TEXT))
