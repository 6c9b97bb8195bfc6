"A retraining that is killed leaves nothing behind that the next one would take for the project's own."

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from llmkit.core.errors import KitError
from llmkit.flow import repro as flow
from llmkit.flow.dag import dag_write
from llmkit.flow.repro import BACKUP, alone, repro
from llmkit.flow.retrain import train_again, with_records

ROOT = Path(__file__).resolve().parents[2]
DIES = """
import os, sys
from llmkit.flow.retrain import train_again, with_records
def run(words, root):
    (root / "dvc.lock").write_text("half of the new\\n")
    os.kill(os.getpid(), 9)
train_again("new.jsonl", "r1", ".", run)
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    "The kit's own pipeline in another folder."
    for name in ("nbs", "llmkit"):
        os.symlink(ROOT / name, tmp_path / name)
    for name in ("params.yaml", "requirements.lock", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    dag_write(str(tmp_path))
    (tmp_path / "dvc.lock").write_text("stages: {}\n")
    (tmp_path / "new.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(project):
    "What a training changes."
    return {n: (project / n).read_text() for n in ("params.yaml", "dvc.yaml", "dvc.lock")}


def killed(project):
    "A training that somebody has killed."
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", DIES], cwd=project, env=env).returncode == -signal.SIGKILL


def test_the_next_one_begins_where_the_killed_one_did(project, capsys):
    was, met = files(project), []
    killed(project)
    assert files(project) != was
    assert train_again("new.jsonl", "r2", project, lambda words, root: met.append(words[0]) or 3) != 0
    assert met == ["checkout", "exp", "checkout"] and "was killed here" in capsys.readouterr().out
    assert files(project) == was and not (project / BACKUP).exists()


def test_what_a_person_has_written_since_is_not_undone(project):
    killed(project)
    mine = (project / "params.yaml").read_text() + "# mine\n"
    (project / "params.yaml").write_text(mine)
    train_again("new.jsonl", "r2", project, lambda words, root: 3)
    assert (project / "params.yaml").read_text() == mine


def test_one_at_a_time(project):
    def second(words, root):
        if words[0] == "exp":
            with pytest.raises(KitError, match="a retraining or another `llmkit repro` runs"):
                train_again("new.jsonl", "r2", project, second)
            assert json.loads((project / BACKUP).read_text())["was"]
        return 3

    train_again("new.jsonl", "r1", project, second)


def stub(monkeypatch, run):
    "`llmkit repro` with another runner of DVC: it is what DVC meets that counts."
    monkeypatch.setattr(flow, "dvc", run)
    monkeypatch.setattr(flow, "after", lambda folder, begun, code: code)


def test_repro_puts_back_what_a_killed_training_has_left(project, capsys, monkeypatch):
    was, met = files(project), []
    killed(project)
    assert files(project) != was
    stub(monkeypatch, lambda words, root: met.append((words[0], files(root) == was)) or 0)
    assert repro(project=str(project)) == 0
    assert met == [("checkout", True), ("repro", True)] and "was killed here" in capsys.readouterr().out
    assert not (project / BACKUP).exists()


def test_while_the_dvc_of_a_killed_training_lives_nobody_touches_the_project(project, monkeypatch):
    (project / "stand_in").mkdir()
    lives = "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(600)\n"
    (project / "stand_in/dvc.py").write_text(lives)
    code = "from llmkit.flow import repro, retrain; retrain.train_again('new.jsonl', 'r1', '.', repro.dvc)"
    path = os.pathsep.join([str(project / "stand_in"), str(ROOT)])
    p = subprocess.Popen([sys.executable, "-c", code], cwd=project, env=os.environ | {"PYTHONPATH": path})
    end = time.monotonic() + 60
    while not (project / "pid").is_file() or not (project / "pid").read_text():
        assert time.monotonic() < end and p.poll() is None
        time.sleep(0.05)
    p.kill(), p.wait()
    stub(monkeypatch, lambda words, root: 0)
    during, left = files(project), psutil.Process(int((project / "pid").read_text()))
    try:
        with pytest.raises(KitError, match="a retraining or another `llmkit repro` runs"):
            repro(project=str(project))
        assert files(project) == during and (project / BACKUP).exists()
    finally:
        left.kill()
    psutil.wait_procs([left], 30)
    assert repro(project=str(project)) == 0 and files(project) != during


def test_repro_keeps_what_a_person_has_written_since(project, monkeypatch):
    killed(project)
    mine = (project / "params.yaml").read_text() + "# mine\n"
    (project / "params.yaml").write_text(mine)
    stub(monkeypatch, lambda words, root: 0)
    repro(project=str(project))
    assert (project / "params.yaml").read_text() == mine and not (project / BACKUP).exists()


def test_repro_and_a_training_do_not_run_beside_each_other(project, monkeypatch):
    tried = []

    def beside(words, root):
        if words[0] == "repro":
            with pytest.raises(KitError, match="a retraining or another `llmkit repro` runs"):
                train_again("new.jsonl", "r1", project, beside)
            with alone(project, beside, several=True):  # another stage, say
                tried.append("repro")
        if words[0] == "exp":
            with pytest.raises(KitError, match="a retraining or another `llmkit repro` runs"):
                repro(project=str(project))
            tried.append("exp")
        return 3

    stub(monkeypatch, beside)
    repro(project=str(project))
    train_again("new.jsonl", "r1", project, beside)
    assert tried == ["repro", "exp"]


BLOCK = """prepare:
  source: csv  # where from
  # the file
  path:
  # of text files
  columns:  # as in the file
    prompt: question
    # the class
    label: class
  # text around a column
  templates:
    prompt: "Q: {text}"

  # file or split name
  splits:
  - a

