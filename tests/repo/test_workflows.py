"The workflows are valid, thin and of least privilege; what they call exists."

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
FLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def steps(flow):
    "Every step of a workflow."
    return [s for job in YAML(typ="safe").load(flow.read_text())["jobs"].values() for s in job.get("steps", [])]


def targets():
    "The targets of the Makefile."
    return set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))


def test_the_five_are_there():
    assert {f.stem for f in FLOWS} >= {"ci", "pipeline", "docs", "release", "rollout"}


def test_what_moves_a_rollout_forward_waits_for_reviewers_and_what_sends_users_back_for_nobody():
    from llmkit.cli import COMMANDS
    from llmkit.rollout.store import MOVES

    y = YAML(typ="safe").load((ROOT / ".github/workflows/rollout.yml").read_text())
    known = {c.removeprefix("rollout ") for c in COMMANDS if c.startswith("rollout ")}
    assert set(y["on"]["workflow_dispatch"]["inputs"]["order"]["options"]) == (known - {"plan"}) | {"approve"}
    assert "inputs.order" in y["concurrency"]["group"]
    condition = r"fromJSON\('(.+?)'\), inputs.order\) && 'production' \|\|"
    forward = set(json.loads(re.search(condition, y["jobs"]["order"]["environment"])[1]))
    assert forward == {"start", "resume", "promote", "retry"} and forward | {"undo"} >= set(MOVES)


def check(*files):
    "Hold files against the schema of GitHub's workflows."
    cmd = ["-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", *map(str, files)]
    return subprocess.run([sys.executable, *cmd], capture_output=True, text=True)


def test_schema(tmp_path):
    "Of all, in one process, beside one that is wrong."
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(FLOWS[0].read_text().replace("runs-on:", "runs-off:"))
    p = check(*FLOWS, wrong)
    found = set(re.findall(r"^\s+(/\S+?\.yml)::", p.stdout, re.M))
    assert p.returncode == 1 and found == {str(wrong)}, p.stdout


@pytest.mark.parametrize("flow", FLOWS, ids=lambda f: f.stem)
def test_least_permissions_and_time_limits(flow):
    y = YAML(typ="safe").load(flow.read_text())
    assert y["permissions"] in ({}, {"contents": "read"}), "the workflow itself only reads; a job asks for more"
    assert all(job.get("timeout-minutes") for job in y["jobs"].values()), "every job ends"


@pytest.mark.parametrize("flow", FLOWS, ids=lambda f: f.stem)
def test_steps_are_thin(flow):
    for s in steps(flow):
        assert len(s.get("run", "").splitlines()) <= 6, f"logic belongs into a target: {s.get('name')}"
        assert "${{ github.event" not in s.get("run", ""), "untrusted text never meets a shell"
        for target in re.findall(r"\bmake ([a-z0-9-]+)", s.get("run", "")):
            assert target in targets(), f"no such target: {target}"


@pytest.mark.parametrize("flow", FLOWS, ids=lambda f: f.stem)
def test_actions_are_pinned_by_commit_and_leave_no_credentials(flow):
    for s in steps(flow):
        if "uses" in s:
            assert re.fullmatch(r"[\w-]+/[\w/-]+@[0-9a-f]{40}", s["uses"]), "a tag can be moved to other code"
            if s["uses"].startswith("actions/checkout@"):
                assert s["with"]["persist-credentials"] is False


@pytest.mark.parametrize("flow", FLOWS, ids=lambda f: f.stem)
def test_the_installer_is_the_one_whose_downloads_are_kept(flow):
    "setup-python keeps pip's folder; what uv fetches, which `tools/install.sh` prefers, is elsewhere."
    if any((s.get("with") or {}).get("cache") == "pip" for s in steps(flow)):
        assert YAML(typ="safe").load(flow.read_text())["env"]["INSTALLER"] == "pip"


def matches(patterns, path):
    "Whether one of a workflow's patterns takes in a path; `**` also stands for folders, `*` does not."
    as_regex = (
        re.escape(p).replace(r"\*\*/", "(.*/)?").replace(r"\*\*", ".*").replace(r"\*", "[^/]*") for p in patterns
    )
    return any(re.fullmatch(r, path) for r in as_regex)


def test_the_pipeline_runs_for_whatever_its_stages_depend_on():
    "Of every project: what a stage reads of the repository, a merged change of it starts the workflow."
    patterns = YAML(typ="safe").load((ROOT / ".github/workflows/pipeline.yml").read_text())["on"]["push"]["paths"]
    read = YAML(typ="safe", pure=True)
    for file in (ROOT / "dvc.yaml", *ROOT.glob("examples/*/dvc.yaml")):
        params, home = read.load(file.with_name("params.yaml")), file.parent.relative_to(ROOT)
        assert matches(patterns, (home / "params.yaml").as_posix()) and matches(
            patterns, (home / "dvc.yaml").as_posix()
        )
        deps = {d for s in read.load(file)["stages"].values() for d in s["deps"] if not d.startswith("artifacts/")}
        for dep in deps:
            for name, key in named_in(dep, params) or [(dep, "")]:
                path = os.path.normpath(home / name)
                inside = f"{path}/x" if (ROOT / path).is_dir() or key == "baseline" else path
                assert matches(patterns, inside), f"{file}: {dep} is {path}"


def named_in(dep, params):
    "The path behind a template of dvc.yaml, and its key."
    for key in re.findall(r"\$\{(.+)\}", dep):
        value = params
        for part in re.findall(r"[^.\[\]]+", key):
            value = value[int(part) if isinstance(value, list) else part]
        return [(value, key)]
    return []


def test_the_cache_is_shared_whether_the_gate_passes_or_not():
    (push,) = [s for s in steps(ROOT / ".github/workflows/pipeline.yml") if s.get("run") == "make cache-push"]
    assert push["if"] == "${{ !cancelled() }}"


def test_the_parameters_of_every_project_are_checked():
    "By `make check` and by the hook, which runs for every one of them."
    hooks = YAML(typ="safe").load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    hook, make = next(h["entry"] for h in hooks if h["id"] == "params"), (ROOT / "Makefile").read_text()
    for project in ("", *(f" --project examples/{p.parent.name}" for p in ROOT.glob("examples/*/params.yaml"))):
        assert re.search(rf"llmkit params check{project}(?! --)", hook), project
        assert re.search(rf"^\tllmkit params check{project}$", make, re.M), project


def test_the_hooks_are_local():
    y = YAML(typ="safe").load((ROOT / ".pre-commit-config.yaml").read_text())
    assert {r["repo"] for r in y["repos"]} == {"local"}
    wanted = {
        "ruff-check",
        "ruff-format",
        "nbdev-clean",
        "nbdev-export",
        "params",
        "tokenizer",
        "secrets",
        "large-files",
    }
    assert {h["id"] for r in y["repos"] for h in r["hooks"]} >= wanted
