"""Every statistic of the gate against an oracle that we did not write."""

import json

import numpy as np
import pytest
from scipy import optimize, stats
from scipy.special import xlogy
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.contingency_tables import mcnemar as sm_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint

from llmkit.gate.intervals import bootstrap, clopper_pearson, quantile_interval, resample_mean, wilson
from llmkit.gate.paired import (
    discordant,
    holm,
    mcnemar,
    mcnemar_better,
    paired_rates,
    score_lower,
    skew_alpha,
    superiority,
)
from llmkit.gate.plan import pairs_needed, rate_needed, scores_needed

COUNTS = [(0, 1), (1, 1), (0, 127), (127, 127), (1, 30), (7, 50), (364, 400), (9999, 10000)]


@pytest.mark.parametrize("k,n", COUNTS)
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("ours,theirs", [(clopper_pearson, "beta"), (wilson, "wilson")])
def test_rates_against_statsmodels(k, n, level, ours, theirs):
    low, high = proportion_confint(k, n, 1 - level, method=theirs)
    got = ours(k, n, level)
    assert got.low == pytest.approx(np.nan_to_num(low, nan=0.0), abs=1e-10)
    assert got.high == pytest.approx(1.0 if np.isnan(high) else high, abs=1e-10)


@pytest.mark.parametrize("k,n", COUNTS)
def test_one_sided_rates_against_scipy(k, n):
    oracle = stats.binomtest(k, n, alternative="less").proportion_ci(0.95, method="exact")
    assert clopper_pearson(k, n, sided="upper").high == pytest.approx(oracle.high, abs=1e-10)
    oracle = stats.binomtest(k, n, alternative="greater").proportion_ci(0.95, method="wilson")
    assert wilson(k, n, sided="lower").low == pytest.approx(oracle.low, abs=1e-10)


def test_no_failure_in_127_bounds_at_2_3_percent():
    assert clopper_pearson(0, 127, sided="upper").high == pytest.approx(0.0233, abs=5e-5)


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_bootstrap_against_scipy(method):
    x = np.random.default_rng(1).exponential(size=120)
    name = {"bca": "BCa"}.get(method, method)
    oracle = stats.bootstrap((x,), np.mean, n_resamples=20000, method=name, rng=2).confidence_interval
    got = bootstrap(x, method=method, times=20000)
    assert (got.low, got.high) == pytest.approx((oracle.low, oracle.high), abs=0.012)


def test_cluster_bootstrap_matches_the_cluster_standard_error():
    rng = np.random.default_rng(3)
    labels = np.repeat(np.arange(60), 8)
    x = rng.normal(size=60)[labels] + rng.normal(scale=0.3, size=480)
    got = bootstrap(x, clusters=labels, method="percentile", times=4000)
    means = x.reshape(60, 8).mean(1)
    width = 2 * 1.96 * means.std(ddof=0) / np.sqrt(60)
    assert got.high - got.low == pytest.approx(width, rel=0.06)


@pytest.mark.parametrize("q,n", [(0.5, 50), (0.5, 201), (0.95, 400)])
def test_quantile_interval_against_scipy(q, n):
    x = np.random.default_rng(0).lognormal(size=n)
    oracle = stats.quantile_test(x, q=np.median(x), p=q).confidence_interval(0.95)
    _, low, high = quantile_interval(x, q)
    assert (low, high) == pytest.approx((oracle.low, oracle.high))


@pytest.mark.parametrize("b,c", [(0, 0), (3, 0), (1, 7), (10, 10), (152, 209)])
def test_mcnemar_against_statsmodels(b, c):
    assert mcnemar(b, c) == pytest.approx(sm_mcnemar([[5, b], [c, 5]], exact=True).pvalue, abs=1e-12)


