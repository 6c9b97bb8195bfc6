"""How often the gate is wrong: simulated evaluations of models at, beyond and within the margin.

    python benchmarks/gate_null.py [--times 10000] [--only equal_models,...] [--out benchmarks/results/gate_null.json]

Each rule that counts uncertainty is held against models for which passing, or failing, would be an error: it may err in at
most alpha = 5 % of evaluations. Equal models must pass non-inferiority with the planned power. Counts of discordant pairs
are drawn from the multinomial that the models imply, and every distinct pair of counts is judged once; mean differences
are resampled 2,000 times in each evaluation.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy import stats
from scipy.special import ndtr, ndtri, stdtrit

from llmkit.core.files import write_json
from llmkit.evals.prevalence import Quality, corrected_rate
from llmkit.gate.clusters import rate_interval
from llmkit.gate.intervals import _few_counts, bootstrap, clopper_pearson, resample_mean, wilson
from llmkit.gate.paired import holm, mcnemar_better, paired_rates, paired_scores, score, skew_alpha
from llmkit.gate.plan import pairs_needed, scores_needed
from llmkit.gate.ratios import _heavy

ALPHA, POWER = 0.05, 0.80


def passing(n: int, margin: float, discordance: float, difference: float, times: int, correct: bool = True) -> float:
    "Share of simulated evaluations that pass non-inferiority."
    gain = (discordance + difference) / 2
    draws = np.random.default_rng(n).multinomial(n, [gain, discordance - gain, 1 - discordance], times)
    pairs, counts = np.unique(draws[:, :2], axis=0, return_counts=True)
    good = score(pairs[:, 0], pairs[:, 1], n, -margin, 0.5 * correct) > ndtri(
        1 - ALPHA
    )  # as a lower bound above -margin
    return float(counts[good].sum() / times)


def at_the_margin(times: int) -> Iterator[dict]:
    "Non-inferiority of a model that lies exactly at the margin."
    for n in (50, 100, 200, 500, 1000, 3000):
        for margin, share in ((0.02, 0.05), (0.02, 0.20), (0.05, 0.06), (0.05, 0.20)):
            got = [passing(n, margin, share, -margin, times, c) for c in (True, False)]
            yield {"n": n, "margin": margin, "discordance": share, "passes": got[0], "uncorrected": got[1]}


def equal_models(times: int) -> Iterator[dict]:
    "Non-inferiority of equal models at the planned number of items, and at the textbook's."
    z = stats.norm.ppf(1 - ALPHA) + stats.norm.ppf(POWER)
    for margin, share in ((0.01, 0.05), (0.02, 0.10), (0.05, 0.20)):
        n, textbook = pairs_needed(margin, share, power=POWER), int(np.ceil(z**2 * share / margin**2))
        row = {"margin": margin, "discordance": share, "n": n, "passes": passing(n, margin, share, 0.0, times)}
        yield row | {"textbook": textbook, "passes there": passing(textbook, margin, share, 0.0, times)}


def equal_scores(times: int) -> Iterator[dict]:
    "The same for mean scores, planned as `llmkit gate plan` does: by the spread that a first evaluation of 160 items shows."
    margin, first, pilots = 0.02, 160, 400
    for name, draw in (
        ("normal", lambda rng, shape: rng.normal(0, 0.1, shape)),
        ("skewed to gains", lambda rng, shape: rng.exponential(0.1, shape) - 0.1),
        ("skewed to losses", lambda rng, shape: 0.1 - rng.exponential(0.1, shape)),
    ):
        seen = draw(np.random.default_rng(1), (pilots, first))
        sd = float(np.median([paired_scores(np.zeros(first), d, ALPHA).sd for d in seen]))
        n = scores_needed(margin, sd, power=POWER)
        low = lower_bounds(draw(np.random.default_rng(0), (times, n)), 1)["passes"]
        row = {"differences": name, "margin": margin, "sd": 0.1, "planned with": round(sd, 4), "n": n}
        yield row | {"passes": float(np.mean(low > -margin))}


def lower_bounds(sums: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """Lower bounds of the mean in each evaluation: sums (evaluations, clusters) of clusters of one size.

    `paired_scores`, for many evaluations at once. The first ten are held against it.
    """
    parts = [_lower_bounds(block.T, size) for block in np.array_split(sums, max(1, len(sums) // 500))]
    found = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    for x, low in zip(sums[:10], found["passes"], strict=False):
        assert not x.all() or np.isclose(_alone(x, size), low, rtol=1e-6, atol=1e-9), "not the bound of the gate"
    return found


def _alone(x: np.ndarray, size: int) -> float:
    "The gate's lower bound of one evaluation."
    return paired_scores(np.zeros(x.size * size), np.repeat(x / size, size), ALPHA, np.repeat(np.arange(len(x)), size)).low  # fmt: skip


def _lower_bounds(sums: np.ndarray, size: int) -> dict[str, np.ndarray]:
    "The same for a block of evaluations, which are the columns."
    k, w = len(sums), _few_counts(len(sums), 2000, 0)
    n, grow, asked = k * size, k / (k - 1), skew_alpha(ALPHA, k)
    m = sums.sum(0) / n
    u = sums - m * size
    se, drawn = np.sqrt((u * u).sum(0) * grow) / n, w @ u
    off = np.round(drawn / n, 12)
    error = np.sqrt(np.maximum(w @ (u * u) - 2 * off * size * drawn + off * off * size * size * k, 0) * grow) / n
    t = np.nanquantile(np.where(error > 1e-6 * se, off / np.maximum(error, 1e-300), np.nan), 1 - asked, axis=0)
    share = (off < 0).mean(0) + (off == 0).mean(0) / 2
    z0 = ndtri(np.clip(share, 0.5 / len(off), 1 - 0.5 / len(off)))
    a = (u**3).sum(0) / (6 * (u**2).sum(0) ** 1.5)
    student, order = stdtrit(k - 1, 1 - asked), np.sort(off, axis=0)

    def at(z: float) -> np.ndarray:
        "What BCa reads at a normal quantile."
        place = ndtr(z0 + (z0 + z) / (1 - a * (z0 + z))) * (len(off) - 1)
        i = np.minimum(place.astype(int), len(off) - 2)
        below, above = (np.take_along_axis(order, j[None], 0)[0] for j in (i, i + 1))
        return m + below + (above - below) * (place - i)

    wide = np.minimum(m - np.maximum(t, student) * se, at(-np.sqrt(grow) * student))
    return {"passes": wide, "BCa": at(ndtri(ALPHA)), "Student's t": m - stdtrit(k - 1, 1 - ALPHA) * se}


def rates_at_the_limit(times: int) -> Iterator[dict]:
    "Bounded rates whose truth is the limit: passing is an error, and so is failing."
    for bound in (clopper_pearson, wilson):
        for limit, n in ((0.8, 200), (0.8, 800), (0.95, 300), (0.99, 300)):
            hits, counts = np.unique(np.random.default_rng(n).binomial(n, limit, times), return_counts=True)
            low = np.array([bound(int(k), n, 1 - ALPHA, "lower").low >= limit for k in hits])
            high = np.array([bound(int(k), n, 1 - ALPHA, "upper").high < limit for k in hits])
            share = {"pass": float(counts[low].sum() / times), "fail": float(counts[high].sum() / times)}
            yield {"bound": bound.__name__, "limit": limit, "n": n, **share}


def superiority_of_equals(times: int) -> Iterator[dict]:
    "Superiority at a lead of zero, of equal models."
    for n, share in ((200, 0.05), (200, 0.20), (1000, 0.05), (1000, 0.20)):
        draws = np.random.default_rng(n).multinomial(n, [share / 2, share / 2, 1 - share], times)
        pairs, counts = np.unique(draws[:, :2], axis=0, return_counts=True)
        good = [mcnemar_better(int(b), int(c)) <= ALPHA for b, c in pairs]
        yield {"n": n, "discordance": share, "passes": float(counts[good].sum() / times)}


def _skewed(rng: np.random.Generator, shape: tuple[int, int], size: int, sign: int) -> np.ndarray:
    "Sums of differences with a mean of zero: exponential between clusters, and normal within them."
    within = rng.normal(0, 0.02 * size**0.5, shape) if size > 1 else 0
    return size * sign * (rng.exponential(0.1, shape) - 0.1) + within


def _flips(rng: np.random.Generator, shape: tuple[int, int], size: int, sign: int) -> np.ndarray:
    "Gains less losses of equal models in clusters: some passages are easier for one of the two."
    gain, loss = (rng.binomial(size, rng.beta(0.5, 4.5, shape)) for _ in range(2))
    return (gain - loss).astype(float)


MEANS = {  # clusters, items in each, direction of the skew, and how they are drawn
    "200 items, skewed to gains": (200, 1, 1, _skewed),
    "200 items, skewed to losses": (200, 1, -1, _skewed),
    "60 clusters of 5, skewed to gains": (60, 5, 1, _skewed),
    "60 clusters of 5, skewed to losses": (60, 5, -1, _skewed),
    "40 clusters of 5, skewed to losses": (40, 5, -1, _skewed),
    "20 clusters of 5, skewed to losses": (20, 5, -1, _skewed),
    "60 clusters of 5 rights and wrongs": (60, 5, 1, _flips),
}


def means_at_the_margin(times: int) -> Iterator[dict]:
    "Mean differences at the margin, by the gate's resampling bounds and by others that were not chosen."
    for name, (groups, size, sign, draw) in MEANS.items():
        margin, rng = 0.0 if draw is _flips else 0.02, np.random.default_rng(0)
        sums = draw(rng, (times, groups), size, sign) - margin * size
        found = lower_bounds(sums, size)
        if draw is _flips:  # clusters without a difference ask for stricter bounds: the gate's own, one by one
            found["passes"] = np.array([_alone(x, size) for x in sums])
        yield {"differences": name} | {k: float(np.mean(v > -margin)) for k, v in found.items()}


RARE = ("whole scores", "parts of scores", "whole scores, and half as many gains")


def _rare(rng: np.random.Generator, n: int, expected: float, kind: str) -> tuple[np.ndarray, float]:
    "Differences that are mostly zero, with so many losses to be expected among n; and their mean."
    size = rng.exponential(0.3, n) if kind == RARE[1] else 0.8
    gains = (rng.random(n) < expected / 2 / n) * 0.8 if kind == RARE[2] else 0.0
    mean = {RARE[0]: -0.8, RARE[1]: -0.3, RARE[2]: -0.4}[kind] * expected / n
    return gains - (rng.random(n) < expected / n) * size, mean


def rare_losses(times: int) -> Iterator[dict]:
    "Mean differences at the margin where almost all items agree, by the gate and by resampling alone; a fifth of the evaluations."
    for n, expected in ((50, 0.5), (50, 2), (400, 1), (400, 4), (400, 16)):
        for kind in RARE:
            rng, passes, alone = np.random.default_rng(0), 0, 0
            for _ in range(times // 5):
                d, mean = _rare(rng, n, expected, kind)
                passes += paired_scores(np.full(n, 0.8), 0.8 + d, ALPHA).low > mean
                alone += not d.any() or resample_mean(d).bounds(ALPHA)[0] > mean
            row = {"items": n, "losses expected": expected, "of": kind}
            yield row | {"passes": passes * 5 / times, "resampling alone": alone * 5 / times}


SURPRISES = {  # spread of the logarithm: of factors on each item's log-likelihood, or of the excess itself
    "factors": lambda rng, n, old, excess: old * (rng.lognormal(-0.045, 0.3, n) - 1) + excess,
    "surprises": lambda rng, n, old, excess: excess * rng.lognormal(-0.5, 1.0, n),
    "surprises of a longer tail": lambda rng, n, old, excess: excess * rng.lognormal(-1.125, 1.5, n),
}


def perplexities_at_the_limit(times: int) -> Iterator[dict]:
    "Perplexities that are 1.10 times as high in the long run, by a rule of 1.10; and how many pass at 1.05, and of twins; a tenth of the evaluations."
    for name, draw in SURPRISES.items():
        for n in (30, 50, 200, 500):
            rng, found = np.random.default_rng(n), np.zeros(3)
            for _ in range(times // 10):
                tokens = rng.poisson(20, n) + 2
                old, per = 0.3 * tokens * rng.lognormal(-0.5, 1.0, n), tokens.mean()
                new = [old + draw(rng, n, old, np.log(ratio) * tokens) for ratio in (1.10, 1.05)] + [old]
                found += [_heavy(x / per, (old + np.log(1.10) * tokens) / per, ALPHA, None).low >= 0 for x in new]
            row = {"differences": name, "items": n}
            yield row | dict(zip(("passes", "at 1.05", "twins"), (found * 10 / times).tolist(), strict=True))


def clusters_not_told(times: int) -> Iterator[dict]:
    "Differences in 60 clusters of 5, taken for 300 items that stand alone."
    rng = np.random.default_rng(0)
    shared = np.repeat(rng.exponential(0.1, (times, 60)) - 0.1, 5, axis=1)
    low = lower_bounds(shared + rng.normal(0, 0.02, shared.shape) - 0.02, 1)["passes"]
    yield {"passes": float(np.mean(low > -0.02))}


CLUSTERED = {  # sizes of the clusters, and their intraclass correlation
    "480 templates of 2": ([2] * 480, 0.3),
    "120 templates of 5": ([5] * 120, 0.1),
    "40 clusters of 12": ([12] * 40, 0.1),
    "40 clusters of 12, much alike": ([12] * 40, 0.4),
    "40 clusters of 1 to 60": ([1 + round(59 * (i / 39) ** 3) for i in range(40)], 0.1),
    "120 clusters of 1 to 40": ([1 + round(39 * (i / 119) ** 4) for i in range(120)], 0.3),
}


def _drawn(rng: np.random.Generator, sizes: list[int], share: float, alike: float) -> np.ndarray:
    "Rights and wrongs of clusters, whose shares spread by a beta distribution of that intraclass correlation."
    of = rng.beta(share * (1 / alike - 1), (1 - share) * (1 / alike - 1), len(sizes))
    return (rng.random(sum(sizes)) < np.repeat(of, sizes)).astype(int)


def clusters_at_the_margin(times: int) -> Iterator[dict]:
    "Non-inferiority of a model at the margin, whose losses come in clusters: as the gate counts them, and as if items stood alone; a fifth of the evaluations."
    for name, (sizes, alike) in CLUSTERED.items():
        by, rng, passes, alone = np.repeat(np.arange(len(sizes)), sizes), np.random.default_rng(0), 0, 0
        for _ in range(times // 5):
            lost, gained = _drawn(rng, sizes, 0.08, alike), _drawn(rng, sizes, 0.03, alike)
            models = 1 - gained, 1 - lost  # the baseline misses what the candidate gains
            passes += paired_rates(*models, ALPHA, clusters=by).low > -0.05
            alone += paired_rates(*models, ALPHA).low > -0.05
        row = {"clusters": name, "alike": alike, "items": len(by)}
        yield row | {"passes": passes * 5 / times, "as if alone": alone * 5 / times}


def clustered_means_at_the_margin(times: int) -> Iterator[dict]:
    "Mean differences at the margin, skewed to losses, in clusters that share half of their spread; a fifth of the evaluations."
    for name, (sizes, _) in CLUSTERED.items():
        by, rng, passes, alone = np.repeat(np.arange(len(sizes)), sizes), np.random.default_rng(0), 0, 0
        for _ in range(times // 5):
            shared, own = rng.exponential(0.1, len(sizes)), rng.exponential(0.1, len(by))
            d = 0.2 - np.repeat(shared, sizes) - own - 0.02
            passes += paired_scores(np.zeros(len(by)), d, ALPHA, by).low > -0.02
            alone += d.mean() - stdtrit(len(by) - 1, 1 - ALPHA) * d.std() / len(by) ** 0.5 > -0.02
        yield {"clusters": name, "items": len(by), "passes": passes * 5 / times, "Student's t, as if alone": alone * 5 / times}  # fmt: skip


def clustered_rates_at_the_limit(times: int) -> Iterator[dict]:
    "Bounded rates of clusters whose truth is the limit: passing is an error, and so is failing; a fifth of the evaluations."
    for name, (sizes, alike) in CLUSTERED.items():
        for limit in (0.8, 0.95):
            by, rng, found = np.repeat(np.arange(len(sizes)), sizes), np.random.default_rng(0), np.zeros(4)
            for _ in range(times // 5):
                flags = _drawn(rng, sizes, limit, alike)
                ends = [rate_interval(flags, c, 1 - 2 * ALPHA, bound="clopper_pearson") for c in (by, None)]
                found += [v for ci in ends for v in (ci.low >= limit, ci.high < limit)]
            row = {"clusters": name, "alike": alike, "limit": limit}
            yield row | dict(
                zip(("pass", "fail", "pass alone", "fail alone"), (found * 5 / times).tolist(), strict=True)
            )


ATTACKS = {  # documents, attacks on each, share that succeeds, and how alike the attacks on one document end
    "50 e-mails of 4, a little alike": (50, 4, 0.2, 0.1),
    "50 e-mails of 4": (50, 4, 0.2, 0.4),
    "50 e-mails of 4, almost one": (50, 4, 0.2, 0.8),
    "200 e-mails of 4, few succeed": (200, 4, 0.05, 0.4),
}


def attacks_on_documents(times: int) -> Iterator[dict]:
    "Rates of attacks that cross documents, by their limit, corrected by a detector of which much is known: clusters count, or do not; a fifth of the evaluations."
    detector = Quality(500, 500, 500, 500)
    for name, (documents, each, share, alike) in ATTACKS.items():
        by, rng, found = np.repeat(np.arange(documents), each), np.random.default_rng(0), np.zeros(4)
        for _ in range(times // 5):
            flags = _drawn(rng, [each] * documents, share, alike)
            ends = [corrected_rate("x", flags, detector, "d", level=1 - 2 * ALPHA, clusters=c) for c in (by, None)]
            found += [v for m in ends for v in (m.high <= share, m.low > share)]
        row = {"attacks": name, "alike": alike, "limit": share}
        yield row | dict(zip(("pass", "fail", "pass alone", "fail alone"), (found * 5 / times).tolist(), strict=True))


def holm_over_fair_groups(times: int) -> Iterator[dict]:
    "Twenty groups that are all exactly at the limit: how often any of them fails, without and with Holm's adjustment."
    rng, limit, n = np.random.default_rng(1), 0.8, 100
    p_of = np.array([stats.binom.cdf(k, n, limit) for k in range(n + 1)])
    fails = np.array([clopper_pearson(k, n, 1 - ALPHA, "upper").high < limit for k in range(n + 1)])
    drawn = rng.binomial(n, limit, (times, 20))
    plain = fails[drawn].any(1).mean()
    held = np.mean([(fails[k] & (holm(p_of[k]) <= ALPHA)).any() for k in drawn])
    yield {"without": float(plain), "with Holm": float(held)}


def intervals_of_rates(times: int) -> Iterator[dict]:
    "How often a 95 % bootstrap interval of a rate misses the truth, and how often there is none: why rates have closed forms."
    for truth, n in ((0.01, 127), (0.10, 127)):
        hits, counts = np.unique(np.random.default_rng(n).binomial(n, truth, times), return_counts=True)
        ends = {k: bootstrap(np.arange(n) < k) for k in hits if 0 < k < n}
        missed = np.array([k in ends and not ends[k].low <= truth <= ends[k].high for k in hits])
        exact = [clopper_pearson(int(k), n) for k in hits]
        off = np.array([not ci.low <= truth <= ci.high for ci in exact])
        row = {"truth": truth, "n": n, "refused": float(counts[[k not in ends for k in hits]].sum() / times)}
        yield row | {"misses": float(counts[missed].sum() / times), "exact misses": float(counts[off].sum() / times)}


PARTS = (at_the_margin, equal_models, equal_scores, means_at_the_margin, rare_losses, perplexities_at_the_limit, clusters_not_told, clusters_at_the_margin, clustered_means_at_the_margin, clustered_rates_at_the_limit, attacks_on_documents, rates_at_the_limit, superiority_of_equals, holm_over_fair_groups, intervals_of_rates)  # fmt: skip
ERRORS = {"at_the_margin": ("passes",), "means_at_the_margin": ("passes",), "rare_losses": ("passes",), "perplexities_at_the_limit": ("passes",), "superiority_of_equals": ("passes",), "rates_at_the_limit": ("pass", "fail"), "clusters_at_the_margin": ("passes",), "clustered_means_at_the_margin": ("passes",), "clustered_rates_at_the_limit": ("pass", "fail"), "attacks_on_documents": ("pass", "fail")}  # fmt: skip
FOR_SHOW = ("bound: wilson", "surprises of a longer tail")  # rows that show what goes wrong


def table(rows: list[dict]) -> str:
    "Rows as a Markdown table."
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(str(v) for v in r.values()) + " |" for r in rows)])


def worst_of(found: dict[str, list[dict]]) -> dict[str, float]:
    "The largest error of each kind of rule, and the smallest planned power."
    shown = lambda r: any(x in f"{k}: {v}" for x in FOR_SHOW for k, v in r.items())
    errors = {n: max(r[k] for r in rows for k in ERRORS[n] if not shown(r)) for n, rows in found.items() if n in ERRORS}
    powers = {n: min(r["passes"] for r in rows if not shown(r)) for n, rows in found.items() if n.startswith("equal_")}
    return errors | powers


def main() -> None:
    "Print the tables; exit 1 when a rule errs more often than it may, or equal models pass more seldom than planned."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--times", type=int, default=10_000, help="simulated evaluations of each row")
    p.add_argument("--only", default="", help="parts, separated by commas; the others stay as they are in the file")
    p.add_argument("--out", type=Path, help="a JSON file for the figures")
    a = p.parse_args()
    error, miss = (3 * float(np.sqrt(x * (1 - x) / a.times)) for x in (ALPHA, POWER))
    print(f"{a.times:,} evaluations for each row, alpha {ALPHA}; Monte-Carlo error of 5 %: {error:.4f}")
    old = json.loads(a.out.read_text())["found"] if a.only and a.out and a.out.exists() else {}
    found = {}
    for part in PARTS:
        name = part.__name__
        if a.only and name not in a.only.split(","):
            found |= {name: old[name]} if name in old else {}
            continue
        start = time.perf_counter()
        found[name] = list(part(a.times))
        print(f"\n{part.__doc__}\n\n{table(found[name])}\n\n{time.perf_counter() - start:.0f} s", flush=True)
    worst = worst_of(found)
    print(f"\nlargest errors, and smallest powers: {worst}")
    if a.out:
        write_json(a.out, {"benchmark": "gate_null", "times": a.times, "alpha": ALPHA, "power": POWER, "monte_carlo_error": error, "worst": worst, "found": found})  # fmt: skip
    bad = {k: v for k, v in worst.items() if (v < POWER - miss if k.startswith("equal_") else v > ALPHA + error)}
    raise SystemExit(f"wrong more often than stated: {bad}" if bad else 0)


if __name__ == "__main__":
    main()
