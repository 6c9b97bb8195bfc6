"Two stages under the real DVC: what repeats, what comes from the cache, and what a stale pipeline does."

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

from llmkit.cli import main
from llmkit.core.errors import KitError
from llmkit.flow import repro as flow
from llmkit.flow.dag import dag_write
from llmkit.flow.notebook import NotebookError
from llmkit.flow.plan import cache_folder, check_cache, plan
from llmkit.flow.records import check_records, sync_records, verify_records
from llmkit.flow.repro import stop_below
from llmkit.flow.runs import list_runs

ROOT = Path(__file__).parents[2]
FIRST = "make('artifacts/one/out.json', lr)"
SECOND = """
import pathlib
make('artifacts/register/out.json', json.load(open('artifacts/one/out.json')) * 2)
make('artifacts/register/receipt.json', 'registered')
with pathlib.Path('calls.log').open('a') as f: f.write('called\\n')
"""


@pytest.fixture
def pipeline(project, empty_repo):
    "`one` makes a number, `register` reads it and leaves a receipt."
    project.params("seed: 7\none: {lr: 1e-4}\nregister: {}\n")
    project.stage("one", FIRST)
    project.stage("register", SECOND, number=2, parameters="seed: int = 0", needs={"out": "artifacts/one/out.json"})
    (project.path / ".gitignore").write_text("/artifacts/\n/.llmkit/\n/calls.log\n/.bin/\n/.home/\n")
    shutil.copytree(empty_repo, project.path, dirs_exist_ok=True)
    (project.path / ".dvc/config").write_text(f"[cache]\n    dir = {project.path.parent / 'cache'}\n")
    dag_write(project.path)
    return project


class Store(SimpleHTTPRequestHandler):
    "A folder over HTTP that takes files from those who have the password."

    def do_PUT(self):
        path = Path(self.translate_path(self.path))
        path.parent.mkdir(parents=True, exist_ok=True)
        body = b""
        while size := int(self.rfile.readline(), 16):  # DVC sends chunks
            body += self.rfile.read(size)
            self.rfile.readline()
        path.write_bytes(body)
        self.send_response(201)
        self.end_headers()

    def parse_request(self):
        known = super().parse_request() and self.headers["Authorization"] == "Basic Y2k6eA=="
        if not known:
            self.send_error(401)
        return known

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    "The address of a store."
    (tmp_path / "store").mkdir()
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Store, directory=str(tmp_path / "store")))
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()


def calls(project):
    log = project.path / "calls.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.mark.slow
