"Readers of files held against damage: a value, or an error of the kit that names the file; never a bare one."

import json
import os
import shutil

import pytest
from data_rows import good_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkit.core.errors import KitError
from llmkit.core.plugins import need
from llmkit.data.records import RowError, normalise
from llmkit.data.sources import Source
from llmkit.model.tiny import train_tokenizer
from llmkit.model.tokenizer import Tokenizer

QUICK = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@st.composite
def damage(draw):
    "A change of some bytes: cut, flipped, doubled, or another thing put in."
    at, how = draw(st.floats(0, 1)), draw(st.sampled_from(["cut", "flip", "double", "put"]))
    what = draw(
        st.sampled_from([b"\x00", b"\xff", b"{", b'"', b"\n", b"NaN", b"9" * 5000, b"\xed\xa0\x80", b"\xef\xbb\xbf"])
    )

    def change(data: bytes) -> bytes:
        i = min(int(at * len(data)), len(data) - 1)
        return {
            "cut": data[:i], "double": data[:i] + data[i // 2 :], "put": data[:i] + what + data[i:],
            "flip": data[:i] + bytes([data[i] ^ 1 << len(what) % 8]) + data[i + 1 :],
        }[how]  # fmt: skip

    return change


def table(path):
    pa, pq = need("pyarrow"), need("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist([{"prompt": f"question {i}", "completion": "a"} for i in range(50)]), path)


def dataset(path):
    need("datasets").Dataset.from_list([{"prompt": f"question {i}", "completion": "a"} for i in range(5)]).save_to_disk(
        path
    )


KINDS = {
    "jsonl": lambda path: path.write_text("".join(json.dumps(r) + "\n" for r in good_rows()[:9])),
    "csv": lambda path: path.write_text("prompt,completion\n" + "where is it?,card\n" * 9),
    "parquet": table,
}


def rows(kind, path):
    "How many records, and how many rows that are none."
    good = bad = 0
    for row in Source(kind, str(path)).rows():
        try:
            normalise(row.value) if row.error is None else None
            good, bad = good + (row.error is None), bad + (row.error is not None)
        except RowError:
            bad += 1
    return good, bad


def refuses_cleanly(read, file):
    "Read what may be damaged: a `KitError` names a file."
    try:
        read()
    except KitError as e:
        assert e.file is not None, e
        return e
    return None


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(change=damage())
def test_a_damaged_source_has_rows_or_a_reason(tmp_path_factory, kind, change):
    path = tmp_path_factory.mktemp("rows") / f"rows.{kind}"
    KINDS[kind](path)
    path.write_bytes(change(path.read_bytes()))
    refuses_cleanly(lambda: rows(kind, path), path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A dataset as Hugging Face saves it, and a tokenizer's folder."
    home = tmp_path_factory.mktemp("saved")
    dataset(home / "hf")
    train_tokenizer(home, [f"the card of customer {i}" for i in range(99)], 300)
    return home


@pytest.mark.parametrize(
    "name, key", [("state.json", "_split"), ("state.json", "_data_files"), ("dataset_info.json", "features")]
)
@QUICK
@given(value=JSON)
def test_a_dataset_folder_with_another_value_in_it(tmp_path_factory, saved, name, key, value):
    copy = tmp_path_factory.mktemp("hf") / "hf"
    shutil.copytree(saved / "hf", copy)
    (copy / name).write_text(json.dumps(json.loads((copy / name).read_text()) | {key: value}))
    refuses_cleanly(lambda: rows("hf", copy), copy)


@pytest.mark.parametrize(
    "name, key",
    [
        ("generation_config.json", "eos_token_id"),
        ("tokenizer_config.json", "chat_template"),
        ("tokenizer_config.json", "eos_token"),
    ],
)
@QUICK
@given(value=JSON)
def test_a_tokenizer_with_another_value_beside_it(tmp_path_factory, saved, name, key, value):
    copy = tmp_path_factory.mktemp("tok") / "tok"
    shutil.copytree(saved, copy, ignore=shutil.ignore_patterns("hf", "chat_template.jinja"))
    there = json.loads((copy / name).read_text()) if (copy / name).exists() else {}
    (copy / name).write_text(json.dumps(there | {key: value}))
    said = []
    refuses_cleanly(lambda: said.append(Tokenizer.load(copy)), copy)
    assert all(type(i) is int for tok in said for i in tok.eos_ids)


def test_a_template_that_is_no_utf8_is_named(tmp_path, saved):
    copy = shutil.copytree(saved, tmp_path / "tok", ignore=shutil.ignore_patterns("hf"))
    (copy / "chat_template.jinja").write_bytes(b"{{ messages }}\xe9")
    with pytest.raises(KitError, match="chat_template.jinja: is not UTF-8: byte 0xe9 at 14"):
        Tokenizer.load(copy)


def test_a_source_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    KINDS["jsonl"](path)
    monkeypatch.setattr(os, "access", lambda *a: False)  # root may read everything
    with pytest.raises(KitError, match="rows.jsonl: may not be read by this user. Give read permission"):
        rows("jsonl", path)
