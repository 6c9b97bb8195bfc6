"""Records that tell what hangs together: every interval of their report counts it for what it is worth."""

import numpy as np
import pytest

from llmkit.core.report import Report
from llmkit.evals.calibration import calibration_measurements, debiased_ece
from llmkit.evals.choice import Question, choice_measurements
from llmkit.evals.damage import mute_engine
from llmkit.evals.fairness import fairness_measurements
from llmkit.evals.language import language_measurements
from llmkit.evals.overlap import overlap_measurements
from llmkit.evals.suite import make_suite
from llmkit.evals.swaps import swap_measurements
from llmkit.evals.task import mean_score, task_measurements
from llmkit.gate.judge import judge

SCORERS = ("label", "exact", "refusal")


def table(size=10, k=60, seed=3):
    "Answers on k templates of some questions each, that are right or wrong together."
    rng = np.random.default_rng(seed)
    n, by = k * size, np.repeat(np.arange(k), size)
    label = np.array(["lost_card", "balance", "refusal"])[by % 3]
    right = np.repeat(rng.random(k) < 0.85, size)
    said = np.where(right, label, np.array(["balance", "refusal", "lost_card"])[by % 3])
    return {
        "id": list(range(n)),
        "group": np.array(["18-30", "31-60"])[by % 2].tolist(),
        "cluster": [f"t{c}" for c in by],
        "label": label.tolist(),
        "predicted": said.tolist(),
        "correct": right.astype(int).tolist(),
        "unknown": [0] * n,
        "empty": [0] * n,
        "exact": right.astype(int).tolist(),
        "confidence": rng.beta(8, 1, n).tolist(),
        "answer": np.where(right, "your card is blocked", "see the app").tolist(),
        "reference": ["your card is blocked"] * n,
    }


def measured(t):
    "All that the task's table gives, by metric and slice."
    t = dict(t)
    out, tables = task_measurements(t, SCORERS)
    out += calibration_measurements(tables["task"], "x") + overlap_measurements(tables["task"], ["rouge_l", "token_f1"])
    out += [m for m in fairness_measurements(t, "refusal") if m.metric.endswith(("_gap", "_difference"))]
    return {(m.metric, m.slice): m for m in out}, tables


def test_every_interval_of_a_task_knows_the_clusters():
    t = table()
    together, tables = measured(t)
    alone, _ = measured({k: v for k, v in t.items() if k != "cluster"})
    width = lambda m: m.high - m.low
    wider = [k for k, m in alone.items() if m.low is not None and width(m) > 0 and width(together[k]) > 1.3 * width(m)]
    for metric in ("accuracy", "exact_match", "macro_f1", "worst_group_accuracy", "refusal_rate", "over_refusal_rate", "empty_answer_rate", "unknown_label_rate", "rouge_l", "token_f1", "normal_match", "accuracy_gap", "demographic_parity_difference", "equalized_odds_difference"):  # fmt: skip
        assert (metric, "all") in wider, metric
    assert ("accuracy", "group=18-30") in wider and ("rouge_l", "label=balance") in wider
    assert all(together[k].value == m.value for k, m in alone.items() if k[0] != "ece_debiased")
    assert all("cluster" in tables[n] for n in ("task", "harmful", "harmless"))


def test_calibration_is_known_by_clusters():
    t = table()
    free, tied = (debiased_ece(t["confidence"], t["correct"], clusters=c) for c in (None, t["cluster"]))
    assert tied[1] < free[1] and tied[2] > free[2]


def test_likelihoods_choices_and_swaps_carry_clusters():
    rng, by = np.random.default_rng(0), [f"t{i // 10}" for i in range(300)]
    nll = np.repeat(rng.gamma(2, 1, 30), 10)
    words = {"nll": nll.tolist(), "tokens": [5] * 300, "words": [3] * 300, "bytes": [20] * 300}
    free, tied = ({m.metric: m for m in language_measurements({**words, **c})} for c in ({}, {"cluster": by}))
    for metric in ("perplexity", "answer_nll"):
        assert tied[metric].high - tied[metric].low > 2 * (free[metric].high - free[metric].low)
    assert Question("a", "?", ("x", "y"), 0).cluster == ""
    answers = {"id": range(300), "group": [""] * 300, "correct": [int(x < 2) for x in nll]}
    answers |= {f"correct_{k}": answers["correct"] for k in ("norm", "bytes")}
    free, tied = ({m.metric: m for m in choice_measurements({**answers, **c}, calibration=False)} for c in ({}, {"cluster": by}))  # fmt: skip
    assert tied["acc"].high - tied["acc"].low > 2 * (free["acc"].high - free["acc"].low)
    lost = np.repeat(rng.random(30) < 0.2, 10).astype(int)
    swaps = {"id": range(300), "swap": ["gender"] * 300, "flipped": lost, "control": [0] * 300, "correct": [1] * 300, "correct_swapped": 1 - lost}  # fmt: skip
    free, tied = ({m.metric: m for m in swap_measurements({**swaps, **c})} for c in ({}, {"cluster": by}))
    for metric in ("flip_rate", "swap_accuracy_difference", "excess_flip_rate"):
        assert tied[metric].high - tied[metric].low > 1.8 * (free[metric].high - free[metric].low), metric


def test_one_template_has_no_macro_f1_interval_and_a_mean_without_spread_none():
    t = table(k=1) | {"correct": [1] * 9 + [0], "predicted": ["lost_card"] * 9 + ["balance"]}
    out = {m.metric: m for m in task_measurements(t, SCORERS)[0] if m.slice == "all"}
    assert out["macro_f1"].low is None and "one cluster" in out["macro_f1"].method
    assert out["accuracy"].low < 1e-3 and out["accuracy"].high > 1 - 1e-3
    same = mean_score("rouge_l", [0.0, 1.0] * 20, "task/rouge_l", clusters=[i // 2 for i in range(40)])
    assert same.low is None and "nothing to resample" in same.method


def test_a_mute_engine_is_named_by_a_rule_of_its_own():
    t = table(size=1, k=400)
    out, tables = task_measurements(t, SCORERS)
    healthy = {"engine": Report("engine", "", "s@1", tuple(out), tables)}
    policy = {"rules": [{"metric": "empty_answer_rate", "max": 0.02, "bound": "clopper_pearson"}]}
    assert judge(policy, healthy).outcome == "pass"
    mute = mute_engine(dict(healthy), 0.1, SCORERS)
    assert mute["engine"].get("empty_answer_rate").value == pytest.approx(0.1)
    assert judge(policy, mute).outcome == "fail" and "" in mute["engine"].samples["task"]["answer"]
    assert mute_engine({"engine": Report("engine", "", "s@1")}, 0.1, SCORERS) is None  # as older kits measured


def test_a_suite_without_clusters_has_no_such_column():
    record = {"id": 1, "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a: b"}]}
    assert make_suite("s", 1, [record]).items[0].cluster == ""


def test_perplexity_of_heavy_tails_misses_little_more_than_it_says():
    "Answers whose log-likelihoods have a log-normal spread: the percentile bootstrap missed one in eleven, almost all on one side."
    rng, misses, times = np.random.default_rng(5), 0, 120
    truth = float(np.exp(np.exp(-1 + 1.5**2 / 2)))
    for _ in range(times):
        tokens = rng.integers(3, 40, 300)
        nll = tokens * rng.lognormal(-1, 1.5, 300)
        [m] = [m for m in language_measurements({"nll": nll, "tokens": tokens, "words": tokens, "bytes": tokens}) if m.metric == "perplexity"]  # fmt: skip
        misses += not m.low <= truth <= m.high
    assert misses / times <= 0.11
