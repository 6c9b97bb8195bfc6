"""Advice of an inconclusive verdict, and margins below the noise of the measurement."""

import numpy as np
import pytest

from llmkit.core.report import Measurement, Report
from llmkit.gate.intervals import bootstrap, wilson
from llmkit.gate.judge import judge, judge_rule
from llmkit.gate.plan import about
from llmkit.gate.policy import read_rule
from llmkit.gate.run import plan_rule


def rated(subject, values, **more):
    "A report with one accuracy and its samples."
    m = Measurement("accuracy", float(np.mean(values)), len(values), samples="task/correct")
    extra = tuple(Measurement(k, v, 100, direction="lower") for k, v in more.items())
    return Report(subject, "", "s@1", (m, *extra), {"task": {"id": list(range(len(values))), "correct": list(values)}})


def pair(n, differ, seed=0):
    "Two equally good models that differ on a share of the items."
    k = round(n * differ / 2)
    old = [1] * (n - 2 * k) + [1] * k + [0] * k
    new = [1] * (n - 2 * k) + [0] * k + [1] * k
    return {"engine": rated("engine", new), "merged": rated("merged", old)}


def test_equal_models_are_told_how_many_items_pass():
    "The textbook's formula says 1,546; with the test that is run, the power of 80 % takes 1,617."
    rule = {"metric": "accuracy", "noninferiority": 0.02, "against": "merged"}
    result = judge({"rules": [rule]}, pair(400, 0.1)).reasons[0]
    assert (result.outcome, result.needs) == ("inconclusive", 1617)
    assert "needs about 1,620 items" in result.sentence
    assert judge({"rules": [rule]}, pair(3000, 0.1)).outcome == "pass"


@pytest.mark.parametrize(
    "rate,limit,test,bound", [(0.9, 0.88, "min", "wilson"), (0.02, 0.03, "max", "clopper_pearson")]
)
def test_the_advised_number_of_items_decides(rate, limit, test, bound):
    rule = read_rule({"metric": "accuracy", test: limit, "bound": bound})
    k, better = round(200 * rate), "higher" if test == "min" else "lower"
    report = lambda share, n: {"engine": Report("engine", "", "s@1", (Measurement("accuracy", share, n, direction=better),))}  # fmt: skip
    [first] = judge_rule(rule, report(k / 200, 200))
    assert first.outcome == "inconclusive" and f"about {about(first.needs)} items" in first.sentence
    drawn, counts = np.unique(np.random.default_rng(0).binomial(first.needs, k / 200, 400), return_counts=True)
    passed = np.array([judge_rule(rule, report(x / first.needs, first.needs))[0].outcome == "pass" for x in drawn])
    assert abs(counts[passed].sum() / 400 - 0.8) < 3 * np.sqrt(0.8 * 0.2 / 400)


def test_the_advice_for_a_bootstrapped_score_decides():
    rng, rule = np.random.default_rng(3), read_rule({"metric": "score", "min": 0.5, "bound": "interval"})

    def report(n, seed):
        x = np.random.default_rng(seed).normal(0.56, 0.4, n)
        ci = bootstrap(x, times=400)
        return {"engine": Report("engine", "", "s@1", (Measurement("score", float(x.mean()), n, ci.low, ci.high),))}

    x = rng.normal(0, 1, 80)
    x = (x - x.mean()) / x.std() * 0.4 + 0.56
    ci = bootstrap(x)
    first = Report("engine", "", "s@1", (Measurement("score", 0.56, 80, ci.low, ci.high),))
    [result] = judge_rule(rule, {"engine": first})
    assert result.outcome == "inconclusive" and 150 < result.needs < 800 and "needs about" in result.sentence
    passed = [judge_rule(rule, report(result.needs, s))[0].outcome == "pass" for s in range(120)]
    assert 0.65 < np.mean(passed) < 0.95


def clustered(n, k, differ, seed=0):
    "Two models that differ on a share of n items, which hang together in k clusters; the older report knows none."
    rng = np.random.default_rng(seed)
    of = np.arange(n) % k
    old = (rng.random(n) < 0.9).astype(int)
    new = np.where((rng.random(k) < differ)[of], rng.random(n) < 0.9, old).astype(int)
    reports = {"engine": rated("engine", new.tolist()), "merged": rated("merged", old.tolist())}
    reports["engine"].samples["task"]["cluster"] = [f"c{c}" for c in of]
    return reports


def test_clusters_are_counted_as_clusters():
    rule = {"metric": "accuracy", "noninferiority": 0.03, "against": "merged", "cluster": "cluster"}
    assert judge({"rules": [rule]}, clustered(4000, 1000, 0.1)).outcome == "pass"
    rule["noninferiority"] = 0.015
    result = judge({"rules": [rule]}, clustered(800, 200, 0.1, 4)).reasons[0]
    assert result.outcome == "inconclusive" and "clusters (there are 200)" in result.sentence
    assert "items" not in result.sentence and result.needs > 800
    many = round(result.needs / 4)
    passed = [judge({"rules": [rule]}, clustered(4 * many, many, 0.1, s)).outcome == "pass" for s in range(1, 25)]
    assert many > 200 and np.mean(passed) > 0.6, (many, passed)


def test_a_handful_of_clusters_promises_no_number_of_items():
    rule = {"metric": "accuracy", "noninferiority": 0.03, "against": "merged", "cluster": "cluster"}
    result = judge({"rules": [rule]}, clustered(700, 3, 0.7, 1)).reasons[0]
    assert result.outcome == "inconclusive" and result.needs is None
    assert "3 clusters show too little" in result.sentence and "needs about" not in result.sentence
    assert -1 <= result.low < result.high <= 1


