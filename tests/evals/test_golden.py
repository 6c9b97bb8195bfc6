"""The last release, without its engine: kept answers, a changed engine, another tokenizer, damage, and the whole way round."""

import copy
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from word_engine import engine

from llmkit.core.artifact import seal
from llmkit.core.errors import KitError
from llmkit.core.files import read_jsonl, write_jsonl
from llmkit.core.report import Measurement, Report, read_report, write_report
from llmkit.evals.battery import Surroundings, run_suite
from llmkit.evals.disagreement import RANKS
from llmkit.evals.regression import keep_golden, learnt_prompts, open_golden, since_release
from llmkit.evals.selftest import gate_selftest
from llmkit.evals.suite import make_suite
from llmkit.flow.dag import data_deps
from llmkit.flow.notebook import read_stage
from llmkit.gate.judge import judge
from llmkit.gate.run import baseline_set, decide

ROOT = Path(__file__).parents[2]
WORDS = [f"{w}_{i}" for i in range(30) for w in ("balance", "refund", "card", "login")]
RULE = {"metric": "broken_rate_excess", "on": "golden_engine", "max": 0.10, "bound": "interval"}


def suite_of(words):
    "Questions whose answer is their own word."
    chats = [({"role": "user", "content": f"Say {w}."}, {"role": "assistant", "content": f"{w}: done"}) for w in words]
    return make_suite("bank", 3, [{"id": f"q{i}", "messages": list(c)} for i, c in enumerate(chats)], scorers=("label",), max_tokens=16)  # fmt: skip


@pytest.fixture
def kept(tmp_path):
    keep_golden(tmp_path / "baseline/golden", engine(wrong=WORDS[:4]), suite_of(WORDS), n=5)
    return tmp_path / "baseline/golden"


def verdict(folder, candidate, dataset=None):
    "What the rule says of a candidate."
    return judge({"rules": [RULE]}, {"golden_engine": since_release(folder, candidate, dataset=dataset)}).outcome


def dataset_of(folder, train, validation=()):
    "A dataset whose splits ask for these words."
    for split, words in (("train", train), ("validation", validation), ("test", ["tea"])):
        rows = [{"id": f"{split}{i}", "messages": [{"role": "user", "content": f"Say {w}."}, {"role": "assistant", "content": w}]} for i, w in enumerate(words)]  # fmt: skip
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


def test_the_same_engine_passes_and_a_changed_one_is_caught(kept):
    assert verdict(kept, engine(wrong=WORDS[:4])) == "pass"
    assert verdict(kept, engine(wrong=WORDS[:1])) == "pass"  # what was mended is no regression
    assert verdict(kept, engine(wrong=WORDS[:40])) == "fail"
    assert verdict(kept, engine(wrong=WORDS[:16])) == "inconclusive"


def test_as_many_right_and_others_wrong_is_caught_where_the_score_sees_nothing(kept):
    r = since_release(kept, engine(wrong=WORDS[60:64]))
    assert r.get("fixed_rate").value == r.get("broken_rate").value == 4 / 100  # the first 100 prompts are kept
    assert r.context["against"] == open_golden(kept).engine == engine(wrong=WORDS[:4]).info.digest
    assert r.get("rbo").value == pytest.approx(1, abs=0.05) and r.context["prompts"] == 100


def test_the_questions_come_from_the_folder_and_not_from_the_test_set(kept):
    other = Surroundings(suite_of(["tea", "coffee"]))
    found = run_suite("golden", engine(), other, {"folder": str(kept)}, cache=kept.parent / "cache")
    assert (found.suite, found.get("churn_rate").n) == ("bank@3", 100)
    assert open_golden(kept).suite.items[0].messages == suite_of(WORDS).items[0].messages


def test_another_tokenizer_leaves_rankings_out_and_says_so(kept):
    other = engine(wrong=WORDS[:24])
    other.tokenizer = copy.copy(other.tokenizer)
    other.tokenizer.digest = "sha256:another"
    r = since_release(kept, other)
    assert r.get("broken_rate").value == 0.20 and [r.get(m) for m in RANKS] == [None] * 3
    assert r.context["left_out"] == list(RANKS)
    assert "rankings left out, since the two have different tokenizers" in r.get("flip_rate").method
    assert verdict(kept, other) == "fail"


