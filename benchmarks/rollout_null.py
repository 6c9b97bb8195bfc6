"""How often a rollout is wrong: simulated rollouts of equal and of harmful challengers.

    python benchmarks/rollout_null.py [--times 1000] [--bad 100]

Both arms get the same traffic (A/A): at most alpha of the rollouts may be aborted, and at least .9 promoted. Then one
thing at a time is made worse in the canary, and it must be aborted before it has answered 1,000 requests.

    python benchmarks/rollout_null.py --users 60 5000 [--habits 0.17] [--times 60] [--bad 15]

Users who differ: each has an error rate of their own (Beta, correlation --habits within a user) and asks as often as is
their habit (lognormal, so that a few ask most). For `unit: request` and `unit: user`: how many equal challengers were found to do harm, how many were
promoted, and how soon errors of 1 → 5 % are found.
"""

import argparse

import numpy as np

from llmkit.rollout.policy import read_rollout
from llmkit.rollout.rehearsal import Traffic, rehearse

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


def main() -> None:
    "Print the table."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--times", type=int, default=1000)
    p.add_argument("--bad", type=int, default=100)
    p.add_argument("--users", type=int, nargs="+", default=[])
    p.add_argument("--habits", type=float, default=1 / 6)
    a, policy = p.parse_args(), read_rollout(POLICY)
    if a.users:
        return crowds(a.users, a.habits, a.times, a.bad)
    null = rehearse(policy, 4000, a.times, every=1800.0)
    print(f"A/A, {a.times:,} rollouts: {null}")
    error = 3 * np.sqrt(0.05 * 0.95 / a.times)
    ok = null.share("Degraded") <= policy.alpha + error and null.share("Healthy") >= 0.9
    for name, change in HARM.items():
        found = rehearse(policy, 4000, a.bad, canary=change, every=900.0)
        soon = np.mean([e.phase == "Degraded" and e.canary < 1000 for e in found.endings])
        print(f"{name}, {a.bad} rollouts: {found}; aborted before 1,000 canary requests {soon:.2f}")
        ok &= bool(soon >= 0.9)
    raise SystemExit(0 if ok else 1)


if __name__ == "__main__":
    main()
