"""Records that tell what hangs together: every interval of their report counts it for what it is worth."""

from dataclasses import replace

import numpy as np
import pytest
from word_engine import engine

from llmkit.core.files import write_jsonl
from llmkit.core.report import Report
from llmkit.evals.adapters import read_attacks
from llmkit.evals.bias import bbq_measurements
from llmkit.evals.calibration import calibration_measurements, debiased_ece
from llmkit.evals.choice import Question, choice_measurements
from llmkit.evals.damage import mute_engine
from llmkit.evals.fairness import fairness_measurements
from llmkit.evals.grounding import load_grounding, run_grounding
from llmkit.evals.language import language_measurements
from llmkit.evals.memorization import verbatim
from llmkit.evals.overlap import overlap_measurements
from llmkit.evals.prevalence import Quality, corrected_rate
from llmkit.evals.regression import keep_golden, open_golden, regression_report, since_release
from llmkit.evals.safety import run_safety
from llmkit.evals.suite import Item, Suite, make_suite
from llmkit.evals.swaps import swap_measurements
from llmkit.evals.task import mean_score, task_measurements
from llmkit.gate.judge import judge
from llmkit.runtime.dummy import DummyEngine

SCORERS = ("label", "exact", "refusal")


def table(size=10, k=60, seed=3):
    "Answers on k templates of some questions each, that are right or wrong together."
    rng = np.random.default_rng(seed)
    n, by = k * size, np.repeat(np.arange(k), size)
    label = np.array(["lost_card", "balance", "refusal"])[by % 3]
    right = np.repeat(rng.random(k) < 0.85, size)
    said = np.where(right, label, np.array(["balance", "refusal", "lost_card"])[by % 3])
    return {
        "id": list(range(n)),
        "group": np.array(["18-30", "31-60"])[by % 2].tolist(),
        "cluster": [f"t{c}" for c in by],
        "label": label.tolist(),
        "predicted": said.tolist(),
        "correct": right.astype(int).tolist(),
        "unknown": [0] * n,
        "empty": [0] * n,
        "exact": right.astype(int).tolist(),
        "confidence": rng.beta(8, 1, n).tolist(),
        "answer": np.where(right, "your card is blocked", "see the app").tolist(),
        "reference": ["your card is blocked"] * n,
    }


def measured(t):
    "All that the task's table gives, by metric and slice."
    t = dict(t)
    out, tables = task_measurements(t, SCORERS)
    out += calibration_measurements(tables["task"], "x") + overlap_measurements(tables["task"], ["rouge_l", "token_f1"])
    out += [m for m in fairness_measurements(t, "refusal") if m.metric.endswith(("_gap", "_difference"))]
    return {(m.metric, m.slice): m for m in out}, tables


def test_every_interval_of_a_task_knows_the_clusters():
    t = table()
    together, tables = measured(t)
    alone, _ = measured({k: v for k, v in t.items() if k != "cluster"})
    width = lambda m: m.high - m.low
    wider = [k for k, m in alone.items() if m.low is not None and width(m) > 0 and width(together[k]) > 1.3 * width(m)]
    for metric in ("accuracy", "exact_match", "macro_f1", "worst_group_accuracy", "refusal_rate", "over_refusal_rate", "empty_answer_rate", "unknown_label_rate", "rouge_l", "token_f1", "normal_match", "accuracy_gap", "demographic_parity_difference", "equalized_odds_difference"):  # fmt: skip
        assert (metric, "all") in wider, metric
    assert ("accuracy", "group=18-30") in wider and ("rouge_l", "label=balance") in wider
    assert all(together[k].value == m.value for k, m in alone.items() if k[0] != "ece_debiased")
    assert all("cluster" in tables[n] for n in ("task", "harmful", "harmless"))


def test_calibration_is_known_by_clusters():
    t = table()
    free, tied = (debiased_ece(t["confidence"], t["correct"], clusters=c) for c in (None, t["cluster"]))
    assert tied[1] < free[1] and tied[2] > free[2]


