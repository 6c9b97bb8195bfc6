"""Ranks against oracles, and the regression report on a real engine: itself, another precision, and planted damage."""

import json

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from word_engine import engine

from llmkit.core.errors import KitError
from llmkit.core.report import read_report, write_report
from llmkit.evals.disagreement import disagreements, kendall_tau, rank_biased_overlap, record_golden
from llmkit.evals.regression import in_other_batches, keep_golden, regression, regression_report, since_release
from llmkit.evals.suite import make_suite
from llmkit.gate.judge import judge
from llmkit.runtime.endpoint import EndpointEngine
from llmkit.runtime.sampling import Sampling

WORDS = [f"{w}_{i}" for i in range(40) for w in ("balance", "refund", "card", "login")]


def suite_of(words):
    "Questions whose answer is their own word."
    rows = [
        {
            "id": f"q{i}",
            "messages": [{"role": "user", "content": f"Say {w}."}, {"role": "assistant", "content": f"{w}: done"}],
        }
        for i, w in enumerate(words)
    ]
    return make_suite("golden", 1, rows, scorers=("label",), max_tokens=16)


@settings(max_examples=60, deadline=None)
@given(st.permutations(range(12)), st.permutations(range(12)), st.integers(1, 12), st.floats(0.05, 0.98))
def test_rbo_is_the_infinite_sum(a, b, k, p):
    a, b = a[:k], b[:k]
    agreement = [len(set(a[:d]) & set(b[:d])) / d for d in range(1, k + 1)]
    brute = (1 - p) * sum(p ** (d - 1) * agreement[min(d, k) - 1] for d in range(1, 3000))
    got = rank_biased_overlap(a, b, p)
    assert got == pytest.approx(brute, abs=1e-9)
    assert got == pytest.approx(rank_biased_overlap(b, a, p)) and -1e-12 <= got <= 1 + 1e-12


def test_rbo_bounds_and_order():
    a = list(range(10))
    assert rank_biased_overlap(a, a) == pytest.approx(1) and rank_biased_overlap(a, list(range(20, 30))) == 0
    top, end = [1, 0, *a[2:]], [*a[:8], 9, 8]
    assert rank_biased_overlap(a, top) < rank_biased_overlap(a, end) < 1


def test_tau_against_a_count_of_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=20), rng.normal(size=20)
    i, j = np.triu_indices(20, 1)
    pairs = np.sign(a[i] - a[j]) * np.sign(b[i] - b[j])
    assert kendall_tau(a, b) == pytest.approx(pairs.mean()) == stats.kendalltau(a, b).statistic


def test_flips_are_counted_and_bounded_exactly():
    old, new = engine(wrong=WORDS[:10]), engine(wrong=WORDS[6:30])
    r = regression(old, new, suite_of(WORDS), n=5, positions=2)
    count = {m: round(r.get(f"{m}_rate").value * len(WORDS)) for m in ("flip", "fixed", "broken", "churn")}
    assert count == {"flip": 26, "fixed": 6, "broken": 20, "churn": 26}
    exact = stats.binomtest(20, len(WORDS)).proportion_ci(0.95, "exact")
    m = r.get("broken_rate")
    assert (m.low, m.high) == pytest.approx((exact.low, exact.high))
    assert r.column("golden/broken").count(1) == 20 and r.get("broken_rate_excess").low > 0


def test_a_gate_stops_what_breaks_and_lets_what_fixes_pass():
    policy = {"rules": [{"metric": "broken_rate_excess", "on": "regression", "max": 0.05, "bound": "interval"}]}
    suite = suite_of(WORDS)
    better = regression(engine(wrong=WORDS[:40]), engine(wrong=WORDS[:1]), suite, n=5)
    worse = regression(engine(wrong=WORDS[:1]), engine(wrong=WORDS[:40]), suite, n=5)
    assert judge(policy, {"regression": better}).outcome == "pass"
    assert judge(policy, {"regression": worse}).outcome == "fail"


def test_the_baselines_own_noise_is_subtracted():
    suite, old = suite_of(WORDS), engine()
    gold = record_golden(old, suite, 5)
    shaky = record_golden(engine(wrong=WORDS[:20]), suite, 5, golden=gold)  # the baseline's second run
    other = record_golden(engine(wrong=WORDS[20:44]), suite, 5, golden=gold)  # as shaky, elsewhere
    r = regression_report(gold, shaky, other, "golden@1")
    assert r.get("flip_rate_noise").value == pytest.approx(20 / 160) and r.get("flip_rate").value == 24 / 160
    excess = r.get("flip_rate_excess")
    assert excess.value == pytest.approx(4 / 160) and excess.low < 0 < excess.high
    steady = regression_report(gold, record_golden(old, suite, 5, golden=gold), other, "golden@1")
    assert steady.get("flip_rate_excess").low > 0


