"""The gate as a command: exit codes, files, and what it refuses."""

import json
from dataclasses import replace

import pytest

from llmkit.core.report import Measurement, Report, read_report, write_report
from llmkit.gate.judge import judge
from llmkit.gate.run import baseline_set, gate_plan, gate_run
from llmkit.gate.verdict import read_verdict


def report(subject, right, n=400, suite="bank@1"):
    "A report with one accuracy."
    m = Measurement("accuracy", right / n, n, samples="task/correct")
    table = {"id": list(range(n)), "correct": [1] * right + [0] * (n - right)}
    return Report(subject, "", suite, (m,), {"task": table})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_report(report("engine", 380), tmp_path / "reports/engine")
    write_report(report("merged", 382), tmp_path / "reports/merged")
    return tmp_path


def policy(folder, *rules):
    "A parameter file with these rules."
    lines = "\n".join(f"    - {r}" for r in rules)
    (folder / "params.yaml").write_text(f"gates:\n  alpha: 0.05\n  rules:\n{lines}\n")


CASES = [
    (0, "{metric: accuracy, min: 0.90, bound: wilson}"),
    (0, "{metric: accuracy, noninferiority: 0.03, against: merged}"),
    (1, "{metric: accuracy, min: 0.99, bound: clopper_pearson}"),
    (1, "{metric: acuracy, min: 0.5}"),
    (1, "{metric: accuracy, on: canary, min: 0.5}"),
    (1, "{metric: accuracy, noninferiority: 0.03, against: baseline}"),
    (3, "{metric: accuracy, min: 0.945, bound: wilson}"),
    (3, "{metric: accuracy, min: 0.9, bound: wilson, min_n: 1000}"),
    (4, "{metric: accuracy, noninferiority: 0.03, against: baseline, if_absent: skip}"),  # nothing was judged
    (4, "{metric: accuracy, max: 0.99, bound: wilson}"),  # it is better high
    (4, "{metric: accuracy, at_least: 0.9}"),
    (4, "{metric: accuracy, min: high}"),
    (4, "{metric: accuracy, min: 0.9, bound: bootstrap}"),
]


@pytest.mark.parametrize("code,rule", CASES)
def test_exit_codes(folder, code, rule, capsys):
    policy(folder, rule)
    assert gate_run(reports="reports", out="verdict") == code
    if (folder / "verdict/verdict.json").is_file():
        assert read_verdict("verdict").exit_code == code
    assert capsys.readouterr() != ("", "")


BAD = {  # policy → what its error says behind the file
    'gates: {rules: [{metric: accuracy, min: "0.8"}]}': "gates.rules[0].min: must be a float, not a str (got '0.8'). Write it without quotes: 0.8",
    "gates: {rules: [{metric: accuracy, min: high}]}": "gates.rules[0].min: must be a float, not a str (got 'high'). Write a number",
    "gates: {alpha: 0.7, rules: [{metric: accuracy, min: 0.8}]}": "gates.alpha: is out of range (got 0.7). It lies in (0, 0.5]",
    "gates: {rules: [{metric: accuracy, min: .nan}]}": "gates.rules[0].min: must be a finite number (got nan). Write a number",
    "gates: {rules: [{metric: accuracy, min: 0.8}, {metric: accuracy, mni: 0.8}]}": "gates.rules[1].mni: unknown parameter (got 0.8). Did you mean 'min'",
    "gates: {rules: [{metric: accuracy, min: 0.8, min_n: 1.5}]}": "gates.rules[0].min_n: must be a int, not a float (got 1.5). Write a whole number",
    "gates: {rules: [{metric: accuracy, min: 0.8, min_n: 0}]}": "gates.rules[0].min_n: is out of range (got 0). It lies in [1, inf)",
    "gates: {rules: [{metric: accuracy, min: 80, bound: wilson}]}": "gates.rules[0].min: a rate lies between 0 and 1 (got 80). Write a share",
    "gates: {rules: [{metric: accuracy, min: 0.8, bound: wilsn}]}": "(got 'wilsn'). Did you mean 'wilson'",
    "gates: {rules: [{metric: accuracy, noninferiority: -0.1, against: merged}]}": "gates.rules[0].noninferiority: a margin or a ratio is positive (got -0.1). Write",
    "gates: {rules: [accuracy]}": "gates.rules[0]: must be a dict, not a str (got 'accuracy'). Write it as",
    "gates: {rules: {metric: accuracy}}": "gates.rules: must be a list, not a dict",
    "gates: [1]": "gates: must be a dict, not a list (got [1]). Write",
}  # fmt: skip


