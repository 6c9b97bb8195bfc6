"A real server on a free port, in this process or in one of its own."

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import asyncio
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from llmkit.runtime.dummy import DummyEngine
from llmkit.serve.app import make_app
from llmkit.serve.backend import EngineBackend
from llmkit.serve.events import Events
from llmkit.serve.gateway import Gateway

REPLIES = {
    "card": "Your card is on its way.",
    "fee": "That was the monthly fee.",
    "count": "one two three four five six seven eight nine ten",
}
PATIENCE = 60.0  # seconds that a slow machine gets


class Gated(DummyEngine):
    "Makes a token only while the gate is open."

    def __init__(self, **options):
        super().__init__(**options)
        self.gate = threading.Event()
        self.gate.set()

    def next_logits(self, prompt, answer=()):
        assert self.gate.wait(PATIENCE)
        return super().next_logits(prompt, answer)


class Lost(DummyEngine):
    "Fails at a step of a prompt that holds some text, and makes no second batch."

    def __init__(self, at="", **options):
        self.at, self.made = at, 0
        super().__init__(**options)

    def batch(self, slots=8, length=None):
        self.made += 1
        if self.made > 1:
            raise RuntimeError("illegal memory access")
        return super().batch(slots, length)

    def next_logits(self, prompt, answer=()):
        if self.at in self.tokenizer.decode(list(prompt)):
            raise RuntimeError("illegal memory access")
        return super().next_logits(prompt, answer)


def until(condition, what="it"):
    "Wait for a condition that another thread brings about."
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.005)


@contextmanager
def listening(app, port=0, **how):
    "The address of a real server for an application, in a thread; on a free port unless one is given."
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(app, "127.0.0.1", port, log_level="warning", access_log=False, lifespan="on", **how)
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    until(lambda: server.started, "the start")
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


def serving(gateway, **options):
    "The address of a real server for a gateway, in a thread."
    return listening(make_app(gateway, **{"check": False, **options}))


@pytest.fixture
def make_gateway(tmp_path):
    "A gateway over a dummy engine, with an event log."

    def make(engine=None, *, slots=8, queue=64, **options):
        backend = EngineBackend(engine or DummyEngine(replies=REPLIES), slots=slots, queue=queue)
        return Gateway("bank", {"baseline": backend}, events=Events(tmp_path / "events.db"), **options)

    return make


@pytest.fixture
def dummy(make_gateway):
    "A server that answers a few questions: its gateway and its address."
    gateway = make_gateway()
    with serving(gateway) as url:
        yield gateway, url


PROGRAM = """
import signal, sys, time
from llmkit.runtime.dummy import DummyEngine
from llmkit.serve.backend import EngineBackend
from llmkit.serve.events import Events
from llmkit.serve.gateway import Gateway
from llmkit.serve.keys import Keys
from llmkit.serve.limits import Limits, Price
from llmkit.serve.running import run

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests were started by nohup
folder, pause, keyed = sys.argv[1], float(sys.argv[2]), sys.argv[3] == "keys"

class Paced(DummyEngine):
    def next_logits(self, prompt, answer=()):
        time.sleep(pause)
        return super().next_logits(prompt, answer)

gateway = Gateway(
    "bank", {"baseline": EngineBackend(Paced(), slots=4)}, events=Events(f"{folder}/events.db"),
    keys=Keys(f"{folder}/serve.db") if keyed else None, limits=Limits(f"{folder}/serve.db", Price(1.0, 1.0)),
)
sys.exit(run(gateway, port=0, drain=float(sys.argv[4]), started=lambda line: print(line, flush=True)))
"""


@contextmanager
def process(folder, pause=0.0, keys=False, drain=60):
    "A server in a process of its own: the process and its address."
    args = [sys.executable, "-c", PROGRAM, str(folder), str(pause), "keys" if keys else "open", str(drain)]
    p = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    try:
        line = p.stdout.readline()
        assert " on http://" in line, p.stderr.read()
        url = line.split(" on ")[1].strip().removesuffix("/v1")
        until(lambda: httpx.get(f"{url}/ready").status_code == 200, "readiness")
        yield p, url
    finally:
        if p.poll() is None:
            p.kill()
        p.wait(PATIENCE)