def test_prompts_that_were_learnt_are_left_out_and_counted(kept, tmp_path):
    candidate, data = engine(wrong=WORDS[:4] + WORDS[96:99]), dataset_of(tmp_path / "data", WORDS[4:34], WORDS[30:54])
    assert verdict(kept, candidate) == "pass"  # 3 broken of 100, half of them known by heart
    assert verdict(kept, candidate, data) == "inconclusive"
    r = since_release(kept, candidate, dataset=data)
    assert r.get("broken_rate").n == 50 and r.get("broken_rate").value == 3 / 50 and r.context["prompts"] == 50
    assert r.get("contamination_rate").value == 0.5 and r.column("prompts/learnt") == [0] * 4 + [1] * 50 + [0] * 46
    said = judge({"rules": [RULE]}, {"golden_engine": r}).reasons[0].sentence
    assert "50 of 100 golden prompts left out as questions of the training or validation split" in said
    write_report(r, tmp_path / "report")
    assert read_report(tmp_path / "report").measurements == r.measurements


@pytest.mark.parametrize("left", [0, 1, 29])
def test_too_few_prompts_that_were_not_learnt_do_not_pass(kept, tmp_path, left, capsys):
    report_of(engine(), tmp_path / "report")
    r = run_suite("golden", engine(), Surroundings(dataset=dataset_of(tmp_path / "data", WORDS[left:])), {"folder": str(kept)}, cache=tmp_path / "cache")  # fmt: skip
    found = judge({"rules": [{**RULE, "if_absent": "skip"}]}, {"golden_engine": r})
    assert found.outcome == "fail"
    assert f"not measured, so it fails; golden_engine has no broken_rate_excess, since {100 - left} of its 100 golden prompts are training or validation questions" in found.reasons[0].sentence  # fmt: skip
    assert "llmkit baseline set" in found.reasons[0].sentence
    write_report(r, tmp_path / "report/golden_engine")
    (tmp_path / "params.yaml").write_text(f"evaluate: {{scorers: [label]}}\ngates:\n  rules:\n    - {json.dumps(RULE)}\n")  # fmt: skip
    gate_selftest(str(tmp_path / "params.yaml"), str(tmp_path / "report"), "", "", str(tmp_path / "none"))
    assert "broken_rate_excess" in capsys.readouterr().out


def test_a_changed_validation_split_is_looked_at_anew(kept, tmp_path):
    ask = lambda: run_suite("golden", engine(), Surroundings(dataset=tmp_path / "data"), {"folder": str(kept)}, cache=tmp_path / "cache")  # fmt: skip
    dataset_of(tmp_path / "data", ["tea"])
    assert ask().get("contamination_rate").value == 0
    dataset_of(tmp_path / "data", ["tea"], WORDS[:10])
    assert ask().get("contamination_rate").value == 0.1