# the next section
gate: {alpha: 0.05}
"""


def test_naming_the_records_keeps_every_comment():
    assert with_records(BLOCK, "new.jsonl") == (
        "prepare:\n  source: jsonl  # where from\n  # the file\n"
        '  path: "new.jsonl"\n  # of text files\n'
        "  columns: {}  # as in the file\n  # text around a column\n"
        "  templates: {}\n\n  # file or split name\n  splits: {}\n\n"
        "# the next section\ngate: {alpha: 0.05}\n"
    )
    flow = "prepare: {source: csv, path: , columns: {a: b}, templates: *t, splits: 'x'}\ngate: 1\n"
    want = 'prepare: {source: jsonl, path: "new.jsonl" , columns: {}, templates: {}, splits: {}}\ngate: 1\n'
    assert with_records("t: &t {}\n" + flow.replace("*t,", "*t ,"), "new.jsonl").replace(" ,", ",") == (
        "t: &t {}\n" + want.replace(" ,", ",")
    )


def test_records_that_would_not_be_read_are_not_trained_on():
    "A source that comes from elsewhere by a merge key stays, whatever is written into the section."
    shared = "d: &d {source: csv, path: old.csv, columns: {}, templates: {}, splits: {}}\n"
    with pytest.raises(KitError, match=r"prepare.source: cannot be set \(got 'csv'\)"):
        with_records(shared + "prepare:\n  <<: *d\n  n: 3\n", "new.jsonl")


def test_a_lock_file_that_was_not_there_is_gone_after_a_failure(project):
    (project / "dvc.lock").unlink()

    def fail(words, root):
        (root / "dvc.lock").write_text("half of the new\n")
        return 3

    assert train_again("new.jsonl", "r1", project, fail) != 0
    assert not (project / "dvc.lock").exists() and not (project / BACKUP).exists()


def test_putting_back_that_was_killed_halfway_is_done_to_its_end(project):
    was = files(project)
    killed(project)
    (project / "params.yaml").write_text(was["params.yaml"])  # and no more, before it was killed too
    assert files(project) != was
    with alone(project, lambda words, root: 0):
        assert files(project) == was and not (project / BACKUP).exists()
