"The generated modules, the notebooks' metadata and README.md are what their sources make: checked in a copy."

import json
import os
import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent


def run(tree, *cmd):
    "Run a command of this environment in a copy of the tree, with the copy's own modules first on the path."
    env = {**os.environ, "PYTHONPATH": str(tree), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    p = subprocess.run([BIN / cmd[0], *cmd[1:]], cwd=tree, env=env, capture_output=True, text=True)
    assert p.returncode == 0, p.stdout + p.stderr


def content(tree, *patterns):
    "Relative path → bytes."
    skip = ("__pycache__", ".egg-info")
    found = {f for p in patterns for f in tree.glob(p) if f.is_file() and not any(s in str(f) for s in skip)}
    return {str(f.relative_to(tree)): f.read_bytes() for f in sorted(found)}


def changed(before, after):
    "The names that differ."
    return [n for n in sorted({*before, *after}) if before.get(n) != after.get(n)]


def test_export_changes_nothing(tree):
    before = content(tree, "llmkit/**/*", "nbs/**/*", "pyproject.toml")
    run(tree, "nbdev-export")
    assert changed(before, content(tree, "llmkit/**/*", "nbs/**/*", "pyproject.toml")) == [], "run `make sync`"


def test_a_module_edited_by_hand_is_seen(tree):
    module = tree / "llmkit/core/digests.py"
    before = module.read_bytes()
    module.write_bytes(before + b"\nextra = 1\n")
    run(tree, "nbdev-export")
    assert module.read_bytes() == before


def test_what_is_written_in_a_module_is_brought_into_its_notebook(tree):
    "The way of CONTRIBUTING.md for whoever edits a module: the notebook has the line, and nothing else moves."
    module, notebook = tree / "llmkit/gate/limits.py", tree / "nbs/02_gate/05b_limits.ipynb"
    before, was = content(tree, "llmkit/**/*.py", "nbs/**/*"), notebook.read_text(encoding="utf-8")
    said = "What the rule asks for is not in the report."
    module.write_text(module.read_text(encoding="utf-8").replace(said, said + " So."), encoding="utf-8")
    run(tree, "nbdev-update", "--fname", "llmkit/gate/limits.py")
    run(tree, "nbdev-export")
    run(tree, "nbdev-clean")
    assert was.count(said) == 1 and notebook.read_text(encoding="utf-8") == was.replace(said, said + " So.")
    after = content(tree, "llmkit/**/*.py", "nbs/**/*")
    assert changed(before, after) == [str(p.relative_to(tree)) for p in (module, notebook)]
    assert (said + " So.").encode() in after["llmkit/gate/limits.py"]


def test_no_filter_and_no_merge_touches_a_record(root, files):
    "A filter such as nbstripout's would rewrite what was executed, in the folder and in git."
    records = [str(f) for f in files() if str(f).startswith("records/") and f.suffix == ".ipynb"]
    assert len(records) >= 10
    p = subprocess.run(["git", "check-attr", "filter", "merge", "--", *records], cwd=root, capture_output=True, text=True, check=True)  # fmt: skip
    assert {line.rsplit(": ", 1)[1] for line in p.stdout.splitlines()} == {"unset"}


def test_clean_changes_nothing(tree):
    before = content(tree, "nbs/**/*.ipynb")
    run(tree, "nbdev-clean")
    assert changed(before, content(tree, "nbs/**/*.ipynb")) == [], "run `make sync`"


def test_clean_keeps_the_parameters_tag_and_drops_the_rest(tree):
    nb = tree / "nbs/guides/99_probe.ipynb"
    cell = {"cell_type": "code", "id": "a1", "source": "x: int = 1", "outputs": [], "execution_count": 7}
    cell["metadata"] = {"tags": ["parameters"], "scrolled": True}
    nb.parent.mkdir(parents=True, exist_ok=True)
    nb.write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    run(tree, "nbdev-clean", "--fname", str(nb))
    after = json.loads(nb.read_text())["cells"][0]
    assert after["metadata"] == {"tags": ["parameters"]} and after["execution_count"] is None


def test_readme_is_the_index(tree):
    before = (tree / "README.md").read_text(encoding="utf-8")
    run(tree, "python", "tools/readme.py")
    assert (tree / "README.md").read_text(encoding="utf-8") == before, "run `make readme`"
