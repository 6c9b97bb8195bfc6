"Windows with the texts of users: quiet, on another topic, in another script, and of words that were never seen."

import numpy as np
import pytest
from watching_town import SMALL, Town, section

from llmkit.core.files import write_jsonl
from llmkit.monitor.check import kept_texts
from llmkit.monitor.watch import run_window
from llmkit.serve.call import parse
from llmkit.serve.samples import Texts

TOPICS = (
    "card arrive post lost block pin new wait week address",
    "fee charge month why pay account cost price wrong back",
    "loan rate house borrow year sum repay early plan interest",
    "transfer send abroad bank euro late today code missing name",
)
COMMON = "my the is a how to what can i please do not it for you".split()
CYRILLIC = str.maketrans("abcdefghijklmnopqrstuvwxyz", "абцдефгхийклмнопярстуввхуз")


def text(rng, topic):
    "A question on a topic, some of it in the words of any."
    return " ".join(rng.choice(COMMON if rng.random() < 0.5 else TOPICS[topic].split()) for _ in range(rng.integers(5, 12)))  # fmt: skip


CHANGES = {
    "topic": ("domain_auc", lambda rng, _: text(rng, 2)),
    "script": ("script_psi", lambda rng, t: t.translate(CYRILLIC)),
    "unseen": ("unseen_words", lambda rng, t: " ".join(w if rng.random() < 0.7 else w[::-1] + "um" for w in t.split())),
}


def town(folder, rng, texts=2400, **more):
    "A town whose server keeps texts, and whose training data lie in the order of their topics."
    folder.mkdir(exist_ok=True)
    train, path = sorted(range(texts), key=lambda i: i % 4), folder / "train.jsonl"
    write_jsonl(path, ({"messages": [{"role": "user", "content": f"{text(rng, i % 4)}"}]} for i in train))
    rules = {k: SMALL[k] for k in ("window", "fairness", "calibration", "retrain")}
    rules["reference"] = SMALL["reference"] | {"texts": str(path) if texts else ""}
    methods = ["tokens", "refusals", "errors", "labels", "surprisal", "confidence", "texts"]
    t = Town(folder, section(**rules, drift={"methods": methods}, texts={"share": 1.0}), **more)
    t.monitor.texts = Texts(folder / "texts.db", lambda: t.now)
    return t


def ask(t, rng, n, change=lambda rng, text: text):
    "Requests whose texts are kept."
    for i in range(1, n + 1):
        said = change(rng, text(rng, int(rng.integers(4))))
        call = parse("chat", {"model": "m", "messages": [{"role": "user", "content": said}]})
        t.monitor.texts.keep(f"q{t.now + i:.0f}", call, "card: So.")
    t.send(n)


def decided(t):
    out = []
    while w := run_window(t.monitor):
        out.append(w)
    return out


@pytest.mark.parametrize("texts", [2400, 0], ids=["training data", "texts of the reference"])
def test_quiet_windows_of_texts_give_no_alarm(tmp_path, texts):
    rng = np.random.default_rng(1)
    t = town(tmp_path, rng, texts)
    ask(t, rng, 180 + 6 * 60)
    [_, *windows] = decided(t)
    assert len(windows) == 6
    assert {f.metric for w in windows for f in w.scores} >= {"domain_auc", "length_psi", "script_psi", "unseen_words"}
    assert not any(w.alarms for w in windows) and {w.outcomes["data"] for w in windows} == {"pass"}


@pytest.mark.parametrize("change", CHANGES)
def test_texts_that_have_changed_are_found_up_to_the_alarm(tmp_path, change):
    (metric, how), rng = CHANGES[change], np.random.default_rng(2)
    t = town(tmp_path, rng, 200)
    ask(t, rng, 240)
    assert [w.alarms for w in decided(t)] == [[], []]
    ask(t, rng, 120, how)
    one, two = decided(t)
    for w in (one, two):
        assert metric in {s.metric for s in w.scores if s.drifted}, w
    assert not one.alarms and two.alarms == ["data"] and two.outcomes["data"] == "fail"
    assert metric in next(r.sentence for r in two.verdict.reasons if r.on == "data") + str(t.monitor.memory.reports(two.release, two.number)["data"].get("drifted_windows"))  # fmt: skip
    assert [a.kind for a in t.monitor.memory.actions()] == ["retrain"]


def test_what_the_policy_says_is_worth_a_look_holds_for_words_that_were_never_seen(tmp_path):
    rng = np.random.default_rng(3)
    t = town(tmp_path, rng, 200)
    t.monitor.policy = type(t.monitor.policy)(**{**vars(t.monitor.policy), "rise": 0.6, "auc": 1.0})
    ask(t, rng, 180)
    ask(t, rng, 60, CHANGES["unseen"][1])
    [_, w] = decided(t)
    [unseen] = [s for s in w.scores if s.metric == "unseen_words"]
    assert unseen.value > 0.2 and unseen.threshold >= 0.6 and not unseen.drifted


def test_each_user_gives_one_text(tmp_path):
    texts = Texts(tmp_path / "texts.db")
    for i in range(40):
        texts.keep(f"q{i}", parse("chat", {"model": "m", "messages": [{"role": "user", "content": f"text {i}"}]}), "a")
    rows = [{"id": f"q{i}", "unit": f"u{i // 2}"} for i in range(42)]
    assert kept_texts(texts, rows) == [f"text {i}" for i in range(0, 40, 2)]
    assert len(kept_texts(texts, [r | {"unit": None} for r in rows])) == 40
