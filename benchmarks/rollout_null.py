"""How often a rollout is wrong: simulated rollouts of equal and of harmful challengers.

    python benchmarks/rollout_null.py [--times 1000] [--bad 400]

Both arms get the same traffic (A/A): at most alpha of the rollouts may be aborted, and at least .9 promoted. Then one
thing at a time is made worse in the canary, and it must be aborted before it has answered 1,000 requests. Chance lets a few
harms look harmless for so long; beside each share stands that of a test which knows both rates (the likelihood ratio of the worse
rate to the largest harmless one, at the same alpha and looks), which no test can do without and hardly any can exceed.

    python benchmarks/rollout_null.py --users 60 5000 [--habits 0.17] [--times 60] [--bad 15]

Users who differ: each has an error rate of their own (Beta, correlation --habits within a user) and asks as often as is
their habit (lognormal, so that a few ask most). For `unit: request` and `unit: user`: how many equal challengers were found to do harm, how many were
promoted, and how soon errors of 1 → 5 % are found.

    python benchmarks/rollout_null.py --tests 60

The tests of `unit: user` by themselves, with 20 to 5,000 users who are alike or differ (correlation 0.02 to 0.5) and ask alike often, by a
lognormal law, or one of them two fifths of everything: how often a challenger is accused at a share of alpha of 0.05 / 18, and cleared at 0.05,
in 4,000 requests with a look after every 80, when it is equal, at the margin of 3 points, and 10 points worse. Exits with 1 where in any row
more than 5 % of the equal ones are accused, or more than 10 % of those at the margin are cleared.
"""

import argparse

import numpy as np
from scipy.special import ndtr, ndtri

from llmkit.gate.sequential_users import MOST, user_rate_difference, user_rate_excess, user_table
from llmkit.rollout.policy import read_rollout
from llmkit.rollout.rehearsal import rehearse
from llmkit.rollout.traffic import Traffic

POLICY = {
    "alpha": 0.05, "label_lag": "30m", "strata": [256],
    "steps": [
        {"setWeight": 5}, {"analysis": {"min_duration": "1h", "max_duration": "48h", "min_samples": 1000, "require": "no_harm"}},
        {"setWeight": 50}, {"analysis": {"min_duration": "4h", "max_duration": "72h", "min_samples": 2000}},
    ],
    "shadow": [], "validity": {"srm_alpha": 0.001, "stale_after": "1h", "on_no_data": "inconclusive"},
    "canary": [{"metric": "error_rate", "margin": 0.005}, {"metric": "refusal_rate", "margin": 0.03}, {"metric": "latency_p95", "max_ratio": 1.2}],
    "on": {"fail": "abort", "error": "pause", "inconclusive": "pause"},
}  # fmt: skip
HARM = {"errors 1 → 5 %": {"errors": 0.05}, "p95 × 1.5": {"slower": 1.5}, "refusals + 10 points": {"refusals": 0.15}}


# of a request of the canary: the largest harmless rate of what is counted, and the one that it has. An answer 1.5 times as slow is over
# 1.2 times the old p95 when its z is over 1.645 - ln(1.25) / spread, whatever its stratum
SLOW = float(ndtr(np.log(1.5 / 1.2) / Traffic().spread + ndtri(0.05)))
RATES = {"errors 1 → 5 %": (0.015, 0.05), "p95 × 1.5": (0.05, SLOW), "refusals + 10 points": (0.08, 0.15)}


def all_knowing(harmless: float, worse: float, alpha: float, times: int = 20_000) -> float:
    "The share of canaries that a test which knows both rates stops before 1,000 requests, at looks after every 50 or so."
    rng = np.random.default_rng(2)
    n = rng.poisson(50, (times, 30))
    k, n = (np.cumsum(x, 1) for x in (rng.binomial(n, worse), n))
    won = k * np.log(worse / harmless) + (n - k) * np.log((1 - worse) / (1 - harmless))
    return float(np.mean(((won >= -np.log(alpha)) & (n < 1000)).any(1)))


CROWD = POLICY | {
    "steps": [{"setWeight": 40}, {"analysis": {"min_duration": "4h", "max_duration": "48h", "min_samples": 200}}],
    "alpha": 0.05 / 12,
}  # fmt: skip