def test_what_repeats_and_what_is_restored(pipeline, server):
    project, record = pipeline, pipeline.path / "artifacts/one/record.ipynb"
    project.sh("dvc", "repro")
    first = record.read_bytes()
    assert project.read("artifacts/one/run.json")["dvc"]["stage"] == "one"
    assert sync_records(project.path) == (["01_one.ipynb", "02_register.ipynb"], [])
    assert check_records(project.path) == verify_records(project.path) == []

    # prose and another stage's parameters repeat nothing
    nb = project.path / "nbs/pipeline/01_one.ipynb"
    nb.write_text(nb.read_text().replace("# The one", "# The one, better told"))
    assert "up to date" in project.sh("dvc", "repro").stdout

    # another value and back: the record comes from the run cache, and is the same to the byte
    project.params("seed: 7\none: {lr: 2e-4}\nregister: {}\n")
    project.sh("dvc", "repro", "one")
    assert record.read_bytes() != first
    assert len(check_records(project.path)) == 1  # the copy is stale, and is seen to be
    project.params("seed: 7\none: {lr: 1e-4}\nregister: {}\n")
    out = project.sh("dvc", "repro", "one").stdout
    assert "Running stage" not in out and "cached" in out, out
    assert record.read_bytes() == first and check_records(project.path) == []

    # a fresh clone fetches what was shared through a remote and runs `register` alone, on a registry that it may not know
    (project.path / "tools").mkdir()
    shutil.copy(Path(__file__).parents[2] / "tools/cache.sh", project.path / "tools")
    remote = ["env", f"DVC_REMOTE={server}", "DVC_REMOTE_USER=ci", "DVC_REMOTE_PASSWORD=x"]
    project.sh(*remote, "tools/cache.sh", "push")
    project.sh("git", "add", "-A")
    project.sh("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "all")
    clone = project.path.parent / "clone"
    subprocess.run(["git", "clone", "-q", project.path, clone], check=True)
    fresh = object.__new__(type(project))
    fresh.path = clone
    assert calls(fresh) == 0 and not (clone / "artifacts").exists()
    (clone / ".dvc/config.local").write_text("[cache]\n    dir = cache\n")  # its own, and empty
    fresh.sh(*remote, "tools/cache.sh", "pull")
    out = fresh.sh("dvc", "repro").stdout
    assert "Running stage 'register'" in out and "Running stage 'one'" not in out, out
    assert calls(fresh) == 1 and (clone / "artifacts/one/record.ipynb").read_bytes() == first
    assert check_records(clone) == []


def test_a_pipeline_that_ends_before_its_gate_reports_no_verdict_of_before(project, empty_repo):
    "The workflow's own step, before its `make repro`: DVC leaves what a stage made until that stage runs again."
    project.params("seed: 7\none: {lr: 1e-4}\ngate: {}\n")
    project.stage("one", FIRST)
    parts = {"parameters": "seed: int = 0", "needs": {"out": "artifacts/one/out.json"}}
    project.stage("gate", "make('artifacts/gate/out.json', 'pass')", number=2, **parts)
    shutil.copytree(empty_repo, project.path, dirs_exist_ok=True)
    dag_write(project.path)
    project.sh("dvc", "repro")
    flow_file = YAML(typ="safe").load((ROOT / ".github/workflows/pipeline.yml").read_text())
    commands = [s["run"] for s in flow_file["jobs"]["repro"]["steps"] if "run" in s]
    forget = commands[commands.index("make repro") - 1]
    verdict = project.path / "artifacts/gate/out.json"
    project.sh("bash", "-c", forget)
    out = project.sh("dvc", "repro").stdout
    assert verdict.is_file() and "Running stage" not in out, out  # nothing changed, so it is still this one's
    project.stage("one", "1 / 0")
    project.params("seed: 7\none: {lr: 2e-4}\ngate: {}\n")
    project.sh("bash", "-c", forget)
    assert project.sh("dvc", "repro", ok=False).returncode and not verdict.exists()


def test_a_stale_pipeline_is_refused_by_the_runner(pipeline):
    "A new import that `dvc.yaml` does not know would be cached under a wrong key."
    (pipeline.path / "llmkit/core").mkdir()
    (pipeline.path / "llmkit/core/extra.py").write_text("")
    with open(pipeline.path / "llmkit/stages/one.py", "a") as f:
        f.write("from llmkit.core import extra\n")
    done = pipeline.sh("dvc", "repro", "one", ok=False)
    assert done.returncode and "stages.one: is stale. Run `llmkit dag write`" in done.stderr


def test_a_stale_pipeline_is_refused_wherever_dvc_is_started(project, empty_repo):
    "From a folder above, DVC calls the stage `ml/dvc.yaml:one`."
    ml, top = type(project)(project.path / "ml"), project.path
    ml.params("seed: 7\none: {lr: 1e-4}\n")
    ml.stage("one", FIRST)
    dag_write(ml.path)
    (ml.path / "llmkit/core").mkdir()
    (ml.path / "llmkit/core/extra.py").write_text("")
    with open(ml.path / "llmkit/stages/one.py", "a") as f:
        f.write("from llmkit.core import extra\n")
    shutil.copytree(empty_repo, top, dirs_exist_ok=True)
    done = project.sh("dvc", "repro", "ml/dvc.yaml:one", ok=False)
    assert done.returncode and "stages.one: is stale. Run `llmkit dag write`" in done.stderr


@pytest.mark.parametrize("words", [["NOPE"], ["one", "NOPE"], ["dvc.yaml:NOPE"], ["--force", "NOPE"], ["--glob", "N*"]])
def test_a_stage_that_is_not_there_is_refused_before_dvc_is_asked(pipeline, monkeypatch, capsys, words):
    "DVC ends as after a stage that failed, and where a pattern fits nothing it runs them all."
    monkeypatch.setattr(flow, "dvc", lambda *_: pytest.fail("DVC was started"))
    assert main(["repro", *words, "--project", str(pipeline.path)]) == 2
    asked = words[-1].removeprefix("dvc.yaml:")
    assert f"no such stage (got '{asked}'). Known: one, register" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["-R", "nbs"], ["--recursive", "nbs"], ["-R", "one", "nbs"]])
