"""The speed benchmark in a process of its own: what it promises and how it fails."""

import pytest

from llmkit.core.errors import KitError
from llmkit.core.report import Measurement, Report, read_report, write_report
from llmkit.evals.cost import cost_measurements, cost_per_success, load_price
from llmkit.evals.energy import cpu_seconds, find_meter
from llmkit.evals.speed import speed_report

PROMPTS = [[72, 105, 33], [72, 101, 121]]


def test_a_report_with_every_promised_metric(tmp_path):
    report = speed_report("speed_engine", ".", PROMPTS, kind="dummy", tokens=6, repeats=25, batch=4)
    names = {m.metric for m in report.measurements}
    assert names >= {"latency_p50", "latency_p95", "latency_p99", "ttft_p50", "inter_token_p50", "tokens_per_second"}
    assert names >= {"peak_rss_bytes", "size_bytes", "load_seconds", "batch_tokens_per_second"}
    p50, p99 = report.get("latency_p50"), report.get("latency_p99")
    assert p50.low <= p50.value <= p50.high and p99.high is None  # fifty requests bound a median, and no p99
    costs = {c.metric: c for c in cost_measurements(report, load_price("m7g.large"))}
    whole, read, written = (costs[f"cost_per_1k_tokens{end}"] for end in ("", "_in", "_out"))
    assert all(c.method.startswith("estimated") and c.value > 0 for c in costs.values())
    task = {"id": ["a", "b"], "tokens": [10, 10], "correct": [1, 1]}
    quality = Report("engine", "", "q@1", (Measurement("accuracy", 1.0, 2, 0.5, 1.0),), {"task": task})
    once = cost_per_success(list(costs.values()), quality, 3)
    assert once.value == pytest.approx((3 * read.value + 10 * written.value) / 1000) and once.high == 2 * once.value
    write_report(report, tmp_path)
    assert read_report(tmp_path).get("latency_p95") == report.get("latency_p95")


def test_codecarbon_is_a_source_of_joules():
    pytest.importorskip("codecarbon")
    meter, own = find_meter("codecarbon"), cpu_seconds()
    before, mine = meter.read(), own.read()
    while own.between(mine, own.read()) < 5.0:  # a busy second
        pass
    used = meter.between(before, meter.read())
    assert 0 < used < 2000 and "codecarbon" in meter.method and not meter.measured
    report = speed_report("speed_engine", ".", PROMPTS, kind="dummy", tokens=6, repeats=5, batch=4, energy="codecarbon")
    assert report.get("joules_per_token").method == meter.method and report.get("kwh_per_1k_requests").value >= 0


def test_the_last_words_of_a_dead_child_are_told():
    with pytest.raises(KitError, match="benchmark process ended with 1: .*token id out of range"):
        speed_report("speed_engine", ".", [[72, 999999]], kind="dummy", tokens=2)
