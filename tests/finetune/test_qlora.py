"A delta trained on a base in four bits, by bitsandbytes itself, which lies in a folder of its own (`make extras`)."

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from llmkit.core.artifact import open_artifact
from llmkit.core.errors import KitError
from llmkit.model.finetune import finetune
from llmkit.model.merge import merge

EXTRA = Path(sys.prefix) / "extras" / "qlora"
CHILD = """
import json, sys
from llmkit.core.artifact import open_artifact
from llmkit.model.finetune import finetune
from llmkit.model.lora import load_frozen
from llmkit.model.train import Recipe
job = json.load(open(sys.argv[1]))
kinds = {type(m).__name__ for m in load_frozen(job["base"], quantize="nf4").modules()}
base, data = open_artifact(job["base"]), open_artifact(job["dataset"])
for out in job["out"]:
    delta = finetune(base, data, out, Recipe(**job["recipe"]))
print(json.dumps({"kinds": sorted(kinds), "loss": delta.meta["validation_loss"]}))
"""


def test_without_bitsandbytes_it_is_refused_by_name(base, dataset, recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(KitError, match=r"quantize_base: QLoRA needs bitsandbytes.*pip install 'llmkit\[qlora\]'"):
        finetune(base, dataset, tmp_path / "delta", replace(recipe, quantize_base="nf4"))
    assert not (tmp_path / "delta").exists()


@pytest.mark.slow
@pytest.mark.skipif(not EXTRA.is_dir(), reason="`make extras` brings bitsandbytes")
@pytest.mark.parametrize("dora", [False, True])
def test_a_delta_is_trained_on_a_base_in_four_bits(base, dataset, recipe, tmp_path, dora):
    full = finetune(base, dataset, tmp_path / "full", replace(recipe, dora=dora))
    job = {"base": str(base.path), "dataset": str(dataset.path), "out": [str(tmp_path / n) for n in ("one", "two")]}
    job["recipe"] = asdict(replace(recipe, dora=dora, quantize_base="nf4"))
    (tmp_path / "job.json").write_text(json.dumps(job))
    env = os.environ | {"PYTHONPATH": str(EXTRA), "LLMKIT_CHECKPOINTS": str(tmp_path / "checkpoints")}
    run = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path / "job.json")], env=env, capture_output=True, text=True)  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    said = json.loads(run.stdout.splitlines()[-1])
    assert "Linear4bit" in said["kinds"]
    one, two = open_artifact(tmp_path / "one"), open_artifact(tmp_path / "two")
    assert one.digest == two.digest, "the same bytes twice"
    assert one.digest != full.digest and one.recipe["quantize_base"] == "nf4"
    first = json.loads((tmp_path / "one" / "history.json").read_text())["train"]["loss"][0]
    assert said["loss"] < 0.7 * first, "it learns"
    assert abs(said["loss"] - full.meta["validation_loss"]) < 0.3, "about as well as on the full base"
    limits = {"logit_error_max": 1e-3, "top1_agreement": 0.99}
    assert merge(tmp_path / "model", base.path, one.path, limits=limits).kind == "model", "it goes onto the full base"