@pytest.mark.parametrize("text", BAD)
@pytest.mark.parametrize("command", [gate_run, gate_plan])
def test_a_bad_policy_is_told_with_its_file_key_value_and_remedy(folder, text, command, capsys):
    (folder / "bad.yaml").write_text(text)
    assert command("bad.yaml", "reports") == 4
    said = capsys.readouterr().err
    assert "bad.yaml: " in said and BAD[text] in said


def test_usage_errors(folder, capsys):
    policy(folder, "{metric: accuracy, min: 0.9}")
    assert gate_run(reports="nowhere") == 2
    assert "no report here" in capsys.readouterr().err
    assert gate_run(policy="nowhere.yaml", reports="reports") == 2


def test_one_failing_rule_fails_the_whole(folder):
    policy(folder, "{metric: accuracy, min: 0.90, bound: wilson}", "{metric: accuracy, min: 0.97}")
    assert gate_run(reports="reports") == 1


def test_baseline_round_trip(folder, capsys):
    rule = "{metric: accuracy, noninferiority: 0.03, against: baseline}"
    policy(folder, rule)
    assert gate_run(reports="reports", baseline="baseline/engine") == 1
    assert baseline_set("reports") == 0
    assert gate_run(reports="reports", baseline="baseline/engine") == 0
    write_report(report("engine", 300), folder / "reports/engine")
    assert gate_run(reports="reports", baseline="baseline/engine") == 1
    assert "a loss of 0.03 is shown" in capsys.readouterr().out


def test_a_baseline_of_another_suite_is_an_error(folder, capsys):
    policy(folder, "{metric: accuracy, noninferiority: 0.03, against: baseline}")
    write_report(report("engine", 380, suite="bank@2"), folder / "baseline/engine")
    assert gate_run(reports="reports", baseline="baseline/engine") == 4
    assert "Measure baseline again, on bank@1" in capsys.readouterr().out


DAMAGE = {  # what happens to a file → what is said of it behind its name
    "truncated": (lambda t: t[:100], "not valid JSON"),
    "empty": (lambda t: "", "not valid JSON"),
    "no JSON": (lambda t: "<html>", "not valid JSON"),
    "no UTF-8": (lambda t: "\udcff", "is not UTF-8: byte 0xff at 0"),
    "too deep": (lambda t: "[" * 100_000, "not valid JSON"),
    "a list": (lambda t: "[1]", "schema: unknown report schema (got 'list')"),
    "another object": (lambda t: '{"metric": 1}', "schema: unknown report schema (got None)"),
    "another schema": (lambda t: t.replace("llmkit.report/1", "llmkit.report/9"), "schema: unknown report schema (got 'llmkit.report/9')"),
    "NaN": (lambda t: t.replace('"value": 0.95', '"value": NaN'), "measurements[0].value: must be a finite number"),
    "text": (lambda t: t.replace('"value": 0.95', '"value": "0.95"'), "measurements[0].value: must be a float"),
    "gone": (lambda t: None, "no such file"),
}  # fmt: skip
SAMPLES = {
    "truncated": (lambda t: t[:-20], "line 400: not valid JSON"),
    "no JSON": (lambda t: "<html>", "line 1: not valid JSON"),
    "a list": (lambda t: "[1]\n", "line 1: must be an object"),
    "another object": (lambda t: '{"metric": 1}\n', "line 1.id: a column is missing"),
    "NaN": (lambda t: t.replace('"correct": 1', '"correct": NaN', 1), "line 1.correct: not a finite number"),
    "gone": (lambda t: None, "no such file"),
}
LOST = {  # what only a rule sees: its outcome is error
    "empty": (lambda t: "", "rests on 400 items, and task/correct has 0"),
    "shorter": (lambda t: "".join(t.splitlines(True)[:-1]), "rests on 400 items, and task/correct has 399"),
    "text": (lambda t: t.replace('"correct": 1', '"correct": "1"', 1), "task/correct is no number (got '1')"),
    "null": (lambda t: t.replace('"correct": 1', '"correct": null', 1), "task/correct is no number (got None)"),
}


def spoil(path, change):
    "Change what a file says, or remove it."
    if (text := change(path.read_text())) is None:
        path.unlink()
    else:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))


