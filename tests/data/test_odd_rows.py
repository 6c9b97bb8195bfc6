"Rows that were taken for something else than they say: each is refused with its line and a remedy, or told of."

import json
import os

import pytest
from data_rows import TABLE, good_rows

from llmkit.core.errors import KitError
from llmkit.core.files import read_json, read_jsonl
from llmkit.core.plugins import need
from llmkit.data.profile import SUITE, summary
from llmkit.data.records import FIELDS, Shape
from llmkit.evals.suite import KEYS

GOOD = good_rows()


def account(data):
    "The profile's account of rows, which must add up, and the reasons of the quarantine."
    rows = read_json(data / "profile.json")["rows"]
    kept = sum(1 for s in ("train", "validation", "test") for _ in read_jsonl(data / f"{s}.jsonl"))
    bad = [*read_jsonl(data / "quarantine.jsonl")]
    assert rows["in"] == rows["out"] + rows["quarantined"] + rows["duplicates"]
    assert (kept, len(bad)) == (rows["out"], rows["quarantined"])
    return [(b["line"], b["reason"]) for b in bad]


@pytest.mark.parametrize(
    "row, says",
    [
        ({"completion": "\u200b\ufeff"}, "completion: is empty. Fill it in"),
        ({"completion": " \u00a0\x00"}, "completion: is empty. Fill it in"),
        ({"label": "\u2060"}, "label: is empty. Fill it in"),
        ({"label": 1.0}, "label: must be a text, not a float. Write it as a text"),
        ({"label": True}, "label: must be a text, not a bool. Write it as a text"),
        ({"system": 0}, "messages[0].content: must be a text, not a int"),
        ({"system": []}, "messages[0].content: must be a text, not a list"),
        ({"messages": [{"from": [], "value": "a"}]}, "messages[0].role: unknown role (got [])"),
        ({"\ud800": 1}, "the name of a column is not UTF-8 (got '\\ud800'). Convert the file"),
        ({"prompt": "\udfff"}, "prompt: has a lone surrogate. Convert the file"),
    ],
)
def test_a_value_that_says_nothing_or_is_of_another_kind(make, row, says):
    [(line, reason)] = account(make([*GOOD, {"prompt": "Who?", "completion": "block", "label": "block", **row}]))
    assert line == 41 and reason.startswith(says)


@pytest.mark.parametrize("value", [["a"], {"a": 1}, float("nan")])
def test_a_template_is_not_filled_with_what_python_makes_of_a_value(make, tmp_path, value):
    pa, pq = need("pyarrow"), need("pyarrow.parquet")
    rows = [{"text": value, "category": "block"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "odd.parquet")
    with pytest.raises(KitError, match="text: must be a text or a number, not (list|dict|NaN). Take its parts"):
        make(tmp_path / "odd.parquet", "parquet", TABLE, max_quarantine_share=1.0)


def test_columns_of_which_nothing_is_read_are_told(make):
    "A `lable` is a dataset without labels, and a `splitt` the shares' division of what was divided."
    rows = [{"prompt": r["prompt"], "completion": r["completion"], "lable": r["label"], "note": i or None} for i, r in enumerate(GOOD)]  # fmt: skip
    told = read_json(make(rows) / "profile.json")
    assert told["unread"] == {"lable": 40, "note": 39}
    assert "- columns of which nothing is read: lable 40 (is it label?), note 39" in summary(told)


def test_columns_that_only_a_suite_reads_are_told_as_such(make):
    assert {*KEYS} - {*FIELDS} == {*SUITE}
    told = summary(read_json(make([{**r, "references": ["a"]} for r in GOOD]) / "profile.json"))
    assert "nothing is read: references 40 (read in a suite's file, not in training data)\n" in told


def test_what_is_left_out_of_a_chat_is_told(make):
    chat = [{"role": "user", "content": "Who?", "name": "Jo"}, {"role": "assistant", "content": "I", "thinking": None}]
    data = make([*GOOD, {"messages": chat, "prompt": "other", "completion": "other", "label": "block"}])
    assert read_json(data / "profile.json")["unread"] == {"completion": 1, "messages.name": 1, "prompt": 1}
    assert "unread" not in read_json(make(GOOD) / "profile.json")
    assert account(data) == []


def test_the_names_of_unread_columns_show_nobody(make):
    data = make([{**r, "jo@example.com": 1} for r in GOOD])
    assert "jo@" not in (data / "profile.json").read_text()


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_files_that_were_put_one_behind_the_other(make, mark):
    table = "text,category\n" + "".join(f"{r['prompt']},{r['label']}\n" for r in GOOD)
    more = table.replace("abroad", "at home")
    data = make((table + mark + more).encode(), "csv", TABLE)
    assert account(data) == [(42, "repeats the header. Files were put together here: take the line out")]
    lines = ["".join(json.dumps({**r, "prompt": p + r["prompt"]}) + "\n" for r in GOOD) for p in ("", "Well, ")]
    assert account(make((lines[0] + mark + lines[1]).encode())) == []


def test_the_number_of_no_class(make, tmp_path):
    datasets = pytest.importorskip("datasets")
    pa = need("pyarrow")
    names = sorted({r["label"] for r in GOOD})
    told = datasets.Features({"prompt": datasets.Value("string"), "completion": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})  # fmt: skip
    rows = [{**r, "label": names.index(r["label"])} for r in GOOD] + [{"prompt": "Who?", "completion": "a", "label": n} for n in (9, -2)]  # fmt: skip
    datasets.Dataset(pa.Table.from_pylist(rows).cast(told.arrow_schema)).cast(told).save_to_disk(str(tmp_path / "rows"))
    bad = account(make(tmp_path / "rows", "hf"))
    assert [(n, r.split(". ")[0]) for n, r in bad] == [(41, "label: is the number of no class (got 9)"), (42, "label: is the number of no class (got -2)")]  # fmt: skip


def test_a_file_whose_name_is_not_utf8(make, tmp_path):
    (tmp_path / "rows").mkdir()
    with open(os.fsencode(tmp_path / "rows") + b"/r\xff.jsonl", "wb") as f:
        f.write(b"{}")
    with pytest.raises(KitError, match=r"rows/r\?.jsonl: the name of the file is not UTF-8. Rename it"):
        make(tmp_path / "rows")


def test_mapped_columns_are_read(make):
    rows = [{"q": r["prompt"], "a": r["completion"], "kind": r["label"]} for r in GOOD]
    data = make(rows, shape=Shape(columns={"prompt": "q", "completion": "a", "label": "kind"}))
    assert "unread" not in read_json(data / "profile.json")
