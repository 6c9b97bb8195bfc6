"The environment is the lock, and nothing in the lock ties it to a machine."

import json
import os
import re
import subprocess
import sys
from importlib.metadata import distributions

import pytest
from packaging.version import Version


def pins(root):
    "Name → version of the lock."
    rows = re.findall(r"^([\w.-]+)==(\S+)", (root / "requirements.lock").read_text(), re.M)
    return {norm(n): v for n, v in rows}


def norm(name):
    "A distribution's name in its canonical spelling."
    return re.sub(r"[-_.]+", "-", name).lower()


def installed():
    "Name → version of this environment, local versions such as +cpu left off."
    return {norm(d.metadata["Name"]): d.version.partition("+")[0] for d in distributions()}


def test_every_pin_is_installed_at_its_version(root):
    have = installed()
    gpu = {"onnxruntime", "onnxruntime-genai"} if "onnxruntime-gpu" in have else set()  # what `make gpu` replaces
    wrong = {n: (v, have.get(n)) for n, v in pins(root).items() if n not in gpu and have.get(n) != v}
    assert wrong == {}, "locked and installed differ: delete the stamp .venv/.installed and run `make env`"


def test_the_lock_serves_every_machine(root):
    lines = [s for s in (root / "requirements.lock").read_text().splitlines() if s and not s.lstrip().startswith("#")]
    assert [s for s in lines if not re.match(r"[\w.-]+(\[[\w,]+\])?==[^+\s]+(\s|$)", s)] == [], "only NAME==VERSION"


def test_the_gpu_builds_are_pinned_and_none_is_newer_than_the_lock(root):
    rows = re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==(\S+)$", (root / "requirements-gpu.txt").read_text(), re.M)
    known, locked = dict(rows), pins(root)
    assert set(known) == {"onnxruntime-gpu", "onnxruntime-genai-cuda"}
    assert known["onnxruntime-genai-cuda"] == locked["onnxruntime-genai"]  # its builder makes the graphs
    assert Version(known["onnxruntime-gpu"]) <= Version(locked["onnxruntime"])


def test_what_is_asked_for_is_locked(root):
    asked = re.findall(r"^([\w.-]+)", (root / "requirements.in").read_text(), re.M)
    assert [n for n in asked if norm(n) not in pins(root)] == [], "run `make lock`"


@pytest.mark.skipif(not os.environ.get("LLMKIT_RESOLVE"), reason="pip takes minutes to resolve: `make lock` runs this")
def test_uv_and_pip_resolve_the_same_versions(root, tmp_path):
    lock, report = str(root / "requirements.lock"), tmp_path / "pip.json"
    pip = ["-m", "pip", "install", "-q", "--dry-run", "--ignore-installed", "--report", str(report), "-r", lock]
    subprocess.run([sys.executable, *pip], check=True)
    by_pip = {norm(p["metadata"]["name"]): p["metadata"]["version"] for p in json.loads(report.read_text())["install"]}
    env = dict(os.environ)
    if env.get("PIP_FIND_LINKS"):
        env.setdefault("UV_FIND_LINKS", ",".join(env["PIP_FIND_LINKS"].split()))
    uv = ["-m", "uv", "pip", "compile", "-q", "--no-header", "--no-annotate", lock]
    out = subprocess.run([sys.executable, *uv], check=True, env=env, capture_output=True, text=True).stdout
    by_uv = {norm(n): v for n, v in re.findall(r"^([\w.-]+)==(\S+)", out, re.M)}
    assert by_uv == by_pip