@pytest.mark.parametrize("where", ["reports/engine", "baseline/engine"])
@pytest.mark.parametrize(
    "name, change, said",
    [
        *(pytest.param("report.json", *d, id=f"report {k}") for k, d in DAMAGE.items()),
        *(pytest.param("samples/task.jsonl", *d, id=f"samples {k}") for k, d in SAMPLES.items()),
    ],
)
def test_a_damaged_report_or_baseline_is_an_error_that_names_the_file(folder, where, name, change, said, capsys):
    policy(folder, "{metric: accuracy, min: 0.5}", "{metric: accuracy, noninferiority: 0.03, against: baseline, if_absent: skip}")  # fmt: skip
    write_report(report("engine", 380), folder / "baseline/engine")
    assert gate_run(reports="reports", baseline="baseline/engine") == 0
    spoil(folder / where / name, change)
    capsys.readouterr()
    assert gate_run(reports="reports", baseline="baseline/engine", out="verdict") == 4
    assert f"{where}/{name}: {said}" in capsys.readouterr().err.replace(f"{folder}/", "")
    assert not (folder / "verdict").exists()
    assert gate_plan(reports="baseline/engine" if "base" in where else "reports") == 4


@pytest.mark.parametrize("damage", LOST)
@pytest.mark.parametrize("rule", ["min: 0.5, bound: wilson", "noninferiority: 0.03, against: merged"])
def test_samples_that_are_lost_are_an_error_of_the_rules_that_read_them(folder, damage, rule, capsys):
    policy(folder, f"{{metric: accuracy, {rule}}}")
    change, said = LOST[damage]
    spoil(folder / "reports/engine/samples/task.jsonl", change)
    assert gate_run(reports="reports", out="verdict") == 4
    told = capsys.readouterr().out
    assert said in told or "cannot be paired" in told or "no per-sample values" in told or "average to" in told
    assert read_verdict("verdict").outcome == "error"


def test_a_folder_that_lost_its_report_is_not_passed_over(folder, capsys):
    policy(folder, "{metric: accuracy, min: 0.5}")
    (folder / "reports/merged/report.json").unlink()
    assert gate_run(reports="reports") == 4
    assert "reports/merged/report.json: no such file" in capsys.readouterr().err


def test_a_ratio_is_resampled_once(folder, capsys, monkeypatch):
    import llmkit.gate.ratios as ratios

    calls = []
    plain = ratios.paired_scores
    monkeypatch.setattr(ratios, "paired_scores", lambda *a, **k: (calls.append(a), plain(*a, **k))[1])
    table = [(i * 37 % 101) / 10 + 1 for i in range(60)]
    for subject, factor in (("engine", 1.0), ("merged", 1.01)):
        values = [v * factor + (i % 5) * 0.3 * (subject == "engine") for i, v in enumerate(table)]
        m = Measurement("tokens", sum(values) / 60, 60, direction="lower", samples="task/tokens")
        samples = {"task": {"id": list(range(60)), "tokens": values}}
        write_report(Report(subject, "", "bank@1", (m,), samples), folder / "reports" / subject)
    ratio = "{metric: tokens, max_ratio: 1.09, against: merged, bound: interval}"
    policy(folder, ratio)
    assert gate_run(reports="reports") == 3 and len(calls) == 1
    assert "Not sure enough; needs about" in capsys.readouterr().out


def test_values_that_were_doctored_are_found(folder, capsys):
    policy(folder, "{metric: accuracy, noninferiority: 0.03, against: merged}")
    path = folder / "reports/engine/report.json"
    body = json.loads(path.read_text())
    body["measurements"][0]["value"] = 0.99
    path.write_text(json.dumps(body))
    assert gate_run(reports="reports") == 4
    assert "average to" in capsys.readouterr().out


def test_plan_prints_what_each_rule_needs(folder, capsys):
    policy(folder, "{metric: accuracy, noninferiority: 0.02, against: merged}", "{metric: asr, max: 0.01, bound: clopper_pearson}")  # fmt: skip
    assert gate_plan(lead=0.01) == 0
    said = capsys.readouterr().out
    assert "about 1,620, equal models that differ on 10.0%, assumed" in said and "about 299" in said
    assert gate_plan(reports="reports", lead=0.01) == 0
    said = capsys.readouterr().out  # the two reports differ on 2 of 400 answers
    assert "about 262 (there are 400), equal models that differ on 0.5% of 400, measured" in said


def test_inconclusive_says_how_many_items(folder, capsys):
    policy(folder, "{metric: accuracy, noninferiority: 0.005, against: merged}")
    write_report(replace(report("merged", 380)), folder / "reports/merged")
    assert gate_run(reports="reports") == 3
    assert "Not sure enough" in capsys.readouterr().out


def share(metric, value, low=None, high=None, unit=""):
    "A report with one metric that keeps no values of its items."
    return {"engine": Report("engine", "", "bank@1", (Measurement(metric, value, 100, low, high, direction="lower", unit=unit),))}  # fmt: skip


