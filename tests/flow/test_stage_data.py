"Every file that a parameter of the pipeline names is a dependency, and counts in the input digest."

from pathlib import Path

import pytest

from llmkit.core.errors import KitError
from llmkit.evals import battery
from llmkit.flow.dag import data_deps
from llmkit.flow.notebook import read_stage
from llmkit.flow.plan import data
from llmkit.flow.repro import check_data, repro

ROOT = Path(__file__).parents[2]


def test_every_option_of_a_suite_that_is_a_path_is_a_dependency():
    keys = {k.rpartition(".")[2] for k in read_stage("evaluate", ROOT).data if k.startswith("evaluate.suites.*.")}
    assert keys == {*battery._PATHS, "judge"}  # which may also be an address or a registered name


@pytest.mark.parametrize(
    "stage, section, key",
    [
        ("evaluate", {"price_table": "named.yaml"}, "price_table"),
        ("evaluate", {"suites": {"safety": {"files": ["named.yaml"]}, "swaps": {}}}, "suites.safety.files[0]"),
        ("evaluate", {"suites": {"bbq": {"file": "named.yaml"}}}, "suites.bbq.file"),
        ("evaluate", {"suites": {"grounding": {"judge": "named.yaml"}, "swaps": {}}}, "suites.grounding.judge"),
        ("package", {"licence_files": ["named.yaml"]}, "licence_files[0]"),
    ],
)
def test_an_edit_of_a_named_file_repeats_the_stage(tmp_path, stage, section, key):
    read, params, file = read_stage(stage, ROOT), {stage: section}, tmp_path / "named.yaml"
    file.write_text("one")
    assert data_deps(read, params, tmp_path) == [f"${{{stage}.{key}}}"]
    before = data(read, params, tmp_path)
    file.write_text("two")
    after = data(read, params, tmp_path)
    assert [*before] == [*after] and before != after and None not in before.values()


def test_the_weights_of_a_judge_repeat_the_stage_and_what_is_no_file_is_none(tmp_path):
    read = read_stage("evaluate", ROOT)
    params = {"evaluate": {"suites": {"grounding": {"judge": "judges/small"}}}}
    assert data_deps(read, params, tmp_path) == []  # not there yet
    (tmp_path / "judges/small").mkdir(parents=True)
    weights = tmp_path / "judges/small/model.safetensors"
    weights.write_bytes(b"one")
    assert data_deps(read, params, tmp_path) == ["${evaluate.suites.grounding.judge}"]
    before = data(read, params, tmp_path)
    weights.write_bytes(b"two")
    assert before != data(read, params, tmp_path)
    for other in ("http://127.0.0.1:9000/v1", "registered-name"):
        assert data_deps(read, {"evaluate": {"suites": {"grounding": {"judge": other}}}}, tmp_path) == []


def test_a_file_that_only_a_late_stage_needs_is_missed_before_anything_runs(project, monkeypatch):
    project.stage("x", data={"x.terms": "named"}, parameters="lr: float = 1e-3\nterms: str = ''")
    project.params("seed: 7\nx: {lr: 1e-4, terms: TERMS}\n")
    monkeypatch.setattr("llmkit.flow.repro.dvc", lambda words, folder: pytest.fail("DVC was started"))
    with pytest.raises(KitError, match="x.terms: no such file or folder .*TERMS"):
        repro(project=str(project.path))
    # who names stages, or lets DVC fetch, may have it elsewhere; an address is asked by whoever reads it
    for args in (["y"], ["--pull"], ["--allow-missing", "--force"]):
        check_data(project.path, args)
    project.params("seed: 7\nx: {lr: 1e-4, terms: 's3://bucket/TERMS'}\n")
    check_data(project.path)
    project.params("seed: 7\nx: {lr: 1e-4, terms: TERMS}\n")
    (project.path / "TERMS").write_text("")
    check_data(project.path, ["--force"])