def crowds(users: list[int], habits: float, times: int, bad: int) -> None:
    "Print the table of users who differ: one rule, with the share of alpha that a rule of `params.yaml` has."
    print(f"| users, habits {habits:g}, errors, margin | unit | equal: found to do harm | promoted | undecided | 5 times the errors: found | hours, median |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for n in users:
        for errors, margin in ((0.01, 0.01), (0.05, 0.03)):
            rule = [{"metric": "error_rate", "margin": margin}]
            for unit in ("request", "user"):
                policy, now = (
                    read_rollout(CROWD | {"unit": unit, "canary": rule}),
                    Traffic(errors=errors, users=n, habits=habits),
                )
                null = rehearse(policy, 1000, times, now, every=7200.0)
                found = rehearse(policy, 1000, bad, now, {"errors": 5 * errors}, every=3600.0)
                hours = [e.hours for e in found.endings if e.phase == "Degraded"]
                shares = (null.share(p) for p in ("Degraded", "Healthy", "Paused"))
                print(f"| {n:,}, {errors:.0%}, {margin:g} | {unit} | {' | '.join(f'{s:.1%}' for s in shares)} | {found.share('Degraded'):.0%} | {np.median(hours) if hours else np.nan:.1f} |", flush=True)  # fmt: skip


def stage(rng, users: int, rho: float, kind: str, excess: float, n=4000, share=0.4, base=0.05, margin=0.03) -> tuple[bool, bool]:  # fmt: skip
    "Whether the challenger of one stage was ever accused, and ever cleared."
    arm, size = rng.random(users) < share, 1 / rho - 1
    own = rng.beta(base * size, (1 - base) * size, users)
    rate = np.where(arm, np.minimum(own * (base + excess) / base if excess else own, 1), own)
    often = rng.lognormal(0, 1.2, users) if kind == "lognormal" else np.ones(users)
    if kind == "heavy":
        often[0] = users * 0.4 / 0.6
    who = rng.choice(users, n, p=often / often.sum())
    hit, k, s, accused, cleared = rng.random(n) < rate[who], np.zeros(users, int), np.zeros(users, int), False, False
    for i, u in enumerate(who, 1):
        if k[u] < MOST:
            k[u], s[u] = k[u] + 1, s[u] + hit[i - 1]
        if i % 80 == 0:
            b, c = (user_table(k[x & (k > 0)], s[x & (k > 0)]) for x in (~arm, arm))
            accused |= user_rate_excess(b, c, margin, share, 0.05 / 18, 0.05).low > margin
            cleared |= user_rate_difference(b, c, margin, 0.05).high < margin
    return accused, cleared


def tests(times: int) -> bool:
    "Print the table of the tests alone."
    rng, ok = np.random.default_rng(1), True
    print("| users | correlation | how often they ask | equal: accused, cleared | at the margin | 10 points worse |\n|---|---|---|---|---|---|")  # fmt: skip
    for users in (20, 60, 500, 5000):
        for rho in (0.02, 1 / 6, 0.5):
            for kind in ("even", "lognormal", "heavy"):
                found = [np.mean([stage(rng, users, rho, kind, x) for _ in range(times)], 0) for x in (0, 0.03, 0.1)]
                ok &= bool(found[0][0] <= 0.05 and found[1][1] <= 0.1)
                print(f"| {users:,} | {rho:.2f} | {kind} | {' | '.join(f'{a:.1%}, {c:.1%}' for a, c in found)} |", flush=True)  # fmt: skip
    return ok


def main() -> None:
    "Print the table."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--times", type=int, default=1000)
    p.add_argument("--bad", type=int, default=400)
    p.add_argument("--users", type=int, nargs="+", default=[])
    p.add_argument("--habits", type=float, default=1 / 6)
    p.add_argument("--tests", type=int, default=0, help="stages of each kind, of the tests of users alone")
    a, policy = p.parse_args(), read_rollout(POLICY)
    if a.tests:
        raise SystemExit(0 if tests(a.tests) else 1)
    if a.users:
        return crowds(a.users, a.habits, a.times, a.bad)
    null = rehearse(policy, 4000, a.times, every=1800.0)
    print(f"A/A, {a.times:,} rollouts: {null}")
    error = 3 * np.sqrt(0.05 * 0.95 / a.times)
    ok = null.share("Degraded") <= policy.alpha + error and null.share("Healthy") >= 0.9
    for name, change in HARM.items():
        found = rehearse(policy, 4000, a.bad, canary=change, every=900.0)
        most = all_knowing(*RATES[name], policy.alpha / len(policy.canary) / 2)  # of two stages
        soon = np.mean([e.phase == "Degraded" and e.canary < 1000 for e in found.endings])
        print(
            f"{name}, {a.bad} rollouts: {found}; aborted before 1,000 canary requests {soon:.4f}, by a test that knows both rates {most:.4f}"
        )
        ok &= bool(soon >= 0.99)
    raise SystemExit(0 if ok else 1)


if __name__ == "__main__":
    main()
