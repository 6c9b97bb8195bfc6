"""How often monitoring cries wolf, and how soon it sees what was planted: simulated releases through the real decision.

    python benchmarks/monitor_null.py [--releases 200] [--out benchmarks/results/monitor_null.json]

Every release has its own reference and its own windows, as the policy in params.yaml sizes them, and everything passes
`decide`: features, adjustment, k of n, the detectors. Under no change the share of windows that end in an alarm must keep
the stated budget, and the share of releases with a false alarm of calibration or fairness Doob's bound n / c. Under a
planted change the delay is counted in windows from the first changed one to the alarm. Exit code 1: a budget was broken.
"""

import argparse
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np

from llmkit.core.params import load_params
from llmkit.gate.intervals import clopper_pearson
from llmkit.monitor.decide import decide
from llmkit.monitor.drift import false_alarms
from llmkit.monitor.policy import FAMILIES, read_monitor, shared
from llmkit.monitor.window import Window

LABELS = np.array([f"intent_{i}" for i in range(20)])


def rows(
    rng, n, refuses=0.05, errors=0.01, longer=1.0, shift=0.0, right=0.0, worse=0.0, dear=1.0, claims=0.1, said=0.3
):
    "Requests as a window has them: `right` is an offset of accuracy to confidence, `worse` what one group in five loses."
    c, old = rng.beta(8, 2, n), rng.random(n) < 0.2
    share = (1 - shift) * np.full(20, 0.05) + shift * (np.arange(20) < 2) / 2
    correct, known = rng.random(n) < c + right - worse * old, rng.random(n) < said
    columns = {
        "status": np.where(rng.random(n) < errors, "error", "ok"), "refused": rng.random(n) < refuses,
        "prompt_tokens": rng.poisson(20 * longer, n), "completion_tokens": rng.poisson(10, n), "surprisal": rng.gamma(2, 0.1, n),
        "confidence": c, "label": rng.choice(LABELS, n, p=share), "group": np.where(old, "65+", "18-64"),
        "joules": rng.gamma(4, 0.1, n) * dear,
    }  # fmt: skip
    out = [dict(zip(columns, r, strict=True)) for r in zip(*(v.tolist() for v in columns.values()), strict=True)]
    asked, wrong = rng.random(n) < 0.3, rng.random(n) < claims
    for i, r in enumerate(out):
        r |= {"id": str(i), "time": float(i), "cost": None, "said": None, "claim": bool(wrong[i]) if asked[i] else None}
        r["correct"] = int(correct[i]) if known[i] else None
    return out


def release(policy, rng, windows, change=None, calm=0, size=None):
    "The windows of one release as they were decided; the last ones with a change."
    size, stream, out = size or policy.requests, {}, []
    for number in range(1 + windows):
        how = (change or {}) if number > calm else {}
        n = size if number else policy.reference
        seen, _, stream, _ = decide(policy, Window("sha256:a", number, 1, 2, tuple(rows(rng, n, **how))), stream)
        out.append(seen)
    return out


PLANTED = {
    "refusals 5 % to 10 %": ("data", {"refuses": 0.10}),
    "refusals 5 % to 15 %": ("data", {"refuses": 0.15}),
    "refusals 5 % to 25 %": ("data", {"refuses": 0.25}),
    "prompts 1.1 times as long": ("data", {"longer": 1.1}),
    "prompts 1.2 times as long": ("data", {"longer": 1.2}),
    "a tenth of the requests on two topics": ("data", {"shift": 0.1}),
    "a quarter of the requests on two topics": ("data", {"shift": 0.25}),
    "joules 1.2 times (below what counts)": ("cost", {"dear": 1.2}),
    "joules 1.5 times": ("cost", {"dear": 1.5}),
    "flagged claims 10 % to 20 %": ("hallucination", {"claims": 0.2}),
    "flagged claims 10 % to 40 %": ("hallucination", {"claims": 0.4}),
    "accuracy 10 points below confidence": ("calibration", {"right": -0.1}),
    "accuracy 20 points below confidence": ("calibration", {"right": -0.2}),
    "one group 25 points worse": ("fairness", {"worse": 0.25}),
    "one group 40 points worse": ("fairness", {"worse": 0.4}),
}


