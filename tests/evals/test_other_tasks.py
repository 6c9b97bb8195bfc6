"""Tasks that are not the bundled one: texts without labels, other alphabets, a handful of items, answers that are cut off."""

import pytest

from llmkit.core.errors import KitError
from llmkit.evals.battery import Surroundings, run_suite
from llmkit.evals.evaluate import evaluate
from llmkit.evals.suite import make_suite, task_suite
from llmkit.evals.temperature import temperature_measurements
from llmkit.runtime.dummy import DummyEngine


def asked(answers, **more):
    "A record for each answer."
    return [{"id": f"r{i}", "messages": [{"role": "user", "content": f"Item {i}."}, {"role": "assistant", "content": a}], **more} for i, a in enumerate(answers)]  # fmt: skip


def knowing(records):
    "An engine that answers as the records do."
    said = {r["messages"][0]["content"]: r["messages"][1]["content"] for r in records}
    return DummyEngine(replies=lambda p: said.get(p.partition("user: ")[2].partition("\n")[0]))


SUMMARIES = [f"Meeting {i}: it lasted {i} minutes." for i in range(40)]
QUERIES = [f"SELECT count(*)\nFROM t WHERE id = {i};" for i in range(40)]


@pytest.mark.parametrize("texts", [SUMMARIES, QUERIES])
def test_texts_without_labels_are_not_scored_by_any(texts):
    "The text before the first colon was taken for a label: two hundred classes, or one."
    with pytest.raises(KitError, match=r"mine.scorers: no record has a label, and these look like texts .* leave the scorer label out"):  # fmt: skip
        task_suite({"suite": "mine"}, asked(texts))
    assert task_suite({"suite": "mine", "scorers": ["exact"]}, asked(texts)).items
    few = ("card: yes", "login: no")
    assert task_suite({"suite": "mine"}, asked([few[i % 2] for i in range(40)])).items
    assert task_suite({"suite": "mine"}, asked(["spam"] * 40, label="spam")).items  # one class that is named


def test_a_score_of_texts_has_no_slice_for_each_text():
    records = asked(SUMMARIES)
    report = evaluate(knowing(records), make_suite("mine", 1, records, scorers=("rouge_l",), max_tokens=64))
    assert {m.slice for m in report.measurements} == {"all"} and report.get("rouge_l").value == 1
    topics = [r | {"label": f"topic {i % 2}"} for i, r in enumerate(records)]
    report = evaluate(knowing(records), make_suite("mine", 1, topics, scorers=("rouge_l",), max_tokens=64))
    assert {m.slice for m in report.measurements} == {"all", "label=topic 0", "label=topic 1"}


def test_answers_that_were_cut_off_are_counted():
    "Thirty-two tokens are the bundled task's: a summary that is cut there matches nothing, and nothing said why."
    records = asked(["yes", *SUMMARIES[:3]])
    short, long = (evaluate(knowing(records), make_suite("mine", 1, records, scorers=("exact",), max_tokens=n)) for n in (8, 64))  # fmt: skip
    assert (short.get("truncated_answer_rate").value, short.get("exact_match").value) == (0.75, 0.25)
    assert (long.get("truncated_answer_rate").value, long.get("exact_match").value) == (0.0, 1.0)
    assert short.get("truncated_answer_rate").direction == "lower"


def test_rouge_refuses_what_it_does_not_see():
    "A perfect answer in Japanese scored 0."
    records = asked([f"猫が{chr(0x4E00 + i)}匹います" for i in range(12)])
    suite = lambda *scorers: make_suite("mine", 1, records, scorers=scorers, max_tokens=64)
    with pytest.raises(KitError, match="rouge_l: ROUGE sees ASCII letters alone"):
        evaluate(knowing(records), suite("rouge_l"))
    assert evaluate(knowing(records), suite("token_f1")).get("token_f1").value == 1


def test_a_handful_of_items_that_gain_alike_have_a_gain_without_an_interval():
    "A base that knows none of twelve questions stopped the stage."
    table = {"id": list(range(12)), "confidence": [0.99] * 12, "correct": [0] * 12}
    got = {m.metric: m for m in temperature_measurements(table, "x")[0]}
    assert got["log_loss_gain"].low is None and got["log_loss_gain"].method.startswith("no interval: all values are equal")  # fmt: skip
    assert got["log_loss_gain"].value > 1
    with pytest.raises(KitError, match="Leave the scorer temperature out"):
        temperature_measurements({k: v[:2] for k, v in table.items()}, "x")


@pytest.mark.parametrize("name", ["fairness", "swaps"])
def test_suites_that_count_right_labels_ask_for_some(name, tmp_path):
    records = asked(SUMMARIES)
    around = Surroundings(make_suite("mine", 1, records, scorers=("rouge_l",)), None, None)
    with pytest.raises(KitError, match="evaluate.scorers: this suite counts right labels"):
        run_suite(name, knowing(records), around, cache=tmp_path)
