"What happens when many ask at once, hang up, or break something."

import asyncio
import json
import math
import random
import socket
import struct
import threading
import time

import httpx
import pytest
from serve_server import PATIENCE, REPLIES, Gated, Lost, serving, until

from llmkit.runtime.dummy import DummyEngine
from llmkit.serve.backend import EngineBackend
from llmkit.serve.call import Asked
from llmkit.serve.gateway import Single

ASK = {"model": "bank", "prompt": "count", "max_tokens": 100, "temperature": 0}


def post(url, **more):
    return httpx.post(f"{url}/v1/completions", json={**ASK, **more}, timeout=PATIENCE)


def test_a_shared_batch_gives_the_answers_that_each_would_get_alone(dummy):
    gateway, url = dummy
    rng = random.Random(5)
    asks = [
        {"prompt": [rng.randrange(256) for _ in range(rng.randint(1, 40))], "max_tokens": rng.randint(1, 25),
         "temperature": rng.choice([0, 0.7, 1.3]), "top_p": rng.choice([1, 0.8]), "seed": i}
        for i in range(60)
    ]  # fmt: skip

    async def main():
        async with httpx.AsyncClient(timeout=PATIENCE) as c:
            return await asyncio.gather(*(c.post(f"{url}/v1/completions", json={**ASK, **a}) for a in asks))

    got = [r.json()["choices"][0]["text"] for r in asyncio.run(main())]
    engine = DummyEngine(replies=REPLIES)
    want = [
        engine.generate([a["prompt"]], Asked(a["max_tokens"], a["temperature"], a["top_p"], seed=a["seed"]))[0].text
        for a in asks
    ]
    assert got == want and len(set(got)) > 50


def test_an_engine_that_is_lost_answers_everybody_with_an_error_and_asks_for_a_new_process(make_gateway):
    gateway = make_gateway(Lost(), slots=2)

    async def many(url):
        async with httpx.AsyncClient(timeout=PATIENCE) as c:
            return await asyncio.gather(*(c.post(f"{url}/v1/completions", json=ASK) for _ in range(8)))

    with serving(gateway, drain=PATIENCE) as url:
        assert httpx.get(f"{url}/health").status_code == 200
        codes = {(r.status_code, r.json()["error"]["code"]) for r in asyncio.run(many(url))}
        assert codes <= {(500, "engine_error"), (503, "engine_error")} and (500, "engine_error") in codes
        late, health, ready = post(url), httpx.get(f"{url}/health"), httpx.get(f"{url}/ready")
        assert (late.status_code, late.json()["error"]["code"], late.headers["retry-after"]) == (
            503,
            "engine_error",
            "5",
        )
        assert (health.status_code, ready.status_code, gateway.open) == (503, 503, 0)
        start = time.monotonic()
    assert time.monotonic() - start < PATIENCE / 2, "nothing is left to wait for"


@pytest.mark.parametrize(
    "dead, answers, ok",
    [
        ("baseline", ["canary"], False),  # nobody stands in any more, and there is no way back
        ("canary", ["canary"], False),  # promoted: all get the release that it replaced
        ("canary", ["canary", "baseline"], True),  # a candidate: its rollout ends it
        ("canary", ["canary"] * 200 + ["baseline"], True),  # though hardly anybody is left to the other one
        ("canary", ["baseline"], True),
    ],
)
def test_health_asks_for_a_new_process_where_everybody_needs_the_engine_that_died(make_gateway, dead, answers, ok):
    class Shares(Single):
        def assign(self, unit):
            return answers[len(unit) % len(answers)]

        def sole(self):
            return answers[0] if len(set(answers)) == 1 else ""

    gateway = make_gateway(Lost() if dead == "baseline" else None, router=Shares())
    gateway.set_variant("canary", EngineBackend(Lost() if dead == "canary" else DummyEngine(replies=REPLIES)))
    with serving(gateway, drain=PATIENCE) as url:
        assert httpx.get(f"{url}/health").status_code == 200
        gateway.router.assign, usual = lambda unit: dead, gateway.router.assign
        assert post(url).status_code == 500 and gateway.variants[dead].broken()
        gateway.router.assign = usual
        assert post(url).status_code == 200, "the other one answers"
        assert httpx.get(f"{url}/health").status_code == (200 if ok else 503)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_slot(make_gateway, stream):
    class Counted(DummyEngine):
        allowed = threading.Semaphore(3 if stream else 0)  # tokens that may be made

        def next_logits(self, prompt, answer=()):
            assert self.allowed.acquire(timeout=PATIENCE)
            return super().next_logits(prompt, answer)

    gateway = make_gateway(Counted(replies=REPLIES), slots=1)
    scheduler = gateway.baseline.scheduler
    with serving(gateway) as url:
        host, port = url.removeprefix("http://").split(":")

        async def leave():
            r, w = await asyncio.open_connection(host, int(port))
            body = json.dumps({**ASK, "stream": stream}).encode()
            w.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
            await w.drain()
            await asyncio.to_thread(until, lambda: scheduler.running, "the join")
            if stream:  # hang up in the middle of the answer
                await r.readuntil(b"data: ")
            w.close()

        asyncio.run(leave())
        until(lambda: gateway.open == 0, "the disconnect")
        Counted.allowed.release(100)
        assert post(url).json()["choices"][0]["text"] == REPLIES["count"]
    first, second = gateway.events.all("request")
    assert (first["status"], first["code"], second["status"]) == ("cancelled", 499, "ok")
    assert scheduler.counts["cancelled"] == 1 and scheduler.counts["finished"] == 1