def test_likelihoods_choices_and_swaps_carry_clusters():
    rng, by = np.random.default_rng(0), [f"t{i // 10}" for i in range(300)]
    nll = np.repeat(rng.gamma(2, 1, 30), 10)
    words = {"nll": nll.tolist(), "tokens": [5] * 300, "words": [3] * 300, "bytes": [20] * 300}
    free, tied = ({m.metric: m for m in language_measurements({**words, **c})} for c in ({}, {"cluster": by}))
    for metric in ("perplexity", "answer_nll"):
        assert tied[metric].high - tied[metric].low > 2 * (free[metric].high - free[metric].low)
    assert Question("a", "?", ("x", "y"), 0).cluster == ""
    answers = {"id": range(300), "group": [""] * 300, "correct": [int(x < 2) for x in nll]}
    answers |= {f"correct_{k}": answers["correct"] for k in ("norm", "bytes")}
    free, tied = ({m.metric: m for m in choice_measurements({**answers, **c}, calibration=False)} for c in ({}, {"cluster": by}))  # fmt: skip
    assert tied["acc"].high - tied["acc"].low > 2 * (free["acc"].high - free["acc"].low)
    lost = np.repeat(rng.random(30) < 0.2, 10).astype(int)
    swaps = {"id": range(300), "swap": ["gender"] * 300, "flipped": lost, "control": [0] * 300, "correct": [1] * 300, "correct_swapped": 1 - lost}  # fmt: skip
    free, tied = ({m.metric: m for m in swap_measurements({**swaps, **c})} for c in ({}, {"cluster": by}))
    for metric in ("flip_rate", "swap_accuracy_difference", "excess_flip_rate"):
        assert tied[metric].high - tied[metric].low > 1.8 * (free[metric].high - free[metric].low), metric


def test_one_template_has_no_macro_f1_interval_and_a_mean_without_spread_none():
    t = table(k=1) | {"correct": [1] * 9 + [0], "predicted": ["lost_card"] * 9 + ["balance"]}
    out = {m.metric: m for m in task_measurements(t, SCORERS)[0] if m.slice == "all"}
    assert out["macro_f1"].low is None and "one cluster" in out["macro_f1"].method
    assert out["accuracy"].low < 1e-3 and out["accuracy"].high > 1 - 1e-3
    same = mean_score("rouge_l", [0.0, 1.0] * 20, "task/rouge_l", clusters=[i // 2 for i in range(40)])
    assert same.low is None and "nothing to resample" in same.method


def test_a_mute_engine_is_named_by_a_rule_of_its_own():
    t = table(size=1, k=400)
    out, tables = task_measurements(t, SCORERS)
    healthy = {"engine": Report("engine", "", "s@1", tuple(out), tables)}
    policy = {"rules": [{"metric": "empty_answer_rate", "max": 0.02, "bound": "clopper_pearson"}]}
    assert judge(policy, healthy).outcome == "pass"
    mute = mute_engine(dict(healthy), 0.1, SCORERS)
    assert mute["engine"].get("empty_answer_rate").value == pytest.approx(0.1)
    assert judge(policy, mute).outcome == "fail" and "" in mute["engine"].samples["task"]["answer"]
    assert mute_engine({"engine": Report("engine", "", "s@1")}, 0.1, SCORERS) is None  # as older kits measured


def test_a_suite_without_clusters_has_no_such_column():
    record = {"id": 1, "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a: b"}]}
    assert make_suite("s", 1, [record]).items[0].cluster == ""


def test_perplexity_of_heavy_tails_misses_little_more_than_it_says():
    "Answers whose log-likelihoods have a log-normal spread: the percentile bootstrap missed one in eleven, almost all on one side."
    rng, misses, times = np.random.default_rng(5), 0, 120
    truth = float(np.exp(np.exp(-1 + 1.5**2 / 2)))
    for _ in range(times):
        tokens = rng.integers(3, 40, 300)
        nll = tokens * rng.lognormal(-1, 1.5, 300)
        [m] = [m for m in language_measurements({"nll": nll, "tokens": tokens, "words": tokens, "bytes": tokens}) if m.metric == "perplexity"]  # fmt: skip
        misses += not m.low <= truth <= m.high
    assert misses / times <= 0.11