def null(policy, releases, windows, seed):
    "Alarms under no change: per window for what is compared, per release for what runs through."
    compared, ran, drifted, total, labels = Counter(), Counter(), 0, 0, []
    any_alarm = 0
    for i in range(releases):
        seen = release(policy, np.random.default_rng([seed, i]), windows)
        for w in seen[1:]:
            total += 1
            drifted += bool(w.flags)
            found = [f for f in w.alarms if f in ("data", "cost", "hallucination")]
            compared.update(found)
            any_alarm += bool(found)
        labels.append(sum(w.labelled for w in seen))
        ran.update(f for f in ("calibration", "fairness") if any(f in w.alarms for w in seen))
    return compared, any_alarm, ran, drifted, total, float(np.mean(labels))


def main() -> None:
    "Print the tables and write the figures."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--releases", type=int, default=200)
    p.add_argument("--windows", type=int, default=20)
    p.add_argument("--planted", type=int, default=30, help="releases for each planted change")
    p.add_argument("--params", default="params.yaml")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="")
    a = p.parse_args()
    policy = read_monitor(load_params(a.params, "monitor"))
    compared, alarms, ran, drifted, total, labels = null(policy, a.releases, a.windows, a.seed)
    ends = clopper_pearson(alarms, total)
    print(
        f"No change: {a.releases} releases, {total} windows of {policy.requests} held against {policy.reference} requests"
    )
    print("| | found | stated |\n|---|--:|--:|")
    print(f"| windows with a test that drifted | {drifted / total:.4f} | {policy.fdr:g} |")
    print(
        f"| windows that end in an alarm | {alarms / total:.4f} ({ends.low:.4f} to {ends.high:.4f}) | {policy.budget:g} |"
    )
    bounds = {"calibration": labels / policy.calibration_run, "fairness": labels / policy.fairness_run}
    for f, bound in bounds.items():
        print(
            f"| releases with a false alarm of {f} in {labels:.0f} labels | {ran[f] / a.releases:.4f} | {bound:.4f} |"
        )
    broken = ends.low > policy.budget
    broken |= any(clopper_pearson(ran[f], a.releases).low > bounds[f] for f in bounds)
    print(
        f"\nPlanted after 3 quiet windows, {a.planted} releases each, up to 10 windows\n| change | found | median delay in windows | by another family |\n|---|--:|--:|--:|"
    )
    planted = {}
    for name, (family, change) in PLANTED.items():
        delays, other = [], 0
        for i in range(a.planted):
            seen = release(policy, np.random.default_rng([a.seed + 1, i]), 13, change, calm=3)[4:]
            delays.append(next((j for j, w in enumerate(seen, 1) if family in w.alarms), math.inf))
            other += any(f != family for w in seen for f in w.alarms)
        found, median = sum(math.isfinite(d) for d in delays), float(np.median(delays))
        planted[name] = {
            "family": family,
            "found": found / a.planted,
            "delay": None if math.isinf(median) else median,
            "others": other / a.planted,
        }
        print(
            f"| {name} | {found / a.planted:.2f} | {'over 10' if math.isinf(median) else f'{median:g}'} | {other / a.planted:.2f} |"
        )
    if a.out:
        expected = false_alarms(policy.fdr, policy.k, policy.n, 1, shared(policy))
        body = {
            "releases": a.releases, "windows": total, "drifted_windows": drifted / total, "fdr": policy.fdr, "alarms": alarms / total,
            "alarms_interval": [ends.low, ends.high], "budget": policy.budget, "computed": expected,
            "by_family": {f: compared[f] / total for f in FAMILIES if f not in bounds}, "labels": labels,
            "releases_with_false_alarm": {f: ran[f] / a.releases for f in bounds}, "bound": bounds, "planted": planted, "params": "params.yaml",
        }  # fmt: skip
        Path(a.out).write_text(json.dumps(body, indent=2) + "\n")
    raise SystemExit(int(broken))


if __name__ == "__main__":
    main()
