"""The speed benchmark in a process of its own: what it promises and how it fails."""

from pathlib import Path

import numpy as np
import pytest

from llmkit.core.errors import KitError
from llmkit.core.params import load_params
from llmkit.core.report import Measurement, Report, read_report, write_report
from llmkit.evals.cost import cost_measurements, cost_per_success, load_price
from llmkit.evals.energy import cpu_seconds, find_meter
from llmkit.evals.speed import speed_measurements, speed_report
from llmkit.gate.judge import judge

ROOT = Path(__file__).parents[2]
PROMPTS = [[72, 105, 33], [72, 101, 121]]


def test_a_report_with_every_promised_metric(tmp_path):
    many = [[72, 33 + i] for i in range(50)]
    report = speed_report("speed_engine", ".", many, kind="dummy", tokens=6, repeats=1, batch=4)
    names = {m.metric for m in report.measurements}
    assert names >= {"latency_p50", "latency_p95", "latency_p99", "ttft_p50", "inter_token_p50", "tokens_per_second"}
    assert names >= {"peak_rss_bytes", "size_bytes", "load_seconds", "batch_tokens_per_second"}
    p50, p99 = report.get("latency_p50"), report.get("latency_p99")
    assert p50.low <= p50.value <= p50.high and p99.high is None  # fifty prompts bound a median, and no p99
    costs = {c.metric: c for c in cost_measurements(report, load_price("m7g.large"))}
    whole, read, written = (costs[f"cost_per_1k_tokens{end}"] for end in ("", "_in", "_out"))
    assert all(c.method.startswith("estimated") and c.value > 0 for c in costs.values())
    task = {"id": ["a", "b"], "tokens": [10, 10], "correct": [1, 1]}
    quality = Report("engine", "", "q@1", (Measurement("accuracy", 1.0, 2, 0.5, 1.0),), {"task": task})
    once = cost_per_success(list(costs.values()), quality, 3)
    assert once.value == pytest.approx((3 * read.value + 10 * written.value) / 1000) and once.high == 2 * once.value
    write_report(report, tmp_path)
    assert read_report(tmp_path).get("latency_p95") == report.get("latency_p95")


def timed(rng, prompts, rounds, own=0.5, noise=0.05):
    "A table of requests whose time depends most on the prompt, and the true p95 of a request."
    ids = [f"{i}/{r}" for r in range(rounds) for i in range(prompts)]
    seconds = np.exp(np.tile(rng.normal(0, own, prompts), rounds) + rng.normal(0, noise, prompts * rounds)).tolist()
    table = {"id": ids, "tokens": [8] * len(ids)} | {k: seconds for k in ("latency", "ttft", "inter_token")}
    return table, float(np.exp(1.6448536269514722 * np.hypot(own, noise)))


@pytest.mark.parametrize(("prompts", "rounds"), [(72, 1), (18, 4), (36, 2), (100, 3)])
def test_the_upper_end_covers_the_p95_of_prompts_as_often_as_it_says(prompts, rounds):
    rng, hits, times = np.random.default_rng(1), 0, 500
    for _ in range(times):
        table, truth = timed(rng, prompts, rounds)
        [p95] = [m for m in speed_measurements(table) if m.metric == "latency_p95"]
        assert p95.n == prompts and (p95.high is None) == (prompts < 72)
        hits += p95.high is None or p95.high >= truth
    assert hits / times > 0.975 - 3 * (0.975 * 0.025 / times) ** 0.5


def test_rounds_over_the_same_prompts_do_not_bound_a_p95():
    rule = {"rules": [{"metric": "latency_p95", "on": "speed_engine", "max": 60.0, "bound": "interval"}]}
    for prompts, rounds, outcome in ((18, 4, "error"), (72, 1, "pass")):
        table, _ = timed(np.random.default_rng(0), prompts, rounds)
        report = Report("speed_engine", "", "s@1", tuple(speed_measurements(table)), {"requests": table})
        [said] = judge(rule, {"speed_engine": report}).reasons
        assert said.outcome == outcome
        assert outcome == "pass" or "72 different prompts" in said.sentence


@pytest.mark.parametrize("project", [".", "examples/banking77"])
def test_the_prompts_that_are_timed_bound_the_quantiles_of_the_default_rules(project):
    params = load_params(ROOT / project / "params.yaml")
    given = params["evaluate"]
    table, _ = timed(np.random.default_rng(0), given["speed_prompts"], given["speed_repeats"])
    found = {m.metric: m for m in speed_measurements(table)}
    asked = [r for r in params["gates"]["rules"] if r.get("on", "").startswith("speed_") and r["metric"] in found]
    asked = [r for r in asked if r.get("bound") == "interval"]
    assert asked and all(found[r["metric"]].high is not None for r in asked)


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
