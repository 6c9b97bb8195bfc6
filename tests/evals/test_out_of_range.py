"Options, suite files and prices that cannot be meant: each is refused by name, and nothing is measured."

import pytest
import yaml

from llmkit.core.errors import KitError
from llmkit.core.files import write_jsonl, write_text
from llmkit.data.canaries import canaries_plant, read_canaries
from llmkit.evals.attacks import kit_attacks
from llmkit.evals.battery import suite_options
from llmkit.evals.bias import read_bbq, read_crows_pairs
from llmkit.evals.cost import load_price
from llmkit.evals.detect import DATA
from llmkit.evals.grounding import load_grounding
from llmkit.evals.load import load_run
from llmkit.evals.safety import run_safety
from llmkit.evals.suite import load_suite
from llmkit.evals.swaps import load_axes
from llmkit.runtime.dummy import DummyEngine


@pytest.mark.parametrize(
    "suite, option, value",
    [
        ("fairness", "min_n", -5),
        ("swaps", "alpha", 7.0),
        ("regression", "n", -1),
        ("regression", "positions", 0),
        ("regression", "items", -20),
        ("memorization", "records", -1),
        ("load", "latency", -1.0),
        ("load", "latency", float("nan")),
        ("load", "slots", 0),
        ("grid", "batches", []),
        ("grid", "batches", [0]),
    ],
)
def test_an_option_outside_its_range_is_refused(suite, option, value):
    with pytest.raises(KitError, match=f"{suite}.{option}: (is (out of range|empty)|must be a finite number)"):
        suite_options(suite, {option: value})


def test_the_load_command_refuses_what_cannot_be_met(capsys):
    assert load_run("http://127.0.0.1:9/v1", latency=-1.0) == 2
    assert "load.latency: is out of range" in capsys.readouterr().err


def changed(tmp_path, name, change):
    "A YAML file of the kit with a change."
    body = yaml.safe_load((DATA / name).read_text(encoding="utf-8"))
    change(body)
    return write_text(tmp_path / "mine.yaml", yaml.safe_dump(body))


def test_suite_files_that_cannot_be_meant_are_refused(tmp_path):
    def alike(body):
        lists = next(iter(body["names"].values()))
        lists["second"][0] = lists["first"][0]

    def empty(body):
        body["passages"][0]["answerable"][0][1] = ""

    with pytest.raises(KitError, match="a name beside itself changes nothing"):
        load_axes(changed(tmp_path, "fairness/swaps.yaml", alike))
    with pytest.raises(KitError, match="does not stand in the text"):
        load_grounding(changed(tmp_path, "grounding/bank.yaml", empty))
    with pytest.raises(KitError, match="version: is out of range"):
        load_grounding(changed(tmp_path, "grounding/bank.yaml", lambda b: b.update(version=-3)))
    said = [{"role": "user", "content": "hm"}, {"role": "assistant", "content": "balance: yes"}]
    write_jsonl(tmp_path / "rows.jsonl", [{"id": 1, "messages": said}])
    text = "name: a\nversion: 1\nrecords: rows.jsonl\nlimit: null\nscorers: [refusal]\nmax_tokens: 8\nstop: []\nrefusal: balance\n"  # fmt: skip
    assert len(load_suite(write_text(tmp_path / "a.yaml", text)).items) == 1
    for old, new, error in (("refusal: balance", "refusal: nolabel", "no item has this label.*Known: balance"), ("version: 1", "version: -3", "version: is out of range"), ("name: a", "name: ' '", "name: is empty")):  # fmt: skip
        with pytest.raises(KitError, match=error):
            load_suite(write_text(tmp_path / "b.yaml", text.replace(old, new)))


@pytest.mark.parametrize("entry", ["[1, 2]", "null", "{usd_per_hour: -1.0, date: '', source: ''}"])
def test_a_price_that_is_none_is_refused(tmp_path, entry):
    with pytest.raises(KitError, match="prices.yaml: (rack: must be a dict|rack.usd_per_hour: is out of range)"):
        load_price("rack", write_text(tmp_path / "prices.yaml", f"rack: {entry}\n"))


def test_canaries_are_counts_of_digits(tmp_path):
    for times, digits in (("0,-1", 3), ("1", 0), ("a,b", 3)):
        with pytest.raises(KitError, match="canaries.(times|digits)"):
            canaries_plant(times, digits, out=str(tmp_path))
    row = {"id": "c", "question": "Code?", "form": "{} {x}", "secret": "123", "times": 1}
    write_jsonl(tmp_path / "c.jsonl", [row])
    assert read_canaries(tmp_path / "c.jsonl")[0].messages()[1]["content"] == "123 {x}"


BBQ = {"example_id": 1, "question_polarity": "neg", "context_condition": "ambig", "category": "Age", "answer_info": {"ans0": ["old"], "ans1": ["young"], "ans2": ["unknown"]}, "additional_metadata": {"stereotyped_groups": ["old"]}, "context": "c", "question": "q", "ans0": "A", "ans1": "B", "ans2": "U", "label": 2}  # fmt: skip


def test_rows_that_name_nobody_and_rows_that_stand_twice_are_refused(tmp_path):
    for change, error in (
        ({"answer_info": {}}, "line 1.answer_info.ans0"),
        ({"additional_metadata": {}}, "line 1.additional_metadata.stereotyped_groups"),
    ):
        write_jsonl(tmp_path / "bbq.jsonl", [BBQ | change])
        with pytest.raises(KitError, match=f"{error}: names no groups"):
            read_bbq(tmp_path / "bbq.jsonl")
    write_jsonl(tmp_path / "bbq.jsonl", [BBQ, BBQ])
    with pytest.raises(KitError, match="two rows with one id"):
        read_bbq(tmp_path / "bbq.jsonl")
    csv = write_text(tmp_path / "crows.csv", ",sent_more,sent_less,bias_type\n0,a b,a c,age\n0,a b,a c,age\n")
    with pytest.raises(KitError, match="two rows with one id"):
        read_crows_pairs(csv)


def test_a_family_that_is_named_twice_is_refused():
    with pytest.raises(KitError, match="two items with one id.*Name every family and file once"):
        run_safety(DummyEngine(), kit_attacks(["direct", "direct"]))


def test_a_date_without_quotes_is_a_date(tmp_path):
    write_text(tmp_path / "prices.yaml", "rack: {usd_per_hour: 1.5, date: 2026-06-17, source: the bill}\n")
    assert load_price("rack", tmp_path / "prices.yaml").date == "2026-06-17"