@pytest.mark.parametrize("b,c", [(3, 0), (1, 7), (10, 10), (209, 152)])
def test_one_sided_mcnemar_against_scipy(b, c):
    oracle = stats.binomtest(b, b + c, 0.5, alternative="greater").pvalue
    assert mcnemar_better(b, c) == pytest.approx(oracle, abs=1e-12)
    old, new = [0] * b + [1] * c + [1] * 50, [1] * b + [0] * c + [1] * 50
    outcome, d = superiority(old, new)
    assert outcome == (
        "pass" if oracle <= 0.05 else "fail" if b < c and mcnemar_better(c, b) <= 0.05 else "inconclusive"
    )
    assert d.value == pytest.approx((b - c) / (b + c + 50))


@pytest.mark.parametrize("shift", [-0.02, 0.0, 0.04])
def test_resampled_mean_against_a_t_test_and_its_own_bounds(shift):
    "On normal values all three bounds agree, and no bound is nearer than Student's."
    x = np.random.default_rng(5).normal(0, 1, 400)
    found = resample_mean(x, times=20000)
    oracle = stats.ttest_1samp(x, shift, alternative="less").pvalue
    assert oracle <= found.p_below(shift) <= oracle + 0.015
    low, high = (stats.ttest_1samp(x, 0, alternative=a).confidence_interval(0.95) for a in ("greater", "less"))
    assert found.bounds() == (pytest.approx(low.low, abs=0.003), pytest.approx(high.high, abs=0.003))
    assert found.bounds()[0] <= low.low + 1e-12 and found.bounds()[1] >= high.high - 1e-12
    assert found.bounds(found.p_below(shift))[1] == pytest.approx(shift, abs=0.002)


def test_resampled_mean_against_scipy_where_the_values_are_skewed():
    "The bootstrap-t against scipy's resamples of the t statistic, and BCa against scipy's at the expanded level."
    x = np.random.default_rng(1).exponential(size=60)
    t = lambda x, axis: (x.mean(axis) - x0) / (x.std(axis, ddof=1) / 60**0.5)
    x0, se = x.mean(), x.std(ddof=1) / 60**0.5
    drawn = stats.bootstrap((x,), t, n_resamples=20000, method="percentile", rng=2).bootstrap_distribution
    by_t = x0 - np.quantile(drawn, [0.95, 0.05]) * se
    tail = stats.norm.cdf(-((60 / 59) ** 0.5) * stats.t.ppf(0.95, 59))
    ci = stats.bootstrap((x,), np.mean, n_resamples=20000, method="BCa", confidence_level=1 - 2 * tail, rng=2)
    bca, student = np.array(ci.confidence_interval), x0 + np.array([-1, 1]) * stats.t.ppf(0.95, 59) * se
    wanted = np.minimum.reduce([by_t, bca, student])[0], np.maximum.reduce([by_t, bca, student])[1]
    assert resample_mean(x, times=20000).bounds() == pytest.approx(wanted, abs=0.008)
    assert by_t[1] > student[1] + 0.02  # the skew is followed


@pytest.mark.parametrize("sizes", ["equal", "unequal"])
def test_cluster_robust_error_against_statsmodels(sizes):
    rng = np.random.default_rng(3)
    labels = np.repeat(np.arange(30), 8 if sizes == "equal" else rng.integers(1, 15, 30))
    x = rng.normal(size=30)[labels] + rng.normal(scale=0.3, size=len(labels))
    oracle = OLS(x, np.ones(len(x))).fit(cov_type="cluster", cov_kwds={"groups": labels}, use_t=True)
    found = resample_mean(x, clusters=labels)
    assert (found.value, found.se, found.units) == (pytest.approx(oracle.params[0]), pytest.approx(oracle.bse[0]), 30)
    (low, high), far = oracle.conf_int(0.1)[0], 0.3 * found.se
    got = found.bounds()
    assert low - far <= got[0] <= low + 1e-12 and high - 1e-12 <= got[1] <= high + far


def test_holm_against_statsmodels():
    p = np.random.default_rng(0).random(17) ** 3
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])


