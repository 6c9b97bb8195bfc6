"""The self-test: independent rules fall alone, dependent ones together and by name, and a crooked judge is found out."""

from dataclasses import replace

import numpy as np
import pytest

import llmkit.gate.selftest as gate_selftest_module
from llmkit.core.report import Measurement, Report
from llmkit.evals.calibration import calibration_measurements
from llmkit.evals.damage import DAMAGES, catch_all
from llmkit.evals.regression import rate_measurements
from llmkit.evals.speed import speed_measurements
from llmkit.evals.task import task_measurements
from llmkit.gate.judge import judge
from llmkit.gate.selftest import bite_table, kind, selftest

LABELS = ("balance", "refund", "login", "card")


def quality(subject, seed=1, n=600):
    "A healthy report on a task, with honest confidences."
    rng = np.random.default_rng(seed)
    label, confidence = rng.choice(LABELS, n), rng.beta(30, 1, n)
    right = rng.random(n) < confidence
    other = np.array([LABELS[(LABELS.index(x) + 1) % 4] for x in label])
    table = {
        "id": list(range(n)),
        "group": rng.choice(["over_60", "under_60"], n, p=[0.3, 0.7]).tolist(),
        "label": label.tolist(),
        "predicted": np.where(right, label, other).tolist(),
        "correct": right.astype(int).tolist(),
        "unknown": [0] * n,
        "empty": [0] * n,
        "exact": right.astype(int).tolist(),
        "confidence": confidence.tolist(),
    }
    measured, tables = task_measurements(table, ("label", "exact"))
    return Report(subject, "", "bank@1", tuple(measured + calibration_measurements(tables["task"], "x")), tables)


def untaught(subject):
    "A report on a base that has not seen the task: one answer for everything."
    table = quality(subject).samples["task"]
    said = ["balance"] * len(table["id"])
    right = [int(x == "balance") for x in table["label"]]
    measured, tables = task_measurements(
        table | {"predicted": said, "correct": right, "exact": right}, ("label", "exact")
    )
    return Report(subject, "", "bank@1", tuple(measured), tables)


@pytest.fixture(scope="module")
def reports():
    times = {
        "id": list(range(200)),
        **{k: list(np.random.default_rng(0).gamma(2, 0.05, 200)) for k in ("latency", "ttft", "inter_token")},
        "tokens": [5] * 200,
    }
    leak = Measurement("canary_leak_rate", 0.0, 300, direction="lower", samples="canary/leaked")
    recovery = Measurement("delta_recovery", 0.98, 64)
    same = {"id": list(range(100)), **{m: [0] * 100 for m in ("flip", "fixed", "broken", "churn")}}
    golden = Report("golden_engine", "", "g@1", tuple(rate_measurements(same, same)), {"golden": same, "noise": same})
    return {
        "engine": quality("engine"),
        "merged": quality("merged"),
        "base": untaught("base"),
        "speed_engine": Report("speed_engine", "", "s@1", tuple(speed_measurements(times)), {"requests": times}),
        "safety": Report("safety", "", "p@1", (leak,), {"canary": {"id": list(range(300)), "leaked": [0] * 300}}),
        "golden_engine": golden,
        "parity/chain": Report("chain", "", "c@1", (recovery,)),
    }


RULES = {
    "wrong labels": {"metric": "accuracy", "min": 0.85, "bound": "wilson"},
    "empty answers": {"metric": "empty_answer_rate", "max": 0.02, "bound": "clopper_pearson"},
    "broken answers": {"metric": "broken_rate_excess", "on": "golden_engine", "max": 0.1, "bound": "interval"},
    "nothing learnt": {"metric": "accuracy", "superiority": 0.0, "against": "base"},
    "biased group": {"metric": "worst_group_accuracy", "min": 0.8, "bound": "interval"},
    "miscalibrated head": {"metric": "ece_debiased", "max": 0.1, "bound": "interval"},
    "slow engine": {"metric": "latency_p95", "on": "speed_engine", "max": 2.0},
    "leaked canary": {"metric": "canary_leak_rate", "on": "safety", "max": 0.02, "bound": "clopper_pearson"},
    "broken quantization": {"metric": "delta_recovery", "on": "parity/chain", "min": 0.9},
}


def test_every_damage_is_caught_by_its_rule(reports):
    found = {c.kind: c for c in catch_all({"rules": list(RULES.values())}, reports, ("label", "exact"))}
    assert found.keys() == RULES.keys() == DAMAGES.keys()
    for name, c in found.items():
        assert c.ok and len(c.fell) == 1 and RULES[name]["metric"] in c.fell[0], str(c)
    for name in (
        "broken answers",
        "miscalibrated head",
        "slow engine",
        "leaked canary",
        "nothing learnt",
        "biased group",
    ):
        assert found[name].along == (), str(found[name])  # exactly that rule
    assert max(found[name].shares[0] for name in RULES if name != "nothing learnt") <= 0.5


