"""The speed benchmark in a process of its own: what it promises and how it fails."""

import pytest

from llmkit.core.errors import KitError
from llmkit.core.report import read_report, write_report
from llmkit.evals.cost import cost_measurement, load_price
from llmkit.evals.speed import speed_report

PROMPTS = [[72, 105, 33], [72, 101, 121]]


def test_a_report_with_every_promised_metric(tmp_path):
    report = speed_report("speed_engine", ".", PROMPTS, kind="dummy", tokens=6, repeats=25, batch=4)
    names = {m.metric for m in report.measurements}
    assert names >= {"latency_p50", "latency_p95", "latency_p99", "ttft_p50", "inter_token_p50", "tokens_per_second"}
    assert names >= {"peak_rss_bytes", "size_bytes", "load_seconds", "batch_tokens_per_second"}
    p50, p99 = report.get("latency_p50"), report.get("latency_p99")
    assert p50.low <= p50.value <= p50.high and p99.high is None  # fifty requests bound a median, and no p99
    cost = cost_measurement(report, load_price("m7g.large"))
    assert cost.method.startswith("estimated") and cost.value > 0
    write_report(report, tmp_path)
    assert read_report(tmp_path).get("latency_p95") == report.get("latency_p95")


def test_the_last_words_of_a_dead_child_are_told():
    with pytest.raises(KitError, match="benchmark process ended with 1: .*token id out of range"):
        speed_report("speed_engine", ".", [[72, 999999]], kind="dummy", tokens=2)
