"""How often the gate is wrong, simulated small and seeded; benchmarks/gate_null.py does it at length."""

import numpy as np
import pytest

from llmkit.gate.intervals import bootstrap
from llmkit.gate.paired import noninferiority, paired_rates, paired_scores, score_lower
from llmkit.gate.plan import pairs_needed, scores_needed


def passes(rng, n, margin, discordance, difference, times):
    "Share of simulated evaluations in which non-inferiority passes."
    b = (discordance + difference) / 2
    draws = rng.multinomial(n, [b, discordance - b, 1 - discordance], times)
    pairs, counts = np.unique(draws[:, :2], axis=0, return_counts=True)
    good = [score_lower(int(b), int(c), n) > -margin for b, c in pairs]
    return counts[good].sum() / times


@pytest.mark.parametrize("n", [50, 200, 1000])
@pytest.mark.parametrize("margin", [0.02, 0.05])
@pytest.mark.parametrize("discordance", [0.05, 0.2])
def test_a_model_at_the_margin_passes_at_most_5_percent(n, margin, discordance):
    times = 4000
    share = passes(np.random.default_rng(n), n, margin, discordance, -margin, times)
    assert share <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / times)


def test_equal_models_pass_with_the_planned_power():
    n = pairs_needed(0.02, 0.10)
    share = passes(np.random.default_rng(7), n, 0.02, 0.10, 0.0, 4000)
    assert share >= 0.8 - 2 * np.sqrt(0.8 * 0.2 / 4000)
    assert passes(np.random.default_rng(7), n - 160, 0.02, 0.10, 0.0, 4000) < 0.8 - 2 * np.sqrt(0.8 * 0.2 / 4000)


def test_equal_scores_pass_with_the_planned_power():
    "Normal differences; what the outermost of three bounds costs is within two points."
    rng, n = np.random.default_rng(8), scores_needed(0.05, 0.2)
    share = np.mean([paired_scores(np.zeros(n), rng.normal(0, 0.2, n)).against(0.05) == "pass" for _ in range(1000)])
    assert share >= 0.8 - 0.02 - 2 * np.sqrt(0.8 * 0.2 / 1000)


def test_a_worse_model_fails_and_a_better_one_passes():
    rng = np.random.default_rng(0)
    old = (rng.random(1500) < 0.9).astype(int)
    worse = old & (rng.random(1500) < 0.9)
    assert paired_rates(old, worse).against(0.02) == "fail"
    assert paired_rates(worse, old).against(0.02) == "pass"


@pytest.mark.parametrize("skew", [1, -1])
@pytest.mark.parametrize("clusters,size", [(200, 1), (60, 5)])
def test_a_mean_at_the_margin_passes_at_most_5_percent(skew, clusters, size):
    "Skewed differences with mean exactly at the margin, from items that stand alone and from clusters."
    rng, times = np.random.default_rng(11), 1000
    labels = np.repeat(np.arange(clusters), size) if size > 1 else None
    hits = 0
    for _ in range(times):
        d = np.repeat(skew * (rng.exponential(0.1, clusters) - 0.1) - 0.02, size) + rng.normal(0, 0.02, clusters * size)
        hits += paired_scores(np.zeros(len(d)), d, clusters=labels).against(0.02) == "pass"
    assert hits / times <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / times)


@pytest.mark.parametrize("sizes", [[400] + [2] * 60, [60 // (i + 1) + 1 for i in range(60)]])
def test_one_huge_cluster_is_no_evidence_of_many(sizes):
    "A share of right answers at the margin, lost by clusters, of which one is as large as many others together."
    rng, labels, hits = np.random.default_rng(12), np.repeat(np.arange(len(sizes)), sizes), 0
    for _ in range(300):
        lost = rng.beta(0.2, 0.8, len(sizes))[labels]  # a fifth, on average
        y = (rng.random(len(labels)) >= lost).astype(int)
        hits += noninferiority(np.ones(len(labels)), y, 0.2, clusters=labels).against(0.2) == "pass"
    assert hits / 300 <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 300)


def test_clusters_protect_against_false_confidence():
    "Forty passages of ten questions: ignoring the clusters would pass a model at the margin far too often."
    rng, naive, fair = np.random.default_rng(5), 0, 0
    labels = np.repeat(np.arange(40), 10)
    for i in range(150):
        d = rng.normal(-0.05, 0.3, 40)[labels] + rng.normal(0, 0.1, 400)
        naive += bootstrap(d, level=0.90, times=400, seed=i).low > -0.05
        fair += bootstrap(d, clusters=labels, level=0.90, times=400, seed=i).low > -0.05
    assert naive / 150 > 0.2 and fair / 150 < 0.12


def test_identical_and_tiny():
    assert paired_rates([1] * 10, [1] * 10).against(0.02) == "inconclusive"  # ten items prove nothing
    assert paired_rates([1] * 500, [1] * 500).against(0.02) == "pass"
