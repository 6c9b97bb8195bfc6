"""What a dataset guarantees, against oracles that we did not write."""

import json
import random
import subprocess
import sys
from itertools import combinations

import pytest
from data_rows import SHARES, good_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.core.errors import KitError
from llmkit.core.files import read_json, read_jsonl, write_jsonl
from llmkit.data import bank
from llmkit.data.duplicates import drop_similar, jaccard, ngrams
from llmkit.data.prepare import Reader, Rules, fill_table, prepare, thin, write
from llmkit.data.records import SPLITS, Shape, folded, prompt_text
from llmkit.data.sources import Row, Source
from llmkit.data.split import assign
from llmkit.data.table import open_table

BANKING = Shape(columns={"label": "category"}, templates={"prompt": "{text}", "completion": "{category}"})


def all_rows(data, *splits):
    return [r for s in splits or SPLITS for r in read_jsonl(data / f"{s}.jsonl")]


# -- the account ---------------------------------------------------------------------------------------------------

junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=3), max_leaves=4
)
lines = st.one_of(
    st.text(alphabet='{}[]",:ab\\ é', max_size=20).map(lambda t: t.encode("latin-1")),
    st.fixed_dictionaries(
        {"prompt": st.sampled_from(["a b", "A  b!", "c", ""]) | junk, "completion": st.sampled_from(["x", "y"]) | junk},
        optional={
            "label": st.sampled_from(["x", "y"]),
            "split": st.sampled_from([*SPLITS, "dev"]),
            "id": st.sampled_from("12"),
        },
    ).map(lambda r: json.dumps(r).encode()),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(lines, min_size=1, max_size=12), st.sampled_from(["\n", "\r\n"]))
def test_rows_in_are_rows_out_quarantined_or_duplicates(tmp_path_factory, content, end):
    folder = tmp_path_factory.mktemp("any")
    (folder / "x.jsonl").write_bytes(b"".join(c.replace(b"\n", b" ") + end.encode() for c in content))
    rules = Rules(SHARES, near_duplicates=0.8, max_quarantine_share=1.0)
    with open_table(folder) as (table, tmp):
        try:
            n = fill_table(table, Source("jsonl", str(folder / "x.jsonl")), rules, Reader())
        except KitError as e:
            array = "one JSON array" in str(e) and content[0].lstrip().startswith(b"[")  # of no rows of ours
            assert array or "no rows" in str(e)  # nothing but blank lines
            return
        thin(table, tmp, rules)
        assign(table, rules.shares, 0)
        write(table, folder, n)  # raises when a row is lost
        count = sum(len([*read_jsonl(folder / f"{f}.jsonl")]) for f in (*SPLITS, "quarantine", "duplicates"))
        assert count == n == sum(1 for c in content if c.strip())


def test_two_runs_give_identical_bytes_and_leave_nothing_behind(tmp_path):
    made = [prepare(Source("bank", n=400, seed=5), tmp_path / f"{i}/dataset", Rules(SHARES, seed=5)) for i in range(2)]
    assert made[0].digest == made[1].digest and dict(made[0].files) == dict(made[1].files)
    assert [p.name for p in (tmp_path / "0").iterdir()] == ["dataset"]


# -- duplicates and leaks ------------------------------------------------------------------------------------------


def test_near_duplicates_against_all_pairs(tmp_path):
    "The true pairs come from comparing everything with everything."
    texts, rng = [r["messages"][1]["content"] for r in bank.records(3, 250)], random.Random(0)
    for text in texts[:250]:  # a word left out, a word added, a letter changed
        words, i = text.split(), rng.randrange(len(text))
        texts += [" ".join(words[1:]), f"{text} {rng.choice(['please', 'ok', 'today'])}", f"{text[:i]}x{text[i + 1 :]}"]
    records = [{"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": "same"}]} for t in texts]
    with open_table(tmp_path) as (table, tmp):
        for i, r in enumerate(records, 1):
            table.keep(Row("made", i, None), r)
        drop_similar(table, tmp, 0.8)
        kept = {s for (s,) in table.all("SELECT seq FROM rows WHERE state = 'kept'")}
        twins = [*table.all("SELECT seq, twin FROM rows WHERE state = 'duplicate'")]
    sets = {i: ngrams(folded(prompt_text(r["messages"]))) for i, r in enumerate(records, 1)}
    assert all(jaccard(sets[a], sets[b]) >= 0.8 for a, b in twins)
    assert {b for _, b in twins} <= kept, "a row is named that went itself"
    true = [(a, b) for a, b in combinations(sets, 2) if jaccard(sets[a], sets[b]) >= 0.8]
    missed = [(a, b) for a, b in true if a in kept and b in kept]
    assert len(true) > 300 and len(missed) <= 0.05 * len(true), (len(missed), len(true))


