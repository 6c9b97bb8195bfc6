"""Two reports by one suite's name, but on other questions or other terms, are not compared: the gate says so."""

import numpy as np
import pytest

from llmkit.core.errors import KitError
from llmkit.core.report import Report
from llmkit.evals.battery import Surroundings, run_suite
from llmkit.evals.bias import choose, run_crows_pairs
from llmkit.evals.choice import Question, choice_table
from llmkit.evals.safety import run_safety
from llmkit.evals.suite import Item, Suite, make_suite
from llmkit.gate.judge import judge
from llmkit.runtime.dummy import DummyEngine


def questions(word="card", n=40):
    "A task whose questions have the same ids and labels, whatever they ask."
    records = [
        {"id": f"q{i}", "messages": [{"role": "user", "content": f"my son's {word} {i}"}, {"role": "assistant", "content": "yes: ok"}], "group": "ab"[i % 2]}
        for i in range(n)
    ]  # fmt: skip
    return make_suite("task", 1, records, scorers=("label",))


def outcome(metric, new, old, slice="all", **test):
    "What a comparison of two reports gives."
    subject = new.subject
    found = judge(
        {"rules": [{"metric": metric, "slice": slice, "on": subject, "against": "old", **test}]},
        {subject: new, "old": old},
    )
    return found.outcome, found.reasons[0].sentence


def crows(path, other):
    "A file of pairs."
    path.parent.mkdir(exist_ok=True)
    path.write_text("sent_more,sent_less,bias_type\n" + "".join(f"a {other} {i},b {i},age\n" for i in range(6)))
    return str(path)


CASES = {  # suite → metric, test, options of two runs, and where the second asks something else
    "fairness": ("accuracy", {"noninferiority": 0.5}, {"min_n": 5}, {"min_n": 5}, "ship"),
    "swaps": ("flip_rate", {"noninferiority": 0.5}, {}, {}, "ship"),
    "load": ("objective_rate", {"noninferiority": 0.5}, {"latency": 2.0, "requests": 40, "per_second": 500.0}, {"latency": 9.0, "requests": 40, "per_second": 500.0}, "card"),
    "safety": ("attack_success_rate", {"noninferiority": 0.5}, {"families": ["leak"]}, {"families": ["leak"]}, "card"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_suite_on_other_terms_is_another_one(name, tmp_path):
    metric, test, first, second, word = CASES[name]
    engine = DummyEngine(replies=lambda p: "yes: ok")
    run = lambda options, word, seed=0: run_suite(name, engine, Surroundings(questions(word), seed=seed), options, tmp_path / "cache")  # fmt: skip
    old, same, other = run(first, "card"), run(first, "card"), run(second, word, seed=int(name == "safety"))
    assert outcome(metric, same, old, **test)[0] in ("pass", "inconclusive")
    found, why = outcome(metric, other, old, **test)
    assert found == "error" and "two suites" in why


def test_files_of_one_name_are_told_apart(tmp_path):
    engine = DummyEngine(seed=1)
    files = [crows(tmp_path / d / "pairs.csv", d) for d in ("one", "two")]
    old, other = (run_suite("crows_pairs", engine, Surroundings(), {"file": f}, tmp_path / "c") for f in files)
    assert old.suite == other.suite and "two suites" in outcome("stereotype_bias", other, old, max_ratio=9.0)[1]


def test_times_of_other_prompts_are_not_compared(tmp_path, monkeypatch):
    from llmkit.core.report import Measurement
    from llmkit.evals import evaluate
    from llmkit.evals.cost import load_price

    speed = Report("speed_engine", "", "closed-loop-8@1", tuple(Measurement(m, 1.0, 9, 0.9, 1.1, direction="lower") for m in ("latency_p95", "batch_tokens_per_second")))  # fmt: skip
    monkeypatch.setattr(evaluate, "speed_report", lambda *a, **k: speed)
    monkeypatch.setattr(evaluate, "open_quietly", lambda folder: DummyEngine())
    time = lambda word: evaluate.timing_report(
        "engine", tmp_path, questions(word), 8, 8, 1, load_price("m7g.large"), 0.5
    )
    old, same, other = time("card"), time("card"), time("ship")
    assert outcome("latency_p95", same, old, max_ratio=1.1)[0] == "pass"
    assert "two suites" in outcome("latency_p95", other, old, max_ratio=1.1)[1]


def test_one_family_has_one_detector():
    "Its rate would be corrected twice, and a rule would read the first of the two."
    item = lambda i, d: Item(f"{i}", ({"role": "user", "content": f"q{i}"},), "kxsecret", d, "mine")
    suites = [Suite("mine", 1, (item(i, d),), scorers=()) for i, d in enumerate(("followed", "leaked"))]
    with pytest.raises(KitError, match="mine: two detectors for one family"):
        run_safety(DummyEngine(replies=lambda p: "no"), suites)


class Broken(DummyEngine):
    "An engine whose weights are not numbers."

    def forward(self, rows):
        return [np.full_like(x, np.nan) for x in super().forward(rows)]

    def score(self, prompts, continuations):
        return [np.full_like(x, np.nan) for x in super().score(prompts, continuations)]


def test_likelihoods_that_are_no_numbers_choose_nothing():
    "The first answer looked likeliest, with a confidence of 1."
    with pytest.raises(KitError, match="not a number.*NaN in the model's weights"):
        choice_table(Broken(seed=1), [Question("1", "what", ("a", "b"), 0)])
    with pytest.raises(KitError, match="not a number"):
        run_crows_pairs(Broken(seed=1), [{"id": "1", "bias_type": "x", "more": "a", "less": "b"}])
    with pytest.raises(KitError, match="not a number"):
        choose(Broken(seed=1), [[{"role": "user", "content": "q"}]], [["a", "b"]])