def test_a_server_without_a_rollout_tells_of_a_request_that_hangs(make_gateway):
    "A judge elsewhere and an alert know of it from here."
    engine = Gated(replies=REPLIES)
    engine.gate.clear()
    gateway = make_gateway(engine, slots=2)
    gateway.stall_after = 0.2
    with serving(gateway) as url:
        asked = threading.Thread(target=post, args=(url,))
        asked.start()
        until(lambda: [*gateway.events.all("stall")], "the stall")
        page = httpx.get(f"{url}/metrics").text
        assert 'variant="baseline"} 1.0' in next(x for x in page.splitlines() if x.startswith("llmkit_stalled_total"))
        engine.gate.set()
        asked.join(PATIENCE)
    (stall,), (request,) = gateway.events.all("stall"), gateway.events.all("request")
    assert (request["id"], request["status"], request["stalled"]) == (stall["id"], "ok", True)


def test_nothing_is_written_to_a_client_that_is_gone(make_gateway, caplog):
    "Tokens that came while the loop was busy are not all sent in one go to a socket that has been closed."

    gateway = make_gateway(DummyEngine(replies={"count": "count to a thousand " * 100}), slots=16)
    scheduler = gateway.baseline.scheduler
    with serving(gateway) as url:
        host, port = url.removeprefix("http://").split(":")
        body = json.dumps({**ASK, "stream": True, "max_tokens": 2000}).encode()
        for _ in range(8):
            with socket.create_connection((host, int(port)), PATIENCE) as s:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # it vanishes: a reset
                s.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
                )
                while b"data: " not in s.recv(4096):
                    pass
        until(lambda: gateway.open == 0, "the disconnects")
        until(lambda: not scheduler.running, "the free slots")
        assert post(url).status_code == 200
    assert [r.getMessage() for r in caplog.records if r.name == "asyncio"] == []
    assert sum(e["status"] == "cancelled" for e in gateway.events.all("request")) == 8


def test_a_full_queue_is_refused_at_once_and_says_when_to_come_back(make_gateway):
    engine = Gated(replies=REPLIES)
    gateway = make_gateway(engine, slots=1, queue=2)
    scheduler = gateway.baseline.scheduler
    with serving(gateway) as url:
        engine.gate.clear()
        done = []
        threads = [threading.Thread(target=lambda: done.append(post(url).status_code)) for _ in range(3)]
        for i, t in enumerate(threads):
            t.start()
            until(lambda i=i: len(scheduler.running) + len(scheduler.waiting) == i + 1, "the queueing")
        full = post(url)
        assert full.status_code == 503 and int(full.headers["retry-after"]) >= 1
        assert full.json()["error"]["code"] == "queue_full"
        assert 'llmkit_queue_depth{variant="baseline"} 2.0' in httpx.get(f"{url}/metrics").text
        engine.gate.set()
        for t in threads:
            t.join(PATIENCE)
        assert done == [200] * 3 and post(url).status_code == 200


def test_a_request_past_its_deadline_gets_504_and_frees_its_slot(make_gateway):
    engine = Gated(replies=REPLIES)
    gateway = make_gateway(engine, slots=1, timeout=0.05)
    with serving(gateway) as url:
        engine.gate.clear()
        got = []
        t = threading.Thread(target=lambda: got.append(post(url)))
        t.start()
        scheduler = gateway.baseline.scheduler
        until(lambda: scheduler.running, "the join")
        [ticket] = scheduler.running.values()
        until(lambda: scheduler.clock() > ticket.deadline, "the deadline")
        engine.gate.set()
        t.join(PATIENCE)
        assert (got[0].status_code, got[0].json()["error"]["code"]) == (504, "timeout")
        gateway.timeout = None
        assert post(url).status_code == 200


