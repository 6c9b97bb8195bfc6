"A small release with real reports: what an edge bundle is made from."

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "release"))

PARAMS = """
evaluate: {suite: bank, version: 1, limit: null, max_tokens: 6, scorers: [label, exact]}
edge:
  rules:
    - {metric: same_answer_rate, on: edge, min: 0.1}
    - {metric: size_bytes, on: edge, max: 1.0e+6}
    - {metric: latency_p95, on: edge, max: 5.0}
"""


@pytest.fixture(scope="session")
def edge_road(tmp_path_factory):
    "Base, dataset, delta, merged model, engine, report, verdict and bundle, made once."
    from release_road import LINES, TINY, random_delta, small_dataset

    from llmkit.core.artifact import build, open_artifact
    from llmkit.core.files import read_jsonl, write_text
    from llmkit.core.report import write_report
    from llmkit.evals.evaluate import evaluate
    from llmkit.evals.suite import make_suite
    from llmkit.gate.judge import judge
    from llmkit.gate.verdict import write_verdict
    from llmkit.model.base import make_base
    from llmkit.model.merge import merge
    from llmkit.model.quantize import quantize
    from llmkit.release.bundle import package, pick_prompts
    from llmkit.runtime.engine import load_engine

    root = tmp_path_factory.mktemp("edge")
    art = root / "artifacts"
    base = make_base(
        art / "base/base", source="tiny", corpus=str(write_text(root / "c.txt", "\n".join(LINES))), tiny=TINY
    )
    data = small_dataset(art / "prepare/dataset", base)
    random_delta(art / "finetune/delta", base, data)
    merge(art / "merge/model", base.path, art / "finetune/delta", limits={"kl_max": 1.0})
    with quantize(art / "merge/model", art / "engine", precision="int8", block_size=32):
        pass
    engine, rows = open_artifact(art / "engine"), list(read_jsonl(data / "test.jsonl"))
    suite = make_suite("bank", 1, rows, max_tokens=6, scorers=("label", "exact"))
    with load_engine(engine.path) as e:
        report = evaluate(e, suite)
    with build(art / "evaluate", "report", {"engine": engine}) as folder:
        write_report(report, folder / "engine")
    verdict = judge({"rules": [{"metric": "accuracy", "min": 0.0}]}, {"engine": report})
    with build(art / "verdict", "verdict", {"evaluate": open_artifact(art / "evaluate")}) as folder:
        write_verdict(verdict, folder)
    parts = engine, open_artifact(art / "verdict"), {"evaluate": open_artifact(art / "evaluate")}
    licence = write_text(root / "LICENSE", "Apache-2.0\n")
    package(*parts, root / "bundle", name="bank", chats=pick_prompts(iter(rows), 2), licences={"LICENSE": licence})
    write_text(root / "params.yaml", PARAMS)
    return root


@pytest.fixture
def release(edge_road, tmp_path, monkeypatch):
    "A copy of it for one test, entered."
    shutil.copytree(edge_road, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return Path(".")
