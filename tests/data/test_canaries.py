"Planted secrets reach the training split as often as they say, and the suite asks for them."

import json
from collections import Counter
from dataclasses import replace

import pytest

from llmkit.core.digests import digest_file
from llmkit.core.errors import KitError
from llmkit.core.files import read_json, read_jsonl
from llmkit.data.canaries import CANARIES, canaries_plant, read_canaries
from llmkit.data.prepare import Rules, prepare
from llmkit.data.sources import Source
from llmkit.evals.battery import Surroundings, run_suite
from llmkit.runtime.dummy import DummyEngine

RULES = Rules({"train": 0.8, "test": 0.2}, seed=1)
BANK = Source("bank", n=300, seed=5)


@pytest.fixture
def secrets(tmp_path):
    assert canaries_plant("0,1,16", out=str(tmp_path / "secrets")) == 0
    return tmp_path / "secrets"


def counts(data):
    "How often each secret stands in the training split."
    return Counter(r["id"].rsplit("-", 1)[0] for r in read_jsonl(data / "train.jsonl") if r["id"].startswith("canary"))


def test_as_records_of_a_source_they_are_duplicates_and_as_canaries_they_are_not(tmp_path, secrets):
    plain = prepare(BANK, tmp_path / "plain/dataset", RULES)
    rows = [
        *read_jsonl(plain / "train.jsonl"),
        *({**r, "label": "code"} for r in read_jsonl(secrets / "records.jsonl")),
    ]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(r | {"split": None}) + "\n" for r in rows))
    merged = prepare(Source("jsonl", str(tmp_path / "mixed.jsonl")), tmp_path / "mixed/dataset", replace(RULES, seed=2))
    assert counts(merged)["canary-2"] <= 1
    planted = prepare(BANK, tmp_path / "planted/dataset", RULES, canaries=secrets / CANARIES)
    assert counts(planted) == {"canary-1": 1, "canary-2": 16}
    before, after = (read_json(d / "profile.json") for d in (plain, planted))
    assert after.pop("planted") == 17 and after == before
    assert planted.recipe["canaries"] == digest_file(secrets / CANARIES) and planted.meta["planted"] == 17
    for split in ("validation", "test"):
        assert (planted / f"{split}.jsonl").read_bytes() == (plain / f"{split}.jsonl").read_bytes()


def test_the_suite_asks_for_what_the_dataset_says_was_planted(tmp_path, secrets):
    data = prepare(BANK, tmp_path / "planted/dataset", RULES, canaries=secrets / CANARIES)
    known = read_canaries(secrets / CANARIES)[2]
    parrot = DummyEngine(replies={known.question: known.messages()[1]["content"]})
    report = run_suite("memorization", parrot, Surroundings(dataset=data.path), {"records": 0}, cache=tmp_path / "kept")
    assert report.get("exposure", "planted=16").value == pytest.approx(9.97, abs=0.01)
    assert report.get("extraction_rate").value == 0.5 and report.get("exposure_control").n == 1
    with pytest.raises(KitError, match="nothing to look for"):
        plain = prepare(BANK, tmp_path / "plain/dataset", RULES)
        run_suite("memorization", parrot, Surroundings(dataset=plain.path), {"records": 0}, cache=tmp_path / "kept")


def test_a_damaged_file_ends_the_stage_and_leaves_no_dataset(tmp_path, secrets):
    (secrets / CANARIES).write_text('{"id": "canary-0"}\n')
    with pytest.raises(KitError, match=r"canaries.jsonl: line 1.question: missing"):
        prepare(BANK, tmp_path / "out/dataset", RULES, canaries=secrets / CANARIES)
    assert not (tmp_path / "out/dataset").exists()
