"""What must stay, or turn round, when the items of a comparison are renamed, swapped, scaled or improved: seeded, small."""

import numpy as np
import pytest
from scipy import optimize, stats

from llmkit.core.report import Measurement, Report
from llmkit.gate.intervals import bootstrap, cluster_numbers, clustered_rate
from llmkit.gate.judge import judge
from llmkit.gate.paired import noninferiority, paired_scores, superiority

ORDER = ("fail", "inconclusive", "pass")


def drawn(seed):
    "Two models, as rates or as scores, with or without clusters."
    rng = np.random.default_rng(seed)
    n, rates = int(rng.choice([12, 60, 250])), bool(seed % 2)
    x = (rng.random(n) < 0.85).astype(int) if rates else rng.lognormal(0, 1, n)
    y = np.where(rng.random(n) < 0.2, rng.permutation(x), x)
    labels = rng.integers(0, n // 2, n).tolist() if seed % 3 else None
    return x, y, labels, rates


@pytest.mark.parametrize("seed", range(24))
def test_a_better_low_metric_is_the_mirror_of_one_that_is_better_high(seed):
    x, y, labels, rates = drawn(seed)
    mirror = (lambda v: 1 - v) if rates else (lambda v: -v)
    one = noninferiority(x, y, 0.05, clusters=labels)
    two = noninferiority(mirror(x), mirror(y), 0.05, direction="lower", clusters=labels)
    assert (one.value, one.low, one.high, one.p_fail) == pytest.approx((two.value, two.low, two.high, two.p_fail))
    assert one.value == pytest.approx(np.mean(y) - np.mean(x)) and one.low <= one.value <= one.high
    assert superiority(x, y, clusters=labels)[0] == superiority(mirror(x), mirror(y), 0.0, 0.05, "lower", labels)[0]


@pytest.mark.parametrize("seed", range(24))
def test_swapped_models_swap_gain_and_loss(seed):
    x, y, labels, _ = drawn(seed)
    (one, d), (two, e) = superiority(x, y, clusters=labels), superiority(y, x, clusters=labels)
    assert ORDER.index(one) == 2 - ORDER.index(two)
    assert (d.low, d.high) == pytest.approx((-e.high, -e.low), abs=1e-9)
    assert (d.p_fail <= 0.05) is (one == "fail") and (e.p_fail <= 0.05) is (two == "fail")


@pytest.mark.parametrize("seed", range(1, 24, 2))
@pytest.mark.parametrize("margin", [0.02, 0.1])
def test_a_better_answer_never_makes_a_verdict_worse(seed, margin):
    x, y, labels, _ = drawn(seed)
    before = ORDER.index(noninferiority(x, y, margin, clusters=labels).against(margin))
    for i in np.flatnonzero(y == 0)[:4]:
        better = y.copy()
        better[i] = 1
        assert ORDER.index(noninferiority(x, better, margin, clusters=labels).against(margin)) >= before


@pytest.mark.parametrize("seed", range(0, 24, 2))
def test_units_of_measurement_and_names_of_clusters_say_nothing(seed):
    x, y, labels, _ = drawn(seed)
    one, many = paired_scores(x, y, clusters=labels), paired_scores(1e4 * x, 1e4 * y, clusters=labels)
    assert (many.low, many.high) == pytest.approx((1e4 * one.low, 1e4 * one.high))
    named = [f"a\n{k:04}" for k in labels] if labels else None
    assert paired_scores(x, y, clusters=named).low == pytest.approx(one.low)


@pytest.mark.parametrize("labels", [None, np.repeat(np.arange(20), 6)])
def test_a_mean_by_any_name_is_resampled_alike(labels):
    x = np.random.default_rng(0).exponential(size=120)
    own, other = (bootstrap(x, f, labels) for f in (np.mean, lambda rows: float(rows.mean())))
    assert (own.low, own.high) == pytest.approx((other.low, other.high))


@pytest.mark.parametrize(
    "n,clusters,rate", [(5, 3, 0.5), (200, 60, 0.9), (200, 60, 1.0), (200, 60, 0.0), (60, 60, 0.1)]
)
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_rate_of_clusters_against_a_root_of_its_statistic(n, clusters, rate, level):
    rng = np.random.default_rng(n)
    labels, flags = rng.integers(0, clusters, n), (rng.random(n) < rate).astype(int)
    sizes, p = np.bincount(cluster_numbers(n, labels)), flags.mean()
    units = sizes.sum() ** 2 / (sizes**2).sum()
    found = clustered_rate(flags, labels, level)
    for sided, tail in (("two", (1 - level) / 2), ("lower", 1 - level), ("upper", 1 - level)):
        t, found = stats.t.ppf(1 - tail, units - 1), clustered_rate(flags, labels, level, sided)
        far = lambda q, t=t: (p - q) ** 2 * units - t * t * q * (1 - q)
        low = optimize.brentq(far, 0, p - 1e-9) if p and sided != "upper" else 0.0
        high = optimize.brentq(far, p + 1e-9, 1) if p < 1 and sided != "lower" else 1.0
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-6)


def test_losses_are_added_up_in_the_direction_of_the_metric():
    "An error rate that has risen since the best release, and one that has fallen."
    rule = {"rules": [{"metric": "error_rate", "noninferiority": 0.05, "against": "baseline"}]}

    def report(subject, wrong, **context):
        m = Measurement("error_rate", wrong / 400, 400, direction="lower", samples="task/wrong")
        return Report(subject, "", "s@1", (m,), {"task": {"id": list(range(400)), "wrong": [1] * wrong + [0] * (400 - wrong)}}, context)  # fmt: skip

    for best, told in ((0.02, True), (0.2, False)):
        kept = report("baseline", 40, best_so_far={"error_rate": best})
        said = judge(rule, {"engine": report("engine", 40), "baseline": kept}).reasons[0]
        assert said.outcome == "pass" and ("In all it has lost 0.08 since the best baseline so far, 0.02" in said.sentence) is told  # fmt: skip
