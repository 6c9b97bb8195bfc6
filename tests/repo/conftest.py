"What the tests of the repository share: its root, its notebooks, its modules."

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def listed(*patterns: str) -> list[Path]:
    "The files of the working tree that git does not ignore, relative to the root, sorted."
    cmd = ["git", "ls-files", "-co", "--exclude-standard", "--deduplicate", "--", *patterns]
    out = subprocess.run(cmd, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(Path(line) for line in out.splitlines() if (ROOT / line).is_file())


def pytest_generate_tests(metafunc):
    "`notebook` runs a test for each notebook of nbs/, `stage` for each stage notebook."
    for name, pattern in {"notebook": "nbs/*.ipynb", "stage": "nbs/pipeline/*.ipynb"}.items():
        if name in metafunc.fixturenames:
            found = listed(pattern)
            metafunc.parametrize(name, found, ids=[str(f.relative_to("nbs")) for f in found])


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def files():
    return listed


@pytest.fixture
def tree(tmp_path) -> Path:
    "A copy of the working tree, without what git ignores."
    for f in listed():
        if f.parts[0] in ("benchmarks", "records") or (f.parts[0] == "examples" and f.name != "params.yaml"):
            continue
        (tmp_path / f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / f, tmp_path / f)
    return tmp_path