@pytest.mark.parametrize("metric", ["ece_debiased", "accuracy_gap", "attack_success_rate_corrected", "broken_rate_excess", "demographic_parity_difference"])  # fmt: skip
def test_percent_in_a_rule_on_a_share_is_an_error_whatever_it_keeps_of_its_items(metric):
    "The gate let a calibration error of 10 % pass a rule that was meant to say 15 % and said 15."
    rule = {"metric": metric, "bound": "interval"}
    found = judge({"rules": [rule | {"max": 15}]}, share(metric, 0.1, 0.05, 0.2))
    assert found.outcome == "error" and "Write a share, 0.05 for 5 %" in found.reasons[0].sentence
    assert judge({"rules": [rule | {"max": 0.15}]}, share(metric, 0.1, 0.05, 0.12)).outcome == "pass"
    assert judge({"rules": [rule | {"max": 15}]}, share(metric, 10, 5, 12, "%")).outcome == "pass"


def test_a_difference_may_be_below_zero_and_not_below_minus_one():
    m = Measurement("swap_accuracy_difference", -0.01, 100, -0.04, 0.02, direction="none")
    told = lambda least: judge({"rules": [{"metric": m.metric, "min": least, "bound": "interval"}]}, {"engine": Report("engine", "", "s@1", (m,))}).outcome  # fmt: skip
    assert (told(-0.05), told(-5)) == ("pass", "error")


def test_a_baseline_with_nothing_to_lose_lets_nothing_pass():
    "Two models that are always wrong differ by nothing: no loss is excluded by that."
    rule = {"rules": [{"metric": "accuracy", "noninferiority": 0.05, "against": "baseline"}]}
    found = judge(rule, {"engine": report("engine", 0), "baseline": report("baseline", 0)})
    assert found.outcome == "error" and "baseline has only 0 to lose" in found.reasons[0].sentence
    assert judge(rule, {"engine": report("engine", 12), "baseline": report("baseline", 20)}).outcome == "error"
    assert judge(rule, {"engine": report("engine", 40), "baseline": report("baseline", 40)}).outcome == "pass"


def test_a_misspelt_slice_is_told_the_slices_there_are():
    m = [Measurement("accuracy", 0.9, 50, slice=s) for s in ("all", "group=18-30", "group=over_60")]
    found = judge({"rules": [{"metric": "accuracy", "slice": "Group=18-30", "min": 0.5}]}, {"engine": Report("engine", "", "s@1", tuple(m))})  # fmt: skip
    assert found.outcome == "fail" and "Did you mean 'group=18-30'?" in found.reasons[0].sentence


def test_small_losses_are_added_up_over_releases(folder, capsys):
    "Each release lost less than the margin, and nothing looked further back than the last one."
    policy(folder, "{metric: accuracy, noninferiority: 0.05, against: baseline}")
    said = []
    for right in (380, 374, 368, 362, 356):
        write_report(report("engine", right), folder / "reports/engine")
        gate_run(reports="reports", baseline="baseline/engine")
        said.append(capsys.readouterr().out)
        baseline_set("reports")
        capsys.readouterr()
    assert ["In all it has lost" in x for x in said] == [False, False, False, False, True]
    assert "In all it has lost 0.06 since the best baseline so far, 0.95, more than one step may" in said[-1]
    assert "PASS: 1 pass" in said[-1]
    write_report(report("engine", 300, suite="bank@2"), folder / "reports/engine")  # other questions, another beginning
    baseline_set("reports")
    assert "best_so_far" not in read_report("baseline/engine").context


def test_folders_are_listed_as_people_write_them(folder, capsys):
    policy(folder, "{metric: accuracy, min: 0.9}")
    (folder / "reports").rename(folder / "date=2026-11-30")
    assert gate_run(reports=" date=2026-11-30/engine, merged=date=2026-11-30/merged,") == 0
    assert gate_plan(reports="date=2026-11-30, ") == 0


@pytest.mark.parametrize("wrong", [{"power": float("nan")}, {"power": -1.0}, {"discordance": float("nan")}, {"lead": float("inf")}])  # fmt: skip
def test_a_plan_for_what_cannot_be_is_wrong_usage(folder, wrong, capsys):
    policy(folder, "{metric: accuracy, noninferiority: 0.03, against: merged}")
    assert gate_plan(**wrong) == 2
    said = capsys.readouterr()
    assert f"plan.{next(iter(wrong))}: is out of range" in said.err and not said.out
