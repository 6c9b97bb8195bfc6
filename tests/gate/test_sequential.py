"""Anytime-valid bounds: they hold at every look together, and say what a brute-force search says."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from scipy.stats import betabinom, binom, chisquare

from llmkit.gate.sequential import (
    Running,
    add,
    mean_difference,
    mean_sequence,
    rate_difference,
    rate_excess,
    rate_sequence,
    ratio_mismatch,
    ratio_mismatch_sequence,
)
from llmkit.gate.sequential_quantiles import (
    GROWTH,
    bucket_quantile,
    histogram,
    quantile_excess,
    quantile_ratio,
    quantile_sequence,
)


def at_most(hits, times, alpha):
    "Whether a share of hits is compatible with a chance of at most alpha."
    return hits / times <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / times)


@pytest.mark.parametrize("p", [0.001, 0.01, 0.3])
def test_a_rate_is_never_excluded_too_often_at_any_of_3000_looks(p):
    rng, times, n = np.random.default_rng(1), 2000, 3000
    successes = np.cumsum(rng.random((times, n)) < p, axis=1)
    k = np.arange(1, n + 1)
    log_m = betabinom.logpmf(successes, k, 0.5, 0.5) - binom.logpmf(successes, k, p)  # scipy's, not ours
    outside = (log_m >= np.log(20)).any(axis=1).sum()
    assert at_most(outside, times, 0.05)
    ends = rate_sequence(int(successes[0, -1]), n)  # and ours says the same
    assert (ends.low < p < ends.high) == bool(log_m[0, -1] < np.log(20))


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_equal_arms_are_told_apart_no_more_often_than_alpha_under_peeking(share):
    rng, times, looks, alpha, wrong = np.random.default_rng(2), 200, 20, 0.2, 0
    for _ in range(times):
        m, n, s, t = 0, 0, 0, 0
        for _ in range(looks):
            dm = max(1, int(100 * share))
            dn = 100 - dm
            m, n, s, t = m + dm, n + dn, s + rng.binomial(dn, 0.05), t + rng.binomial(dm, 0.05)
            gap = rate_difference((s, n), (t, m), alpha)
            if not gap.low <= 0 <= gap.high:
                wrong += 1
                break
    assert at_most(wrong, times, alpha)


@pytest.mark.parametrize(("base", "cand"), [((3, 200), (5, 40)), ((0, 500), (0, 30)), ((400, 500), (70, 100)), ((20, 100), (20, 100))])  # fmt: skip
def test_the_bounds_of_a_difference_are_those_of_a_search_over_both_rates(base, cand):
    def capital(d):
        "The least log capital against a difference, by a search that we did not write."

        def total(p):
            logs = [
                betabinom.logpmf(k, n, 0.5, 0.5) - binom.logpmf(k, n, q) for (k, n), q in ((base, p), (cand, p + d))
            ]
            return np.logaddexp(0, logs[0]) - np.log(2) + logs[1]

        grid = np.linspace(max(0, -d) + 1e-7, min(1, 1 - d) - 1e-7, 400)
        best = grid[np.nanargmin([total(p) for p in grid])]
        step = grid[1] - grid[0]
        found = minimize_scalar(total, bounds=(max(grid[0], best - step), min(grid[-1], best + step)), method="bounded", options={"xatol": 1e-10})  # fmt: skip
        return min(found.fun, total(best))

    gap = rate_difference(base, cand)
    for end in (gap.low, gap.high):
        if abs(end) < 0.999:
            assert capital(end) == pytest.approx(np.log(20), abs=0.03)
    assert capital(gap.low - 0.01) > np.log(20) or gap.low <= -0.99
    assert capital((gap.low + gap.high) / 2) < np.log(20)


def test_a_quantile_and_a_ratio_of_quantiles_are_covered_at_all_looks():
    rng, times, looks, alpha = np.random.default_rng(3), 150, 12, 0.2
    truth, wrong, wrong_ratio = np.exp(-1 + 0.5 * 1.6448536), 0, 0
    for _ in range(times):
        base, cand = np.zeros((2, len(histogram([1.0]))), int)
        bad = bad_ratio = False
        for _ in range(looks):
            base, cand = base + histogram(rng.lognormal(-1, 0.5, 150)), cand + histogram(rng.lognormal(-1, 0.5, 25))
            one, gap = quantile_sequence(cand, 0.95, alpha), quantile_ratio({"": base}, {"": cand}, 0.95, alpha)
            bad |= not one.low <= truth <= one.high
            bad_ratio |= not gap.low <= 1 <= gap.high
        wrong, wrong_ratio = wrong + bad, wrong_ratio + bad_ratio
    assert at_most(wrong, times, alpha) and at_most(wrong_ratio, times, alpha)


@pytest.mark.parametrize("ties", [False, True])
def test_a_candidate_at_the_limit_of_a_quantile_is_seldom_accused_at_any_look(ties):
    rng, times, alpha, wrong = np.random.default_rng(8), 100, 0.2, 0
    take = lambda n: np.round(rng.lognormal(0, 0.5, n) * 4 + 0.5) / 4 if ties else rng.lognormal(0, 0.5, n)
    for _ in range(times):
        base, cand = {"a": 0, "b": 0}, {"a": 0, "b": 0}
        for _ in range(12):
            base = {k: c + histogram(take(300)) for k, c in base.items()}
            cand = {k: c + histogram(take(50) * 1.2) for k, c in cand.items()}
            if quantile_excess(base, cand, 0.95, 1.2, alpha).low:
                wrong += 1
                break
    assert at_most(wrong, times, alpha)


def test_a_slow_candidate_is_found_sooner_by_the_test_for_harm_than_by_the_bounds():
    rng, found = np.random.default_rng(9), {"test": 0, "bounds": 0}
    for _ in range(60):
        base = {k: histogram(rng.lognormal(0, 0.5, 4000)) for k in "ab"}
        cand = {k: histogram(rng.lognormal(0, 0.5, 180) * 1.5) for k in "ab"}
        found["test"] += quantile_excess(base, cand, 0.95, 1.2, 0.05 / 6).low >= 1.2
        found["bounds"] += quantile_ratio(base, cand, 0.95, 0.05 / 6).low > 1.2
    assert found["test"] >= found["bounds"] + 6


def test_harm_to_long_prompts_alone_is_found_and_reported_as_theirs():
    rng = np.random.default_rng(10)
    base = {k: histogram(rng.lognormal(0, 0.5, 4000)) for k in ("short", "long")}
    cand = {"short": histogram(rng.lognormal(0, 0.5, 4000)), "long": histogram(rng.lognormal(0, 0.5, 200) * 3)}
    gap = quantile_excess(base, cand, 0.95, 1.2, 0.05 / 6)
    assert 1.2 < gap.low < gap.value == pytest.approx(3, rel=0.2)
    assert quantile_excess(base, cand | {"long": cand["short"]}, 0.95, 1.2, 0.05 / 6).low == 0


def test_quantiles_agree_with_numpy_to_within_a_bucket():
    x = np.random.default_rng(4).gamma(2, 0.2, 4000)
    for q in (0.5, 0.9, 0.95, 0.99):
        assert bucket_quantile(histogram(x), q) == pytest.approx(np.quantile(x, q), rel=GROWTH - 1)
        ends = quantile_sequence(histogram(x), q)
        assert ends.low < np.quantile(x, q) < ends.high


def test_strata_keep_a_shift_of_the_mix_from_looking_like_harm():
    rng, alarms = np.random.default_rng(5), 0
    for _ in range(100):
        base = {"a": histogram(rng.lognormal(-2, 0.4, 900)), "b": histogram(rng.lognormal(0, 0.4, 100))}
        cand = {"a": histogram(rng.lognormal(-2, 0.4, 100)), "b": histogram(rng.lognormal(0, 0.4, 200))}
        alarms += quantile_ratio(base, cand, 0.95).low > 1
    assert at_most(alarms, 100, 0.05)


def test_tied_values_are_no_problem():
    same = histogram(np.full(3000, 0.25))
    gap = quantile_ratio({"": same}, {"": same}, 0.95)
    assert gap.low <= 1 <= gap.high and gap.high < 1.1


@pytest.mark.parametrize("values", ["thumbs", "stars"])
def test_a_bounded_mean_is_covered_at_all_looks(values):
    rng, times, n, wrong, apart = np.random.default_rng(6), 150, 300, 0, 0
    draw = {"thumbs": lambda: rng.random(n) < 0.8, "stars": lambda: rng.choice([0, 0.25, 0.5, 0.75, 1], n, p=[0.1, 0, 0.1, 0.3, 0.5])}[values]  # fmt: skip
    truth = {"thumbs": 0.8, "stars": 0.775}[values]
    for _ in range(times):
        a, b, bad, off = Running(), Running(), False, False
        for x, y in zip(draw(), draw(), strict=True):
            a, b = add(a, float(x)), add(b, float(y))
            ends, gap = mean_sequence(a, 0.2), mean_difference(a, b, 0.2)
            bad, off = bad or not ends.low <= truth <= ends.high, off or not gap.low <= 0 <= gap.high
        wrong, apart = wrong + bad, apart + off
    assert at_most(wrong, times, 0.2) and at_most(apart, times, 0.2)


def test_a_right_split_is_rarely_doubted_however_often_it_is_looked_at_and_a_wrong_one_is_found():
    rng, times, looks, alpha, shares = np.random.default_rng(7), 1000, 60, 0.05, {"baseline": 0.9, "canary": 0.1}
    seq = fixed = found = 0
    for _ in range(times):
        canary = np.cumsum(rng.binomial(50, 0.1, looks))
        counts = [{"baseline": 50 * (i + 1) - int(c), "canary": int(c)} for i, c in enumerate(canary)]
        seq += any(ratio_mismatch_sequence(c, shares) < alpha for c in counts)
        fixed += any(ratio_mismatch(c, shares) < alpha for c in counts[::4])
        found += ratio_mismatch_sequence({"baseline": 2600, "canary": 400 + int(canary[0])}, shares) < 0.001
    assert at_most(seq, times, alpha) and fixed / times > 3 * alpha  # the chi-square is for one look
    assert found == times
    want = chisquare([2600, 400], [2700, 300]).pvalue
    assert ratio_mismatch({"baseline": 2600, "canary": 400}, shares) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize(("p", "margin", "worse"), [(0.01, 0.005, 0.05), (0.05, 0.03, 0.15)])
def test_harm_is_found_soon(p, margin, worse):
    rng, late = np.random.default_rng(8), []
    for _ in range(25):
        s = t = m = n = 0
        while rate_excess((s, n), (t, m), margin, 0.05 / 6).low < 0 and m < 2000:
            m, n, s, t = m + 50, n + 950, s + rng.binomial(950, p), t + rng.binomial(50, worse)
        late.append(m)
    assert np.median(late) <= 350 and max(late) < 1000


@pytest.mark.parametrize(("share", "above"), [(0.05, 1.0), (0.5, 1.0), (0.9, 1.0), (0.5, 0.0)])
def test_a_harmless_candidate_is_accused_no_more_often_than_alpha_under_peeking(share, above):
    rng, times, looks, alpha, p, margin, wrong = np.random.default_rng(9), 100, 10, 0.2, 0.05, 0.03, 0
    dm, dn = round(400 * share), 400 - round(400 * share)
    for _ in range(times):
        s, t = np.cumsum(rng.binomial(dn, p, looks)), np.cumsum(rng.binomial(dm, p + above * margin, looks))
        wrong += any(
            rate_excess((int(a), dn * k), (int(b), dm * k), margin, alpha).low > 0
            for k, a, b in zip(range(1, looks + 1), s, t, strict=True)
        )
    assert at_most(wrong, times, alpha) and (above or wrong == 0)


@pytest.mark.parametrize(("base", "cand"), [((10, 1000), (9, 100)), ((0, 300), (6, 20)), ((60, 6000), (15, 300)), ((3, 40), (60, 70)), ((3, 40), (4, 70))])  # fmt: skip
def test_the_bound_of_an_excess_is_that_of_a_search_over_the_baselines_rate(base, cand):
    margin, steps = 0.01, 2.0 ** np.arange(-3, 6)

    def capital(d):
        "The least log capital against an excess of at most d, on a grid that we did not write."
        p = np.linspace(1e-9, 1 - d - 1e-9, 50_001)[:, None]
        q, below = np.minimum(p + d + steps * margin, (1 + p + d) / 2), p**2 / (p + steps[:4] * margin)
        harm, excuse = (
            logsumexp(binom.logpmf(k, n, x) - binom.logpmf(k, n, y), axis=1) - np.log(x.shape[1])
            for (k, n), x, y in ((cand, q, p + d), (base, below, p))
        )
        return (harm + np.logaddexp(np.log(0.3), np.log(0.7) + excuse)).min()

    low = rate_excess(base, cand, margin).low
    assert (low > 0) == (capital(margin) >= np.log(20))
    assert low < 0 or capital(low) == pytest.approx(np.log(20), abs=0.02)