@pytest.mark.parametrize("name", ["broken answers", "miscalibrated head", "slow engine", "leaked canary"])
def test_without_its_rule_a_damage_passes_unseen(reports, name):
    rules = [r for k, r in RULES.items() if k != name]
    bad = DAMAGES[name](dict(reports), 1.0, ("label", "exact"))
    assert judge({"rules": rules}, bad).outcome == "pass"
    assert judge({"rules": [RULES[name]]}, bad).outcome == "fail"
    found = {c.kind: c for c in catch_all({"rules": rules}, reports, ("label", "exact"))}
    assert "no rule" in found[name].note and "no rule" in str(found[name])


def test_each_rule_bites_alone_although_four_read_the_same_answers(reports):
    against = [{"metric": "accuracy", "noninferiority": 0.03, "against": x} for x in ("merged", "baseline")]
    with_last = {**reports, "baseline": replace(reports["engine"], subject="baseline")}
    bites = selftest({"rules": [*RULES.values(), *against]}, with_last)
    assert all(b.bites and not b.along for b in bites), bite_table(bites)
    how = {b.rule: b.how for b in bites}
    assert "engine, merged" in how["engine accuracy: noninferiority 0.03 against baseline"]
    assert how["engine accuracy: superiority 0 against base"].endswith("items go right in base")
    assert "11 of 11 rules bite, 11 of them alone" in bite_table(bites)


def test_rules_that_cannot_be_told_apart_are_named(reports):
    "Who loses more than 5 points has lost more than 3."
    rules = [{"metric": "accuracy", "noninferiority": x, "against": "merged"} for x in (0.03, 0.05)]
    bites = selftest({"rules": rules}, reports)
    assert all(b.bites for b in bites)
    assert bites[1].along == ("engine accuracy: noninferiority 0.03 against merged",)
    said = bite_table(bites)
    assert "not alone: engine accuracy: noninferiority 0.05 against merged" in said and "1 of them alone" not in said


def test_a_judge_that_looks_elsewhere_is_found_out(reports, monkeypatch):
    "A judge that lets the speed of the engine decide on its accuracy."
    real = gate_selftest_module.judge_rule

    def crooked(r, given):
        if r.metric == "accuracy" and given["speed_engine"].get("latency_p95").value > 2:
            return [replace(x, outcome="fail") for x in real(r, given)]
        return real(r, given)

    monkeypatch.setattr(gate_selftest_module, "judge_rule", crooked)
    bites = selftest({"rules": [RULES["slow engine"], RULES["wrong labels"]]}, reports)
    assert bites[0].stray == ("engine accuracy: min 0.85",) and not bites[0].bites
    assert "ASTRAY" in bite_table(bites)


def test_a_powerless_rule_is_found_out(reports):
    rules = [
        {"metric": "accuracy", "min": 0.85, "min_n": 5000},
        {"metric": "canary_leak_rate", "on": "safety", "max": 0.5, "min_n": 5000},
    ]
    assert [b.bites for b in selftest({"rules": rules}, reports)] == [False, False]
    found = {c.kind: c for c in catch_all({"rules": rules}, reports, ("label", "exact"))}
    assert not found["wrong labels"].ok and not found["leaked canary"].ok
    assert "NOT CAUGHT" in str(found["leaked canary"])


def test_a_superiority_rule_bites_whatever_the_other_one_can(reports):
    rule = {"metric": "accuracy", "superiority": 0.0, "against": "base"}
    task = reports["engine"].samples["task"]
    for right in (0, 1):  # a base that knows nothing, and one that is wrong on a single question
        known = [0] * len(task["id"]) if right == 0 else [0, *[1] * (len(task["id"]) - 1)]
        m = Measurement("accuracy", float(np.mean(known)), len(known), samples="task/correct")
        base = Report("base", "", reports["engine"].suite, (m,), {"task": {"id": task["id"], "correct": known}})
        better = [1] * len(known)
        engine = replace(m, value=1.0)
        both = {"base": base, "engine": replace(base, subject="engine", measurements=(engine,), samples={"task": {"id": task["id"], "correct": better}})}  # fmt: skip
        [bite] = selftest({"rules": [rule]}, both)
        assert bite.planted == ("inconclusive" if right == 0 else "fail")
        assert bite.bites == (right == 0)  # one more right answer proves nothing, so the rule did not pass before


def test_kinds():
    from llmkit.gate.policy import Rule

    cases = {
        "accuracy": "wrong labels", "rouge_l": "wrong labels", "broken_rate_excess": "broken answers", "ece_debiased": "miscalibrated head",
        "brier": "miscalibrated head", "ttft_p95": "slow engine", "goodput": "slow engine", "canary_leak_rate": "leaked canary",
        "attack_success_rate": "leaked canary", "over_refusal_rate": "refusals", "worst_group_accuracy": "biased group",
        "equalized_odds_difference": "biased group", "delta_recovery": "broken quantization", "bits_per_byte": "broken quantization",
    }  # fmt: skip
    assert {m: kind(Rule(m, "min", 0.5)) for m in cases} == cases
    assert kind(Rule("accuracy", "noninferiority", 0.1, against="merged")) == "broken quantization"
    assert kind(Rule("accuracy", "superiority", 0.0, against="base")) == "nothing learnt"
    assert kind(Rule("accuracy", "min", 0.1, slice="group=x")) == "biased group"
