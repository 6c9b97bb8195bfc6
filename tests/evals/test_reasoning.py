"""Answers with a preamble of reasoning are read from its end where a suite says so, and several right answers count as such."""

import pytest

from llmkit.core.errors import KitError
from llmkit.core.params import ParamsError
from llmkit.evals.evaluate import evaluate
from llmkit.evals.regression import keep_golden, open_golden, since_release
from llmkit.evals.suite import load_suite, make_suite, task_suite
from llmkit.evals.swaps import Axis, run_swaps
from llmkit.runtime.dummy import DummyEngine

END = "</think>"
LABELS = ("balance", "refund", "login", "card")


def record(i, **more):
    label = LABELS[i % 4]
    chat = [
        {"role": "user", "content": f"He asks: say {label} {i}."},
        {"role": "assistant", "content": f"{label}: done"},
    ]
    return {"id": f"q{i}", "messages": chat, **more}


def thinker(preamble="<think>Label: hm, so it is a\nquestion.</think>\n\n", after="done", every=True):
    "An engine that answers rightly, after some thought."

    def reply(text):
        said = text.rpartition("say ")[2].partition(".")[0].split()
        if len(said) < 2:
            return "ok"
        return (preamble if every or int(said[1]) % 2 else "") + f"{said[0]}: {after}"

    return DummyEngine(context_length=2048, replies=reply)


def suite(n=12, scorers=("label", "exact", "token_f1", "rouge_l", "calibration"), max_tokens=120, **more):
    return make_suite("t", 1, [record(i) for i in range(n)], scorers=scorers, max_tokens=max_tokens, **more)


def values(report):
    return {m.metric: m.value for m in report.measurements if m.slice == "all"}


def test_reasoning_is_not_scored_where_its_end_is_named():
    "Read whole, every answer was wrong."
    whole, read = (values(evaluate(thinker(), suite(**more))) for more in ({}, {"think_end_token": END}))
    assert whole["accuracy"] == whole["exact_match"] == 0 and "reasoning_unclosed_rate" not in whole
    assert read["accuracy"] == read["exact_match"] == read["token_f1"] == read["rouge_l"] == 1
    assert read["reasoning_unclosed_rate"] == 0
    report = evaluate(thinker(), suite(think_end_token=END))
    assert report.samples["task"]["answer"][0] == "balance: done"
    assert (
        report.samples["task"]["reasoning"][0].startswith("<think>Label: hm")
        and END in report.samples["task"]["reasoning"][0]
    )
    assert "12 answers were read from the end of their reasoning" in report.get("reasoning_unclosed_rate").method
    plain = evaluate(thinker(preamble=""), suite()).samples["task"]["confidence"]
    assert report.samples["task"]["confidence"] == pytest.approx(plain, abs=1e-4)


def test_reasoning_that_does_not_end_is_told_and_is_no_answer():
    cut = evaluate(thinker(), suite(think_end_token=END, max_tokens=10))
    assert (
        values(cut)["reasoning_unclosed_rate"] == values(cut)["empty_answer_rate"] == 1 and values(cut)["accuracy"] == 0
    )
    mixed = values(evaluate(thinker(every=False), suite(think_end_token=END)))
    assert mixed["accuracy"] == 1 and mixed["reasoning_unclosed_rate"] == 0.5  # half answered at once


def test_golden_answers_and_swaps_are_read_alike(tmp_path):
    keep_golden(tmp_path / "old", thinker(preamble=""), suite())
    golden = lambda **more: values(since_release(tmp_path / "old", thinker(), **more))
    assert golden()["broken_rate"] == 1 and "reasoning_unclosed_rate" not in golden()
    assert golden(think_end_token=END)["broken_rate"] == golden(think_end_token=END)["reasoning_unclosed_rate"] == 0
    keep_golden(tmp_path / "new", thinker(), suite(think_end_token=END))
    assert {r["answer"] for r in open_golden(tmp_path / "new").rows} == {f"{x}: done" for x in LABELS}
    assert values(since_release(tmp_path / "new", thinker(preamble="")))["broken_rate"] == 0
    axis = [Axis("g", "words", (("he", "she"),))]
    for more, right in (({}, 0), ({"think_end_token": END}, 12)):
        assert sum(run_swaps(thinker(), suite(**more), axis)[1]["swaps"]["correct_swapped"]) == right


def test_the_key_is_read_from_params_and_from_a_file(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"id": 1, "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a: b"}]}\n')  # fmt: skip
    (tmp_path / "s.yaml").write_text(f"name: s\nversion: 1\nrecords: r.jsonl\nthink_end_token: {END}\n")
    assert load_suite(tmp_path / "s.yaml").think_end_token == END
    assert task_suite({"think_end_token": END}, [record(0)]).think_end_token == END
    assert task_suite({"think_end_token": None}, [record(0)]).digest == task_suite({}, [record(0)]).digest
    with pytest.raises(ParamsError, match="evaluate.think_end_token"):
        task_suite({"think_end_token": True}, [record(0)])


def test_the_best_of_several_references_counts(tmp_path):
    "They were dropped without a word."
    rows = [record(i, references=["it is settled", f"{LABELS[i % 4]}: all done now"]) for i in range(12)]
    ask = lambda rows: make_suite("t", 1, rows, scorers=("label", "exact", "token_f1", "rouge_l"), max_tokens=80)
    report = evaluate(thinker(preamble="", after="all done now"), ask(rows))
    alone = values(evaluate(thinker(preamble="", after="all done now"), ask([record(i) for i in range(12)])))
    for metric in ("exact_match", "token_f1", "normal_match", "rouge_l"):
        assert values(report)[metric] == 1 > alone[metric], metric
    assert report.samples["task"]["references"][0] == ["balance: done", "it is settled", "balance: all done now"]
    assert ask(rows).digest != ask([record(i) for i in range(12)]).digest


def test_a_misspelt_key_of_a_file_is_told_with_its_file(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"id": 1, "refrences": ["x"], "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a: b"}]}\n')  # fmt: skip
    (tmp_path / "s.yaml").write_text("name: s\nversion: 1\nrecords: r.jsonl\n")
    with pytest.raises(KitError, match=r"r\.jsonl: record 1\.refrences: is no key that a suite reads .*Did you mean 'references'"):  # fmt: skip
        load_suite(tmp_path / "s.yaml")
