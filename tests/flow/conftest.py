"A small project of its own: stages as notebooks, a module for each, parameters, and settings when asked for."

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

MAKE = """
import json, pathlib
def make(path, value):
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(path).write_text(json.dumps(value))
"""


def cell(source, *tags, kind="code", id="c"):
    body = {"cell_type": kind, "source": source, "metadata": {"tags": list(tags)}, "id": id}
    return body | ({"outputs": [], "execution_count": None} if kind == "code" else {})


def wait_for(condition, seconds=300):
    "Wait until something is so."
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def alive(pid):
    "Whether a process runs (a zombie does not)."
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Project:
    "A folder with `params.yaml`, `nbs/pipeline` and `llmkit/stages`, and helpers at hand."

    cell, wait_for, alive = staticmethod(cell), staticmethod(wait_for), staticmethod(alive)

    def __init__(self, folder):
        self.path = Path(folder)
        self.path.mkdir(parents=True, exist_ok=True)
        self.params("seed: 7\nx: {lr: 1e-4}\n")

    def params(self, text):
        (self.path / "params.yaml").write_text(text)

    def stage(
        self, name, *sources, number=1, parameters="lr: float = 1e-3", needs=None, makes=None, data=None, cells=None
    ):
        "Write a stage: its code cells, or all its cells."
        for sub in ("nbs/pipeline", "llmkit/stages"):
            (self.path / sub).mkdir(parents=True, exist_ok=True)
        code = [cell(s, id=f"c{i}") for i, s in enumerate(sources)]
        head = [
            cell(f"# The {name}", kind="markdown", id="t"),
            cell(MAKE, id="m"),
            cell(parameters, "parameters", id="p"),
        ]
        body = {"cells": cells or head + code, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
        (self.path / f"nbs/pipeline/{number:02}_{name}.ipynb").write_text(json.dumps(body))
        lits = {"NEEDS": needs or {}, "MAKES": makes if makes is not None else {"out": f"artifacts/{name}/out.json"}}
        lits |= {"DATA": data} if data else {}
        text = "".join(f"{k} = {v!r}\n" for k, v in lits.items())
        (self.path / f"llmkit/stages/{name}.py").write_text(text)

    def track(self, template):
        "Log to a SQLite file of this project, which starts as a copy of an empty one."
        (self.path / "settings.ini").write_text("[DEFAULT]\ntracking_uri = sqlite:///mlflow.db\nexperiment = kit\n")
        shutil.copy(template, self.path / "mlflow.db")

    def mlflow(self):
        "The end states in MLflow's database, oldest first, read without MLflow."
        with sqlite3.connect(self.path / "mlflow.db", timeout=120) as db:
            return [r[0] for r in db.execute("select status from runs order by start_time")]

    def spawn(self, name, **env):
        "Run a stage in a process of its own, as the command line does."
        code = f"import sys; from llmkit.flow.runner import stage; sys.exit(stage({name!r}))"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, "-P", "-c", code], cwd=self.path, env={**os.environ, **env}, **pipes)

    def read(self, path):
        return json.loads((self.path / path).read_text())

    def sh(self, *words, ok=True):
        "A command with an `llmkit` on the path that knows `stage`."
        bin = self.path / ".bin"
        if not bin.is_dir():
            bin.mkdir()
            call = "import sys; from llmkit.flow.runner import stage; sys.exit(stage(sys.argv[2]))"
            (bin / "llmkit").write_text(f"#!{sys.executable} -P\n{call}\n")
            (bin / "llmkit").chmod(0o755)
        path = os.pathsep.join([str(bin), str(Path(sys.executable).parent), os.environ["PATH"]])
        env = {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1", "HOME": str(self.path / ".home")}
        done = subprocess.run([str(w) for w in words], cwd=self.path, env=env, capture_output=True, text=True)
        assert not ok or done.returncode == 0, done.stdout + done.stderr
        return done


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path / "project")


@pytest.fixture(scope="session")
def empty_repo(tmp_path_factory):
    "A repository of git and DVC, made once."
    path = tmp_path_factory.mktemp("repo")
    for words in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(words, cwd=path, check=True)
    return path


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory):
    "An MLflow database with its tables, made once."
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    code = f"from llmkit.flow.tracking import connect; connect('sqlite:///{path}').create_experiment('kit')"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return path
