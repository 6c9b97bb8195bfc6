"""The engine under lm-evaluation-harness, and our own runner, against the harness' Hugging Face backend on one model."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import numpy as np
import pytest

from llmkit.core.errors import KitError
from llmkit.core.files import write_jsonl
from llmkit.core.report import read_report, write_report
from llmkit.evals.choice import Question, choice_measurements, choice_table
from llmkit.evals.harness import harness_model, harness_run, run_harness
from llmkit.evals.language import language_measurements, text_likelihood
from llmkit.gate.judge import judge

pytest.importorskip("lm_eval")

RNG = np.random.default_rng(0)
WORDS = ["card", "arrived", "day", "customer", "the", "of", "on", "money", "Straße", "5", "refund.", "déjà"]


def words(n):
    "Some words."
    return " ".join(RNG.choice(WORDS, n))


TEXTS = [words(n) for n in (3, 8, 15, 40, 90, 6, 120)]  # some are longer than the context of 128 tokens
QUIZ = [
    {"q": words(6), "o": [words(k) for k in RNG.integers(1, 4, 4)], "r": int(r), "id": i}
    for i, r in enumerate(RNG.integers(0, 4, 40))
]
YAML = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}
test_split: test
"""
LANGUAGE = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
CHOICE = """output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{o}}"
doc_to_target: r
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
"""
SAYS = """output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{o[r]}}"
generation_kwargs: {until: ["day"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    "A folder with three tasks and their data."
    folder = tmp_path_factory.mktemp("tasks")
    write_jsonl(folder / "kit_language.jsonl", [{"text": t} for t in TEXTS])
    for name in ("kit_choice", "kit_says"):
        write_jsonl(folder / f"{name}.jsonl", QUIZ)
    for name, body in (("kit_language", LANGUAGE), ("kit_choice", CHOICE), ("kit_says", SAYS)):
        (folder / f"{name}.yaml").write_text(YAML.format(name=name, folder=folder) + body)
    return folder


NAMES = ("kit_language", "kit_choice", "kit_says")


@pytest.fixture(scope="module")
def theirs(llama, tasks):
    "The harness with its own Hugging Face backend."
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=str(llama), device="cpu", dtype="float32", batch_size=4)
    manager = TaskManager(include_path=str(tasks))
    return lm_eval.simple_evaluate(lm, tasks=list(NAMES), task_manager=manager, bootstrap_iters=0)


@pytest.fixture(scope="module")
def ours(open_onnx, tasks):
    "The harness with the ONNX engine."
    return run_harness(open_onnx("fp32"), NAMES, tasks)


def test_the_engine_under_the_harness_gives_the_harness_own_numbers(ours, theirs):
    seen = 0
    for task in NAMES:
        for key, value in theirs["results"][task].items():
            metric = key.partition(",")[0]
            if isinstance(value, float) and "stderr" not in metric:
                assert ours.get(metric, f"task={task}").value == pytest.approx(value, rel=1e-3, abs=1e-3), key
                seen += 1
    assert seen == 7
    assert ours.context["contexts_cut"] == 0 and ours.context["lm_eval"]


def test_another_form_of_the_questions_is_another_suite(open_onnx, tasks):
    "Other few-shot examples or another template leave the documents as they are, and still two runs are not compared."
    runs = [run_harness(open_onnx("fp32"), ["kit_choice"], tasks, limit=12, seed=s) for s in (0, 0, 1)]
    rule = {"metric": "acc", "slice": "task=kit_choice", "on": "new", "noninferiority": 0.05, "against": "old"}
    found = [judge({"rules": [rule]}, {"new": new, "old": runs[0]}).reasons[0] for new in runs[1:]]
    assert found[0].outcome != "error" and found[1].outcome == "error" and "two suites" in found[1].sentence


def test_item_by_item(ours, theirs):
    for metric in ("acc", "acc_norm", "acc_bytes"):
        rows = sorted(theirs["samples"]["kit_choice"], key=lambda s: s["doc_id"])
        assert ours.column(f"kit_choice/{metric}") == [s[metric] for s in rows]
    rows = sorted(theirs["samples"]["kit_language"], key=lambda s: s["doc_id"])
    likelihood = [s["bits_per_byte"][0] for s in rows]
    assert ours.column("kit_language/bits_per_byte") == pytest.approx(likelihood, abs=1e-2, rel=1e-4)


def test_our_own_runner_gives_the_same_numbers(open_onnx, theirs):
    engine = open_onnx("fp32")
    measured = language_measurements(text_likelihood(engine, TEXTS))
    language = {m.metric: m.value for m in measured}
    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        expected = theirs["results"]["kit_language"][f"{metric},none"]
        assert language[metric] == pytest.approx(expected, rel=1e-3), metric
    questions = [Question(str(q["id"]), q["q"], tuple(q["o"]), q["r"], between=" ") for q in QUIZ]
    table = choice_table(engine, questions)
    got = {m.metric: m.value for m in choice_measurements(table)}
    for metric in ("acc", "acc_norm", "acc_bytes"):
        assert got[metric] == pytest.approx(theirs["results"]["kit_choice"][f"{metric},none"], abs=1e-3), metric


def test_the_model_says_what_transformers_says(open_onnx, theirs, llama):
    ids = {s["doc_id"]: s["resps"][0][0] for s in theirs["samples"]["kit_says"]}
    from types import SimpleNamespace as Instance

    lm = harness_model(open_onnx("fp32"))
    asked = [Instance(args=(q["q"], {"until": ["day"], "max_gen_toks": 12})) for q in QUIZ]
    said = lm.generate_until(asked)
    assert [s == ids[i] for i, s in enumerate(said)].count(False) <= 1  # a near tie may fall the other way
    assert len(set(said)) > 5


def test_a_report_that_a_gate_can_read(ours, tmp_path):
    write_report(ours, tmp_path)
    back = read_report(tmp_path)
    rules = [
        {"metric": "acc", "on": "harness_engine", "slice": "task=kit_choice", "min": 0.001, "bound": "clopper_pearson"},
        {"metric": "acc", "on": "harness_engine", "slice": "task=kit_choice", "noninferiority": 0.2, "against": "old"},
        {"metric": "bits_per_byte", "on": "harness_engine", "slice": "task=kit_language", "max": 30},
    ]
    assert judge({"rules": rules}, {"harness_engine": back, "old": back}).outcome == "pass"
    assert back.get("bits_per_byte", "task=kit_language").direction == "lower"
    assert back.get("acc_norm", "task=kit_choice").direction == "higher"


def test_the_command(llama, tasks, tmp_path, capsys):
    out = tmp_path / "report"
    assert harness_run("kit_choice", str(llama), str(tasks), limit=3, out=str(out)) == 0
    assert "task=kit_choice" in capsys.readouterr().out and read_report(out).get("acc", "task=kit_choice").n == 3
    assert harness_run("nothing", str(llama), str(tasks)) == 2
    assert "no such task" in capsys.readouterr().err


def test_a_task_without_its_data_fails_offline(open_onnx, tmp_path):
    (tmp_path / "far.yaml").write_text("task: far\ndataset_path: nobody/nothing\ntest_split: test\n" + CHOICE)
    with pytest.raises(Exception, match="(?i)offline|nothing|connect"):
        run_harness(open_onnx("fp32"), ["far"], tmp_path)


def test_missing_extra_is_told(monkeypatch, open_onnx):
    import llmkit.core.plugins as plugins

    real = plugins.importlib.import_module

    def gone(name):
        if name.startswith("lm_eval"):
            raise ModuleNotFoundError("no", name="lm_eval")
        return real(name)

    monkeypatch.setattr(plugins.importlib, "import_module", gone)
    with pytest.raises(KitError, match=r"llmkit\[harness\]"):
        harness_model(open_onnx("fp32"))
