"The pre-commit hooks let the tree pass as it is, and each of them stops the bad thing that it is for."

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ENV = Path(sys.executable).parent.parent
PROBES = [
    "llmkit/core/digests.py",
    "nbs/core_probe.ipynb",
    "nbs/index.ipynb",
    "params.yaml",
    "tools/probe.py",
    "big.txt",
]


@pytest.fixture
def repository(tree):
    "The copy of the tree as a repository with its own hooks, this environment, and a base that was made."
    from llmkit.model.tiny import train_tokenizer

    (tree / ".venv").symlink_to(ENV)
    for made in ("artifacts/base/base", "artifacts/quantize/engine"):
        (tree / made).mkdir(parents=True)
        train_tokenizer(tree / made, [f"question {i} about my card" for i in range(200)], 320)
    (tree / "nbs/core_probe.ipynb").write_text((tree / "nbs/guides/01_first_run.ipynb").read_text())
    (tree / "tools/probe.py").write_text('"A probe."\n')
    (tree / "big.txt").write_text("small\n")
    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    subprocess.run(["git", "add", "-A"], cwd=tree, check=True)
    return tree


def outcomes(repository):
    "Hook → Passed, Failed or Skipped, and everything that was printed."
    env = {**os.environ, "PYTHONPATH": str(repository), "PRE_COMMIT_HOME": str(repository / ".git/pre-commit")}
    args = [sys.executable, "-m", "pre_commit", "run", "--verbose", "--color", "never", "--files", *PROBES]
    said = subprocess.run(args, cwd=repository, env=env, capture_output=True, text=True).stdout
    return {hook: how for how, hook in re.findall(r"(Passed|Failed|Skipped)\n- hook id: (\S+)", said)}, said


def plant(repository):
    "Every bad thing at once."
    r = repository
    (r / "llmkit/core/digests.py").open("a").write("\nby_hand = 1\n")
    book = json.loads((r / "nbs/core_probe.ipynb").read_text())
    book["cells"][0]["metadata"]["scrolled"] = True
    (r / "nbs/core_probe.ipynb").write_text(json.dumps(book))
    (r / "nbs/index.ipynb").write_text((r / "nbs/index.ipynb").read_text().replace("# llmkit", "# llmkitt", 1))
    (r / "params.yaml").write_text((r / "params.yaml").read_text().replace("  rank: 64", "  rankk: 64"))
    key = "AKIA" + "QZ7XN3P5M2WV6K4T"  # in two parts, or this file would be stopped itself
    (r / "tools/probe.py").write_text(f'import os\nkey="{key}"\n')
    (r / "big.txt").write_text("x" * 600_000)
    (r / "artifacts/quantize/engine/chat_template.jinja").write_text("{{ messages[0].content }}")


def test_the_hooks_pass_the_tree_and_stop_bad_things(repository):
    good, said = outcomes(repository)
    assert set(good.values()) == {"Passed"} and len(good) == 9, said
    plant(repository)
    bad, said = outcomes(repository)
    assert set(bad.values()) == {"Failed"} and bad.keys() == good.keys(), said
    for word in (
        "imported but unused",
        "would be reformatted",
        "finetune.rankk: unknown parameter",
        "another chat template",
        "AWS Access Key",
        "big.txt: 600,000 bytes",
    ):
        assert word in said
    assert "by_hand" not in (repository / "llmkit/core/digests.py").read_text()  # and what can be mended is mended
    assert "llmkitt" in (repository / "README.md").read_text()


def test_the_drivers_for_notebooks_work_in_a_folder_with_blanks(tmp_path):
    "What `make hooks` writes into git's configuration is a line of a shell."
    home, root = tmp_path / "my kit", Path(__file__).parents[2]
    (home / "tools").mkdir(parents=True)
    for name in ("Makefile", "tools/with_env.sh", "nbs/index.ipynb"):
        shutil.copy(root / name, home / name.removeprefix("nbs/"))
    (home / ".venv").symlink_to(ENV)
    (home / ".gitattributes").write_text("*.ipynb merge=jupyternotebook diff=jupyternotebook\n")

    def sh(*words):
        return subprocess.run(words, cwd=home, capture_output=True, text=True, check=True).stdout

    sh("git", "init", "-q")
    for line in sh("make", "-n", "-o", ".venv/.installed", "hooks").splitlines():
        if line.startswith("git config"):
            sh("bash", "-c", line)
    commit = ("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam")
    sh("git", "add", "index.ipynb", ".gitattributes"), sh(*commit, "one")
    sh("git", "branch", "other")
    text = (home / "index.ipynb").read_text()
    (home / "index.ipynb").write_text(text.replace("# llmkit", "# llmkit again", 1))
    assert "# llmkit{+ again+}" in sh("git", "diff")
    sh(*commit, "two"), sh("git", "checkout", "-q", "other")
    (home / "index.ipynb").write_text(text.replace("Apache-2.0", "Apache-2.0 or later", 1))
    sh(*commit, "three")
    sh("git", "-c", "user.name=a", "-c", "user.email=a@b", "merge", "-q", "-m", "both", "-")
    merged = (home / "index.ipynb").read_text()
    assert "# llmkit again" in merged and "Apache-2.0 or later" in merged
