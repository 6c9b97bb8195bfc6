"""Fixtures: a project in miniature up to the verdict, with a bundle, with a card."""

import shutil
from pathlib import Path

import pytest
from release_road import LINES, TINY, random_delta, run_card, run_gate, run_package, small_dataset, write_reports

from llmkit.core.artifact import open_artifact
from llmkit.core.files import write_json, write_text


@pytest.fixture(scope="session")
def road(tmp_path_factory):
    "The road up to the verdict, made once."
    from llmkit.model.base import make_base
    from llmkit.model.merge import merge
    from llmkit.model.quantize import quantize

    root = tmp_path_factory.mktemp("road")
    corpus = write_text(root / "corpus.txt", "\n".join(LINES))
    art = root / "artifacts"
    parts = {"base": make_base(art / "base/base", source="tiny", corpus=str(corpus), tiny=TINY)}
    parts["dataset"] = small_dataset(art / "prepare/dataset", parts["base"])
    parts["delta"] = random_delta(art / "finetune/delta", parts["base"], parts["dataset"])
    merge(art / "merge/model", art / "base/base", art / "finetune/delta", limits={"kl_max": 1.0})
    parts["model"] = open_artifact(art / "merge/model")
    with quantize(art / "merge/model", art / "quantize/engine", precision="int8", block_size=32):
        pass
    parts["engine"] = open_artifact(art / "quantize/engine")
    write_reports(parts, art / "evaluate/report", art / "quantize/report")
    for stage in ("base", "prepare", "finetune", "merge", "quantize", "evaluate", "gate", "package", "card"):
        write_json(art / stage / "record.ipynb", {"stage": stage})
    write_text(root / "LICENSE", "Apache-2.0\n")
    write_text(root / "params.yaml", "seed: 0\n")
    write_text(root / "settings.ini", "[DEFAULT]\ntracking_uri = sqlite:///mlflow.db\n")
    return root


@pytest.fixture
def project(road, tmp_path, monkeypatch):
    "A copy of the road for one test, entered."
    shutil.copytree(road, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    return Path(".")


@pytest.fixture
def packaged(project):
    "A project with a bundle."
    run_gate()
    run_package()
    return project


@pytest.fixture
def carded(packaged):
    "A project with a bundle and a card."
    run_card()
    return packaged