def test_a_folder_without_stages_is_no_order_for_all_of_them(pipeline, monkeypatch, capsys, words):
    "DVC finds no stage in it, and runs every one."
    monkeypatch.setattr(flow, "dvc", lambda *_: pytest.fail("DVC was started"))
    assert main(["repro", *words, "--project", str(pipeline.path)]) == 2
    assert "/nbs: no dvc.yaml here or below. Name a folder of stages" in capsys.readouterr().err


def test_what_dvc_is_asked_for(pipeline, monkeypatch, capfd):
    monkeypatch.chdir(pipeline.path)
    (pipeline.path / "extra.dvc").touch()
    (pipeline.path / "sub/deep").mkdir(parents=True)
    (pipeline.path / "sub/deep/dvc.yaml").touch()
    asked = [["one"], ["dvc.yaml:one"], ["--glob", "o*"], ["dvc.yaml"], ["extra.dvc"], ["-R", "sub"], ["-R", "one"]]
    for words in ([], ["-f"], *asked):
        flow.check_stages(pipeline.path, words)
    assert main(["repro", "--nope"]) == 2  # DVC knows its own options
    assert "unrecognized arguments: --nope" in capfd.readouterr().err


def test_what_nobody_has_pushed_is_told_before_it_is_made_again(pipeline, capfd):
    "A clone of a commit whose run nobody has pushed, with a cache of its own."
    call = lambda *words: (main(["repro", *words, "--project", str(pipeline.path)]), capfd.readouterr())
    code, said = call("one")
    assert code == 0 and "dvc.lock: what" not in said.out  # nobody has run it yet
    (pipeline.path / "records/01_one.ipynb").unlink()
    code, said = call("one", "--dry")
    assert code == 0 and "verdict " not in said.out and not list((pipeline.path / "records").iterdir())  # made nothing
    shutil.rmtree(pipeline.path / "artifacts")
    code, said = call("one")
    assert code == 0 and "dvc.lock: what" not in said.out and calls(pipeline) == 0  # it is in the cache
    shutil.rmtree(pipeline.path / "artifacts")
    shutil.rmtree(pipeline.path.parent / "cache")
    code, said = call("--dry")
    assert code == 2 and "dvc.lock: what one made is neither here nor in DVC's cache" in said.out
    assert "--dry: what would run cannot be told" in said.err and "artifacts/one/out.json" in said.err
    assert "dvc.lock: what" not in call("one", "--pull")[1].out  # DVC asks the remote itself


def test_a_cache_that_cannot_be_written_is_refused_by_the_runner_too(pipeline, monkeypatch):
    "`dvc repro` alone would notice after the training."
    monkeypatch.setenv("DVC_STAGE", "one")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(KitError, match="DVC's cache cannot be written"):
        plan("one", pipeline.path)


def test_what_lies_in_the_project_is_no_module_of_dvc(pipeline):
    (pipeline.path / "queue.py").write_text("raise SystemExit('imported')")
    assert flow.dvc(["status", "-q"], pipeline.path) in (0, 1)
    assert flow.dvc(["version"], pipeline.path) == 0


def test_a_misspelt_project_is_not_the_one_above(pipeline, monkeypatch):
    monkeypatch.chdir(pipeline.path)
    (pipeline.path / "examples").mkdir()
    monkeypatch.setattr(flow, "dvc", lambda words, folder: pytest.fail("DVC was started"))
    for name in ("exampels/cards", "examples"):
        with pytest.raises(KitError, match=f"{name}/params.yaml: no such file"):
            flow.repro(project=name)