def test_identical_answers_in_clusters_are_as_many_as_there_are_clusters():
    rule = {"metric": "accuracy", "noninferiority": 0.02, "against": "merged", "cluster": "cluster"}
    few = judge({"rules": [rule | {"min_n": 200}]}, clustered(400, 40, 0.0)).reasons[0]
    assert (few.outcome, few.n) == ("inconclusive", 400) and "clusters (there are 40)" in few.sentence
    assert judge({"rules": [rule]}, clustered(400, 200, 0.0)).outcome == "pass"


def test_no_number_is_promised_where_none_would_do():
    rule = read_rule({"metric": "accuracy", "min": 0.9, "bound": "wilson"})
    [result] = judge_rule(rule, {"engine": rated("engine", [1] * 90 + [0] * 10)})
    assert result.needs is None and "Not sure enough at this n" in result.sentence


@pytest.mark.parametrize("noise,margin,outcome", [(0.0, 0.02, "pass"), (0.015, 0.02, "pass"), (0.02, 0.02, "error"), (0.05, 0.02, "error")])  # fmt: skip
@pytest.mark.parametrize("noisy", ["engine", "merged"])
def test_a_margin_must_be_above_the_noise_of_both(noise, margin, outcome, noisy):
    reports = pair(4000, 0.05)
    reports[noisy] = rated(noisy, reports[noisy].samples["task"]["correct"], accuracy_noise=noise)
    verdict = judge({"rules": [{"metric": "accuracy", "noninferiority": margin, "against": "merged"}]}, reports)
    assert verdict.outcome == outcome
    if outcome == "error":
        assert f"measured noise {noise:.4g}" in verdict.reasons[0].sentence and "Widen" in verdict.reasons[0].sentence


def test_no_bootstrap_at_nothing_of_n():
    zero = {"engine": Report("engine", "", "s@1", (Measurement("rate", 0.0, 127, direction="lower"),))}
    [interval] = judge_rule(read_rule({"metric": "rate", "max": 0.03, "bound": "interval"}), zero)
    [exact] = judge_rule(read_rule({"metric": "rate", "max": 0.03, "bound": "clopper_pearson"}), zero)
    [tight] = judge_rule(read_rule({"metric": "rate", "max": 0.02, "bound": "clopper_pearson"}), zero)
    assert (interval.outcome, exact.outcome, tight.outcome) == ("error", "pass", "inconclusive")
    assert exact.high == pytest.approx(0.0233, abs=5e-5) and tight.needs == 149
    assert wilson(0, 127, 0.95, "upper").high < exact.high


def nll(subject, values):
    "A report whose metric is a mean of what each item cost."
    table = {"language": {"id": [f"q{i}" for i in range(len(values))], "nll": list(values)}}
    m = Measurement("answer_nll", float(np.mean(values)), len(values), direction="lower", samples="language/nll")
    return Report(subject, "", "demo@1", (m,), table)


def test_a_ratio_of_means_is_judged_and_planned_item_by_item():
    "Items differ by a factor of ten, and the models by three percent: two intervals could not tell, pairs can."
    rng = np.random.default_rng(0)
    old = rng.lognormal(0, 1.2, 400)
    reports = {"merged": nll("merged", old), "engine": nll("engine", old * rng.normal(1.03, 0.1, 400))}
    rule = {"metric": "answer_nll", "max_ratio": 1.1, "against": "merged", "bound": "interval"}
    result = judge({"rules": [rule]}, reports).reasons[0]
    assert result.outcome == "pass" and result.low < 1.03 < result.high < 1.1 and "paired" in result.sentence
    assert judge({"rules": [rule | {"max_ratio": 1.001}]}, reports).outcome == "fail"
    few = {s: nll(s, r.column("language/nll")[:40]) for s, r in reports.items()}
    near = judge({"rules": [rule | {"max_ratio": 1.04}]}, few).reasons[0]
    assert near.outcome == "inconclusive" and (near.needs is None or near.needs > 40)
    need, why = plan_rule(read_rule(rule), lead=0.02, reports=reports)
    assert need and plan_rule(read_rule(rule), lead=0.04, reports=reports)[0] < need and "true ratio of 1.08" in why


def test_a_ratio_at_its_limit_passes_at_most_one_time_in_twenty():
    rng = np.random.default_rng(1)
    rule = read_rule({"metric": "answer_nll", "max_ratio": 1.1, "against": "merged", "bound": "interval"})
    passed = 0
    for _ in range(300):
        old = rng.lognormal(0, 1, 60)
        new = 1.1 * old * rng.lognormal(-0.02, 0.2, 60)  # a mean factor of one
        [result] = judge_rule(rule, {"merged": nll("merged", old), "engine": nll("engine", new)})
        passed += result.outcome == "pass"
    assert passed <= 26  # P(more | 5 %) = 0.2 %


def test_a_gain_is_planned_with_the_share_it_was_seen_with():
    "Fine-tuning changes nine answers in ten: an assumed gain of 5 % on those would ask for thousands of items."
    old, new = [0] * 95 + [1] * 5, [1] * 90 + [0] * 10
    reports = {"base": rated("base", old), "engine": rated("engine", new)}
    rule = read_rule({"metric": "accuracy", "superiority": 0.0, "against": "base"})
    need, why = plan_rule(rule, reports=reports)
    assert need < 20 and "at least, as measured" in why
    assert plan_rule(rule)[0] > 200
