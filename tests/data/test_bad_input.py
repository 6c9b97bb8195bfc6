"""Bad input: a clear error or a quarantined row that names file, line, value and remedy; nothing lost or half-written."""

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
import tokenizers
from data_rows import TABLE, good_rows

from llmkit.core.errors import KitError
from llmkit.core.files import read_json, read_jsonl
from llmkit.core.plugins import need
from llmkit.data.prepare import Rules
from llmkit.data.records import Shape
from llmkit.data.table import open_table
from llmkit.model.tokenizer import Tokenizer

GOOD = [json.dumps(r).encode() for r in good_rows()]


def quarantine(data):
    return [(r["line"], r["reason"]) for r in read_jsonl(data / "quarantine.jsonl")]


def test_malformed_json_line_is_quarantined_with_its_number(make):
    data = make(b"\n".join([*GOOD[:2], b'{"prompt": ', *GOOD[2:]]))
    [(line, reason)] = quarantine(data)
    assert line == 3 and reason.startswith("not valid JSON")
    assert read_json(data / "profile.json")["rows"] == {"in": 41, "out": 40, "quarantined": 1, "duplicates": 0}


@pytest.mark.parametrize(
    "row, says",
    [
        (b"[1, 2]", "must be an object"),
        (b'{"prompt": "a"}', "has neither messages nor a completion"),
        (b'{"prompt": "", "completion": "b"}', "prompt: is empty"),
        (b'{"prompt": NaN, "completion": "b"}', "NaN is no JSON number"),
        (b'{"prompt": "a", "prompt": "b", "completion": "c"}', "the key 'prompt' occurs twice"),
        (b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "the key 'content' occurs twice"),
        (b'{"prompt": 3, "completion": "b"}', "prompt: must be a text, not a int"),
        (b'{"prompt": "\\ud800", "completion": "b"}', "lone surrogate"),
        (b'{"prompt": "a", "completion": "b", "split": "dev"}', "unknown split"),
        (b'{"messages": "hi"}', "must be a list of {role, content}"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "must end with the assistant's answer"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Let me look", "tool_calls": [{"id": "1"}]}]}', "messages[1]: calls a tool"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_record(make, row, says):
    [(line, reason)] = quarantine(make(b"\n".join([row, *GOOD])))
    assert line == 1 and says in reason


def test_latin1_line_among_utf8_is_quarantined_alone(make):
    bad = '{"prompt": "Warum die Gebühr?", "completion": "x"}'.encode("latin-1")
    [(line, reason)] = quarantine(make(b"\n".join([*GOOD, bad])))
    assert line == 41 and "prompt: is not UTF-8: byte 0xfc" in reason and "`encoding`" in reason


def test_latin1_file_is_read_when_its_encoding_is_named(make):
    bad = '{"prompt": "Warum die Gebühr?", "completion": "x", "label": "x"}'.encode("latin-1")
    data = make(b"\n".join([*GOOD, bad]), encoding="latin-1")
    said = [
        m["content"]
        for s in ("train", "validation", "test")
        for r in read_jsonl(data / f"{s}.jsonl")
        for m in r["messages"]
    ]
    assert "Warum die Gebühr?" in said and quarantine(data) == []


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_empty_file(make, kind):
    with pytest.raises(KitError, match=rf"rows\.{kind}: the file is empty"):
        make(b"", kind)


@pytest.mark.parametrize("splits", [("train", "test"), ()])
def test_dataset_folder_without_rows(make, tmp_path, splits):
    datasets = pytest.importorskip("datasets")
    full, empty = (datasets.Dataset.from_dict({"prompt": x, "completion": x}) for x in (["a"], []))
    data = datasets.DatasetDict(dict(zip(splits, (full, empty), strict=True))) if splits else empty
    data.save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(KitError, match="rows/test: a dataset without rows" if splits else "rows: a dataset without"):
        make(tmp_path / "rows", "hf")


def test_a_dataset_folder_without_a_split(make, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(good_rows())
    parts = {"train": rows.select(range(30)), "test": rows.select(range(30, 40))}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(KitError, match=r"none in validation.*prepare\.splits: \{train: null\}"):
        make(tmp_path / "rows", "hf")
    data = make(tmp_path / "rows", "hf", splits={"train": None})
    assert [*read_json(data / "profile.json")["splits"]] == ["test", "train", "validation"]


def test_no_row_is_left(make):
    with pytest.raises(KitError, match=r"1 of 1 rows .*none is left .*rows\.jsonl: line 1: .*neither messages nor"):
        make([{"prompt": "a"}], max_quarantine_share=1.0)


def test_a_link_that_leads_nowhere(make, tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/a.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(KitError, match=r"a\.jsonl: the link leads nowhere \(got 'gone.jsonl'\)\. Fetch"):
        make(tmp_path / "rows")


@pytest.mark.parametrize("name", ["b.jsonl.gz", "sub/b.JSONL.zst", "linked"])
def test_a_folder_of_which_a_part_would_not_be_read(make, tmp_path, name):
    (tmp_path / "rows/sub").mkdir(parents=True)
    (tmp_path / "rows/a.jsonl").write_bytes(b"\n".join(GOOD))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/c.jsonl").write_bytes(b"\n".join(GOOD))
    if name == "linked":
        (tmp_path / "rows/linked").symlink_to(tmp_path / "elsewhere")
    else:
        (tmp_path / "rows" / name).write_bytes(gzip.compress(b"\n".join(GOOD)))
    with pytest.raises(KitError, match=f"{name}: is (packed|a link to a folder)"):
        make(tmp_path / "rows")
    (tmp_path / "elsewhere/c.jsonl").rename(
        tmp_path / "elsewhere/readme.txt"
    )  # what is not of the source may be linked
    if name == "linked":
        make(tmp_path / "rows")


@pytest.mark.parametrize(
    "wrote, named",
    [("utf-8-sig", "cp1252"), ("utf-8-sig", "latin-1"), ("utf-16", "utf-16-le"), ("utf-32", "utf-32-le")],
)
def test_a_mark_is_no_part_of_the_first_column(make, wrote, named):
    "The first column is one that a record need not have: lost, it would be missed by nobody."
    rows = "".join(f"{'test' if i < 9 else ''},{r['prompt']},{r['label']}\n" for i, r in enumerate(good_rows()))
    content = f"split,prompt,completion\n{rows}".encode(wrote)
    if wrote == "utf-8-sig":
        with pytest.raises(KitError, match="begins with the mark of UTF-8 .*Set `encoding: utf-8`"):
            make(content, "csv", Shape(), encoding=named)
    else:
        data = make(content, "csv", Shape(), encoding=named, shares={"train": 0.8, "validation": 0.2})
        assert len([*read_jsonl(data / "test.jsonl")]) == 9


def test_file_without_rows(make):
    with pytest.raises(KitError, match="the source has no rows"):
        make(b"\n \n")


@pytest.mark.parametrize("kind, shape", [("jsonl", Shape()), ("csv", TABLE)])
@pytest.mark.parametrize(
    "wrote, named, says",
    [
        ("utf-16", "utf-8", r"rows.\w+: encoding: is UTF-16 \(got 'utf-8'\). Set `encoding: utf-16`"),
        ("utf-16-le", "utf-8", "Set `encoding: utf-16-le`"),
        ("utf-16-be", "UTF8", "Set `encoding: utf-16-be`"),
        ("utf-32", "utf-8", "is UTF-32.*Set `encoding: utf-32`"),
        ("utf-8", "utf-16", "encoding: is not utf-16: .*BOM.*Name the encoding"),
        ("utf-8", "utf-32", "encoding: is not utf-32"),
        ("utf-8", "utf-9", "unknown encoding .got 'utf-9'.*utf-16, latin-1"),
        ("utf-16", "utf-16", None),
        ("utf-32", "utf-32", None),
    ],
)
def test_wide_files_and_wrong_names(make, tmp_path, kind, shape, wrote, named, says):
    lines = [json.dumps(r) for r in good_rows()]
    if kind == "csv":
        lines = ["text,category", *(f"{r['prompt']},{r['label']}" for r in good_rows())]
    content = ("\n".join(lines) + "\n").encode(wrote)
    if says is None:
        assert read_json(make(content, kind, shape, encoding=named) / "profile.json")["rows"]["out"] == 40
        with pytest.raises(KitError, match="is not utf-.*cut short"):
            make(content[:-1], kind, shape, encoding=named)
        return
    with pytest.raises(KitError, match=says):
        make(content, kind, shape, encoding=named)
    assert not (tmp_path / "out/dataset").exists()


def test_missing_file_and_unknown_source(make, tmp_path):
    with pytest.raises(KitError, match="no such file or folder"):
        make(tmp_path / "absent.jsonl")
    with pytest.raises(KitError, match="Did you mean 'jsonl'"):
        make(b"x", "jsonll")


def test_one_class_fails(make):
    with pytest.raises(KitError, match="more than one label.*found 1.*learns nothing"):
        make([{**r, "label": "block"} for r in good_rows()])


def test_prompt_longer_than_the_context_is_quarantined_or_kept_and_counted(make):
    long = [{"prompt": "word " * 300, "completion": "block", "label": "block"}, *good_rows()]
    [(line, reason)] = quarantine(make(long, context=64))
    assert line == 1 and "is longer than the context (got 301)" in reason and "64 tokens" in reason
    kept = make(long, context=64, too_long="keep")
    assert read_json(kept / "profile.json")["over_context"] == 1


def test_missing_column_names_file_column_and_known_ones(make):
    with pytest.raises(KitError, match=r"rows\.csv: line 1: no such column \(got 'category'\).*Known: intent, text"):
        make(b"text,intent\na,b\n", "csv", TABLE)


def test_a_header_in_another_encoding(make):
    with pytest.raises(KitError, match="line 1: the name of a column is not UTF-8.*`encoding`"):
        make("täxt,category\na,b\n".encode("latin-1"), "csv", TABLE)


def test_header_twice_and_no_header(make):
    with pytest.raises(KitError, match="a column occurs twice"):
        make(b"text,text\na,b\n", "csv", TABLE)
    with pytest.raises(KitError, match="no header"):
        make(b"\n\n", "csv", TABLE)


def test_duplicate_ids_are_quarantined_but_a_repeated_row_is_a_duplicate(make):
    rows = [{**r, "id": str(i)} for i, r in enumerate(good_rows())]
    rows += [{**rows[5]}, {"id": "7", "prompt": "Quite another question", "completion": "find", "label": "find"}]
    data = make(rows)
    [(line, reason)] = quarantine(data)
    assert line == 42 and "id: the same id as rows.jsonl: line 8" in reason
    assert [r["kind"] for r in read_jsonl(data / "duplicates.jsonl")] == ["exact"]


@pytest.mark.parametrize("heir", ["9", "7"])
def test_a_repeated_row_comes_back_when_the_row_it_repeats_has_a_taken_id(make, heir):
    other = {"prompt": "Quite another question", "completion": "find", "label": "find"}
    rows = [{**r, "id": f"r{i}"} for i, r in enumerate(good_rows())]
    rows += [{"id": "7", "prompt": "The first of two", "completion": "find", "label": "find"}]
    rows += [{**other, "id": "7"}, {**other, "id": heir}, {**other, "id": "8"}, {**other, "id": "10"}]
    data = make(rows)
    lines = [line for line, _ in quarantine(data)]
    left = [
        r["id"]
        for s in ("train", "validation", "test")
        for r in read_jsonl(data / f"{s}.jsonl")
        if "another" in r["messages"][0]["content"]
    ]
    assert (lines, left) == (([42], ["9"]) if heir == "9" else ([42, 43], ["8"]))
    assert {r["of"]["id"] for r in read_jsonl(data / "duplicates.jsonl")} == set(left)


def test_bom_crlf_and_quoted_newlines(make):
    rows = "".join(f'"{r["prompt"]}\r\nPlease ""help""",{r["label"]}\r\n' for r in good_rows())
    data = make(b"\xef\xbb\xbf" + f"text,category\r\n{rows}".encode(), "csv", TABLE)
    got = [r for s in ("train", "validation", "test") for r in read_jsonl(data / f"{s}.jsonl")]
    assert len(got) == 40 and quarantine(data) == []
    assert all(r["messages"][0]["content"].endswith('\r\nPlease "help"') for r in got)
    assert {r["id"] for r in got} >= {"rows-2", "rows-4"}  # each row takes two lines


def test_ragged_and_unclosed_csv_rows(make):
    rows = "".join(f"{r['prompt']},{r['label']}\n" for r in good_rows())
    data = make(f'text,category\nHi, there,find\n{rows}"never closed,x\n'.encode(), "csv", TABLE)
    assert [(n, r.split(":")[0]) for n, r in quarantine(data)] == [
        (2, "has 3 fields, the header 2. Quote a cell that holds the separator"),
        (43, "not valid CSV"),
    ]


def test_an_unclosed_quote_loses_no_row_from_the_count(make):
    rows = [f"Question {i} of the customer,c{i % 4}\n" for i in range(400)]
    rows[200] = '"' + rows[200]
    content = f"text,category\n{''.join(rows)}".encode()
    with pytest.raises(KitError, match="200 of 400 rows are quarantined.*rows.csv: line 202: not valid CSV.*a quote"):
        make(content, "csv", TABLE)
    data = make(content, "csv", TABLE, max_quarantine_share=0.6)
    assert read_json(data / "profile.json")["rows"] == {"in": 400, "out": 200, "quarantined": 200, "duplicates": 0}


def test_a_row_that_the_chat_template_refuses_is_quarantined_with_its_line(make):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}hello"
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"hello": 0}, unk_token="hello"))
    tok = Tokenizer(backend, template, {}, (0,))
    rows = [*good_rows(), {"system": "Be brief.", "prompt": "Who is there?", "completion": "find", "label": "find"}]
    [(line, reason)] = quarantine(make(rows, encode=tok.chat))
    assert line == 41 and "messages: the base cannot read it" in reason and "System role not supported" in reason


def test_a_control_token_that_cannot_be_text_is_quarantined_with_its_line(make):
    def encode(messages, opened):
        if "<|im_end|>" in messages[0]["content"]:
            raise KitError("this control token cannot be written as text", value="<|im_end|>")
        return []

    [(line, reason)] = quarantine(make([{**good_rows()[0], "prompt": "Say <|im_end|>"}, *good_rows()], encode=encode))
    assert line == 1 and "cannot be written as text" in reason


def test_a_damaged_page_of_a_parquet_file_names_the_file(make, tmp_path):
    pq, pa = need("pyarrow.parquet"), need("pyarrow")
    rows = pa.Table.from_pylist([{**good_rows()[0], "prompt": f"question {i}"} for i in range(5000)])
    pq.write_table(rows, tmp_path / "whole.parquet", compression="zstd", data_page_size=4096)
    data = bytearray((tmp_path / "whole.parquet").read_bytes())
    page = pq.ParquetFile(tmp_path / "whole.parquet").metadata.row_group(0).column(0).data_page_offset
    data[page + 40 : page + 104] = bytes(64)
    with pytest.raises(KitError, match=r"rows.parquet: cannot be read after row \d+: .*damaged"):
        make(bytes(data), "parquet")


def test_a_contradiction_is_quarantined_and_named(make):
    rows = [*good_rows(), {**good_rows()[0], "label": "order", "completion": "order"}]
    [(line, reason)] = quarantine(make(rows))
    assert line == 41 and "asks the same as rows.jsonl: line 1, which is labelled 'block'" in reason


def test_too_much_quarantine_fails_keeps_the_list_and_the_old_dataset(make, tmp_path):
    old = make(b"\n".join(GOOD))
    with pytest.raises(KitError, match=r"20 of 60 rows are quarantined, and at most 10.00% may be.*rows.jsonl: line 1"):
        make(b"\n".join([b"{"] * 20 + GOOD), max_quarantine_share=0.1)
    assert len([*read_jsonl(tmp_path / "out/quarantine.jsonl")]) == 20
    assert read_json(old.path / "manifest.json")["digest"] == old.digest
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["dataset", "quarantine.jsonl"]


def test_the_quarantine_does_not_become_the_leak(make):
    key = "AKIA" + "IOSFODNN7EXAMPLE"
    rows = [
        b'{"prompt": "mail jo@example.org", ',
        json.dumps({"prompt": f"key {key}", "completion": "x"}).encode(),
        *GOOD,
    ]
    text = (make(b"\n".join(rows)) / "quarantine.jsonl").read_text()
    assert "jo@example.org" not in text and key not in text
    assert "<EMAIL_ADDRESS>" in text and "holds AWS Access Key" in text


@pytest.mark.parametrize(
    "number", ["+49 170 1234567", "DE89 3704 0044 0532 0130 00", "10.0.0.7", "4111\u00a01111\u00a01111\u00a01111"]
)
@pytest.mark.parametrize("before", ["Reach me:\n", "Reach me:\t", "Reach me: "])
def test_the_quarantine_masks_what_stands_behind_an_escape(make, number, before):
    "JSON writes a line's end as backslash and n, which was taken for a letter that the number continues."
    said = f"{before}{number}"
    rows = [
        json.dumps({"prompt": said, "completion": ""}).encode(),
        json.dumps({"prompt": said}).encode()[:-1] + b", ",  # no JSON
        json.dumps({"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": "x"}]}).encode(),
        *GOOD,
    ]
    text = (make(b"\n".join(rows), pii="quarantine") / "quarantine.jsonl").read_text()
    assert (
        len(text.splitlines()) == 3 and number[-4:] not in text and number.split()[0].split("\u00a0")[0] not in text
    ), text