def numeric_score_lower(b, c, n, level):
    "The score bound by brute force: constrained likelihood by scipy.optimize, then a root of the statistic."

    def z(lam):
        "Score statistic at a supposed difference, with the nuisance parameter maximised numerically."
        top = (1 - lam) / 2 if lam >= 0 else (1 + lam) / 2

        def nll(q):
            gain, loss = (q + lam, q) if lam >= 0 else (q, q - lam)
            return -(xlogy(b, gain) + xlogy(c, loss) + xlogy(n - b - c, max(1 - gain - loss, 0)))

        q = optimize.minimize_scalar(nll, bounds=(0, top), method="bounded", options={"xatol": 1e-12}).x
        both = 2 * q + abs(lam)
        return (b - c - n * lam) / np.sqrt(n * (both - lam**2))

    return optimize.brentq(lambda lam: z(lam) - stats.norm.ppf(level), -0.999, (b - c) / n - 1e-9)


@pytest.mark.parametrize("b,c,n", [(12, 2, 50), (2, 12, 50), (1, 3, 30), (209, 152, 1319), (5, 5, 400)])
@pytest.mark.parametrize("level", [0.95, 0.975])
def test_score_bound_against_numeric_likelihood(b, c, n, level):
    assert score_lower(b, c, n, level, correct=False) == pytest.approx(numeric_score_lower(b, c, n, level), abs=2e-5)
    assert score_lower(b, c, n, level) < score_lower(b, c, n, level, correct=False)


def test_graded_gsm8k(shared):
    file = shared("gsm8k_graded", "graded.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    new, old = ([int(r[m]) for r in rows] for m in ("6b_verification", "175b_finetuning"))
    b, c = discordant(old, new)
    assert (len(rows), b, c) == (1319, 209, 152)
    assert mcnemar(b, c) == pytest.approx(0.00315, abs=5e-6)
    assert superiority(old, new)[0] == "pass" and superiority(new, old)[0] == "fail"
    assert superiority(old, new, 0.02)[0] == "inconclusive"
    assert paired_rates(old, new).against(0.02) == "pass"
    assert paired_rates(new, old).against(0.005) == "fail"


@pytest.mark.parametrize("margin,share,textbook,planned", [(0.02, 0.10, 1546, 1617), (0.05, 0.20, 495, 521)])  # fmt: skip
def test_planned_pairs_have_the_power_and_one_fewer_has_not(margin, share, textbook, planned):
    "(1.645 + .842)² · discordance / margin² is too few for the test that is run; the oracle adds scipy's binomials up."

    def power(n):
        total, chance = 0.0, stats.binom.pmf(np.arange(n + 1), n, share)
        for t in np.flatnonzero(chance > 1e-6):
            low, high = 0, t + 1  # the fewest wins among t discordant items that pass
            while low < high:
                b = (low + high) // 2
                low, high = (low, b) if score_lower(b, t - b, n) > -margin else (b + 1, high)
            total += chance[t] * stats.binom.sf(low - 1, t, 0.5)
        return total

    assert pairs_needed(margin, share) == planned
    assert np.ceil((stats.norm.ppf(0.95) + stats.norm.ppf(0.8)) ** 2 * share / margin**2) == textbook
    assert power(textbook) < 0.79 < power(planned - 1) < 0.8 <= power(planned) < 0.803


@pytest.mark.parametrize("effect,power", [(0.2, 0.8), (0.5, 0.9), (0.1, 0.8)])
def test_planned_scores_against_statsmodels(effect, power):
    n = scores_needed(effect * 3, 3.0, power=power)
    found = [TTestPower().power(effect, m, skew_alpha(0.05, m), alternative="larger") for m in (n, n - 1)]
    assert found[0] >= power > found[1]


def test_planned_rates():
    assert rate_needed(0.01, 0.0) == 299
    for bound, f in (("clopper_pearson", clopper_pearson), ("wilson", wilson)):
        n = rate_needed(0.9, 0.95, bound=bound)
        power = [sum(stats.binom.pmf(k, m, 0.95) for k in range(m + 1) if f(k, m, sided="lower").low >= 0.9) for m in (n, n - 1)]  # fmt: skip
        assert power[0] >= 0.8 > power[1]