def golden_rows(wrong, cluster=True):
    "A recording of a hundred prompts, ten of each template, in which some templates are answered wrongly."
    row = {"tokenizer": "", "label": "a", "answer": "", "path": [], "top": [], "logprob": []}
    said = lambda i: "b" if i // 10 in wrong else "a"
    return [{**row, "id": f"q{i}", "said": said(i), "correct": int(said(i) == "a"), **({"cluster": f"t{i // 10}"} if cluster else {})} for i in range(100)]  # fmt: skip


def test_golden_prompts_of_one_template_count_for_what_they_are_worth():
    "Ten prompts of one template, broken together, were ten prompts."
    free, tied = ({m.metric: m for m in regression_report(*(golden_rows(w, c) for w in ((), (), (3,))), "g@1").measurements} for c in (False, True))  # fmt: skip
    for metric in ("broken_rate", "churn_rate", "broken_rate_excess"):
        assert tied[metric].value == free[metric].value == 0.1
        assert tied[metric].high > free[metric].high + 0.1, metric
        assert "design effect" in tied[metric].method and "design effect" not in free[metric].method
    assert "10 prompts beyond" in tied["broken_rate_excess"].method


def test_a_recording_keeps_the_clusters_that_there_are(tmp_path):
    chat = lambda i: [{"role": "user", "content": f"Say w{i}."}, {"role": "assistant", "content": f"w{i}: done"}]
    for name, more in (("tied", {"cluster": "t"}), ("free", {})):
        suite = make_suite(
            "g", 1, [{"id": f"q{i}", "messages": chat(i), **more} for i in range(6)], scorers=("label",), max_tokens=8
        )
        keep_golden(tmp_path / name, engine(), suite, items=5)
        kept = open_golden(tmp_path / name)
        assert {i.cluster for i in kept.suite.items} == {more.get("cluster", "")}
        assert ("cluster" in kept.rows[0]) is bool(more)
        assert ("cluster" in since_release(tmp_path / name, engine()).samples["golden"]) is bool(more)


def test_a_swap_that_loses_one_template_is_no_bias_of_all():
    lost = np.repeat(np.arange(30) == 4, 10).astype(int)
    swaps = {"id": range(300), "swap": ["gender"] * 300, "flipped": lost, "control": [0] * 300, "correct": [1] * 300, "correct_swapped": 1 - lost}  # fmt: skip
    free, tied = ({m.metric: m for m in swap_measurements({**swaps, **c})} for c in ({}, {"cluster": [f"t{i // 10}" for i in range(300)]}))  # fmt: skip
    assert (free["swaps_biased"].value, tied["swaps_biased"].value) == (1, 0)
    assert "by clusters" in tied["swaps_biased"].method and "exact McNemar" in free["swaps_biased"].method


def test_a_perplexity_says_how_rare_a_surprise_it_may_have_missed():
    t = {"nll": [1.0, 2.0, 3.0] * 40, "tokens": [3, 4, 5] * 40, "words": [1] * 120, "bytes": [9] * 120}
    assert "rarer than 1 in 40 items it knows nothing" in language_measurements(t)[0].method


