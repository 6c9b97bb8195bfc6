"Windows that monitoring really decides arrive at `/metrics`, each series once, and on the page."

import time
from collections import Counter

import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from telemetry_town import lint, needs, town  # noqa: F401

from llmkit.monitor.board import Reader, render
from llmkit.monitor.watch import open_monitor, run_window
from llmkit.serve.events import Events

KEYS = ("variant", "unit", "key", "code", "ttft", "finish", "fallback", "reason")


def traffic(path, n, at, rng, right):
    "Requests with all that monitoring looks at, and feedback on half of them."
    log, events = Events(path), []
    for i in range(n):
        sure = float(rng.uniform(0.6, 1.0))
        e = dict.fromkeys(KEYS) | {
            "kind": "request", "time": at + i / 100, "id": f"q{at:.0f}-{i}", "release": "sha256:a", "variant": "baseline",
            "status": "ok", "latency": 0.2, "prompt_tokens": int(rng.integers(10, 40)), "completion_tokens": 8, "cost": 0.001,
            "refused": bool(rng.random() < 0.05), "confidence": sure, "label": "lost_card", "surprisal": float(rng.gamma(2)),
            "group": ("young", "old")[i % 2], "joules": 1.5, "meter": "estimated", "claim": bool(rng.random() < 0.1), "scorer": "x",
        }  # fmt: skip
        events.append(e)
        if i % 2 or right < 0.5:
            said = "lost_card" if rng.random() < (sure if right == 1 else right) else "balance"
            events.append({"kind": "feedback", "time": at + i / 100, "id": e["id"], "rating": None, "success": None, "label": said})  # fmt: skip
    log.append(*events)


@needs("promtool")
def test_windows_arrive_once_and_on_the_page(town, root):  # noqa: F811
    rng, now = np.random.default_rng(0), time.time()
    traffic(town.folder / "events.db", 900, now - 7200, rng, 1)
    traffic(town.folder / "events.db", 300, now - 3600, rng, 0.3)
    m = open_monitor(str(root / "params.yaml"), str(town.folder / "settings.ini"))
    assert run_window(m).number == 0
    last = run_window(m)
    assert last.number == 1 and last.outcomes["calibration"] == "fail", str(last)
    with town.server() as t:
        text = t.metrics()
    assert lint(text) == (0, "")
    samples = [s for f in text_string_to_metric_families(text) for s in f.samples]
    twice = [k for k, n in Counter((s.name, tuple(sorted(s.labels.items()))) for s in samples).items() if n > 1]
    assert not twice
    found = {(s.name, s.labels.get("family"), s.labels.get("metric"), s.labels.get("slice")): s.value for s in samples}
    for s in last.scores:
        assert found["llmkit_drift_score", s.family, s.metric, s.slice] == s.value
        assert found["llmkit_drift_threshold", s.family, s.metric, s.slice] == s.threshold
    outcomes = {
        s.labels["family"]: s.labels["outcome"] for s in samples if s.name == "llmkit_window_outcome" and s.value
    }
    assert outcomes == dict(last.outcomes)
    assert any(s.name == "llmkit_calibration_ece" and s.labels["source"] == "window" for s in samples)
    page = render(Reader(str(town.folder / "settings.ini"), gate="none").board())
    assert "Window 1" in page and "calibration: evidence" in page
