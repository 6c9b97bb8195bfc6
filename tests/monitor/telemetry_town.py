"A real server that follows rollouts, whose canary fails on purpose, with customers who ask in ordinary and in odd ways."

import shutil
import subprocess
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from rollout_road import CANARY, Recorder
from serve_server import REPLIES, serving

from llmkit.core.report import Measurement, Report
from llmkit.core.settings import Settings
from llmkit.gate.verdict import RuleResult, Verdict
from llmkit.monitor.state import Action, Memory, Score, Seen
from llmkit.rollout.controller import Controller
from llmkit.rollout.live import Live
from llmkit.rollout.store import Store
from llmkit.runtime.dummy import DummyEngine
from llmkit.serve.backend import EngineBackend
from llmkit.serve.events import Events
from llmkit.serve.gateway import Gateway
from llmkit.serve.limits import Limits, Price
from llmkit.serve.server import measure

QUICK = CANARY | {
    "steps": [
        {"setWeight": 50},
        {"analysis": {"min_duration": "1s", "max_duration": "10m", "min_samples": 40}},
    ],
    "canary": [{"metric": "error_rate", "margin": 0.4, "hard_stop": {"max": 0.3, "min_n": 20}}],
}
SHADOWED = QUICK | {
    "steps": [
        {"shadow": {"percent": 100}},
        {"analysis": {"min_duration": "1s", "max_duration": "10m", "min_samples": 5}},
        *QUICK["steps"],
    ],
    "shadow": [{"metric": "error_rate", "noninferiority": 0.4, "against": "baseline", "min_n": 5}],
}


@contextmanager
def receiver(take):
    "Somebody who is told things by POST: the URL; `take` gets the headers and the body."

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            take(self.headers, self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def needs(*programs):
    "Skip where a program is not installed (`a|b`: one of them), and say which package brings it."
    missing = [p for p in programs if not any(map(shutil.which, p.split("|")))]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)} (tools/system.sh)")


def lint(text):
    "What promtool says of a page of metrics."
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


class Failing(DummyEngine):
    "Passes its self-test, and then fails on one question of customers."

    def next_logits(self, prompt, answer=()):
        if "my card is gone" in self.tokenizer.decode(list(prompt)):
            raise RuntimeError("a bad release")
        return super().next_logits(prompt, answer)


def window(folder: Path, calibration="pass"):
    "A window of traffic as monitoring leaves it: reports, scores and a verdict."
    found = (
        Measurement("accuracy_gap", 0.05, 400, 0.03, 0.07, direction="lower"),
        Measurement("ece_debiased", 0.03, 400, 0.01, 0.05, direction="lower"),
        Measurement("hallucination_rate", 0.1, 200, 0.06, 0.15, direction="lower"),
        Measurement("worst_group_accuracy", 0.9, 100, 0.83, 0.95),
    )
    scores = (
        Score("data", "prompt_tokens_psi", 0.04, 0.1, 300),
        Score(
            "calibration", "evidence", 40.0 if calibration == "fail" else 2.0, 20.0, 250, drifted=calibration == "fail"
        ),
    )
    rule = RuleResult("calibration holds", calibration, "what was found", "evidence", "calibration")
    outcomes = {"data": "pass", "calibration": calibration}
    verdict = Verdict(calibration, (rule,), "sha256:p")
    now = time.time()
    w = Seen("sha256:a", 3, 901, 1200, now - 60, now, 300, 250, scores, outcomes, verdict)
    asked = (
        [Action("a", "retrain", now, "sha256:a", 3, "calibration drifted", "requested")]
        if calibration == "fail"
        else []
    )
    Memory(folder / "monitor.db").add(w, {"traffic": Report("window", "", "window@1", found)}, {}, asked)


class Town:
    "Where the server keeps its files, and what can be done with it."

    def __init__(self, folder):
        self.folder, self.registry = folder, Recorder(folder / "registry.json")
        self.store = Store(folder / "rollouts.db")
        files = {
            "monitor_db": "monitor.db",
            "rollouts": "rollouts.db",
            "events_db": "events.db",
            "serve_db": "serve.db",
        }
        values = {k: str(folder / name) for k, name in files.items()}
        (folder / "settings.ini").write_text("[DEFAULT]\n" + "".join(f"{k} = {v}\n" for k, v in values.items()))
        self.settings, self.n = Settings("DEFAULT", values, folder / "settings.ini"), 0

    def open(self, release):
        "A release as the server loads it: the canary is the bad one."
        engine = Failing if release == "sha256:b" else DummyEngine
        return EngineBackend(engine(replies=REPLIES), release=release)

    @contextmanager
    def server(self, keys=None, **options):
        "The address of a server, and what follows its rollouts."
        limits = Limits(self.folder / "serve.db", Price(1.0, 2.0))
        gateway = Gateway(
            "bank-support", {"baseline": self.open("sha256:a")}, events=Events(self.folder / "events.db"),
            keys=keys, limits=limits, **options,
        )  # fmt: skip
        measure(gateway, self.settings)
        live = Live(gateway, Store(self.folder / "rollouts.db"), self.registry, self.open, every=0.05)
        with serving(gateway, beside=live.beside()) as url:
            self.url, self.gateway, self.live = url, gateway, live
            yield self

    def begin(self, id="r1", section=QUICK):
        "Begin a rollout as another process does."
        self.store.create(id, section)
        releases = {"baseline": "sha256:a", "canary": "sha256:b"}
        Controller(self.store, id, self.registry).command("start", "ann", model="bank-support", releases=releases)

    def phase(self, id="r1"):
        "Where a rollout stands."
        return self.store.load(id).state.phase

    def ask(self, text="card", key="", user="", **more):
        "One question."
        self.n += 1
        body = {"model": "bank-support", "user": user or f"u{self.n}", "max_tokens": 6}
        body |= {"messages": [{"role": "user", "content": text}], **more}
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=headers, timeout=60)

    def metrics(self, key=""):
        "What a scrape gives."
        headers = {"authorization": f"Bearer {key}"} if key else {}
        got = httpx.get(f"{self.url}/metrics", headers=headers)
        assert got.status_code == 200, got.text
        return got.text


@pytest.fixture
def town(tmp_path):
    "A town of its own for each test."
    return Town(tmp_path)