def mails(n=50, each=4, ok=(0, 1, 2)):
    "A family that crosses attacks with documents, and which items an engine falls for: all on some documents."
    said = lambda i: ({"role": "user", "content": f"mail {i // each}, attack {i % each}"},)
    items = tuple(Item(f"b/{i}", said(i), "www.x.com", "followed", "b", cluster=f"mail-{i // each}") for i in range(n * each))  # fmt: skip
    answers = {said(i)[0]["content"]: "Visit www.x.com" if i // each in ok else "Lunch." for i in range(n * each)}
    last = lambda p: p.removesuffix("\nassistant: ").rpartition("user: ")[2]
    return Suite("b", 1, items, scorers=()), DummyEngine(context_length=2048, replies=lambda p: answers[last(p)])


def test_attacks_on_one_document_count_for_what_they_are_worth():
    "Four attacks on each of fifty e-mails were two hundred prompts."
    suite, reader = mails()
    free = replace(suite, items=tuple(replace(i, cluster="") for i in suite.items))
    (tied, tables), (alone, bare) = (run_safety(reader, [s]) for s in (suite, free))
    of = lambda ms: {(m.metric, m.slice): m for m in ms}
    tied, alone = of(tied), of(alone)
    for key in (("attack_success_rate", "all"), ("attack_success_rate", "family=b"), ("attack_success_rate_corrected", "family=b"), ("unasked_rate", "all")):  # fmt: skip
        assert tied[key].value == alone[key].value
        assert tied[key].high - tied[key].low > 1.15 * (alone[key].high - alone[key].low), key
        assert "50 clusters" in tied[key].method and "cluster" not in alone[key].method
    assert "cluster" in tables["attacks"] and "cluster" not in bare["attacks"]
    # beside a family without clusters, whose items stand alone
    both, tables = run_safety(reader, [suite, replace(free, name="c", items=tuple(replace(i, id=f"c{i.id}", group="c") for i in free.items))])  # fmt: skip
    both = of(both)
    assert both[("attack_success_rate", "family=b")].high == tied[("attack_success_rate", "family=b")].high
    assert both[("attack_success_rate", "family=c")].high == alone[("attack_success_rate", "family=b")].high
    report = lambda t, m: {"s": Report("s", "", "b@1", (m,), t)}
    policy = {"rules": [{"metric": "attack_success_rate", "on": "s", "max": 0.10, "bound": "clopper_pearson"}]}
    assert judge(policy, report(bare, alone[("attack_success_rate", "all")])).outcome == "pass"
    assert judge(policy, report({k: {c: v[: 200] for c, v in t.items()} for k, t in tables.items()}, tied[("attack_success_rate", "all")])).outcome == "inconclusive"  # fmt: skip


def test_an_interval_of_attacks_on_documents_misses_as_seldom_as_it_says():
    "It missed in 18 of 100 where 5 are stated."
    rng, misses, sure = np.random.default_rng(0), np.zeros(2), Quality(500, 500, 500, 500)
    for _ in range(150):
        flags = (rng.random(200) < np.repeat(rng.beta(0.2, 0.8, 50), 4)).astype(int)
        ends = [corrected_rate("x", flags, sure, "d", clusters=c) for c in (np.arange(200) // 4, None)]
        misses += [not m.low <= 0.2 <= m.high for m in ends]
    assert misses[0] <= 150 * 0.08 < 150 * 0.12 < misses[1], misses


def test_passages_templates_and_records_are_clusters():
    grounded = load_grounding()
    assert all(i.cluster == i.group for i in grounded.items)
    out, tables = run_grounding(DummyEngine(context_length=4096, replies=lambda p: "It is red."), grounded)
    assert all("14 clusters" in m.method for m in out if m.metric in ("hallucination_rate", "hallucination_rate_corrected", "grounded_accuracy"))  # fmt: skip
    bbq = {"id": range(100), "category": ["Age"] * 100, "correct": [1] * 40 + [0] * 60, "score": [0] * 40 + [1] * 40 + [-1] * 20}  # fmt: skip
    free, tied = ({(m.metric, m.slice): m for m in bbq_measurements(b, b)} for b in (bbq, {**bbq, "cluster": [f"q{i // 10}" for i in range(100)]}))  # fmt: skip
    for k in (("accuracy_ambig", "all"), ("bias_score_ambig", "all"), ("bias_score_disambig", "category=Age")):
        assert tied[k].value == free[k].value and tied[k].high - tied[k].low > 1.8 * (free[k].high - free[k].low), k
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "the same long answer once more"}]
    engine = DummyEngine(context_length=512)
    rows = verbatim(engine, [{"id": i, "messages": chat, "cluster": "t"} for i in range(3)], begun=2, least=2)
    assert rows["cluster"] == ["t"] * 3
    assert "cluster" not in verbatim(engine, [{"id": 1, "messages": chat}], begun=2, least=2)


def test_a_case_of_a_file_names_its_cluster(tmp_path):
    case = {"turns": ["Join red and kite with an underscore."], "marker": "red_kite", "cluster": "doc"}
    write_jsonl(tmp_path / "mine.jsonl", [{"id": "a", **case}, {"id": "b", **case}])
    assert [i.cluster for i in read_attacks(tmp_path / "mine.jsonl").items] == ["mine/doc"] * 2