def test_learnt_in_another_spelling_and_in_flat_memory(tmp_path):
    system, said = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "b"}
    asked = ["say  BALANCE_0!", "Ｓａｙ card_0.", "Say login.", "Say login_0 please."]
    rows = [{"messages": [system, {"role": "user", "content": q}, said]} for q in asked]
    rows += [
        {"messages": [{"role": "user", "content": "Say"}, said, {"role": "user", "content": "refund_0."}, said]}
    ]  # another conversation
    write_jsonl(tmp_path / "train.jsonl", rows + [{"messages": [{"role": "user", "content": f"{i} " * 50}, said]} for i in range(5000)])  # fmt: skip
    tracemalloc.start()
    found = learnt_prompts(suite_of(WORDS[:100]), tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert {w for w, x in zip(WORDS, found, strict=False) if x} == {"balance_0", "card_0"}
    assert peak < 500_000 < (tmp_path / "train.jsonl").stat().st_size


def reseal(folder, file, change):
    "Change the rows of a recording, with a manifest that fits."
    rows = list(read_jsonl(folder / file))
    change(rows)
    write_jsonl(folder / file, rows)
    body = json.loads((folder / "manifest.json").read_text())
    seal(folder, body["kind"], body["parents"], body["recipe"])


def cut(folder):
    "The last row is half written."
    path = folder / "golden.jsonl"
    path.write_text(path.read_text()[:-40])


DAMAGED = {
    "a file that changed": (cut, "golden.jsonl differs"),
    "a file that is gone": (lambda f: (f / "again.jsonl").unlink(), "again.jsonl is missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "it has no manifest"),
    "a row without answer": (lambda f: reseal(f, "golden.jsonl", lambda r: r[2].pop("said")), r"golden.jsonl: line 3.said: missing"),
    "a mistyped row": (lambda f: reseal(f, "again.jsonl", lambda r: r[0].update(correct="yes")), r"again.jsonl: line 1.correct: must be a int"),
    "another prompt": (lambda f: reseal(f, "golden.jsonl", lambda r: r[1]["messages"][0].update(content="Say tea.")), r"line 2.messages: the prompt is not the one"),
    "a wrong that became right": (lambda f: reseal(f, "golden.jsonl", lambda r: r[0].update(correct=1)), r"line 1.correct: is not what label and answer say"),
    "two lists of prompts": (lambda f: reseal(f, "again.jsonl", lambda r: r.pop()), "the two recordings hold different prompts"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_rows_are_refused_by_file_and_line(kept, name):
    damage, said = DAMAGED[name]
    damage(kept)
    with pytest.raises(KitError, match=said) as e:
        since_release(kept, engine())
    assert "golden" in str(e.value) and e.value.remedy


def report_of(e, folder):
    "What the evaluate stage leaves of an engine, as far as the baseline is concerned."
    m = Measurement("accuracy", 1.0, 4, samples="score/right")
    write_report(Report("engine", e.info.digest, "bank@3", (m,), {"score": {"id": [0, 1, 2, 3], "right": [1] * 4}}), folder / "engine")  # fmt: skip
    keep_golden(folder / "golden", e, suite_of(WORDS), n=5)
    return folder


def test_set_and_held_against(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first, second = engine(wrong=WORDS[:4]), engine(wrong=WORDS[:40], seed=1)
    second.info = replace(second.info, digest="sha256:second")
    report_of(first, tmp_path / "report")
    assert "keep them by `llmkit baseline set`" in str(decide({"rules": [RULE]}, ["report"]))  # nothing to compare with
    assert baseline_set("report") == 0 and "Golden answers: baseline/golden" in capsys.readouterr().out
    assert open_golden("baseline/golden").engine == first.info.digest
    found = run_suite("golden", second, Surroundings(), {"folder": "baseline/golden"}, cache="cache")
    write_report(found, "report/golden_engine")
    assert decide({"rules": [RULE]}, ["report"]).outcome == "fail"
    # a report that brings no golden answers would leave those of another engine beside it
    write_report(Report("engine", "sha256:second", "bank@3", (Measurement("accuracy", 1.0, 4),)), "alone")
    with pytest.raises(KitError, match="baseline/golden: holds what another engine said"):
        baseline_set("alone")
    assert json.loads(Path("baseline/engine/report.json").read_text())["digest"] == first.info.digest
    # and the same engine's may stay
    assert baseline_set("report/engine") == 0


def test_the_folder_is_a_dependency_from_the_first_release_on(tmp_path):
    stage, params = read_stage("evaluate", ROOT), {"evaluate": {"suites": {"golden": {"folder": "baseline/golden"}}}}
    assert data_deps(stage, params, tmp_path) == []
    (tmp_path / "baseline/golden").mkdir(parents=True)
    assert data_deps(stage, params, tmp_path) == ["${evaluate.suites.golden.folder}"]


def test_the_selftest_plants_a_regression_before_there_is_a_release(tmp_path, capsys):
    report_of(engine(), tmp_path / "report")
    (tmp_path / "params.yaml").write_text(f"evaluate: {{scorers: [label]}}\ngates:\n  rules:\n    - {json.dumps(RULE)}\n")  # fmt: skip
    assert gate_selftest(str(tmp_path / "params.yaml"), str(tmp_path / "report"), "", "", str(tmp_path / "none")) == 0
    said = capsys.readouterr().out
    assert "the engine's own stand for them" in said and "✓ broken answers: caught when" in said
    assert "1 of 1 rules bite, 1 of them alone" in said
    dull = {**RULE, "max": 0.99, "min_n": 5000}
    (tmp_path / "params.yaml").write_text(f"evaluate: {{scorers: [label]}}\ngates:\n  rules:\n    - {json.dumps(dull)}\n")  # fmt: skip
    assert gate_selftest(str(tmp_path / "params.yaml"), str(tmp_path / "report"), "", "", str(tmp_path / "none")) == 1


def test_the_tracked_answers_are_those_of_the_tracked_report():
    tracked = open_golden(ROOT / "baseline/golden")
    assert tracked.engine == json.loads((ROOT / "baseline/engine/report.json").read_text())["digest"]
    assert sum(p.stat().st_size for p in (ROOT / "baseline/golden").iterdir()) < 400_000
