"""Every metric says which way is better, and lies in its own interval: a rule, a Pareto front and a comparison go by it."""

import re

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, log_loss

from llmkit.evals.calibration import calibration_measurements
from llmkit.evals.drive import Trace
from llmkit.evals.fairness import fairness_measurements
from llmkit.evals.load import Objective, load_report
from llmkit.evals.regression import rate_measurements
from llmkit.evals.swaps import swap_measurements
from llmkit.evals.task import task_measurements
from llmkit.gate.paired import score_lower

HIGH = """accuracy macro_f1 f1 exact_match worst_group_accuracy refusal_rate accuracy_difference demographic_parity_ratio
equalized_odds_ratio objective_rate requests_per_second tokens_per_second goodput fixed_rate fixed_rate_excess"""
LOW = """unknown_label_rate over_refusal_rate ece ece_excess ece_debiased ece_adaptive mce brier log_loss accuracy_gap
groups_worse groups_unjudged demographic_parity_difference equalized_odds_difference equalized_odds_unjudged flip_rate
excess_flip_rate swaps_biased error_rate flip_rate_excess broken_rate broken_rate_excess churn_rate churn_rate_excess"""
FACTS = """ece_null ece_adaptive_null swap_accuracy_difference offered_per_second flip_rate_noise fixed_rate_noise
broken_rate_noise churn_rate_noise"""
QUANTILES = [f"{m}_p{q}" for m in ("latency", "ttft", "inter_token", "longest_gap", "queued") for q in (50, 95, 99)]
BETTER = dict.fromkeys(HIGH.split(), "higher") | dict.fromkeys([*LOW.split(), *QUANTILES], "lower") | dict.fromkeys(FACTS.split(), "none")  # fmt: skip


@pytest.fixture(scope="module")
def table():
    "Answers of two groups, one of which is served worse."
    rng, n = np.random.default_rng(0), 600
    group = np.where(np.arange(n) % 2, "old", "young")
    label = rng.choice(["card", "loan", "refusal"], n, p=[0.5, 0.3, 0.2])
    right = rng.random(n) < np.where(group == "old", 0.75, 0.95)
    said = np.where(right, label, rng.choice(["card", "refusal"], n))
    sure = np.clip(rng.beta(8, 2, n), 0.01, 0.99)
    return {
        "id": [f"q{i}" for i in range(n)], "group": group.tolist(), "label": label.tolist(), "predicted": said.tolist(),
        "correct": (said == label).astype(int).tolist(), "unknown": [0] * n, "exact": (said == label).astype(int).tolist(),
        "confidence": sure.tolist(),
    }  # fmt: skip


@pytest.fixture(scope="module")
def measured(table):
    "Measurements of every suite that needs no engine."
    rng = np.random.default_rng(1)
    draw = lambda p: (rng.random(200) < p).astype(int).tolist()
    swaps = {"id": list(range(200)), "swap": ["gender"] * 200, "flipped": draw(0.2), "control": draw(0.1), "correct": draw(0.9), "correct_swapped": draw(0.8)}  # fmt: skip
    rates = {k: draw(0.1) for k in ("flip", "fixed", "broken", "churn")} | {"right": [1] * 200}
    rows = [
        Trace(i, i * 0.5, i * 0.5, [i * 0.5 + 0.2, i * 0.5 + 0.4 + 0.3 * (i % 7 == 0)], 2).row() for i in range(200)
    ]
    out, _ = task_measurements(table, ("label", "exact", "refusal"))
    out += fairness_measurements(table, "refusal") + swap_measurements(swaps) + rate_measurements(rates, rates)
    return [*out, *calibration_measurements(dict(table), "drawn"), *load_report(rows, "load", 2, Objective(0.6)).measurements]  # fmt: skip


def test_every_metric_says_which_way_is_better(measured):
    assert {m.metric: m.direction for m in measured} == BETTER


def test_every_value_lies_in_its_interval(measured):
    for m in measured:
        assert (m.low is None or m.low <= m.value + 1e-9) and (m.high is None or m.value <= m.high + 1e-9), m


def test_the_losses_are_those_of_sklearn_row_by_row(table):
    scored = dict(table)
    found = {m.metric: m for m in calibration_measurements(scored, "drawn")}
    y, c = table["correct"], table["confidence"]
    assert found["log_loss"].value == pytest.approx(log_loss(y, c))
    assert found["brier"].value == pytest.approx(brier_score_loss(y, c))
    assert np.mean(scored["log_loss"]) == pytest.approx(log_loss(y, c)) and 0 < found["brier"].low < found["brier"].high < 1  # fmt: skip


def test_a_swap_is_bounded_on_both_sides_together(measured):
    m = next(m for m in measured if m.metric == "swap_accuracy_difference")
    better, worse = (int(w) for w in re.findall(r"(\d+) (?:better|worse)", m.method))
    assert (m.low, m.high) == pytest.approx((score_lower(better, worse, 200, 0.975), -score_lower(worse, better, 200, 0.975)))  # fmt: skip
