"`llmkit params check` finds what would stop a run hours later: each fault in a copy of the shipped parameters."

import re
from pathlib import Path

import pytest

from llmkit.core.errors import KitError
from llmkit.flow.dag import dag, params_problems

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "was, now, says",
    [
        ("{metric: accuracy, min: 0.80,", "{metric: accuracy, mim: 0.80,", "gates.rules[0].mim: unknown parameter"),
        ("  precision: auto\n  # for auto", "  precision: int3\n  # for auto", "quantize.precision: cannot be built"),
        ("    hidden: 128", "    hiden: 128", "base.tiny.hiden: unknown parameter"),
        ("[engine, merged, base]", "[engine, mergd, base]", "evaluate.speed_subjects[1]: must be one of"),
        ("  clip: 1.0", "  clip: .nan", "finetune.clip: must be a finite number (got nan)"),
        ("  clip: 1.0", "  clip: -1.0", "finetune.clip: must be 0 or more (got -1.0)"),
        ("  patience: 4", "  patience: -1", "finetune.patience: must be 0 or more"),
        ("  pii: mask", "  pii: hide", "prepare.pii: unknown policy"),
        ("seed: 42", "seed: -1", "finetune.seed: must be from 0"),
    ],
)
def test_a_fault_is_named(tmp_path, was, now, says):
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    assert text.count(was) == 1
    file = tmp_path / "params.yaml"
    file.write_text(text.replace(was, now), encoding="utf-8")
    (problem,) = params_problems(tmp_path)
    assert problem.startswith(f"{file}: {says}"), problem


@pytest.mark.parametrize(
    "section", ["finetune:", "finetune: 5", "evaluate: [a]", "gates:", "edge: 3", "rollout:", "monitor: []"]
)
def test_a_section_that_is_none_is_told_wherever_it_is_read(tmp_path, section):
    name, text = section.partition(":")[0], (ROOT / "params.yaml").read_text(encoding="utf-8")
    (tmp_path / "params.yaml").write_text(re.sub(rf"^{name}:\n((  .*)?\n)+", f"{section}\n", text, flags=re.M))
    assert any(f"params.yaml: {name}" in p for p in params_problems(tmp_path))
    if name in ("finetune", "evaluate"):
        with pytest.raises(KitError, match=f"params.yaml: {name}: must be a dict"):
            dag(tmp_path)


@pytest.mark.parametrize("project", [".", "examples/banking77"])
def test_what_is_shipped_has_none(project):
    assert params_problems(ROOT / project) == []
