"""How often the gate is wrong: simulated evaluations of models at, beyond and within the margin.

    python benchmarks/gate_null.py [--times 10000] [--out benchmarks/results/gate_null.json]

Each rule that counts uncertainty is held against models for which passing, or failing, would be an error: it may err in at
most alpha = 5 % of evaluations. Equal models must pass non-inferiority with the planned power. Counts of discordant pairs
are drawn from the multinomial that the models imply, and every distinct pair of counts is judged once.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy import stats

from llmkit.core.files import write_json
from llmkit.gate.intervals import bootstrap, clopper_pearson, wilson
from llmkit.gate.paired import holm, mcnemar_better, paired_scores, score_lower
from llmkit.gate.plan import pairs_needed

ALPHA = 0.05


def passing(n: int, margin: float, discordance: float, difference: float, times: int, correct: bool = True) -> float:
    "Share of simulated evaluations that pass non-inferiority."
    gain = (discordance + difference) / 2
    draws = np.random.default_rng(n).multinomial(n, [gain, discordance - gain, 1 - discordance], times)
    pairs, counts = np.unique(draws[:, :2], axis=0, return_counts=True)
    good = [score_lower(int(b), int(c), n, correct=correct) > -margin for b, c in pairs]
    return float(counts[good].sum() / times)


def at_the_margin(times: int) -> Iterator[dict]:
    "Non-inferiority of a model that lies exactly at the margin."
    for n in (50, 100, 200, 500, 1000, 3000):
        for margin, share in ((0.02, 0.05), (0.02, 0.20), (0.05, 0.06), (0.05, 0.20)):
            got = [passing(n, margin, share, -margin, times, c) for c in (True, False)]
            yield {"n": n, "margin": margin, "discordance": share, "passes": got[0], "uncorrected": got[1]}


def equal_models(times: int) -> Iterator[dict]:
    "Non-inferiority of equal models at the planned number of items."
    for margin, share in ((0.01, 0.05), (0.02, 0.10), (0.05, 0.20)):
        n = pairs_needed(margin, share)
        yield {"margin": margin, "discordance": share, "n": n, "passes": passing(n, margin, share, 0.0, times)}


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


def bootstraps_at_the_margin(times: int) -> Iterator[dict]:
    "Paired bootstrap of skewed differences at the margin: items that stand alone, and items in clusters, told and untold."
    rng = np.random.default_rng(0)
    for name, clusters, size in (("200 items", None, 1), ("60 clusters of 5", True, 5), ("60 clusters of 5, not told", None, 5)):  # fmt: skip
        groups, hits = (200 if size == 1 else 60), 0
        labels = np.repeat(np.arange(groups), size) if clusters else None
        for _ in range(times):
            d = np.repeat(rng.exponential(0.1, groups) - 0.12, size) + (rng.normal(0, 0.02, groups * size) if size > 1 else 0)  # fmt: skip
            hits += paired_scores(np.zeros(len(d)), d, clusters=labels, times=400).against(0.02) == "pass"
        yield {"items": name, "passes": hits / times, "evaluations": times}


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
    rng = np.random.default_rng(2)
    for truth, n in ((0.01, 127), (0.10, 127)):
        missed = none = 0
        for x in (rng.random((times, n)) < truth).astype(float):
            if x.min() == x.max():
                none += 1
                continue
            ci = bootstrap(x, times=300)
            missed += not ci.low <= truth <= ci.high
        yield {"truth": truth, "n": n, "refused": none / times, "misses": missed / times, "evaluations": times}


PARTS = {f.__name__: f for f in (at_the_margin, equal_models, rates_at_the_limit, superiority_of_equals, bootstraps_at_the_margin, holm_over_fair_groups, intervals_of_rates)}  # fmt: skip
ERRORS = {"at_the_margin": ("passes",), "superiority_of_equals": ("passes",), "rates_at_the_limit": ("pass", "fail")}


RESAMPLED = ("bootstraps_at_the_margin", "intervals_of_rates")


def table(rows: list[dict]) -> str:
    "Rows as a Markdown table."
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(str(v) for v in r.values()) + " |" for r in rows)])


def main() -> None:
    "Print the tables; exit 1 when a rule with an exact or corrected bound errs more often than it may."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--times", type=int, default=10_000, help="simulated evaluations of each row")
    p.add_argument("--bootstraps", type=int, default=2_000, help="of rows that resample")
    p.add_argument("--out", type=Path, help="a JSON file for the figures")
    a = p.parse_args()
    error = 3 * float(np.sqrt(ALPHA * (1 - ALPHA) / a.times))
    print(f"{a.times:,} evaluations for each row, alpha {ALPHA}; Monte-Carlo error of 5 %: {error:.4f}")
    found = {}
    for name, part in PARTS.items():
        found[name] = list(part(a.bootstraps if name in RESAMPLED else a.times))
        print(f"\n{part.__doc__}\n\n{table(found[name])}", flush=True)
    worst = {n: max(r[k] for r in found[n] for k in keys if r.get("bound") != "wilson") for n, keys in ERRORS.items()}
    print(f"\nworst error of exact and corrected bounds: {worst}")
    if a.out:
        write_json(a.out, {"benchmark": "gate_null", "times": a.times, "alpha": ALPHA, "monte_carlo_error": error, "worst": worst, "found": found})  # fmt: skip
    raise SystemExit(int(max(worst.values()) > ALPHA + error))


if __name__ == "__main__":
    main()
