"The questions of the example are fetched as they were published, or not at all, to where its tests look for them in CI."

import os
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
NAMES = ("test.csv", "train.csv")


def fetch(folder, source):
    "`make banking77-data` with a folder in place of the public address."
    env = os.environ | {"FROM": source.as_uri()}
    cmd = ["make", "-s", "banking77-data", f"BANKING77={folder}"]
    return subprocess.run(cmd, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("there, said", [(False, "cannot fetch file:"), (True, "train.csv is another file")])
def test_what_is_not_there_or_another_file_is_refused_and_not_kept(tmp_path, there, said):
    (source := tmp_path / "source").mkdir()
    for name in NAMES if there else ():
        (source / name).write_text("text,category\nhello,greeting\n")
    done = fetch(tmp_path / "data", source)
    assert done.returncode and said in done.stderr and not list((tmp_path / "data").iterdir()), done.stderr


def test_the_published_files_come_once_and_a_changed_one_again(shared, tmp_path):
    data, source, nowhere = tmp_path / "data", shared("banking77"), tmp_path
    assert fetch(data, source).returncode == 0 and sorted(p.name for p in data.iterdir()) == [*NAMES]
    assert fetch(data, nowhere).returncode == 0  # nothing to fetch
    with open(data / "test.csv", "a") as f:
        f.write("hello,greeting\n")
    assert fetch(data, nowhere).returncode and fetch(data, source).returncode == 0
    assert all((data / name).read_bytes() == (source / name).read_bytes() for name in NAMES)


def test_ci_fetches_them_before_the_tests_and_tells_the_tests_where():
    steps = YAML(typ="safe").load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["steps"]
    before, then = (s["run"] for s in steps[-2:])
    assert before == 'make banking77-data BANKING77="$RUNNER_TEMP/data/banking77"'
    assert then == 'LLMKIT_SHARED_DATA="$RUNNER_TEMP/data" make test'  # tests/conftest.py looks for banking77 in it
    assert not any(s.get("continue-on-error") for s in steps)
