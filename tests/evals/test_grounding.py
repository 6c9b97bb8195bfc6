"""Grounding: what is invented is found, what is given is not accused, and abstaining does not pay for everything."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import recall_score

from llmkit.core.digests import short
from llmkit.core.errors import KitError
from llmkit.core.params import ParamsError
from llmkit.core.report import Report
from llmkit.evals.battery import Surroundings, run_suite
from llmkit.evals.claims import (
    ABSTAINED,
    HALLUCINATED,
    UNSUPPORTED,
    EngineJudge,
    find_judge,
    judge_detector,
    names,
    numbers,
    unsupported,
)
from llmkit.evals.grounding import agreement, load_grounding, run_grounding
from llmkit.evals.prevalence import Quality, melded, rogan_gladen
from llmkit.gate.judge import judge
from llmkit.runtime.dummy import DummyEngine

SUITE = load_grounding()


def engine(said):
    "An engine that answers an item by a function of it."
    answers = {i.messages[-1]["content"]: said(i) for i in SUITE.items}
    return DummyEngine(context_length=4096, replies=lambda p: next(a for q, a in answers.items() if q in p))


def faithful(i):
    return f"It is {i.answer}." if i.answer else "The text does not say."


def values(measured):
    return {m.metric: m.value for m in measured if m.slice == "all"}


def test_a_faithful_engine_is_not_accused():
    v = values(run_grounding(engine(faithful), SUITE)[0])
    assert (v["abstention_accuracy"], v["over_abstention_rate"], v["grounded_accuracy"]) == (1, 0, 1)
    assert v["unsupported_claim_rate"] == v["hallucination_rate"] == v["hallucination_rate_corrected"] == 0


@pytest.mark.parametrize(
    "said,metric,expected",
    [
        (lambda i: i.answer or "It is in room 12.", "abstention_accuracy", 0.0),
        (lambda i: "The text does not say.", "over_abstention_rate", 1.0),
        (lambda i: f"{i.answer}, as Max Frost says." if i.answer else "Unknown.", "unsupported_claim_rate", 1.0),
        (lambda i: "It is 98,765." if i.answer else "Unknown.", "hallucination_rate", 0.5),
        (lambda i: i.answer or "Yes, quite often.", "hallucination_rate", 0.5),
        (lambda i: "Yes." if i.answer else "Unknown.", "grounded_accuracy", 0.0),
    ],
)
def test_each_planted_failure_moves_its_metric(said, metric, expected):
    assert values(run_grounding(engine(said), SUITE)[0])[metric] == pytest.approx(expected)


RULES = [
    {"metric": "abstention_accuracy", "min": 0.8, "bound": "wilson"},
    {"metric": "over_abstention_rate", "max": 0.2, "bound": "clopper_pearson"},
    {"metric": "grounded_accuracy", "min": 0.8, "bound": "wilson"},
    {"metric": "unsupported_claim_rate", "max": 0.2, "bound": "clopper_pearson"},
    {"metric": "hallucination_rate_corrected", "max": 0.2, "bound": "interval"},
]


def test_the_gate_tells_the_engines_apart():
    outcomes = {}
    for name, said in (("faithful", faithful), ("inventive", lambda i: i.answer or "Max Frost, 4,711."), ("mute", lambda i: "I don't know.")):  # fmt: skip
        measured, tables = run_grounding(engine(said), SUITE)
        report = Report("grounding_engine", "", str(SUITE), tuple(measured), tables)
        verdict = judge({"rules": [{"on": "grounding_engine", **r} for r in RULES]}, {"grounding_engine": report})
        outcomes[name] = [r.metric for r in verdict.reasons if r.outcome == "fail"]
    assert outcomes["faithful"] == []
    assert set(outcomes["inventive"]) == {
        "abstention_accuracy",
        "unsupported_claim_rate",
        "hallucination_rate_corrected",
    }
    assert set(outcomes["mute"]) == {"over_abstention_rate", "grounded_accuracy", "unsupported_claim_rate"}


def test_the_corrected_rate_recovers_a_known_one():
    "Null and other truths, simulated through the published errors of the scorer: intervals cover in 95 % of cases."
    q, rng = HALLUCINATED.quality(), np.random.default_rng(3)
    for theta in (0.0, 0.1, 0.4):
        held, points = 0, []
        for _ in range(300):
            sample = Quality(int(rng.binomial(q.positives, q.sensitivity)), q.positives, int(rng.binomial(q.negatives, q.specificity)), q.negatives)  # fmt: skip
            k = int(rng.binomial(56, theta * q.sensitivity + (1 - theta) * (1 - q.specificity)))
            ci = melded(k, 56, sample, draws=800)
            held += ci.low <= theta <= ci.high
            points.append(rogan_gladen(k / 56, q.sensitivity, q.specificity))
        assert held / 300 >= 0.93
        assert theta == 0 or abs(np.mean(points) - theta) < 0.04


@pytest.mark.parametrize("detector", [ABSTAINED, UNSUPPORTED, HALLUCINATED], ids=str)
def test_quality_is_recall_of_both_classes(detector):
    rows = [(label, detector.find(s["text"], s)) for label, part in detector.sentences.items() for s in part]
    true, said = zip(*rows, strict=True)
    assert detector.quality().sensitivity == pytest.approx(recall_score(true, said))
    assert detector.quality().specificity == pytest.approx(recall_score(true, said, pos_label=False))


@given(st.lists(st.integers(0, 999_999), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_numbers_are_read_by_value(xs):
    assert numbers(" and ".join(f"{x:,}" for x in xs)) == numbers(" or ".join(map(str, xs))) == set(map(float, xs))
    assert not unsupported(f"It is {xs[0]:,}.", {"context": f"We saw {', then '.join(map(str, xs))}."})
    assert unsupported("It is 1000001.", {"context": " ".join(map(str, xs))})


@given(st.text(max_size=200))
@settings(max_examples=100, deadline=None)
def test_a_text_supports_itself(text):
    assert not unsupported(text, {"context": text})
    assert names(text) == names(text)


@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=8))
def test_agreement_is_the_share_of_equal_pairs(said):
    pairs = [(x, y) for i, x in enumerate(said) for y in said[i + 1 :]]
    assert agreement(said) == pytest.approx(sum(x == y for x, y in pairs) / len(pairs))


def test_self_consistency_falls_with_temperature():
    sure = DummyEngine(context_length=4096, replies=lambda p: "18:00", sure=4.0)
    got = [values(run_grounding(sure, SUITE, k=4, temperature=t, seed=1)[0])["self_consistency"] for t in (0.1, 3.0)]
    assert got[0] > 0.9 > 0.3 > got[1]
    again = values(run_grounding(sure, SUITE, k=4, temperature=3.0, seed=1)[0])["self_consistency"]
    assert again == got[1]


def test_a_judge_takes_the_rules_place_and_is_measured():
    truth = {s["text"]: label for label, part in HALLUCINATED.sentences.items() for s in part}
    knowing = DummyEngine(context_length=4096, replies=lambda p: next(("no" if v else "yes" for t, v in sorted(truth.items(), key=lambda x: -len(x[0])) if f"Answer: {t}\n" in p), "yes"))  # fmt: skip
    scorer = judge_detector(EngineJudge(knowing))
    assert scorer.quality().sensitivity == scorer.quality().specificity == 1
    measured, _ = run_grounding(engine(lambda i: i.answer or "Max Frost."), SUITE, scorer=scorer)
    m = next(m for m in measured if m.metric == "hallucination_rate_corrected")
    assert m.value == 0 and "engine-judge@1" in m.method
    blind = judge_detector(EngineJudge(DummyEngine(context_length=4096, replies=lambda p: "yes")))
    with pytest.raises(KitError, match="say nothing"):
        run_grounding(engine(faithful), SUITE, scorer=blind)


def test_a_report_names_the_judge_by_what_it_runs(tmp_path, monkeypatch):
    given, found = {}, {}
    monkeypatch.setattr("llmkit.evals.claims.load_engine", lambda name: given[name])
    truth = {s["text"]: label for label, part in HALLUCINATED.sentences.items() for s in part}
    knows = lambda p: next(("no" if v else "yes" for t, v in sorted(truth.items(), key=lambda x: -len(x[0])) if f"Answer: {t}\n" in p), "yes")  # fmt: skip
    for seed in (1, 2):
        folder = tmp_path / f"judge{seed}"
        folder.mkdir()
        given[str(folder)] = DummyEngine(seed=seed, context_length=4096, replies=knows)
        report = run_suite(
            "grounding", engine(faithful), Surroundings(), {"judge": str(folder)}, cache=tmp_path / "kept"
        )
        found[seed] = report.context["judge"]
        said = next(m.method for m in report.measurements if m.metric == "hallucination_rate_corrected")
        assert found[seed]["name"] in said and short(given[str(folder)].info.digest) in said
    assert found[1]["name"] != found[2]["name"] and found[1]["digest"] != found[2]["digest"]


def test_a_judge_without_a_manifest_is_known_by_its_files(tmp_path, monkeypatch):
    bare = DummyEngine()
    bare.info = replace(bare.info, digest="")
    monkeypatch.setattr("llmkit.evals.claims.load_engine", lambda name: bare)
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = find_judge(str(tmp_path)).digest
    assert first == find_judge(str(tmp_path)).digest
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert first != find_judge(str(tmp_path)).digest
    assert find_judge("http://127.0.0.1:9000/v1").identity.startswith("dummy, question ")  # nothing to read there


def test_the_suite_is_balanced_and_known():
    assert Counter(i.label for i in SUITE.items) == {"answerable": 28, "unanswerable": 28}
    assert len({i.messages[-1]["content"] for i in SUITE.items}) == 56
    assert load_grounding().digest == SUITE.digest


def test_a_faulty_file_is_named(tmp_path):
    (tmp_path / "x.yaml").write_text("name: x\nversion: 1\nabout: x\nmax_tokens: 8\nsystem: ''\npassages: [{id: a}]\n")
    with pytest.raises(ParamsError, match=r"x.yaml: passages\[0\].text: missing parameter"):
        load_grounding(tmp_path / "x.yaml")
