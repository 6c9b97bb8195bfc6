"Users who ask more than once are no drift, and a bot is."

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from llmkit.core.params import load_params
from llmkit.monitor.compare import adjusted, claims, features
from llmkit.monitor.decide import decide
from llmkit.monitor.drift import design_effect, users
from llmkit.monitor.measure import calibration, fairness
from llmkit.monitor.policy import read_monitor
from llmkit.monitor.window import Window

SECTION = load_params(Path(__file__).parents[2] / "params.yaml", "monitor")
POLICY = replace(read_monitor(SECTION), methods=("labels", "tokens", "refusals"))


def asked(rng, n, each=3, intents=60, named=True, bot=0.0):
    "Requests of users who ask `each` times about one thing, in their own way, and of a bot."
    rows = []
    while len(rows) < n:
        who, label = f"u{rng.integers(1 << 40)}", f"intent_{rng.integers(intents)}"
        long, refused = int(rng.poisson(20)), bool(rng.random() < 0.05)
        for _ in range(each):
            seen = {"status": "ok", "label": label, "prompt_tokens": long, "completion_tokens": int(rng.poisson(9)), "refused": refused, "unit": who}  # fmt: skip
            if rng.random() < bot:
                seen |= {"label": "intent_0", "unit": "bot"}
            rows.append(dict.fromkeys(("cost", "joules", "surprisal", "confidence", "claim")) | seen)
    return [{**r, "unit": r["unit"] if named else None} for r in rows[:n]]


def drifts(count, **window):
    "Of so many releases those whose first window drifts, quiet unless something is planted."
    found = 0
    for i in range(count):
        rng = np.random.default_rng([i, 7])
        old, new = asked(rng, 900, named=window.get("named", True)), asked(rng, 300, **window)
        tests = adjusted(features(POLICY, old, new), POLICY.fdr)
        found += any(f.drifted for fs in tests.values() for f in fs)
    return found


def test_customers_who_ask_three_times_are_quiet_and_a_bot_is_not():
    assert drifts(20) <= 2
    assert drifts(20, named=False) >= 10  # as if each came from another user
    assert drifts(10, bot=0.3) == 10  # one name, and a third of the requests
    assert drifts(10, intents=20) == 10  # others ask about a third of the things


def test_requests_of_users_who_ask_once_or_have_no_name_count_singly():
    rng = np.random.default_rng(0)
    bins = np.eye(6)[rng.integers(0, 6, 400)]
    for units in ([None] * 400, [f"u{i}" for i in range(400)], ["key"] * 400):
        assert len(set(users(units[:300], units[300:]))) == 400
        assert design_effect(bins[:300], bins[300:], users(units[:300], units[300:])) == 1
    twice = np.repeat(bins[:200], 2, axis=0)
    who = users([f"u{i // 2}" for i in range(300)], [f"u{i // 2}" for i in range(300, 400)])
    assert abs(design_effect(twice[:300], twice[300:], who) - 2) < 1e-9
    half = np.arange(400) // 2 % 2 * 1.0  # a cost, the same twice
    assert abs(design_effect(half[:300], half[300:], who) - 2) < 1e-9
    regulars = users([f"u{i % 50}" for i in range(300)], [f"u{i % 50}" for i in range(100)])
    assert design_effect(np.ones(300), np.ones(100), regulars) == 1  # nothing varies


def test_a_window_remembers_who_asked(tmp_path):
    rng, stream, seen = np.random.default_rng(3), {}, []
    for number in range(4):
        rows = asked(rng, 300 if number else 900)
        also = {"group": None, "said": None, "correct": None}
        rows = tuple(r | also | {"id": f"{number}-{i}", "time": float(i)} for i, r in enumerate(rows))
        w, reports, stream, _ = decide(POLICY, Window("sha256:a", number, 1, 2, rows), stream)
        seen.append(w)
    assert [w.flags for w in seen] == [()] * 4
    assert "users ask more than once" in reports["data"].get("label_psi").method
    assert stream["recent"][-1][0]["unit"] and stream["reference"][0]["unit"]
    older = {k: [{j: v for j, v in r.items() if j != "unit"} for r in rows] for k, rows in (("reference", stream["reference"]),)}  # fmt: skip
    again, *_ = decide(POLICY, Window("sha256:a", 4, 1, 2, rows), stream | older)  # as an earlier version left it
    assert again.number == 4