@pytest.mark.parametrize(
    "one, other",
    [
        ("मेरा दिन कैसा है", "मेरा दान कैसा है"),
        ("ไม่ ไป", "ไม้ ไป"),
        ("👍", "👎"),
        ("The meal was 👍", "The meal was 👎"),
        ("...", "?"),
        ("What is 2 + 2?", "What is 2 - 2?"),
        ("Is x < y?", "Is x > y?"),
    ],
)
def test_questions_that_differ_in_vowel_signs_or_pictures_are_two(make, one, other):
    rows = [*good_rows(), *({"prompt": q, "completion": "find", "label": "find"} for q in (one, other))]
    data = make(rows)
    assert [*read_jsonl(data / "duplicates.jsonl")] == [*read_jsonl(data / "quarantine.jsonl")] == []


def test_leaks_into_a_given_test_leave_the_training_and_the_test_stays_whole(tmp_path):
    tested = [{**r, "split": "test", "id": f"t{i}"} for i, r in enumerate(good_rows()[:8])]
    leaks = [
        {**tested[0], "split": "train", "id": "exact"},
        {**tested[1], "split": "train", "id": "folded", "prompt": tested[1]["prompt"].upper()},
        {**tested[2], "id": "near", "prompt": tested[2]["prompt"] + " please"},
    ]
    for leak in leaks[2:]:
        del leak["split"]
    rows = [*leaks, *good_rows()[8:], *tested, {**tested[0], "id": "again"}]
    write_jsonl(tmp_path / "x.jsonl", rows)
    shares = {"train": 0.8, "validation": 0.2}
    data = prepare(
        Source("jsonl", str(tmp_path / "x.jsonl")), tmp_path / "out/dataset", Rules(shares, near_duplicates=0.8, seed=1)
    )
    assert {r["id"] for r in all_rows(data, "test")} == {f"t{i}" for i in range(8)} | {"again"}
    kinds = {r["record"]["id"]: (r["kind"], r["of"]["id"]) for r in read_jsonl(data / "duplicates.jsonl")}
    assert kinds == {"exact": ("exact leak", "t0"), "folded": ("normalised leak", "t1"), "near": ("near leak", "t2")}


def test_clusters_and_questions_never_straddle_splits(tmp_path):
    data = prepare(
        Source("bank", n=2000, seed=1), tmp_path / "d", Rules({"train": 0.7, "validation": 0.1, "test": 0.2}, seed=1)
    )
    homes: dict = {}
    for r in all_rows(data):
        homes.setdefault(r["cluster"], set()).add(r["split"])
        homes.setdefault(folded(r["messages"][1]["content"]), set()).add(r["split"])
    assert all(len(h) == 1 for h in homes.values())
    shares = {s: len(all_rows(data, s)) / len(all_rows(data)) for s in SPLITS}
    assert abs(shares["test"] - 0.2) < 0.04 and abs(shares["validation"] - 0.1) < 0.03


# -- the bundled task ----------------------------------------------------------------------------------------------


def test_the_bundled_task_is_neither_trivial_nor_hopeless(tmp_path):
    "A bag of words with logistic regression (scikit-learn), as on banking77."
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    data = prepare(
        Source("bank", n=4000, seed=42),
        tmp_path / "d",
        Rules({"train": 0.8, "validation": 0.05, "test": 0.15}, seed=42),
    )
    x, y = (
        {s: [f(r) for r in all_rows(data, s)] for s in SPLITS}
        for f in (lambda r: r["messages"][1]["content"], lambda r: r["label"])
    )
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=20, max_iter=300)
    )
    accuracy = model.fit(x["train"], y["train"]).score(x["test"], y["test"])
    assert 0.8 < accuracy < 0.96, accuracy


