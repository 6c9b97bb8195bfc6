"""Items that hang together count for what they are worth, in every rule that counts them."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.regression.linear_model import OLS

from llmkit.core.errors import KitError
from llmkit.core.report import Measurement, Report
from llmkit.gate.clusters import ALIKE, design_effect, rate_interval
from llmkit.gate.intervals import effective, wilson
from llmkit.gate.judge import judge, judge_rule
from llmkit.gate.paired import paired_rates, paired_scores
from llmkit.gate.policy import read_rule
from llmkit.gate.run import plan_rule


def drawn(rng, k, size, p, alike):
    "Rights and wrongs of k clusters, whose shares of right answers spread by an intraclass correlation."
    shares = rng.beta(p * (1 / alike - 1), (1 - p) * (1 / alike - 1), k) if alike else np.full(k, p)
    return (rng.random((k, size)) < shares[:, None]).astype(int).ravel(), np.repeat(np.arange(k), size)


@pytest.mark.parametrize("k,size,p,alike", [(40, 10, 0.9, 0.3), (100, 4, 0.9, 0.1), (400, 2, 0.97, 0.2), (60, 10, 0.9, 0.0)])  # fmt: skip
def test_a_rate_of_clusters_misses_as_often_as_it_says(k, size, p, alike):
    rng, misses, alone, times = np.random.default_rng(0), 0, 0, 600
    for _ in range(times):
        flags, by = drawn(rng, k, size, p, alike)
        ends = rate_interval(flags, by), wilson(int(flags.sum()), len(flags))
        misses, alone = (n + (not ci.low <= p <= ci.high) for n, ci in zip((misses, alone), ends, strict=True))
    assert misses / times < 0.075
    assert alike < 0.3 or alone / times > 0.2  # as if alone, one in four


def test_the_measured_effect_is_that_of_the_cluster_robust_error():
    flags, by = drawn(np.random.default_rng(1), 80, 6, 0.8, 0.2)
    oracle = OLS(flags, np.ones(len(flags))).fit(cov_type="cluster", cov_kwds={"groups": by, "use_correction": False})
    found = float(oracle.bse[0]) ** 2 * 80 / 79 / (flags.var() / len(flags))
    c = effective(np.bincount(by, flags == 0))
    assert design_effect(flags, by) == pytest.approx((c * max(found, 1) + ALIKE * 6) / (c + ALIKE))


def rated(subject, flags, by=None, metric="accuracy", direction="higher"):
    "A report on rights and wrongs."
    table = {"id": list(range(len(flags))), "right": [int(v) for v in flags], "group": ["a", "b"] * (len(flags) // 2)}
    table |= {} if by is None else {"cluster": [str(c) for c in by], "half": [str(i % 2) for i in range(len(flags))]}
    m = Measurement(metric, float(np.mean(flags)), len(flags), direction=direction, samples="task/right")
    return Report(subject, "", "s@1", (m,), {"task": table})


together = np.repeat(np.arange(40) >= 3, 10).astype(int)  # 370 of 400, in 40 clusters that fall as a whole
by = np.arange(400) // 10


@pytest.mark.parametrize("bound", ["wilson", "clopper_pearson"])
def test_a_rule_reads_the_clusters_of_the_table(bound):
    rule = {"metric": "accuracy", "min": 0.88, "bound": bound}
    alone, [result] = judge({"rules": [rule]}, {"engine": rated("engine", together)}), judge_rule(read_rule(rule), {"engine": rated("engine", together, by)})  # fmt: skip
    assert (alone.outcome, result.outcome) == ("pass", "inconclusive")
    assert "40 clusters, design effect" in result.sentence and "clusters (there are 40)" in result.sentence
    assert result.needs > 400
    single = judge({"rules": [rule | {"cluster": "id"}]}, {"engine": rated("engine", together, by)})
    assert single.outcome == "pass"


def test_a_cluster_that_is_not_there_is_an_error():
    rule = {"metric": "accuracy", "min": 0.5, "bound": "wilson", "cluster": "halb"}
    [result] = judge_rule(read_rule(rule), {"engine": rated("engine", together, by)})
    assert result.outcome == "error" and "Did you mean 'half'?" in result.sentence


def test_pairs_count_as_their_clusters_without_being_told():
    lost = together.copy()
    lost[370:] = 0  # three more clusters as a whole: a loss of 7.5 %
    reports = {"engine": rated("engine", lost, by), "merged": rated("merged", together)}
    rule = {"metric": "accuracy", "noninferiority": 0.12, "against": "merged"}
    told, alone = (judge({"rules": [rule | c]}, reports).reasons[0] for c in ({}, {"cluster": "id"}))
    assert (told.outcome, alone.outcome) == ("inconclusive", "pass") and told.low < alone.low < -0.075 < alone.high


def test_equal_models_of_few_differences_are_told_apart_from_none():
    "Three of eight hundred items differ: whole clusters resampled said nothing of a margin of 3 %."
    base, new, of = np.ones(800, int), np.ones(800, int), np.r_[np.zeros(12, int), 1 + np.arange(788) % 479]
    base[5], new[[200, 300]] = 0, 0
    assert paired_rates(base, new, clusters=of).against(0.03) == "pass"
    assert paired_scores(base, new, clusters=of).against(0.03) == "inconclusive"


@pytest.mark.parametrize("k,size,alike", [(40, 5, 0.3), (100, 10, 0.3), (480, 2, 0.3), (40, 20, 0.05)])
def test_a_loss_at_the_margin_passes_at_most_5_percent(k, size, alike):
    rng, passes, times, margin = np.random.default_rng(2), 0, 400, 0.05
    for _ in range(times):
        flags, of = drawn(rng, k, size, 1 - margin, alike)
        passes += paired_rates(np.ones(k * size), flags, clusters=of).low > -margin
    assert passes <= stats.binom.ppf(0.999, times, 0.05)


def test_gains_and_losses_that_cancel_in_each_cluster_are_judged():
    base, new, of = np.array([0.2, 0.8] * 40), np.array([0.8, 0.2] * 40), np.arange(80) // 2
    found = paired_scores(base, new, clusters=of)
    assert found.value == pytest.approx(0) and found.low < -0.05 and found.against(0.05) == "inconclusive"


def test_the_plan_of_a_rate_knows_its_clusters():
    rule = read_rule({"metric": "accuracy", "min": 0.88, "bound": "wilson"})
    need, why = plan_rule(rule, reports={"engine": rated("engine", together, by)})
    plain, _ = plan_rule(rule, reports={"engine": rated("engine", together)})
    assert need > 5 * plain and "measured design effect of 10" in why


def test_a_rate_of_no_items_is_refused():
    with pytest.raises(KitError, match="needs 0 ≤ successes"):
        rate_interval([], [])
