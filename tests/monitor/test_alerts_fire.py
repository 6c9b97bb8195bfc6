"Real Prometheus and Alertmanager watch a real server: an alert arrives at a webhook, and every query of the dashboard answers."

import json
import signal
import socket
import subprocess
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
from serve_server import until
from telemetry_town import QUICK, needs, receiver, town, window  # noqa: F401

from llmkit.monitor.grafana import metrics_of, queries
from llmkit.monitor.wiring import alerts_write

SILENT = {
    "llmkit_ratelimit_rejections_total",
    "llmkit_fallback_total",
    "llmkit_unloaded_total",
    "llmkit_answers_checked_total",
}  # did not happen
ROOT = Path(__file__).parents[2]


def free_port():
    "A port that nobody uses now."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def webhook():
    "Somebody who writes down what he is told: the URL and the list of alerts."
    told = []
    with receiver(lambda headers, body: told.extend(json.loads(body)["alerts"])) as url:
        yield f"{url}/page", told


@contextmanager
def program(folder, *args):
    "A program that runs, with what it says in a file."
    with open(folder / f"{args[0]}.log", "wb") as log:
        p = subprocess.Popen(args, cwd=folder, stdout=log, stderr=log)
        try:
            yield p
        finally:
            p.send_signal(signal.SIGTERM)
            try:
                p.wait(10)
            except subprocess.TimeoutExpired:
                p.kill()
                p.wait()


@needs("prometheus", "prometheus-alertmanager", "promtool")
def test_an_alert_arrives_and_every_panel_has_data(town, tmp_path):  # noqa: F811
    ports, folder = [free_port(), free_port()], tmp_path / "watch"
    with ExitStack() as stack:
        url, told = stack.enter_context(webhook())
        t = stack.enter_context(town.server())
        window(t.folder, "fail")
        address = t.url.removeprefix("http://")
        manager = f"127.0.0.1:{ports[1]}"
        code = alerts_write(str(folder), policy=str(ROOT / "params.yaml"), target=address, alertmanager=manager, page=url, every="1s", window="5s", hold="0s", wait="0s")  # fmt: skip
        assert code == 0
        stack.enter_context(program(folder, "prometheus-alertmanager", "--config.file=alertmanager.yml", "--storage.path=am", f"--web.listen-address={manager}", "--cluster.listen-address="))  # fmt: skip
        stack.enter_context(program(folder, "prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=db", f"--web.listen-address=127.0.0.1:{ports[0]}"))  # fmt: skip
        prometheus = httpx.Client(base_url=f"http://127.0.0.1:{ports[0]}/api/v1")

        def ask(query):
            "The samples of a query."
            try:
                answer = prometheus.get("/query", params={"query": query})
            except httpx.TransportError:
                return []  # it does not listen yet
            if answer.status_code == 503:
                return []  # it is still reading its files
            got = answer.json()
            assert got["status"] == "success", got
            return got["data"]["result"]

        until(lambda: ask("llmkit_ready"), "the first scrape")
        t.begin(section=QUICK)
        until(lambda: t.store.load("r1").state.weights.get("canary") == 50, "the canary")
        said = t.ask("card: I am ann@example.com").json()
        httpx.post(f"{t.url}/v1/feedback", json={"id": said["id"], "rating": 1, "success": True})

        def busy():
            "Customers whose question the canary cannot answer."
            for _ in range(12):
                t.ask("my card is gone")
            return any(a["labels"]["alertname"] == "LlmkitRolloutDegraded" for a in told) and t.phase() == "Degraded"

        until(busy, "the alert")

        def silent():
            "Metrics of panels without data; a rate needs two scrapes, and customers who go on asking."
            t.ask("card: I am ann@example.com")
            return {m for q in queries() if not ask(q) for m in metrics_of(q)} - SILENT

        until(lambda: not silent(), "data in every panel")
        firing = {a["labels"]["alertname"] for a in prometheus.get("/alerts").json()["data"]["alerts"]}

    alert = next(a for a in told if a["labels"]["alertname"] == "LlmkitRolloutDegraded")
    assert alert["status"] == "firing" and alert["labels"]["severity"] == "ticket"
    assert alert["annotations"]["summary"] == "A rollout was aborted; everybody is the baseline's again."
    assert "LlmkitDrift" in firing and "LlmkitDown" not in firing
    names = alert["annotations"]  # of the moment at which it fired
    assert "baseline: release a." in names["release"] and "canary: release b." in names["release"]
    assert names["order"] == "Rollout r1 is Degraded: everybody is back at release a."
