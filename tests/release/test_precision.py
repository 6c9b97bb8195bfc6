"""The stage quantize with `precision: auto`: what it tries, what it takes, what it keeps, and that it is the same again."""

import shutil

import pytest
from release_road import LINES, TINY, random_delta, small_dataset

from llmkit.core.artifact import open_artifact
from llmkit.core.errors import KitError
from llmkit.core.report import read_report
from llmkit.gate.run import collect
from llmkit.gate.verdict import read_verdict
from llmkit.stages import quantize

HOW = {
    "precision": "auto", "candidates": ["fp32", "int8"], "block_size": 32, "device": "cpu", "method": "rtn",
    "prompts": 8, "max_tokens": 4, "metric": "answer_logprob", "min_recovery": -1e9, "limits": {},
}  # fmt: skip
LOOSE = {"margin": 0.9, "ratio": 5.0, "attacks": 0.9, "calibration": 0.9}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    "A project up to the merged model, whose context takes the prompts of the safety suite."
    from llmkit.model.base import make_base
    from llmkit.model.merge import merge

    root = tmp_path_factory.mktemp("wide")
    art, corpus = root / "artifacts", root / "corpus.txt"
    corpus.write_text("\n".join(LINES))
    base = make_base(art / "base/base", source="tiny", corpus=str(corpus), tiny={**TINY, "context": 512})
    random_delta(art / "finetune/delta", base, small_dataset(art / "prepare/dataset", base))
    merge(art / "merge/model", art / "base/base", art / "finetune/delta", limits={"kl_max": 1.0})
    return root


@pytest.fixture
def inside(wide, monkeypatch):
    "That project, entered."
    monkeypatch.chdir(wide)


def test_the_smallest_candidate_that_passes_is_built_and_the_reasons_are_kept(inside):
    engine = quantize.run(**HOW, choose=LOOSE)
    report = open_artifact("artifacts/quantize/report", "report")
    assert engine.recipe["precision"] == report.meta["precision"] == "int8"
    assert report.meta["why"].startswith("the smallest of those that are not worse")
    kept = report.path / "choice"
    assert {p.name for p in kept.iterdir()} == {"tradeoff.md", "tradeoff.png", "fp32", "int8"}
    assert read_verdict(kept / "int8/verdict").outcome == "pass" and "▶ | int8" in (kept / "tradeoff.md").read_text()
    sizes = [read_report(kept / f"{p}/speed").get("size_bytes").value for p in ("int8", "fp32")]
    assert sizes[0] < sizes[1]
    assert not [s for s in collect(f"parity={report.path}") if "int8" in s], "a gate reads the parity chain alone"
    # without certainty the exact one is taken
    shutil.rmtree("artifacts/quantize")
    engine = quantize.run(**HOW, choose=LOOSE | {"calibration": 1e-6})
    assert engine.recipe["precision"] == "fp32"
    assert "int8 inconclusive" in open_artifact("artifacts/quantize/report", "report").meta["why"]


def test_a_model_whose_context_takes_no_attack_is_not_called_safe(project):
    with pytest.raises(KitError, match="attack_success_rate.*has to be given a precision"):
        quantize.run(**HOW | {"candidates": ["fp32"]}, choose=LOOSE)
    assert not [p for p in project.glob("artifacts/quantize/*/choice")]


def test_what_cannot_be_built_is_refused_at_once(inside):
    with pytest.raises(KitError, match="cannot be built"):
        quantize.run(**HOW | {"candidates": ["fp32", "int2"]}, choose=LOOSE)
    with pytest.raises(KitError, match="quantize.choose"):
        quantize.run(**HOW, choose={"margin": 0.02})