def test_users_who_are_right_or_wrong_each_time_alarm_no_sooner_than_is_stated(monkeypatch):
    "As bad as the policy accepts, for 50 windows: at most half of the services may give a false alarm, and nearly all did."
    monkeypatch.setattr(
        "llmkit.monitor.measure.debiased_ece", lambda c, y: (0.0, 0.0, 0.0)
    )  # told, and decides nothing
    rng, bad = np.random.default_rng(4), Counter()

    def window(number, right=0.0, worse=0.0, users=38, each=8):
        c, old = rng.beta(8, 2, users), rng.random(users) < 0.2
        y = (rng.random(users) < c + right - worse * old).astype(int)
        rows = [{"unit": f"{number}-{u}", "status": "ok", "confidence": c[u], "correct": int(y[u]) if rng.random() < 0.3 else None, "group": "old" if old[u] else "young"} for u in rng.permutation(np.repeat(np.arange(users), each))]  # fmt: skip
        return Window("sha256:a", number, 1, 2, tuple(r | {"id": str(i), "time": float(i)} for i, r in enumerate(rows)))

    for _ in range(10):
        watch, groups = None, {}
        for number in range(1, 51):
            watch, told = calibration(POLICY, window(number, right=-POLICY.tolerance), watch)
            groups, found, _ = fairness(POLICY, window(number, worse=POLICY.gap), groups)
        bad["calibration"] += watch.alarmed(POLICY.calibration_run)
        bad["fairness"] += bool(found)
    assert bad["calibration"] <= 3 and bad["fairness"] <= 3
    assert watch.n > 50 * 60 and told.get("label_coverage").n == 304  # labels, and not users, are told
    watch = None
    for number in range(1, 51):
        watch, _ = calibration(POLICY, window(number, right=-0.25), watch)
    assert watch.alarmed(POLICY.calibration_run)


def test_every_answer_to_a_user_adds_what_it_tells_of_his_group():
    "A group 40 points worse, of which each user asks four times and is right or wrong anew: his first answer alone found none in 10 windows."
    rng, found = np.random.default_rng(5), 0

    def window(number, users=75, each=4):
        old, said = rng.random(users) < 0.2, rng.random(users) < 0.3
        rows = [{"unit": f"{number}-{u}", "status": "ok", "correct": int(rng.random() < 0.8 - 0.4 * old[u]) if said[u] else None, "group": "old" if old[u] else "young"} for u in np.repeat(np.arange(users), each)]  # fmt: skip
        return Window("sha256:a", number, 1, 2, tuple(r | {"id": str(i), "time": float(i)} for i, r in enumerate(rows)))

    for _ in range(10):
        groups = {}
        for number in range(1, 11):
            groups, bad, _ = fairness(POLICY, window(number), groups)
        found += bad == ["old"]
    assert found >= 7


def test_the_interval_of_flagged_claims_knows_how_few_users_asked():
    "95 % intervals that took each of eight answers to a user for one of its own missed the truth in half of the windows."
    rng, missed = np.random.default_rng(6), 0
    for _ in range(100):
        flagged = rng.random(38) < 0.1
        rows = [{"id": str(i), "unit": f"u{u}", "status": "ok", "claim": bool(flagged[u])} for i, u in enumerate(np.repeat(np.arange(38), 8))]  # fmt: skip
        corrected, plain = claims(Window("sha256:a", 1, 1, 2, tuple(rows)))
        missed += not plain.low <= 0.1 <= plain.high
        assert plain.n == 304 and plain.value == np.repeat(flagged, 8).mean() and corrected.low <= corrected.value
    assert missed <= 10
    few = [
        {"id": str(i), "unit": f"u{i // 8}", "status": "ok", "claim": False} for i in range(160)
    ]  # no claim of 20 users
    assert claims(Window("sha256:a", 1, 1, 2, tuple(few)))[1].high > 0.15