def test_a_failed_stage_keeps_its_record_of_failure(pipeline):
    "DVC deletes the outputs of the failed stage when it runs again; the run's folder stays."
    pipeline.stage("one", "1 / 0")
    dag_write(pipeline.path)
    assert pipeline.sh("dvc", "repro", ok=False).returncode
    pipeline.stage("one", FIRST)
    pipeline.sh("dvc", "repro", "one")
    kept = list((pipeline.path / ".llmkit/runs").glob("*-one-*/notebook.ipynb"))
    assert len(kept) == 1 and "ZeroDivisionError" in kept[0].read_text()


def test_the_same_notebook_without_its_tag_is_refused(pipeline):
    "What nbdev-clean does by default."
    nb = pipeline.path / "nbs/pipeline/01_one.ipynb"
    nb.write_text(nb.read_text().replace('["parameters"]', "[]"))
    with pytest.raises(NotebookError, match="needs one cell tagged 'parameters'"):
        dag_write(pipeline.path)
    done = pipeline.sh("dvc", "repro", ok=False)
    assert done.returncode and "needs one cell tagged 'parameters'" in done.stderr


@pytest.mark.slow
def test_the_whole_command(pipeline, monkeypatch, capfd):
    from llmkit.flow.repro import repro

    shutil.rmtree(pipeline.path / "records", ignore_errors=True)
    (pipeline.path / "dvc.yaml").unlink()
    (pipeline.path / ".gitignore").write_text("/calls.log\n")
    monkeypatch.chdir(pipeline.path)
    assert repro() == 0
    said = capfd.readouterr().out
    for word in ("verdict ", "card ", "site ", "next     llmkit serve\n"):
        assert f"\n{word}" in said
    assert re.search(r"^time +\d+ s in stages: (one|register) \d+, (one|register) \d+$", said, re.M)
    assert check_records(pipeline.path) == []
    ignored = pipeline.sh("git", "status", "--porcelain", "--untracked-files=all").stdout
    assert "artifacts" not in ignored and ".llmkit" not in ignored
    pipeline.stage("one", "raise SystemExit(7)")
    pipeline.params("seed: 7\none: {lr: 5e-4}\nregister: {}\n")
    assert repro() == 1


def test_a_cache_that_cannot_be_written_is_refused_before_anything_runs(pipeline, monkeypatch):
    from llmkit.flow.repro import repro

    cache = pipeline.path.parent / "cache"
    cache.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", cache], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs")
    monkeypatch.chdir(pipeline.path)
    try:
        with pytest.raises(KitError, match="DVC's cache cannot be written.*dvc cache dir --local"):
            repro()
        assert not (pipeline.path / ".llmkit/runs").exists() and not (pipeline.path / "artifacts").exists()
    finally:
        subprocess.run(["umount", cache], check=True)


def test_what_ends_by_itself_after_its_stage_was_stopped_is_not_interrupted():
    slow = "import subprocess, sys, time; subprocess.run(['sleep', '600']); time.sleep(2); sys.exit(3)"
    process = subprocess.Popen([sys.executable, "-c", slow])
    while not psutil.Process(process.pid).children():
        time.sleep(0.01)
    stop_below(process, signal.SIGTERM)
    assert process.returncode == 3