def test_answers_name_their_label_and_groups_phrase_differently():
    rows = [*bank.records(0, 2000)]
    assert all(r["messages"][-1]["content"].split(":")[0] == r["label"] for r in rows)
    words = {g: {w for r in rows if r["group"] == g for w in r["messages"][1]["content"].split()} for g in bank.GROUPS}
    assert "pls" in words["18-30"] - words["over_60"] and "grateful" in words["over_60"] - words["18-30"]
    assert all(len(r["messages"][1]["content"]) < 260 for r in rows)


# -- sources -------------------------------------------------------------------------------------------------------


def test_all_sources_give_the_same_records(tmp_path):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq
    from deltalake import write_deltalake

    table = {"text": [r["prompt"] for r in good_rows()], "category": [r["label"] for r in good_rows()]}
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    write_deltalake(tmp_path / "x.delta", pa.table(table))
    names = sorted(set(table["category"]))
    features = datasets.Features({"text": datasets.Value("string"), "category": datasets.ClassLabel(names=names)})
    coded = {**table, "category": [names.index(c) for c in table["category"]]}
    datasets.Dataset.from_dict(coded, features=features).save_to_disk(str(tmp_path / "x.hf"))
    (tmp_path / "x.csv").write_text(
        "text,category\n" + "".join(f'"{t}",{c}\n' for t, c in zip(*table.values(), strict=True))
    )
    write_jsonl(tmp_path / "x.jsonl", ({"text": t, "category": c} for t, c in zip(*table.values(), strict=True)))
    got = {}
    for kind in ("parquet", "delta", "hf", "csv", "jsonl"):
        data = prepare(
            Source(kind, str(tmp_path / f"x.{kind}"), BANKING), tmp_path / f"{kind}/d", Rules(SHARES, seed=3)
        )
        got[kind] = sorted((r["messages"][0]["content"], r["label"], r["split"]) for r in all_rows(data))
    assert len(got["hf"]) == 40 and all(g == got["hf"] for g in got.values())


def test_a_hidden_label_of_a_hugging_face_folder_is_no_label(tmp_path):
    "Benchmarks mark it by -1 in their test split; it became a class of that name."
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "category": datasets.ClassLabel(names=["a", "b"])})
    coded = {"text": [f"How do I {i}?" for i in range(4)], "category": [0, 1, -1, None]}
    datasets.Dataset.from_dict(coded, features=features).save_to_disk(str(tmp_path / "x"))
    shape = Shape(columns={"prompt": "text", "label": "category"})
    assert [r.value["category"] for r in Source("hf", str(tmp_path / "x"), shape).rows()] == ["a", "b", None, None]


def test_splits_of_a_hugging_face_folder_are_given_unless_a_parameter_frees_them(tmp_path):
    import datasets

    parts = {s: datasets.Dataset.from_list(good_rows()[i::2]) for i, s in enumerate(("train", "test"))}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "hf"))
    free = prepare(
        Source("hf", str(tmp_path / "hf"), splits={"train": None}),
        tmp_path / "a/d",
        Rules({"train": 0.7, "validation": 0.3}),
    )
    assert len(all_rows(free, "test")) == 20 and len(all_rows(free, "validation")) > 0


def test_banking77_loads_by_parameters_alone(shared, tmp_path):
    source = Source("csv", str(shared("banking77")), BANKING, splits={"test.csv": "test"})
    rules = Rules(
        {"train": 0.95, "validation": 0.05},
        seed=42,
        near_duplicates=0.9,
        given={"source": "banking77", "licence": "CC-BY-4.0"},
    )
    data = prepare(source, tmp_path / "d", rules)
    p = read_json(data / "profile.json")
    assert p["rows"]["in"] == 13_083 and p["splits"]["test"] == 3_080 and len(p["labels"]) == 77
    assert p["rows"]["quarantined"] < 10 and p["splits"]["train"] > 9_000
    tested = {folded(r["messages"][0]["content"]) for r in all_rows(data, "test")}
    assert not any(folded(r["messages"][0]["content"]) in tested for r in all_rows(data, "train", "validation"))


