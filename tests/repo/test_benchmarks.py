"""Every benchmark still runs, in its smallest size; what it measures is not looked at, since no test holds a clock to the kit."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2]
SMALLEST = {
    "gate_null": "--times 20 --only equal_models",
    "rollout_null": "--times 2 --bad 1",
    "gateway_overhead": "--requests 100",
    "prepare_scale": "300",
    "prefix_reuse": "--layers 1 --repeats 1 --systems 32",
    "score_speed": "--items 8 --texts 2 --rounds 1",
    "decode_speed": "--layers 1 --tokens 4 --repeats 1",
    "serve_speed": "--layers 1 --rounds 1 --clients 1 --blocks 32 --tokens 4 --transformers",
    "stage_overhead": "--repeat 1",
}
LONG = {
    "finetune_speed",
    "gpu",  # tests/runtime/test_gpu_benchmark.py
    "monitor_null",
    "muon",
}  # half a minute and more at their smallest, or need what the lock has not


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_runs(name):
    before = {f: f.read_bytes() for f in (HERE / "benchmarks/results").iterdir()}
    command = [sys.executable, HERE / f"benchmarks/{name}.py", *SMALLEST[name].split()]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300)
    said = done.stdout + done.stderr
    missed = done.returncode == 1 and "MISSED" in said and "Traceback" not in said  # as so small a run may
    assert done.returncode == 0 or missed, done.stderr[-2000:]
    assert re.search(r"\d\.\d", done.stdout), done.stdout[-2000:]
    assert {f: f.read_bytes() for f in (HERE / "benchmarks/results").iterdir()} == before


def test_none_is_forgotten():
    "Each is run above or said to be long, and has a line in the folder's README with the figures that it left."
    files = {p.stem for p in (HERE / "benchmarks").glob("*.py")}
    assert files == SMALLEST.keys() | LONG
    text = (HERE / "benchmarks/README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)\.py`", text, re.M)) == files
    results = {p.name for p in (HERE / "benchmarks/results").iterdir()}
    assert set(re.findall(r"`(?:results/)?(\w+\.(?:json|jsonl|txt|md))`", text)) == results


def test_one_that_fails_takes_no_other_with_it(tmp_path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "tools/bench.sh").write_text((HERE / "tools/bench.sh").read_text())
    for name, text in {"a": "raise SystemExit(1)", "b": "print('b ran')", "finetune_speed": "print('no')"}.items():
        (tmp_path / f"benchmarks/{name}.py").write_text(text)
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "BENCH": "", "BANKING77": ""}
    done = subprocess.run(["bash", "tools/bench.sh"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "b ran" in done.stdout and "no" not in done.stdout.split()
    assert "finetune_speed needs BANKING77" in done.stderr and "not as promised: a finetune_speed" in done.stderr
    some = subprocess.run(
        ["bash", "tools/bench.sh"], cwd=tmp_path, env=env | {"BENCH": "b"}, capture_output=True, text=True
    )
    assert some.returncode == 0 and "bench: a" not in some.stdout