def test_policies(make):
    rows = [*good_rows(), {"prompt": "I am jo@example.org", "completion": "find", "label": "find"}]
    assert read_json(make(rows, pii="flag") / "profile.json")["found"] == {"EMAIL_ADDRESS": 1}
    assert len(quarantine(make(rows, pii="quarantine"))) == 1
    with pytest.raises(KitError, match="pii: unknown policy .got 'ignore'"):
        make(rows, pii="ignore")


@pytest.mark.parametrize(
    "shares, says",
    [({"train": 0.5}, "add up to 1"), ({"train": 1.5, "test": -0.5}, "negative"), ({"dev": 1}, "no such split")],
)
def test_shares(shares, says):
    with pytest.raises(KitError, match=says):
        Rules(shares)


def test_full_disk(tmp_path):
    "SQLite's own limit stands in for the disk's."
    with pytest.raises(KitError, match="database or disk is full.*Free some space"):
        with open_table(tmp_path) as (table, _):
            table.db.execute("PRAGMA max_page_count = 20")
            for _ in range(1000):
                table.db.execute("INSERT INTO rows (body) VALUES (?)", ("x" * 1000,))
    assert [*tmp_path.iterdir()] == []


def test_a_folder_that_is_no_dataset(make, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(KitError, match="not a dataset folder"):
        make(tmp_path / "empty", "hf")
    with pytest.raises(KitError, match="it has no _delta_log"):
        make(tmp_path / "empty", "delta")
    (tmp_path / "broken/_delta_log").mkdir(parents=True)
    (tmp_path / "broken/_delta_log/00000000000000000000.json").write_text("{}")
    with pytest.raises(KitError, match="cannot read the Delta table"):
        make(tmp_path / "broken", "delta")
    with pytest.raises(KitError, match="not a Parquet file"):
        make(b"PAR1 and then nothing", "parquet")


def test_what_is_no_file_is_refused_before_it_is_opened(make, tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "folder/a.jsonl").mkdir(parents=True)
    for path, says in {
        tmp_path / "pipe.jsonl": r"pipe.jsonl: is a pipe or a device, and no file\. Name a file",
        "/dev/zero": "/dev/zero: is a pipe or a device, and no file",
        tmp_path / "loop.jsonl": "loop.jsonl: no such file or folder",
        tmp_path / "folder": "folder/a.jsonl: is a folder, and no file",
    }.items():
        with pytest.raises(KitError, match=says):
            make(Path(path))
    assert not [*(tmp_path / "out").iterdir()]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize(
    "data, says", [(gzip.compress(b"\n".join(GOOD)), "is packed with gzip. Unpack it"), (b"PK\x03\x04" + bytes(99), "is packed with zip")]
)  # fmt: skip
def test_a_packed_file_under_the_name_of_text(make, kind, data, says):
    with pytest.raises(KitError, match=rf"rows.{kind}: {says}"):
        make(data, kind, TABLE if kind == "csv" else Shape())


def test_an_encrypted_parquet_file(make, tmp_path):
    import base64

    pq, pa, pe = need("pyarrow.parquet"), need("pyarrow"), need("pyarrow.parquet.encryption")

    class Plain(pe.KmsClient):
        "A key service that hides nothing."

        def __init__(self, _):
            pe.KmsClient.__init__(self)

        def wrap_key(self, key, _):
            return base64.b64encode(key)

    factory, table = pe.CryptoFactory(Plain), pa.Table.from_pylist(good_rows())
    for plain in (True, False):  # whether the footer can be read
        how = pe.EncryptionConfiguration(footer_key="k", column_keys={"c": ["prompt"]}, plaintext_footer=plain)
        keys = factory.file_encryption_properties(pe.KmsConnectionConfig(), how)
        with pq.ParquetWriter(tmp_path / "x.parquet", table.schema, encryption_properties=keys) as out:
            out.write_table(table)
        with pytest.raises(KitError, match=r"rows.parquet: .*Write it anew without encryption"):
            make((tmp_path / "x.parquet").read_bytes(), "parquet")


def test_parquet_columns_of_other_kinds(make, tmp_path):
    from decimal import Decimal

    pq, pa = need("pyarrow.parquet"), need("pyarrow")
    rows = pa.Table.from_pylist(good_rows())
    labels = rows["label"].combine_chunks().dictionary_encode()
    more = rows.set_column(2, "label", labels).append_column("x", pa.array([{"a": [1]}] * 40))
    pq.write_table(more, tmp_path / "x.parquet")
    assert read_json(make((tmp_path / "x.parquet").read_bytes(), "parquet") / "profile.json")["rows"]["out"] == 40
    pq.write_table(rows.set_column(2, "label", pa.array([Decimal(i) for i in range(40)])), tmp_path / "x.parquet")
    with pytest.raises(KitError, match="rows.parquet: line 1: label: must be a text, not a Decimal"):
        make((tmp_path / "x.parquet").read_bytes(), "parquet")


def test_ten_million_characters_in_a_cell_are_quarantined_as_too_long(make):
    rows = "".join(f"{r['prompt']},{r['label']}\n" for r in good_rows())
    [(line, reason)] = quarantine(make(f'text,category\n"{"word " * 2_000_000}",block\n{rows}'.encode(), "csv", TABLE, context=64))  # fmt: skip
    assert line == 2 and "is longer than the context" in reason


def test_a_label_with_space_around_it_is_the_same_label(make):
    "An answer never names `block `, so every such row would count as wrong."
    rows = [{**r, "label": r["label"] + " " * (i % 2), "group": f"g{i % 3}\n"} for i, r in enumerate(good_rows())]
    made = read_json(make(rows) / "profile.json")
    assert [*made["labels"]] == ["block", "change", "find", "order"] and [*made["groups"]] == ["g0", "g1", "g2"]


@pytest.mark.parametrize("value, kind", [(2**50, "timestamp[s]"), (-(2**50), "timestamp[s]"), (2**60, "duration[s]")])
def test_a_time_that_python_does_not_have_names_file_and_row(make, tmp_path, value, kind):
    pq, pa = need("pyarrow.parquet"), need("pyarrow")
    types = {"timestamp[s]": pa.timestamp("s"), "duration[s]": pa.duration("s")}
    pq.write_table(
        pa.Table.from_pylist(good_rows()).append_column("x", pa.array([0] * 39 + [value], types[kind])),
        tmp_path / "x.parquet",
    )
    with pytest.raises(KitError, match=r"rows.parquet: cannot be read after row \d+"):
        make((tmp_path / "x.parquet").read_bytes(), "parquet")


def test_pictures_of_a_dataset_folder_are_not_looked_at(make, tmp_path):
    datasets, n = need("datasets"), len(good_rows())
    kinds = {c: datasets.Value("string") for c in good_rows()[0]} | {"scan": datasets.Image()}
    rows = [{**r, "scan": {"bytes": b"no picture", "path": None}} for r in good_rows()]
    made = datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
    made.with_format("numpy", columns=["prompt"]).save_to_disk(tmp_path / "scans")
    assert read_json(make(tmp_path / "scans", "hf") / "profile.json")["rows"]["out"] == n
    (shard,) = (tmp_path / "scans").glob("*.arrow")
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(KitError, match=r"scans: (cannot be read after row \d+|not a dataset folder)"):
        make(tmp_path / "scans", "hf")


def test_two_files_with_the_same_ids_are_told_apart(make, tmp_path):
    (tmp_path / "rows").mkdir()
    for name, part in (("a", good_rows()[:35]), ("b", good_rows()[35:])):
        lines = [json.dumps({**r, "id": str(i)}) for i, r in enumerate(part)]
        (tmp_path / f"rows/{name}.jsonl").write_text("\n".join(lines))
    found = quarantine(make(tmp_path / "rows"))
    assert len(found) == 5 and "id: the same id as a.jsonl: line 1. Make the ids unique" in found[0][1]


def test_data_diff_tells_a_renamed_record_from_one_that_is_new(make, tmp_path, capsys):
    from llmkit.cli import main

    rows = [{**r, "id": f"q{i}"} for i, r in enumerate(good_rows())]
    shutil.copytree(make(rows).path, tmp_path / "before")
    old = [*read_jsonl(tmp_path / "before/train.jsonl")]
    named = {old[0]["id"]: "new-name"}
    make(
        [
            {**r, "id": named.get(r["id"], r["id"]), "split": where}
            for r, where in with_splits(rows, tmp_path / "before")
        ]
    )
    assert main(["data", "diff", str(tmp_path / "before"), str(tmp_path / "out/dataset"), "--as-json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["counts"] == {"added": 0, "removed": 0, "renamed": 1, "edited": 0, "moved": 0, "same": 39}
    assert said["examples"]["renamed"] == ["new-name"]


def with_splits(rows, dataset):
    "Rows with the split that each has in a dataset."
    where = {r["id"]: s for s in ("train", "validation", "test") for r in read_jsonl(dataset / f"{s}.jsonl")}
    return [(r, where[r["id"]]) for r in rows]


CHAT = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Where is my card?"}, {"from": "gpt", "value": "On its way."}]  # fmt: skip


def test_a_chat_as_sharegpt_writes_it_is_read_and_an_unknown_speaker_is_named(make):
    rows = [{"conversations": [*CHAT[:1], {"from": "human", "value": f"Question {i}?"}, CHAT[2]]} for i in range(30)]
    rows += [{"conversations": [*CHAT, {"from": "observation", "value": "sunny"}]}]
    data = make(rows, shape=Shape({"messages": "conversations"}))
    said = next(read_jsonl(data / "train.jsonl"))["messages"]
    assert [m["role"] for m in said] == ["system", "user", "assistant"] and said[0]["content"] == "Be brief."
    [bad] = read_jsonl(data / "quarantine.jsonl")
    assert "messages[3].role: unknown role (got 'observation')" in bad["reason"]


def test_an_answer_of_no_weight_is_not_learnt(make):
    rows = good_rows() + [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": w}], "label": "x"} for w in (0, 1)]  # fmt: skip
    [bad] = read_jsonl(make(rows) / "quarantine.jsonl")
    assert "messages[-1].weight: nothing is to be learnt from the last answer (got 0)" in bad["reason"]


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_is_told_from_json_lines(make, indent):
    with pytest.raises(KitError, match="rows.jsonl: is one JSON array, and not JSON Lines.*jq"):
        make(json.dumps(good_rows(), indent=indent).encode())


@pytest.mark.parametrize("between", [";", "\t"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_table_says_in_its_header_what_stands_between_cells(make, between, ends):
    lines = [between.join(("text", "category"))]
    lines += [between.join((f'"{r["prompt"]}, or{between}{ends}so"', r["label"])) for r in good_rows()]
    data = make(("\ufeff" + ends.join(lines) + ends).encode(), "csv", TABLE)
    assert read_json(data / "profile.json")["rows"]["out"] == 40
    assert f", or{between}{ends}so" in next(read_jsonl(data / "train.jsonl"))["messages"][0]["content"]


def test_latin1_is_what_windows_writes(make):
    text = "“Where” is my 5 € refund – please?"
    lines = [f"{text} {i},{r['label']}" for i, r in enumerate(good_rows())]
    data = make("\n".join(["text,category", *lines]).encode("cp1252"), "csv", TABLE, encoding="latin-1")
    assert next(read_jsonl(data / "train.jsonl"))["messages"][0]["content"].startswith(text)


@pytest.mark.parametrize("names", [("train.jsonl", "test.jsonl"), ("data/train-00000-of-1.jsonl", "data/validation-00000-of-1.jsonl"), ("split=train/0.jsonl", "split=test/0.jsonl")])  # fmt: skip
def test_files_named_after_splits_are_not_divided_anew(make, tmp_path, names):
    "Somebody's test in the training would be found by nobody."
    rows = [json.dumps(r) for r in good_rows()]
    for name, part in zip(names, (rows[:30], rows[30:]), strict=True):
        (tmp_path / "rows" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "rows" / name).write_text("\n".join(part))
    with pytest.raises(KitError, match=r"rows: splits: the files are called after splits.*splits: \{test.csv: test\}"):
        make(tmp_path / "rows")
    data = make(tmp_path / "rows", splits={names[1]: "test"})
    assert read_json(data / "profile.json")["splits"]["test"] >= 10
    make(tmp_path / "rows", splits={names[1]: None})
