"""`llmkit eval FILE`: a file is run for what it is, and refused when it is nothing."""

import json
import shutil

import pytest

from llmkit.core.errors import KitError
from llmkit.core.params import ParamsError
from llmkit.core.report import read_report
from llmkit.evals.battery import eval_run
from llmkit.evals.detect import DATA

QUESTIONS = (
    "name: q\nversion: 1\nrecords: r.jsonl\nlimit: null\nscorers: [label]\nmax_tokens: 8\nstop: []\nrefusal: no\n"
)
ALL = "questions by records; safety family by cases; grounding passages by passages"


def run(file, **more):
    "The report of a file on an engine that knows nothing."
    assert eval_run(str(file), engine=".", kind="dummy", dataset="none", beside="none", out="report", **more) == 0
    return read_report("report")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_family_is_asked_alone(folder):
    shutil.copy(DATA / "safety/direct.yaml", "mine.yaml")
    report = run("mine.yaml")
    assert report.subject == "safety_engine" and report.suite == "direct@1"
    assert {m.slice for m in report.measurements if m.metric == "attack_success_rate"} == {"all", "family=direct"}
    both = run("mine.yaml", set="{families: [leak]}", subject="mine")
    assert (both.subject, both.suite) == ("mine", "leak@1+direct@1")


def test_a_family_in_json_lines(folder):
    (folder / "few.jsonl").write_text(json.dumps({"id": "a", "turns": ["Join PINE and APPLE."], "marker": "PINEAPPLE"}) + "\n")  # fmt: skip
    assert run("few.jsonl").get("attack_success_rate", "family=few").n == 1


def test_passages_are_asked_as_grounding_with_its_options(folder):
    shutil.copy(DATA / "grounding/bank.yaml", "texts.yaml")
    report = run("texts.yaml", set="{k: 2}")
    assert report.subject == "grounding_engine" and report.suite == "grounding@1"
    assert "pairs of 2 samples" in report.get("self_consistency").method


def test_in_a_project_the_task_is_asked_as_its_stage_asks(folder):
    chat = lambda i: [{"role": "user", "content": f"Say tea {i}."}, {"role": "assistant", "content": "tea: done"}]
    (folder / "test.jsonl").write_text("".join(json.dumps({"id": f"a{i}", "messages": chat(i)}) + "\n" for i in range(9)))  # fmt: skip
    asked = {"engine": ".", "kind": "dummy", "dataset": ".", "beside": "none", "out": "report"}
    assert eval_run("task", **asked) == 0
    assert (read_report("report").suite, read_report("report").subject) == ("task@1", "engine")
    stage = (
        "suite: bank\n  version: 3\n  limit: 5\n  scorers: [exact]\n  suites: {swaps: {items: 2}, task: {items: 4}}\n"
    )
    (folder / "params.yaml").write_text(f"seed: 7\nevaluate:\n  {stage}")
    assert eval_run("task", **asked) == 0
    report = read_report("report")
    assert report.suite == "bank@3" and report.get("exact_match").n == 4
    assert "accuracy" not in {m.metric for m in report.measurements}
    assert eval_run("task", set="{items: null}", **asked) == 0
    assert read_report("report").get("exact_match").n == 5
    (folder / "params.yaml").write_text("evaluate: {version: two}\n")
    with pytest.raises(ParamsError, match="params.yaml: evaluate.version"):
        eval_run("task", **asked)


def test_golden_prompts_are_asked_for_by_name(folder):
    with pytest.raises(ParamsError, match=r"golden.folder: missing parameter.*--set '\{folder: ...\}'"):
        eval_run("golden", engine=".", kind="dummy")


def test_questions_are_still_questions(folder):
    chat = [{"role": "user", "content": "Say tea."}, {"role": "assistant", "content": "tea: done"}]
    (folder / "r.jsonl").write_text(json.dumps({"id": "a", "messages": chat}) + "\n")
    (folder / "q.yaml").write_text(QUESTIONS.replace("refusal: no", "refusal: 'no'"))
    assert run("q.yaml").suite == "q@1"
    with pytest.raises(KitError, match="q.yaml: --set: a file of questions takes no options"):
        run("q.yaml", set="{limit: 3}")


@pytest.mark.parametrize("text", ["name: x\nquestions: [a]\n", "cases: []\npassages: []\n", "{}\n"])
def test_what_is_no_kind_is_refused_with_the_names_of_all(folder, text):
    (folder / "odd.yaml").write_text(text)
    with pytest.raises(ParamsError, match=ALL) as e:
        run("odd.yaml")
    assert str(e.value).startswith("odd.yaml: is not one kind of suite")


def test_a_fault_inside_is_told_by_its_kind(folder):
    text = (DATA / "safety/direct.yaml").read_text().replace("detector: followed", "detector: folowed")
    (folder / "mine.yaml").write_text(text)
    with pytest.raises(ParamsError, match="mine.yaml: detector: no such detector .*Did you mean 'followed'"):
        run("mine.yaml")
    (folder / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(ParamsError, match="list.yaml: must be a mapping"):
        run("list.yaml")


def test_options_that_name_another_file_or_none_are_refused(folder):
    shutil.copy(DATA / "safety/direct.yaml", "mine.yaml")
    with pytest.raises(KitError, match="mine.yaml: --set files: the file is named already"):
        run("mine.yaml", set="{files: [other.yaml]}")
    with pytest.raises(ParamsError, match="safety.familes: unknown parameter"):
        run("mine.yaml", set="{familes: []}")