def test_a_poisoned_request_fails_alone(make_gateway):
    class Poisoned(Gated):
        def next_logits(self, prompt, answer=()):
            if b"poison" in bytes(i for i in prompt if i < 256) and len(answer) == 2:
                raise RuntimeError("illegal memory access in " + bytes(prompt).decode())
            return super().next_logits(prompt, answer)

    engine = Poisoned(replies=REPLIES)
    gateway = make_gateway(engine)
    with serving(gateway) as url:
        engine.gate.clear()
        got = {}

        def ask(name, prompt):
            got[name] = post(url, prompt=prompt)

        threads = [threading.Thread(target=ask, args=a) for a in (("a", "card"), ("b", "poison"), ("c", "count"))]
        for t in threads:
            t.start()
        until(
            lambda: len(gateway.baseline.scheduler.running) + len(gateway.baseline.scheduler.waiting) == 3, "all three"
        )
        engine.gate.set()
        for t in threads:
            t.join(PATIENCE)
        assert [got[k].status_code for k in "abc"] == [200, 500, 200]
        assert [got[k].json()["choices"][0]["text"] for k in "ac"] == [REPLIES["card"], REPLIES["count"]]
        assert "poison" not in got["b"].text
        assert 'llmkit_failed_steps_total{variant="baseline"}' in httpx.get(f"{url}/metrics").text
        assert post(url).status_code == 200


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_no_numbers_are_a_failure_and_no_sure_answer(make_gateway, temperature):
    class Overflowing(DummyEngine):
        def next_logits(self, prompt, answer=()):
            logits = super().next_logits(prompt, answer)
            return logits * math.nan if b"poison" in bytes(i for i in prompt if i < 256) else logits

    gateway = make_gateway(Overflowing(replies=REPLIES))
    with serving(gateway) as url:
        bad, good = post(url, prompt="poison", temperature=temperature), post(url)
        assert (bad.status_code, good.status_code) == (500, 200)
        assert bad.json()["error"]["code"] == "engine_error"
        assert sorted(e["status"] for e in gateway.events.all("request")) == ["error", "ok"]


def test_replacing_the_engine_under_load_loses_nothing(make_gateway):
    gateway = make_gateway()
    with serving(gateway) as url:
        texts = ["from engine 0"]
        gateway.set_variant("baseline", EngineBackend(DummyEngine(replies={"count": texts[0]})))

        async def main():
            async with httpx.AsyncClient(timeout=PATIENCE, limits=httpx.Limits(max_connections=16)) as c:
                asks = [asyncio.ensure_future(c.post(f"{url}/v1/completions", json=ASK)) for _ in range(150)]
                for i in range(1, 5):
                    await asks[i * 25]
                    texts.append(f"from engine {i}")
                    old = gateway.set_variant(
                        "baseline", EngineBackend(DummyEngine(replies={"count": texts[-1]}, seed=i))
                    )
                    await asyncio.to_thread(old.scheduler.close)
                    asks.append(asyncio.ensure_future(c.post(f"{url}/v1/completions", json=ASK)))
                    assert (await asks[-1]).json()["choices"][0]["text"] == texts[-1]
                return await asyncio.gather(*asks)

        got = asyncio.run(main())
        assert {r.status_code for r in got} == {200}
        assert {r.json()["choices"][0]["text"] for r in got} == set(texts)
        one = {(r.json()["system_fingerprint"], r.json()["choices"][0]["text"]) for r in got}
        assert len(one) == 5, "an answer is of one engine, and says of which"


def test_a_unit_stays_with_its_variant_and_a_lost_variant_falls_back(make_gateway):
    class Halves(Single):
        events = []

        def assign(self, unit):
            return "canary" if int(unit, 16) % 2 else "baseline"

        def observe(self, event):
            self.events.append(event)

    gateway = make_gateway(router=Halves())
    gateway.set_variant("canary", EngineBackend(DummyEngine(replies={"count": "the new one"}, seed=1)))
    with serving(gateway) as url:
        texts = {}
        for session in map(str, range(12)):
            for _ in range(2):
                got = httpx.post(f"{url}/v1/completions", json=ASK, headers={"x-session-id": session}, timeout=PATIENCE)
                texts.setdefault(session, set()).add(got.json()["choices"][0]["text"])
        assert all(len(t) == 1 for t in texts.values()) and len({str(t) for t in texts.values()}) == 2
        gateway.variants["canary"].scheduler.close()
        lost = next(s for s, t in texts.items() if t == {"the new one"})
        got = httpx.post(f"{url}/v1/completions", json=ASK, headers={"x-session-id": lost}, timeout=PATIENCE)
        assert got.json()["choices"][0]["text"] == REPLIES["count"]
    last = Halves.events[-1]
    assert (last["variant"], last["fallback"], last["release"]) == ("canary", True, gateway.baseline.release)


def test_no_prompt_reaches_the_log(make_gateway, caplog, capfd):
    class Broken(DummyEngine):
        def next_logits(self, prompt, answer=()):
            raise RuntimeError(f"cannot do {bytes(prompt).decode()}")

    gateway = make_gateway(Broken())
    with serving(gateway) as url:
        for stream in (False, True):
            assert post(url, prompt="my secret question", stream=stream).status_code == 500
    told = caplog.text + "".join(capfd.readouterr())
    assert "RuntimeError at" in caplog.text and "secret" not in told and "Traceback" not in told