def test_onnx_precisions_and_a_round_trip(open_onnx, tmp_path):
    suite = suite_of([f"{w}{i}" for i in range(6) for w in ("card", "day")])
    exact, coarse = open_onnx("fp32"), open_onnx("int4")
    for e in (exact, coarse):
        e.tokenizer.template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    itself = regression(exact, exact, suite, n=8)
    assert itself.get("rbo").value == pytest.approx(1, abs=0.02) and itself.get("churn_rate").value == 0
    r = regression(exact, coarse, suite, n=8)
    assert r.get("rbo").value < itself.get("rbo").value and r.get("rbo_excess").value > 0
    assert r.get("rbo_noise").value > r.get("rbo").value
    write_report(r, tmp_path / "report")
    assert read_report(tmp_path / "report").measurements == r.measurements
    keep_golden(tmp_path / "golden", exact, suite, n=8)
    assert since_release(tmp_path / "golden", coarse).measurements == r.measurements


@pytest.mark.parametrize("shared", [False, True])
def test_a_server_is_compared_by_its_answers(shared):
    "Behind an address there are no logits, whether or not it shares the tokenizer: rates are measured, rankings left out."
    inner = engine(wrong=WORDS[6:8])

    def answer(request):
        "What an OpenAI-compatible server says, with `/tokenize` or without."
        asked, path = json.loads(request.content or b"{}"), request.url.path
        if path.endswith("/models"):
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        if shared and path == "/tokenize":
            ids = inner.tokenizer.chat(asked["messages"]) if "messages" in asked else [1]
            return httpx.Response(200, json={"tokens": ids, "max_model_len": 512})
        if shared and path == "/tokenizer_info":
            return httpx.Response(200, json={"digest": inner.tokenizer.digest})
        if not path.endswith("completions"):
            return httpx.Response(404)
        ids = asked["prompt"] if "prompt" in asked else inner.tokenizer.chat(asked["messages"])
        text = inner.generate([ids], Sampling(max_tokens=16))[0].text
        choice = {"text": text, "message": {"content": text}, "finish_reason": "stop"}
        return httpx.Response(200, json={"choices": [choice]})

    there = EndpointEngine("http://x/v1", transport=httpx.MockTransport(answer))
    r = regression(engine(), there, suite_of(WORDS[:100]), n=5)
    assert r.get("broken_rate").value == 0.02 and r.get("rbo") is None and r.context["left_out"]
    assert r.get("broken_rate_excess").method == "paired score bound, 2 prompts beyond the baseline's own noise, 0 in that noise alone"  # fmt: skip


def test_what_cannot_be_compared_is_refused():
    suite, old = suite_of(WORDS[:4]), engine()
    gold = record_golden(old, suite, 5)
    with pytest.raises(KitError, match="different prompts"):
        disagreements(gold, gold[:3])
    with pytest.raises(KitError, match="without doubles"):
        rank_biased_overlap([1, 1], [1, 2])
    assert in_other_batches(old).slots == 2 and old.slots == 8


def test_where_nothing_was_right_nothing_can_break_and_the_rule_does_not_pass():
    "Answers in free words have no label that is met: an engine of nonsense passed the rule on broken answers."
    row = lambda i, right: {"id": str(i), "tokenizer": "", "label": "a", "said": "a" if right else "b", "correct": int(right), "answer": "", "path": [], "top": [], "logprob": []}  # fmt: skip
    rule = {"rules": [{"metric": "broken_rate_excess", "on": "regression", "max": 0.1, "bound": "interval"}]}
    for right, outcome in ((0, "fail"), (23, "fail"), (24, "fail"), (120, "fail")):
        gold = [row(i, i < right) for i in range(120)]
        r = regression_report(gold, gold, [row(i, False) for i in range(120)], "golden@1")
        assert judge(rule, {"regression": r}).outcome == outcome
        assert ("unmeasured" in r.context) == (r.get("broken_rate_excess") is None) == (right < 24)
    gold = [row(i, i < 5) for i in range(120)]
    said = judge(rule, {"regression": regression_report(gold, gold, gold, "golden@1")}).reasons[0].sentence
    assert "only 5 of 120 golden prompts were answered with their label" in said and "rouge_l" in said