def test_xstest_loads_by_parameters_alone(shared, tmp_path):
    shape = Shape(
        columns={"prompt": "prompt", "label": "label", "group": "type"},
        templates={"completion": "{label}", "id": "xstest-{id}"},
    )
    rules = Rules({"test": 1.0}, near_duplicates=None, given={"source": "xstest"})
    data = prepare(Source("csv", str(shared("xstest")), shape), tmp_path / "d", rules)
    p = read_json(data / "profile.json")
    assert p["rows"] == {"in": 450, "out": 450, "quarantined": 0, "duplicates": 0}
    assert {k: v["test"] for k, v in p["labels"].items()} == {"safe": 250, "unsafe": 200}


# -- the stage -----------------------------------------------------------------------------------------------------


def test_the_stage_counts_with_the_tokenizer_of_the_base(tmp_path, monkeypatch):
    "The base is a folder with a real tokenizer and no weights."
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from llmkit.core.artifact import build
    from llmkit.stages import prepare as stage

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<pad>", "<eos>", "<user>", "<assistant>"]
    tok.train_from_iterator(
        bank.corpus(0, 500),
        trainers.BpeTrainer(
            vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    monkeypatch.chdir(tmp_path)
    with build("artifacts/base/base", "base", meta={"context": 60}) as folder:
        tok.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "pad_token": "<pad>"}))
        (folder / "chat_template.jinja").write_text(
            "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}"
        )
    common = {
        "path": "",
        "encoding": "utf-8",
        "columns": {},
        "templates": {},
        "splits": {},
        "fields": {},
        "n": 600,
        "shares": SHARES,
    }
    data = stage.run(
        source="bank",
        **common,
        near_duplicates=0.8,
        pii="mask",
        secrets="quarantine",
        too_long="quarantine",
        max_quarantine_share=0.5,
        canaries=None,
        seed=42,
    )
    p = read_json(data / "profile.json")
    assert p["context_length"] == 60 and p["tokens"]["max"] <= 60 and p["over_context"] == 0
    assert p["quarantine"].get("messages: is longer than the context", 0) > 0
    assert data.parents["base"].startswith("sha256:") and data.recipe["source"] == "bank"


# -- memory --------------------------------------------------------------------------------------------------------

GROW = """
import resource, sys
from pathlib import Path
from llmkit.data.prepare import Reader, Rules, fill_table, thin, write
from llmkit.data.split import assign
from llmkit.data.sources import Source
from llmkit.data.table import open_table
rules = Rules({"train": 0.9, "test": 0.1}, near_duplicates=0.8)
import datasketch, detect_secrets.core.plugins.util
with open_table(sys.argv[1]) as (table, tmp):
    n = fill_table(table, Source("bank", n=int(sys.argv[2]), seed=1), rules, Reader())
    thin(table, tmp, rules); assign(table, rules.shares, 1); write(table, Path(sys.argv[1]), n)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_is_flat(tmp_path):
    "Four times the rows, and at most a few megabytes more."
    peak = [
        int(
            subprocess.run(
                [sys.executable, "-c", GROW, str(tmp_path), str(n)], capture_output=True, text=True, check=True
            ).stdout
        )
        for n in (1000, 4000)
    ]
    assert peak[1] - peak[0] < 25, peak


@pytest.mark.parametrize("name", ["Jane Doe", "a%20b", "q?x", "$x", "h#y é"])
def test_a_project_may_lie_in_any_folder(tmp_path, name):
    made = prepare(Source("bank", n=200, seed=1), tmp_path / name / "dataset", Rules(SHARES, seed=1))
    assert made.digest == prepare(Source("bank", n=200, seed=1), tmp_path / "plain", Rules(SHARES, seed=1)).digest
