"""How often monitoring cries wolf, and how soon it sees what was planted: simulated releases through the real decision.

    python benchmarks/monitor_null.py [--before COMMIT] [--out benchmarks/results/monitor_null.json]
    python benchmarks/monitor_null.py --sequences 200      only what needs labels, over whole lives of services
    python benchmarks/monitor_null.py --texts 20           only windows with the texts of users, of so many releases

Every release has its own reference and its own windows, as the policy in params.yaml sizes them, and everything passes
`decide`: features, adjustment, k of n, the detectors. Under no change the share of windows that end in an alarm must keep
the stated budget, and the share of releases with a false alarm of calibration or fairness Doob's bound n / c, also where a
release is as bad as the policy accepts; and both again where each user asks several times. With --before the code and the policy of an earlier commit stand beside. Under a
planted change the delay is counted in windows from the first changed one to the alarm. Exit code 1: a budget was broken.

With --sequences, services of 50 windows have labels for 5, 30 and 100 % of their requests, each a minute late on average (the
policy's label lag cuts some off); then for samples that are none, in which wrong answers are rated more often than right ones.

With --texts, each request has a text of a topic, held against two thousand texts that the release was made for, and every
other column is there as well. Of a change the delay is counted as above.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from llmkit.core.params import load_params
from llmkit.gate.intervals import clopper_pearson
from llmkit.monitor import measure
from llmkit.monitor.decide import decide
from llmkit.monitor.measure import calibration, fairness
from llmkit.monitor.policy import FAMILIES, read_monitor
from llmkit.monitor.window import Window

LABELS = np.array([f"intent_{i}" for i in range(20)])
# the same whenever a user asks
HABITS = ("refused", "prompt_tokens", "confidence", "label", "group", "joules", "claim", "correct")


def rows(
    rng, n, refuses=0.05, errors=0.01, longer=1.0, shift=0.0, right=0.0, worse=0.0, dear=1.0, claims=0.1, said=0.3, each=1
):  # fmt: skip
    """Requests as a window has them: `right` is an offset of accuracy to confidence, `worse` what one group in five loses.

    Users ask `each` times, between each other, about the same and in the same way: only what is said in answer differs.
    """
    if each > 1:
        own = rows(rng, -(-n // each), refuses, 0.0, longer, shift, right, worse, dear, claims, said)
        run, out = rng.integers(1 << 40), rows(rng, n, errors=errors)
        for r, i in zip(out, rng.permutation(np.arange(n) // each), strict=True):
            r |= {f: own[i][f] for f in HABITS} | {"unit": f"{run}-{i}"}
        return out
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


def release(policy, rng, windows, change=None, calm=0, each=1):
    "The windows of one release as they were decided; the last ones with a change."
    stream, out = {}, []
    for number in range(1 + windows):
        how = {"each": each} | ((change or {}) if number > calm else {})
        n = policy.requests if number else policy.reference
        seen, _, stream, _ = decide(policy, Window("sha256:a", number, 1, 2, tuple(rows(rng, n, **how))), stream)
        out.append(seen)
    return out


PLANTED = {
    "refusals 5 % to 10 %": ("data", {"refuses": 0.10}),
    "refusals 5 % to 15 %": ("data", {"refuses": 0.15}),
    "refusals 5 % to 25 %": ("data", {"refuses": 0.25}),
    "prompts 1.1 times as long": ("data", {"longer": 1.1}),
    "prompts 1.2 times as long": ("data", {"longer": 1.2}),
    "a tenth of the requests on two topics (below what counts)": ("data", {"shift": 0.1}),
    "three in twenty of the requests on two topics": ("data", {"shift": 0.15}),
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


def null(policy, releases, windows, seed, each=1):
    "Alarms under no change: per window for what is compared, per release for what runs through."
    compared, ran, drifted, total, labels = Counter(), Counter(), 0, 0, []
    any_alarm = 0
    for i in range(releases):
        seen = release(policy, np.random.default_rng([seed, i]), windows, each=each)
        for w in seen[1:]:
            total += 1
            drifted += bool(w.flags)
            found = [f for f in w.alarms if f in ("data", "cost", "hallucination")]
            compared.update(found)
            any_alarm += bool(found)
        labels.append(sum(w.labelled for w in seen))
        ran.update(f for f in ("calibration", "fairness") if any(f in w.alarms for w in seen))
    return compared, any_alarm, ran, drifted, total, float(np.mean(labels))


def edge(policy, rng, releases, windows, each=1):
    """Releases whose calibration and whose groups are as bad as the policy accepts, and not worse: share with an alarm.

    Only the detectors run, on labels, and the reference is that of a calibrated release. The budget is meant for this edge;
    a release that is better than it has to be has hardly any false alarms.
    """
    bad = Counter()
    for _ in range(releases):
        watch, groups = None, {}
        for number in range(1, windows + 1):
            r = rows(rng, policy.requests, right=-policy.tolerance, each=each)
            watch, _ = calibration(policy, Window("sha256:a", number, 1, 2, tuple(r)), watch)
            r = rows(rng, policy.requests, worse=policy.gap, each=each)
            groups, found, _ = fairness(policy, Window("sha256:a", number, 1, 2, tuple(r)), groups)
        bad["calibration"] += watch.alarmed(policy.calibration_run)
        bad["fairness"] += bool(found)
    return {f: bad[f] / releases for f in ("calibration", "fairness")}


SHIFTS = {
    "confidence 15 points above accuracy": ("calibration", {"right": -0.15}),
    "one group in five 15 points worse": ("fairness", {"worse": 0.15}),
    "one group in five 25 points worse": ("fairness", {"worse": 0.25}),
}
RATED = {"only wrong answers, 3 in 10": (0.0, 0.3), "only wrong answers, all": (0.0, 1.0), "wrong answers three times as often": (0.1, 0.3)}  # fmt: skip


def rated(policy, rng, n, number, right=0.0, worse=0.0, said=(1.0, 1.0), late=60.0):
    "A window of which right and wrong answers are rated with these shares, after a minute on average, one request a second."
    c, old, at = rng.beta(8, 2, n), rng.random(n) < 0.2, np.arange(float(n))
    correct = rng.random(n) < c + right - worse * old
    known = (rng.random(n) < np.where(correct, *said)) & (at + rng.exponential(late, n) <= n - 1 + policy.label_lag)
    out = []
    for k, (x, o, y, heard) in enumerate(zip(c.tolist(), old.tolist(), correct.tolist(), known.tolist(), strict=True)):
        seen = {"id": str(k), "time": float(k), "status": "ok", "refused": False, "confidence": x, "group": "65+" if o else "18-64"}  # fmt: skip
        seen |= dict.fromkeys(
            ("prompt_tokens", "completion_tokens", "surprisal", "label", "joules", "cost", "claim", "said")
        )
        out.append(seen | {"correct": int(y) if heard else None})
    return Window("sha256:a", number, 1, 2, tuple(out))


def life(policy, rng, windows, said, change=None, calm=0):
    "Of one service the first window with an alarm, by family, the outcomes of its last window, and the labels it had."
    stream, first, labels, asked = {}, {}, 0, 0
    for number in range(1 + windows):
        n, how = policy.requests if number else policy.reference, (change or {}) if number > calm else {}
        w = rated(policy, rng, n, number, said=said, **how)
        seen, _, stream, _ = decide(policy, w, stream)
        labels, asked = labels + seen.labelled, asked + n
        for f in seen.alarms:
            first.setdefault(f, number)
    return first, seen.outcomes, labels / asked


def sequences(a) -> int:
    "The tables of --sequences."
    policy = replace(read_monitor(load_params(a.params, "monitor")), methods=("errors",), together=0)
    measure.debiased_ece = lambda c, y: (0.0, 0.0, 0.0)  # its interval is told, and decides nothing
    runs, broken, count, windows = {"calibration": policy.calibration_run, "fairness": policy.fairness_run}, False, a.sequences, a.edge_windows  # fmt: skip
    print(f"No change: {count} services of {windows} windows; stated: at most {windows / runs['calibration']:.2f} of them with a false alarm of calibration, {windows / runs['fairness']:.2f} of fairness\n| labelled | in time | calibration | fairness | alarms in 100 windows |\n|--:|--:|--:|--:|--:|")  # fmt: skip
    for share in (0.05, 0.3, 1.0):
        lives = [life(policy, np.random.default_rng([a.seed + 3, i, round(100 * share)]), windows, (share, share)) for i in range(count)]  # fmt: skip
        bad = {f: sum(f in x[0] for x in lives) for f in runs}
        broken |= any(clopper_pearson(bad[f], count).low > windows / runs[f] for f in runs)
        print(f"| {share:.0%} | {np.mean([x[2] for x in lives]):.0%} | {bad['calibration'] / count:.3f} | {bad['fairness'] / count:.3f} | {100 * sum(bad.values()) / (count * windows):.2f} |", flush=True)  # fmt: skip
    some = max(10, count // 5)
    print(f"\nPlanted after 3 quiet windows, {some} services, up to {windows // 2} windows\n| change | labelled | found | median delay | nine in ten by |\n|---|--:|--:|--:|--:|")  # fmt: skip
    for name, (family, change) in SHIFTS.items():
        for share in (0.05, 0.3, 1.0):
            lives = [life(policy, np.random.default_rng([a.seed + 4, i, round(100 * share)]), windows // 2 + 3, (share, share), change, 3) for i in range(some)]  # fmt: skip
            delays = np.array([x[0].get(family, math.inf) - 3 for x in lives])
            ends = [f"{q:g}" if math.isfinite(q := np.quantile(delays, part, method="higher")) else f"over {windows // 2}" for part in (0.5, 0.9)]  # fmt: skip
            print(f"| {name} | {share:.0%} | {np.isfinite(delays).mean():.2f} | {ends[0]} | {ends[1]} |", flush=True)
    print(f"\nLabels that are no sample, {some} services of 10 windows, nothing changed\n| rated | labelled | alarms of calibration | of fairness | calibration is inconclusive at the end |\n|---|--:|--:|--:|--:|")  # fmt: skip
    for name, said in RATED.items():
        lives = [life(policy, np.random.default_rng([a.seed + 5, i]), 10, said) for i in range(some)]
        bad = [np.mean([f in x[0] for x in lives]) for f in runs]
        mute = np.mean([x[1]["calibration"] == "inconclusive" for x in lives])
        print(
            f"| {name} | {np.mean([x[2] for x in lives]):.0%} | {bad[0]:.2f} | {bad[1]:.2f} | {mute:.2f} |", flush=True
        )
    return int(broken)


WORDS, CYRILLIC = 3000, str.maketrans("0123456789w", "абвгдежзийш")
SAID = {
    "a half of the texts on one topic of ten (below what counts)": ("domain_auc", {"other": 0.5}),
    "all texts on one topic of ten": ("domain_auc", {"other": 1.0}),
    "a fifth of the texts in another script": ("script_psi", {"script": 0.2}),
    "one word in ten never seen": ("unseen_words", {"unseen": 0.1}),
}


def texts(rng, n, other=0.0, script=0.0, unseen=0.0):
    "Texts of 8 to 16 words, of which the commonest are any topic's and the others of one of ten; what has changed, as shares."
    topics = np.where(rng.random(n) < other, 0, rng.integers(10, size=n))
    out = []
    for topic in topics.tolist():
        rank = np.minimum((WORDS ** rng.random(rng.integers(8, 17))).astype(int), WORDS - 1)  # Zipf's law
        own = np.where(rank < 50, rank, WORDS * (topic + 1) + rank)
        new = rng.random(len(own)) < unseen
        said = " ".join(f"w{10**6 + w if x else w}" for w, x in zip(own.tolist(), new.tolist(), strict=True))
        out.append(said.translate(CYRILLIC) if rng.random() < script else said)
    return out


def said(policy, rng, windows, change=None, calm=0):
    "The windows of one release whose texts are compared, without the reference; the last ones with a change."
    made_for, stream, out = list(dict.fromkeys(texts(rng, 2000))), {}, []
    for number in range(1 + windows):
        n = policy.requests if number else policy.reference
        pair = (made_for, list(dict.fromkeys(texts(rng, n, **((change or {}) if number > calm else {})))) if number else [])  # fmt: skip
        w = Window("sha256:a", number, 1, 2, tuple(rows(rng, n)))
        seen, _, stream, _ = decide(policy, w, stream, pair)
        out.append(seen)
        if change and "data" in seen.alarms:
            break
    return out[1:]


def of_texts(a) -> int:
    "The tables of --texts."
    policy = read_monitor(load_params(a.params, "monitor"))
    policy = replace(policy, methods=(*policy.methods, "texts"))
    seen = [w for i in range(a.texts) for w in said(policy, np.random.default_rng([a.seed + 8, i]), a.windows)]
    drifts = [{s.metric for s in w.scores if s.drifted and s.q is not None} for w in seen]
    bad = sum("data" in w.alarms for w in seen)
    alarms = clopper_pearson(bad, len(seen))
    of_text = sum(bool(d & {"domain_auc", "length_psi", "script_psi", "unseen_words"}) for d in drifts)
    print(f"Texts, no change: {a.texts} releases, {len(seen)} windows\n| | found | stated |\n|---|--:|--:|")
    print(f"| windows with a test that drifted | {np.mean([bool(d) for d in drifts]):.4f} | {policy.fdr:g} |\n| a test of texts | {of_text / len(seen):.4f} | |")  # fmt: skip
    print(f"| windows that end in an alarm of data | {bad / len(seen):.4f} ({alarms.low:.4f} to {alarms.high:.4f}) | {policy.budget:g} |", flush=True)  # fmt: skip
    some = max(1, a.texts // 4)
    print(f"\nPlanted after 3 quiet windows, {some} releases each, up to 4 windows\n| change | found by | found | median delay |\n|---|---|--:|--:|")  # fmt: skip
    for name, (metric, change) in SAID.items():
        lives = [said(policy, np.random.default_rng([a.seed + 9, i]), 7, change, 3)[3:] for i in range(some)]
        named = [any(s.metric == metric and s.drifted for w in x for s in w.scores) for x in lives]
        delays = [next((j for j, w in enumerate(x, 1) if "data" in w.alarms), math.inf) for x in lives]
        median = f"{m:g}" if math.isfinite(m := float(np.median(delays))) else "over 4"
        print(f"| {name} | {metric} in {sum(named)} of {some} | {np.isfinite(delays).mean():.2f} | {median} |", flush=True)  # fmt: skip
    return int(alarms.low > policy.budget)


def planted(policy, a, name, each=1) -> dict:
    "How often and how soon a change is found after three quiet windows."
    (family, change), delays, other = PLANTED[name], [], 0
    for i in range(a.planted):
        seen = release(policy, np.random.default_rng([a.seed + 1, i]), 13, change, calm=3, each=each)[4:]
        delays.append(next((j for j, w in enumerate(seen, 1) if family in w.alarms), math.inf))
        other += any(f != family for w in seen for f in w.alarms)
    found, median = sum(math.isfinite(d) for d in delays), float(np.median(delays))
    return {"family": family, "found": found / a.planted, "delay": None if math.isinf(median) else median, "others": other / a.planted}  # fmt: skip


def regulars(policy, a) -> dict:
    "The same figures under no change where each user asks several times in a window, always in his own way."
    compared, alarms, ran, drifted, total, _ = null(policy, a.releases, a.windows, a.seed + 6, a.each)
    ends = clopper_pearson(alarms, total)
    return {
        "each": a.each, "windows": total, "drifted_windows": drifted / total, "alarms": alarms / total, "alarms_interval": [ends.low, ends.high],
        "by_family": {f: compared[f] / total for f in ("data", "cost", "hallucination")},
        "releases_with_false_alarm": {f: ran[f] / a.releases for f in ("calibration", "fairness")},
        "edge": edge(policy, np.random.default_rng([a.seed + 7]), a.releases, a.edge_windows, a.each),
        "planted": {name: planted(policy, a, name, a.each) for name, (f, _) in PLANTED.items() if f in ("calibration", "fairness")},
    }  # fmt: skip


def measured(a) -> dict:
    "Every figure of one version of the kit."
    policy = read_monitor(load_params(a.params, "monitor"))
    by_window = hasattr(policy, "together")  # else it is a version whose budgets are in labels
    compared, alarms, ran, drifted, total, labels = null(policy, a.releases, a.windows, a.seed)
    ends = clopper_pearson(alarms, total)
    spent = {"calibration": a.windows if by_window else labels, "fairness": a.windows if by_window else labels}
    runs = {"calibration": policy.calibration_run, "fairness": policy.fairness_run}
    body = {
        "releases": a.releases, "windows": total, "drifted_windows": drifted / total, "fdr": policy.fdr, "alarms": alarms / total,
        "alarms_interval": [ends.low, ends.high], "budget": policy.budget,
        "by_family": {f: compared[f] / total for f in FAMILIES if f not in runs}, "labels": labels,
        "releases_with_false_alarm": {f: ran[f] / a.releases for f in runs}, "bound": {f: spent[f] / runs[f] for f in runs},
        "edge_windows": a.edge_windows, "edge_releases": a.releases,
        "edge": edge(policy, np.random.default_rng([a.seed + 2]), a.releases, a.edge_windows),
        "edge_bound": {f: min(1.0, (a.edge_windows if by_window else labels / (a.windows + 3) * a.edge_windows) / runs[f]) for f in runs},
        "regulars": regulars(policy, a), "planted_releases": a.planted, "planted": {}, "params": Path(a.params).name,
    }  # fmt: skip
    body["planted"] = {name: planted(policy, a, name) for name in PLANTED}
    return body


def of(rev: str, a) -> dict:
    "The same figures of an earlier commit, by its own code and its own policy."
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "-C", root, "worktree", "add", "-q", "--detach", f"{folder}/then", rev], check=True)
        try:
            words = [
                f"--{k}={getattr(a, k)}" for k in ("releases", "windows", "edge_windows", "planted", "each", "seed")
            ]
            words += [f"--params={folder}/then/params.yaml", f"--out={folder}/out.json"]
            env = os.environ | {"PYTHONPATH": f"{folder}/then"}
            done = subprocess.run([sys.executable, __file__, *[w.replace("edge_", "edge-") for w in words]], env=env)
            if done.returncode not in (0, 1):
                raise SystemExit(f"monitor_null: {rev} ended with {done.returncode}")
            return json.loads(Path(folder, "out.json").read_text())
        finally:
            subprocess.run(["git", "-C", root, "worktree", "remove", "--force", f"{folder}/then"], check=True)


def tables(now: dict, then: dict | None) -> None:
    "Null and power, with what they were."
    was = lambda text: f" {text(then)} |" if then else ""
    more = (" before |", "--:|") if then else ("", "")
    print(
        f"No change: {now['releases']} releases, {now['windows']} windows\n| | found | stated |{more[0]}\n|---|--:|--:|{more[1]}"
    )
    print(f"| windows with a test that drifted | {now['drifted_windows']:.4f} | {now['fdr']:g} |{was(lambda b: format(b['drifted_windows'], '.4f'))}")  # fmt: skip
    ends = "({:.4f} to {:.4f})".format(*now["alarms_interval"])
    print(f"| windows that end in an alarm | {now['alarms']:.4f} {ends} | {now['budget']:g} |{was(lambda b: format(b['alarms'], '.4f'))}")  # fmt: skip
    for f in ("calibration", "fairness"):
        print(f"| releases with a false alarm of {f} | {now['releases_with_false_alarm'][f]:.4f} | {now['bound'][f]:.4f} |{was(lambda b, f=f: format(b['releases_with_false_alarm'][f], '.4f'))}")  # fmt: skip
    for f in ("calibration", "fairness"):
        print(f"| {f}: the same in {now['edge_windows']} windows as bad as is accepted | {now['edge'][f]:.4f} | {now['edge_bound'][f]:.4f} |{was(lambda b, f=f: format(b['edge'][f], '.4f'))}")  # fmt: skip
    r = now["regulars"]
    print(
        f"\nNo change, and each user asks {r['each']} times in a window: {now['releases']} releases, {r['windows']} windows\n| | found | stated |\n|---|--:|--:|"
    )
    ends = "({:.4f} to {:.4f})".format(*r["alarms_interval"])
    print(f"| windows with a test that drifted | {r['drifted_windows']:.4f} | {now['fdr']:g} |\n| windows that end in an alarm | {r['alarms']:.4f} {ends} | {now['budget']:g} |")  # fmt: skip
    for f in ("calibration", "fairness"):
        print(
            f"| releases with a false alarm of {f} | {r['releases_with_false_alarm'][f]:.4f} | {now['bound'][f]:.4f} |"
        )
        print(f"| {f}: the same in {now['edge_windows']} windows as bad as is accepted | {r['edge'][f]:.4f} | {now['edge_bound'][f]:.4f} |")  # fmt: skip
    late = lambda p: "over 10" if p["delay"] is None else f"{p['delay']:g}"
    print(
        "\nPlanted for the same users, whose answers are all right or all wrong\n| change | found | median delay |\n|---|--:|--:|"
    )
    for name, p in r["planted"].items():
        print(f"| {name} | {p['found']:.2f} | {late(p)} |")
    more = (" before | median before |", "--:|--:|") if then else ("", "")
    print(f"\nPlanted after 3 quiet windows, {now['planted_releases']} releases each, up to 10 windows\n| change | family | found | median delay |{more[0]} by another family |\n|---|---|--:|--:|{more[1]}--:|")  # fmt: skip
    for name, p in now["planted"].items():
        q = then and then["planted"][name]
        old = f" {q['found']:.2f} | {late(q)} |" if q else ""
        print(f"| {name} | {p['family']} | {p['found']:.2f} | {late(p)} |{old} {p['others']:.2f} |")


def main() -> None:
    "Print the tables and write the figures."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--releases", type=int, default=80)
    p.add_argument("--windows", type=int, default=20)
    p.add_argument("--edge-windows", type=int, default=50)
    p.add_argument("--planted", type=int, default=20, help="releases for each planted change")
    p.add_argument(
        "--each", type=int, default=4, help="requests of each user in a window, where users ask more than once"
    )
    p.add_argument("--params", default="params.yaml")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--before", default="", help="a commit whose code and policy are measured too, in the same run")
    p.add_argument("--out", default="")
    p.add_argument("--sequences", type=int, default=0, help="only so many services with labels of every coverage")
    p.add_argument("--texts", type=int, default=0, help="only so many releases whose windows have texts")
    a = p.parse_args()
    if a.texts:
        raise SystemExit(of_texts(a))
    if a.sequences:
        raise SystemExit(sequences(a))
    body = measured(a)
    then = of(a.before, a) if a.before else None
    tables(body, then)
    if a.out:
        Path(a.out).write_text(
            json.dumps({**body, **({"before": then, "commit": a.before} if then else {})}, indent=2) + "\n"
        )
    over = lambda share, bound: clopper_pearson(round(share * a.releases), a.releases).low > bound
    broken = False
    for seen in (body, body["regulars"]):
        broken |= seen["alarms_interval"][0] > body["budget"]
        for f in ("calibration", "fairness"):
            broken |= over(seen["releases_with_false_alarm"][f], body["bound"][f])
            broken |= over(seen["edge"][f], body["edge_bound"][f])
    raise SystemExit(int(broken))


if __name__ == "__main__":
    main()
