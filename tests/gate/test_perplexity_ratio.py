"A ratio of perplexities is judged item by item where both reports keep the log-likelihoods of the same tokens."

import math
from dataclasses import replace

import numpy as np
import pytest

from llmkit.core.report import Measurement, Report
from llmkit.gate.judge import judge_rule
from llmkit.gate.policy import read_rule
from llmkit.gate.ratios import ENOUGH, _heavy, below, bound_ratio, ratio_needed
from llmkit.gate.run import plan_rule
from llmkit.gate.selftest import selftest

RULE = {"metric": "perplexity", "max_ratio": 1.10, "bound": "interval", "against": "merged"}


def report(subject, nll, tokens, clusters=None, factor=3.0):
    "A report as `language_measurements` writes it, with an interval as wide as heavy tails make it."
    nll, tokens = np.asarray(nll, float), np.asarray(tokens, int)
    table = {"id": [f"q{i}" for i in range(len(nll))], "nll": nll.tolist(), "tokens": tokens.tolist()}
    table |= {"words": (tokens // 2).tolist(), "bytes": (tokens * 4).tolist()}
    found = {"perplexity": tokens, "word_perplexity": tokens // 2, "byte_perplexity": tokens * 4}
    values = {m: math.exp(nll.sum() / u.sum()) for m, u in found.items()}
    values["bits_per_byte"] = nll.sum() / tokens.sum() / 4 / math.log(2)
    ms = [Measurement(m, v, len(nll), v / factor, v * factor, direction="lower") for m, v in values.items()]
    return Report(subject, "", "demo@1", tuple(ms), {"language": table | ({"cluster": clusters} if clusters else {})})


def drawn(rng, n, ratio=1.0, spread=0.3):
    "Tokens, and log-likelihoods of two models whose perplexities have that ratio in the long run."
    tokens = rng.poisson(20, n) + 2
    old = 0.3 * tokens * rng.lognormal(-0.5, 1.0, n)
    return tokens, old, old * rng.lognormal(-(spread**2) / 2, spread, n) + math.log(ratio) * tokens


def judged(tokens, old, new, clusters=None, **changes):
    "The only result of the rule."
    pair = {"engine": report("engine", new, tokens, clusters), "merged": report("merged", old, tokens, clusters)}
    [found] = judge_rule(read_rule(RULE | changes), pair)
    return found


@pytest.mark.parametrize("n", [50, 200, 1000])
@pytest.mark.parametrize("metric", ["perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"])
def test_two_identical_engines_pass(n, metric):
    tokens, old, _ = drawn(np.random.default_rng(n), n)
    found = judged(tokens, old, old, metric=metric)
    assert found.outcome == "pass" and "paired" in found.sentence and found.low <= 1 <= found.high


def test_identical_engines_pass_with_answers_of_one_length():
    "Every item differs from its limit by the same, so there is nothing to resample; a pair of items is too few all the same."
    rng = np.random.default_rng(0)
    old = rng.lognormal(-1, 1, 200)
    assert judged([2] * 200, old, old).outcome == "pass"
    assert judged([2] * 2, old[:2] + 1, old[:2] + 1).outcome == "inconclusive"


def test_a_perplexity_at_its_limit_passes_at_most_one_time_in_twenty_and_a_better_one_mostly():
    rng, passed = np.random.default_rng(3), {}
    for ratio in (1.03, 1.10):
        passed[ratio] = sum(judged(*drawn(rng, 200, ratio)).outcome == "pass" for _ in range(200))
    assert passed[1.10] <= 18 and passed[1.03] > 180  # P(19 or more | 5 %) = 0.7 %


def test_the_estimate_is_the_ratio_and_a_loss_fails():
    tokens, old, _ = drawn(np.random.default_rng(1), 300)
    found = judged(tokens, old, old + math.log(1.3) * tokens)
    assert found.outcome == "fail" and found.value == pytest.approx(1.3) and 1.10 < found.low <= 1.3 <= found.high


def test_clusters_count_once():
    "Ten copies of each item say no more than one of them does."
    tokens, old, new = drawn(np.random.default_rng(2), 60, 1.04)
    ten = [np.repeat(x, 10) for x in (tokens, old, new)]
    names = [f"c{i // 10}" for i in range(600)]
    alone, told, not_told = judged(tokens, old, new), judged(*ten, names), judged(*ten)
    assert told.high - told.low > 0.9 * (alone.high - alone.low) and not_told.high < told.high
    assert "60 clusters" in told.sentence


def test_one_item_that_is_much_worse_widens_the_interval():
    "A tail is seldom seen whole: of what the worst item costs, the bound counts as much again, and again."
    tokens, old, _ = drawn(np.random.default_rng(4), 200)
    new = old.copy()
    new[0] += 100
    assert judged(tokens, old, new).high > math.exp(3 * 100 / tokens.sum()) - 0.01


def test_what_cannot_be_paired_is_judged_by_two_intervals_and_says_why():
    tokens, old, _ = drawn(np.random.default_rng(5), 200)
    engine, merged = report("engine", old, tokens), report("merged", old, tokens)
    longer = report("merged", old, np.r_[tokens[0] + 1, tokens[1:]])
    fewer = report("merged", old[:-3], tokens[:-3])
    for other, why in (
        (replace(merged, samples={}), "merged keeps no log-likelihoods of its items"),
        (fewer, "3 ids stand in only one of the two reports"),
        (longer, "two tokenizers are compared by bits_per_byte"),
    ):
        [found] = judge_rule(read_rule(RULE), {"engine": engine, "merged": other})
        assert found.outcome == "inconclusive" and "worst ends of two intervals, since" in found.sentence
        assert why in found.sentence, found.sentence
    by_bytes = report("merged", old, tokens)
    table = {**by_bytes.samples["language"], "tokens": [t + 1 for t in tokens.tolist()]}
    [found] = judge_rule(
        read_rule(RULE | {"metric": "bits_per_byte"}),
        {"engine": engine, "merged": replace(by_bytes, samples={"language": table})},
    )
    assert found.outcome == "pass"


def test_a_perplexity_that_its_items_contradict_is_an_error():
    tokens, old, _ = drawn(np.random.default_rng(6), 100)
    engine = report("engine", old * 1.5, tokens)
    doctored = replace(engine, measurements=report("engine", old, tokens).measurements)
    [found] = judge_rule(read_rule(RULE), {"engine": doctored, "merged": report("merged", old, tokens)})
    assert found.outcome == "error" and "average to" in found.sentence
    broken = replace(engine, samples={"language": {**engine.samples["language"], "tokens": ["x"] * 100}})
    [found] = judge_rule(read_rule(RULE), {"engine": broken, "merged": report("merged", old, tokens)})
    assert found.outcome == "error" and "no number of tokens" in found.sentence


def test_items_are_planned_by_the_spread_of_pairs():
    tokens, old, new = drawn(np.random.default_rng(8), 40, 1.08)
    pair = {"engine": report("engine", new, tokens), "merged": report("merged", old, tokens)}
    rule = read_rule(RULE)
    [found] = judge_rule(rule, pair)
    assert found.outcome == "inconclusive" and 40 < found.needs < 2000
    apart = {k: replace(v, samples={}) for k, v in pair.items()}
    assert ratio_needed(rule, apart, 0.05) > 20 * ratio_needed(rule, pair, 0.05)
    assert plan_rule(rule, lead=0.02, reports=pair)[0] > plan_rule(rule, lead=0.05, reports=pair)[0]
    assert bound_ratio(rule, pair)[1] < bound_ratio(rule, apart)[1]


@pytest.mark.parametrize("metric", ["perplexity", "bits_per_byte", "answer_nll"])
def test_the_self_test_plants_a_dear_engine_in_its_items(metric):
    tokens, old, _ = drawn(np.random.default_rng(9), 200)
    pair = {"engine": report("engine", old, tokens), "merged": report("merged", old, tokens)}
    nll = Measurement("answer_nll", float(old.mean()), 200, direction="lower", samples="language/nll", unit="nats")
    pair = {k: replace(v, measurements=(*v.measurements, nll)) for k, v in pair.items()}
    [bite] = selftest({"rules": [RULE | {"metric": metric}]}, pair)
    assert bite.bites, bite


def test_few_items_let_no_perplexity_pass_and_the_plan_says_so():
    "Ten items passed at the limit in up to 20 of 100 simulations, and a plan named seven of them."
    rng = np.random.default_rng(8)
    tokens, old, new = drawn(rng, 200, 1.01, 0.05)
    pair = lambda n: {s: report(s, x[:n], tokens[:n]) for s, x in (("engine", new), ("merged", old))}
    need, why = plan_rule(read_rule(RULE), lead=0.05, reports=pair(200))
    assert need == ENOUGH and f"{ENOUGH} items, or clusters, at least" in why
    for n, outcome in ((ENOUGH - 1, "inconclusive"), (ENOUGH, "pass")):
        [found] = judge_rule(read_rule(RULE), pair(n))
        assert found.outcome == outcome and (found.needs == ENOUGH or outcome == "pass"), found
    ten = {s: report(s, np.repeat(x, 10), np.repeat(tokens, 10), [f"c{i // 10}" for i in range(2000)]) for s, x in (("engine", new), ("merged", old))}  # fmt: skip
    assert plan_rule(read_rule(RULE), lead=0.05, reports=ten)[0] == 10 * ENOUGH


def test_few_items_pass_too_often():
    "Why there is a floor: an engine at its limit, on ten items whose losses have log-normal tails."
    rng, passed = np.random.default_rng(10), 0
    for _ in range(200):
        tokens = rng.poisson(20, 10) + 2
        old, most = 0.3 * tokens * rng.lognormal(-0.5, 1.0, 10), math.log(1.10) * tokens
        new = old + most * rng.lognormal(-0.5, 1.0, 10)
        passed += _heavy(new / tokens.mean(), (old + most) / tokens.mean(), 0.05, None).low >= 0
    assert passed > 12


def test_items_are_joined_once_for_a_rule(monkeypatch):
    tokens, old, new = drawn(np.random.default_rng(8), 40, 1.08)
    pair, calls = {"engine": report("engine", new, tokens), "merged": report("merged", old, tokens)}, []
    import llmkit.gate.ratios as ratios

    kept = ratios.likelihoods
    monkeypatch.setattr(ratios, "likelihoods", lambda *a: calls.append(a) or kept(*a))
    for reports in (pair, {**pair, "merged": replace(pair["merged"], samples={})}):
        calls.clear()
        [found] = judge_rule(read_rule(RULE), reports)
        assert found.outcome == "inconclusive" and len(calls) == 2
    assert below(read_rule(RULE), reports) == (None, "merged keeps no log-likelihoods of its items")
