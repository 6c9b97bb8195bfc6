"""All scorers of a suite through `evaluate`: what is asked for is measured, what is not is not, and old suites keep their digest."""

import numpy as np
import pytest

from llmkit.core.digests import digest_json
from llmkit.core.errors import KitError
from llmkit.core.report import read_report, write_report
from llmkit.evals.choice import Question, choice_measurements, choice_table, option_scores, score_pairs
from llmkit.evals.evaluate import evaluate
from llmkit.evals.suite import KNOWN_SCORERS, SCORERS, make_suite
from llmkit.runtime.dummy import DummyEngine

LABELS = ("balance", "refund", "login", "card")


def record(i):
    "A question that names its label, with all labels as choices."
    label, group = LABELS[i % 4], ("over_60", "under_60")[i % 3 == 0]
    chat = [{"role": "user", "content": f"Say {label} {i}."}, {"role": "assistant", "content": f"{label}: it is done"}]
    return {"id": f"q{i}", "messages": chat, "group": group, "choices": [f"{x}: it is done" for x in LABELS]}


def engine():
    "Right but for every fifth question, and wordier than the reference."

    def reply(text):
        said = text.partition("Say ")[2].partition(".")[0].split()
        if len(said) < 2:
            return None
        return f"{'hm' if int(said[1]) % 5 == 0 else said[0]}: it is all done now"

    return DummyEngine(replies=reply)


@pytest.fixture(scope="module")
def report():
    suite = make_suite("all", 1, [record(i) for i in range(60)], scorers=KNOWN_SCORERS, max_tokens=40)
    return evaluate(engine(), suite)


def test_every_scorer_leaves_its_metrics(report, tmp_path):
    names = {m.metric for m in report.measurements}
    assert names >= {"accuracy", "macro_f1", "exact_match", "perplexity", "ece", "ece_debiased", "mce", "ece_adaptive"}
    assert names >= {"rouge_l", "token_f1", "normal_match", "acc", "acc_norm", "acc_bytes"}
    assert names >= {"temperature", "ece_scaled", "brier_gain", "log_loss_unscaled"}
    keys = [(m.metric, m.slice) for m in report.measurements]
    assert len(set(keys)) == len(keys)  # a policy could not tell two of them apart
    write_report(report, tmp_path)
    assert read_report(tmp_path).measurements == report.measurements


def test_slices_by_group_and_label(report):
    for metric in ("accuracy", "rouge_l", "token_f1"):
        parts = [report.get(metric, f"label={x}") for x in LABELS]
        assert all(parts) and sum(m.n for m in parts) == report.get(metric).n == 60
    assert report.get("acc", "group=over_60").n + report.get("acc", "group=under_60").n == 60
    rows = [
        v for v, g in zip(report.column("task/rouge_l"), report.column("task/group"), strict=True) if g == "over_60"
    ]
    assert report.get("rouge_l", "group=over_60").value == pytest.approx(np.mean(rows))


def test_only_what_is_asked_for_is_measured():
    rows = [record(i) for i in range(8)]
    quiet = evaluate(engine(), make_suite("few", 1, rows, scorers=("choice",), max_tokens=8))
    assert set(quiet.samples) == {"choice"} and {m.metric for m in quiet.measurements} >= {"acc", "ece"}
    plain = evaluate(engine(), make_suite("few", 1, rows, scorers=("label",), max_tokens=40))
    assert "reference" not in plain.samples["task"] and plain.get("rouge_l") is None


def test_a_suite_without_choices_keeps_its_digest():
    bare = {k: v for k, v in record(1).items() if k != "choices"}
    s = make_suite("old", 2, [bare], max_tokens=24)
    head = ["old", 2, SCORERS, 24, (), "refusal"]
    i = s.items[0]
    assert s.digest == digest_json([*head, [i.id, list(i.messages), i.answer, i.label, i.group]])
    assert make_suite("old", 2, [record(1)], max_tokens=24).digest != s.digest
    with pytest.raises(KitError, match="without choices"):
        evaluate(engine(), make_suite("old", 2, [bare], scorers=("choice",)))


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_shared_rows_score_as_single_ones(open_onnx, precision):
    e, rng = open_onnx(precision), np.random.default_rng(0)
    pairs = []
    for _ in range(12):
        prompt = rng.integers(2, 300, rng.integers(1, 30)).tolist()
        pairs += [(prompt, rng.integers(2, 300, n).tolist()) for n in (1, 1, 2, 4)]
        pairs.append((prompt, pairs[-1][1][:2]))
    found, said = score_pairs(e, pairs)
    each = [float(s.sum()) for s in e.score([p for p, _ in pairs], [c for _, c in pairs])]
    assert found == pytest.approx(each, abs=2e-3)
    greedy = [
        all(int(e.logits([*p, *c])[len(p) - 1 + j].argmax()) == t for j, t in enumerate(c)) for p, c in pairs[:15]
    ]
    assert said[:15].tolist() == greedy


def test_questions_come_as_a_stream_and_blocks_change_nothing(open_onnx):
    e = open_onnx("fp32")
    asked = [(f"the card of customer {i} arrived", (" on day 1", " on", f" day {i % 9}")) for i in range(11)]
    whole = list(option_scores(e, asked))
    small = list(option_scores(e, iter(asked), block=2))
    assert np.concatenate(whole) == pytest.approx(np.concatenate(small), abs=1e-4)
    first = next(option_scores(e, (asked[i % 11] for i in range(10**9)), block=4))  # no end, and no hurry to reach it
    assert first == pytest.approx(whole[0], abs=1e-4)


def test_confidence_of_a_choice_is_the_softmax(open_onnx):
    e = open_onnx("fp32")
    q = Question("a", "the card of customer 5", ("arrived", "on", "day"), 1, between=" ")
    [ll] = option_scores(e, [(q.prompt, [" arrived", " on", " day"])])
    p = np.exp(ll) / np.exp(ll).sum()
    table = choice_table(e, [q])
    assert table["confidence"][0] == pytest.approx(p.max(), abs=1e-4)
    assert table["correct"][0] == int(p.argmax() == 1)
    assert table["margin"][0] == pytest.approx(ll[1] - max(ll[0], ll[2]), abs=1e-4)
    assert {m.metric for m in choice_measurements(table, calibration=False)} == {"acc", "acc_norm", "acc_bytes"}
