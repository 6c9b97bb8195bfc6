"The benchmark for GPUs: every step of it on the CPU, in small, and its word where there is no GPU."

import json
import subprocess
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).parents[2] / "benchmarks/gpu.py"


def run(*args, limit=60):
    "The benchmark in a process of its own."
    return subprocess.run([sys.executable, GPU, *args], capture_output=True, text=True, timeout=limit)


def test_without_a_gpu_it_says_so():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run()
    assert done.returncode == 2 and "no GPU here" in done.stderr and "Traceback" not in done.stderr
    done = run("--device", "cpu", "--only", "merge,mrege")
    assert done.returncode == 2 and "no such step: mrege" in done.stderr


STEPS = (
    "machine,finetune,resume,qlora,merge,torch,fp32,int4,server,energy"  # all but int8, like int4, and two processes
)


@pytest.mark.slow
def test_the_steps_run_on_the_cpu(tmp_path):
    kept = ("--work", tmp_path / "work", "--out", tmp_path / "gpu.json")
    done = run("--device", "cpu", "--only", STEPS, *kept, limit=580)
    assert done.returncode == 0, done.stdout[-6000:]
    found = {x["check"]: x for x in json.loads((tmp_path / "gpu.json").read_text())["checks"]}
    assert {n for n, x in found.items() if x["status"] == "skip"} <= {"qlora", "server torch", "server fp32"}
    assert found["finetune fp32"]["figures"]["same_bytes"] and found["chain int4"]["figures"]["recovery"] > 0.5
    assert len(found) == 27 and all(n in done.stdout for n in found)


def test_a_step_that_fails_or_hangs_takes_no_other_with_it(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(GPU.parent))
    import gpu

    b = gpu.Bench(tmp_path, "cpu")
    gpu.run_step(b, "machine", 0.05)
    gpu.run_step(b, "no such step", 60)
    with b.check("figures") as f:
        f["loss"] = 2.0
        gpu.expect(f["loss"] < 1, "the loss did not fall")
    with b.check("needs"):
        b.need("model")
    with b.check("fine") as f:
        f["loss"] = 0.5
    status = {x["check"]: (x["status"], x["why"]) for x in b.notes()}
    assert status["machine"] == ("fail", "not done in 0 s")
    assert status["no such step"][0] == "fail" and "it ended with 2" in status["no such step"][1]
    assert status["figures"] == ("fail", "Missed: the loss did not fall") and b.notes()[2]["figures"] == {"loss": 2.0}
    assert status["needs"] == ("skip", "model was not made") and status["fine"] == ("pass", "")
    assert capsys.readouterr().out.count("\n") == 5
