"""The stage quantize with `precision: auto`: what it tries, what it takes, what it keeps, and that it is the same again."""

import shutil

import pytest

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
LOOSE = {"margin": 0.9, "ratio": 5.0, "attacks": 1.0}


def test_the_smallest_candidate_that_passes_is_built_and_the_reasons_are_kept(project):
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
    shutil.rmtree("artifacts/quantize")
    assert quantize.run(**HOW, choose=LOOSE).digest == engine.digest


def test_without_certainty_the_exact_one_is_taken(project):
    engine = quantize.run(**HOW, choose=LOOSE | {"margin": 0.001})
    assert engine.recipe["precision"] == "fp32"
    assert "int8 inconclusive" in open_artifact("artifacts/quantize/report", "report").meta["why"]


def test_what_cannot_be_built_is_refused_at_once(project):
    with pytest.raises(KitError, match="cannot be built"):
        quantize.run(**HOW | {"candidates": ["fp32", "int2"]}, choose=LOOSE)
    with pytest.raises(KitError, match="quantize.choose"):
        quantize.run(**HOW, choose={"margin": 0.02})
