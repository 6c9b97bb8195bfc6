"The example on real questions, shortened: its own parameters, a twelfth of its data, all ten stages, a registered version."

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from llmkit.core.files import read_json, read_jsonl
from llmkit.core.project import find_project

ROOT = find_project(Path(__file__).parent)
pytestmark = pytest.mark.slow


def shorten(data, name, target, each):
    "The first `each` questions of every intent."
    seen = {}
    with (
        open(data / name, newline="", encoding="utf-8") as f,
        open(target / name, "w", newline="", encoding="utf-8") as g,
    ):
        reader = csv.DictReader(f)
        writer = csv.DictWriter(g, reader.fieldnames)
        writer.writeheader()
        for row in reader:
            seen[row["category"]] = seen.get(row["category"], 0) + 1
            if seen[row["category"]] <= each:
                writer.writerow(row)


@pytest.fixture(scope="module")
def project(shared, tmp_path_factory):
    "A checkout with shortened data and a smaller, shorter training; everything else as the example has it."
    data, root = shared("banking77"), tmp_path_factory.mktemp("checkout")
    left_out = shutil.ignore_patterns("artifacts", ".llmkit", "mlflow.db*", "mlartifacts", "__pycache__")
    for part in ("llmkit", "nbs", "examples/banking77"):
        shutil.copytree(ROOT / part, root / part, ignore=left_out, symlinks=True)
    for part in ("settings.ini", "pyproject.toml", "requirements.lock", "LICENSE"):
        shutil.copy2(ROOT / part, root / part)
    example = root / "examples/banking77"
    if (example / "data").is_symlink():
        (example / "data").unlink()
    (example / "data").mkdir(exist_ok=True)
    shorten(data, "train.csv", example / "data", 12)
    shorten(data, "test.csv", example / "data", 3)
    yaml = YAML()
    params = yaml.load(example / "params.yaml")
    params["base"]["tiny"] |= {"vocab": 1024, "hidden": 64, "heads": 2, "mlp": 128, "steps": 60, "threads": 1}
    params["finetune"] |= {"rank": 16, "alpha": 16, "epochs": 4, "lr": 6e-3, "threads": 1}
    params["finetune"] |= {"word_dropout": 0.0, "label_smoothing": 0.0, "ema": 0.0}
    params["quantize"] |= {"metric": "answer_logprob", "prompts": 16}
    params["evaluate"] |= {"speed_tokens": 2, "speed_subjects": ["engine"]}
    for rule in params["gates"]["rules"]:
        if "min" in rule and rule["metric"] in ("accuracy", "macro_f1"):
            rule["min"] = 0.02  # above chance
        if rule.get("noninferiority") or rule.get("min_n"):
            rule["min_n"] = 100
        if rule.get("noninferiority"):
            rule["noninferiority"] = 0.1
    yaml.dump(params, example / "params.yaml")
    run = lambda *words, at=root: subprocess.run(words, cwd=at, check=True, capture_output=True)
    run("git", "init", "-q")
    run(sys.executable, "-m", "dvc", "init", "-q")
    return example


def test_all_stages_run_to_a_registered_version(shared, project):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [Path(sys.executable).parent / "llmkit", "repro"],
        cwd=project,
        env=env,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    made = project / "artifacts"
    assert read_json(made / "gate/verdict/verdict.json")["outcome"] == "pass"
    rows = read_json(made / "prepare/dataset/manifest.json")["meta"]["rows"]
    assert rows["in"] == 77 * 15 == sum(rows[k] for k in ("out", "quarantined", "duplicates"))
    answers = [r["label"] for r in read_jsonl(made / "prepare/dataset/test.jsonl")]
    assert "card arrival" in answers and not any("_" in a for a in answers)
    assert list((made / "register").rglob("*.json"))
    printed = subprocess.run(
        [sys.executable, project / "yardstick.py", "--data", shared("banking77")],
        capture_output=True,
        text=True,
        timeout=600,
    )
    rates = [float(line.split()[-7]) for line in printed.stdout.splitlines()[:2]]
    assert rates[0] > 0.8 > rates[1] > 0.04, (
        printed.stdout + printed.stderr
    )  # trained on all, on a twelfth; chance is 0.013
    assert "exact McNemar p =" in printed.stdout
