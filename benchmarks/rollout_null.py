"""How often a rollout is wrong: simulated rollouts of equal and of harmful challengers.

    python benchmarks/rollout_null.py [--times 1000] [--bad 100]

Both arms get the same traffic (A/A): at most alpha of the rollouts may be aborted, and at least .9 promoted. Then one
thing at a time is made worse in the canary, and it must be aborted before it has answered 1,000 requests.
"""

import argparse

import numpy as np

from llmkit.rollout.policy import read_rollout
from llmkit.rollout.rehearsal import rehearse

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


def main() -> None:
    "Print the table."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--times", type=int, default=1000)
    p.add_argument("--bad", type=int, default=100)
    a, policy = p.parse_args(), read_rollout(POLICY)
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