@pytest.mark.parametrize("reach", ["command", "terminal"])
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_command_ends_the_stage_that_runs(pipeline, reach, number, code):
    "A supervisor reaches the command alone, a terminal its whole process group."
    pid = pipeline.path / "pid"
    pipeline.stage("one", "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(600)", FIRST)
    dag_write(pipeline.path)
    call = [sys.executable, "-P", "-c", "import sys; from llmkit.cli import main; sys.exit(main(['repro', 'one']))"]
    env = {**os.environ, "DVC_NO_ANALYTICS": "1", "HOME": str(pipeline.path / ".home")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = subprocess.Popen(call, cwd=pipeline.path, env=env, start_new_session=True, **pipes)
    try:
        pipeline.wait_for(lambda: command.poll() is not None or pid.exists() and pid.read_text(), 120)
        assert command.poll() is None, command.communicate()
        begun = time.monotonic()
        (os.kill if reach == "command" else os.killpg)(command.pid, number)
        out, err = command.communicate(timeout=120)
        assert time.monotonic() - begun < 60
    finally:
        for group in [command.pid, *([int(pid.read_text())] if pid.exists() else [])]:
            subprocess.run(["kill", "-9", "--", f"-{group}"], capture_output=True)
    assert command.returncode == code and "Traceback" not in out + err, out + err
    assert not pipeline.alive(int(pid.read_text()))
    (run,) = list_runs(pipeline.path)
    assert run.status["state"] == "killed" and run.status["exit_code"] == code
    assert (run.folder / "notebook.ipynb").is_file() and "killed in cell" in err
    assert not (pipeline.path / "artifacts/one/record.ipynb").exists()


def test_another_seed_repeats_a_stage_that_has_no_parameter_for_it(pipeline):
    "The runner seeds every kernel, so the seed is part of what every stage reads."
    pipeline.stage("one", "import random; make('artifacts/one/out.json', random.random())")
    dag_write(pipeline.path)
    pipeline.sh("dvc", "repro", "one")
    first = pipeline.read("artifacts/one/out.json")
    pipeline.params("seed: 8\none: {lr: 1e-4}\nregister: {}\n")
    pipeline.sh("dvc", "repro", "one")
    assert pipeline.read("artifacts/one/out.json") != first


@pytest.mark.parametrize("said", ["{}  # ours, and not a part of the name", '"{}"', "'{}'"])
def test_the_cache_is_where_dvc_finds_it(tmp_path, said):
    "Its configuration may hold quotes, as DVC writes them around a comma, and comments."
    folder = tmp_path / "store"
    (tmp_path / "p/.dvc").mkdir(parents=True)
    (tmp_path / "p/.dvc/config").write_text(f"[cache]\n    dir = {said.format(folder)}\n")
    assert cache_folder(tmp_path / "p") == folder


def test_a_configuration_that_was_merged_by_halves_is_named(tmp_path):
    (tmp_path / ".dvc").mkdir()
    both = "[core]\n<<<<<<< HEAD\n    analytics = false\n=======\n    analytics = true\n>>>>>>> other\n"
    (tmp_path / ".dvc/config").write_text(both)
    with pytest.raises(KitError, match=r"\.dvc/config: not a configuration of DVC: .*line 2"):
        check_cache(tmp_path)


def test_a_verdict_on_what_was_made_before_is_not_shown_as_one_on_this(tmp_path):
    "As after `llmkit repro prepare` on other data: DVC leaves the verdict of the run before."
    (tmp_path / "artifacts/gate/verdict").mkdir(parents=True)
    (tmp_path / "artifacts/gate/verdict/verdict.json").write_text('{"outcome": "pass"}')

    def lock(made):
        "Three stages, of which the second has read `old`."
        rows = {"prepare": ([], ["data", made]), "evaluate": (["data", "old"], ["report", "r"]), "gate": (["report", "r"], ["verdict", "v"])}  # fmt: skip
        entry = lambda pair: [{"path": pair[0], "md5": pair[1]}] if pair else []
        stages = {n: {"cmd": n, "deps": entry(d), "outs": entry(o)} for n, (d, o) in rows.items()}
        (tmp_path / "dvc.lock").write_text(json.dumps({"schema": "2.0", "stages": stages}))

    lock("old")
    assert flow.overtaken(tmp_path) == set() and "\nverdict  pass (" in "\n" + flow.where_to_look(tmp_path)
    lock("new")
    assert flow.overtaken(tmp_path) == {"evaluate", "gate"}
    assert "verdict  pass, on what was made before: `llmkit repro` decides anew (" in flow.where_to_look(tmp_path)
