"The runner, by doing the bad thing."

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from llmkit.cli import main
from llmkit.core import errors
from llmkit.core.errors import KitError
from llmkit.core.files import take_lock, write_json
from llmkit.flow import runner
from llmkit.flow.doctor import doctor, run_problems
from llmkit.flow.plan import plan
from llmkit.flow.records import md5, verify_records
from llmkit.flow.repro import check_home
from llmkit.flow.runner import git_facts, report, run_stage, stage, surroundings, tags
from llmkit.flow.runs import RUNS, bury, bury_dead, describe, list_runs, open_run, prune, runs
from llmkit.gate.verdict import SCHEMA

ROOT = Path(__file__).parents[2]
DONE = "make('artifacts/x/out.json', 1)"


def outputs(project, id, name="x"):
    "What a cell printed, as the record has it."
    nb = project.read(f"artifacts/{name}/record.ipynb")
    return "".join("".join(o["text"]) for c in nb["cells"] if c["id"] == id for o in c["outputs"])


def test_values_and_surroundings_reach_the_kernel(project):
    ask = """
import os, sys, random, numpy
print(repr(lr), os.getcwd() == os.path.abspath('.'), os.environ['PYTHONHASHSEED'], os.environ['LLMKIT_INPUT_DIGEST'])
print('' in sys.path or os.getcwd() in sys.path, random.random(), numpy.random.rand())
"""
    project.stage("x", ask, DONE)
    todo = plan("x", project.path)
    assert run_stage("x", project.path).status["exit_code"] == 0
    printed = outputs(project, "c0")
    assert printed.startswith(f"0.0001 True 7 {todo.digest}\n")
    assert "False" in printed.splitlines()[1]  # a module that lies in the project cannot be imported
    injected = [c for c in project.read("artifacts/x/record.ipynb")["cells"] if c["id"] == "injected-parameters"]
    assert "lr = 0.0001" in "".join(injected[0]["source"])
    side = project.read("artifacts/x/run.json")
    assert side["digests"]["inputs"] == todo.digest and side["kernel_exit"] == 0


@pytest.mark.parametrize(
    "text", ["seed: 7\nx: {lr: 1e-4}", "seed: 7\nx: {lr: 1E-4}", "seed: 0o17\nx: {lr: 5}", "seed: 7\nx: {lr: .5}"]
)
def test_values_are_those_that_dvc_tracks(project, empty_repo, text, monkeypatch):
    import dvc.api

    project.stage("x", DONE)
    project.params(text)
    shutil.copytree(empty_repo, project.path, dirs_exist_ok=True)
    monkeypatch.chdir(project.path)
    shown = dvc.api.params_show("params.yaml")
    todo = plan("x", ".")
    assert (todo.values["lr"], todo.seed) == (shown["x"]["lr"], shown["seed"])


@pytest.mark.parametrize(
    "text, message",
    [
        ("x: {lr: '1e-4'}", "x.lr: must be a float, not a str"),
        ("x: {lr: 1e-4, lrr: 1}", "x.lrr: unknown parameter (got 1). Did you mean 'lr'?"),
        ("x: {}", "x.lr: missing parameter"),
        ("y: {lr: 1}", "x.lr: missing parameter"),
        ("x: [1]", "x: must be a dict"),
        ("x: {lr: true}", "x.lr: must be a float, not a bool"),
        ("x: {lr: 1, lr: 2}", "duplicate key"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(project, capsys, text, message):
    project.stage("x", DONE)
    project.params(text)
    assert stage("x", str(project.path)) == 2
    err = capsys.readouterr().err
    assert message in err and "params.yaml" in err and len(err.splitlines()) == 1
    assert not (project.path / ".llmkit/runs").exists()  # nothing ran


@pytest.mark.parametrize("tags", [(), ("parameters", "parameters")])
def test_a_notebook_without_exactly_one_parameters_cell_is_refused(project, capsys, tags):
    cells = [project.cell("lr: float = 0.5", t, id=f"p{i}") for i, t in enumerate(tags)] or [
        project.cell("lr: float = 0.5")
    ]
    project.stage("x", cells=[*cells, project.cell(DONE)])
    assert stage("x", str(project.path)) == 2
    assert "needs one cell tagged 'parameters'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["{x}", "a {} b{0", "it's #1 %20 \\n ü"])
def test_a_folder_of_any_name_runs(project, name, capfd):
    "Papermill puts values in the place of what stands in braces."
    project.path = project.path.rename(project.path.with_name(name))
    project.stage("x", DONE)
    assert run_stage("x", project.path).status["state"] == "completed"
    assert "KeyboardInterrupt" not in capfd.readouterr().err


def test_a_user_without_a_home_has_a_record(project, monkeypatch):
    "A container may run as a number that nobody has heard of."
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    project.stage("x", DONE)
    assert run_stage("x", project.path).status["state"] == "completed"
    with pytest.raises(KitError, match=r"HOME: no home of this user \(got None\). Set HOME to a folder"):
        check_home()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(project.path))
    check_home()


def test_two_identical_runs_give_identical_records(project):
    noise = "import time, sys; print(object()); print(time.time_ns(), file=sys.stderr); print(len({'a', 'b'}), list({'a', 'b'}))"
    project.stage("x", noise, DONE)
    nb = project.path / "nbs/pipeline/01_x.ipynb"
    body = json.loads(nb.read_text())
    body["cells"].append(project.cell("print(time.time_ns())", "volatile", id="v"))
    nb.write_text(json.dumps(body))
    first = [run_stage("x", project.path).id, (project.path / "artifacts/x/record.ipynb").read_bytes()]
    aside = project.read("artifacts/x/run.json")["aside"]
    second = [run_stage("x", project.path).id, (project.path / "artifacts/x/record.ipynb").read_bytes()]
    assert first[1] == second[1] and first[0] != second[0]
    assert [a["cell"] for a in aside] == ["c0", "v"]
    assert aside != project.read("artifacts/x/run.json")["aside"]
    assert str(project.path) not in first[1].decode()


def test_a_raising_cell_is_kept_with_its_traceback(project, capsys, monkeypatch):
    project.stage("x", "def inner():\n    return 1 / 0", "inner()", DONE)
    assert stage("x", str(project.path)) == 1
    err = capsys.readouterr().err
    assert "failed in cell 6 'The x'" in err and "ZeroDivisionError: division by zero" in err and "in inner" in err
    run = list_runs(project.path)[0]
    kept = json.loads((run.folder / "notebook.ipynb").read_text())
    assert any(o["output_type"] == "error" for c in kept["cells"] for o in c.get("outputs", []))
    assert "ZeroDivisionError" in (run.folder / "traceback.txt").read_text()
    monkeypatch.chdir(project.path)
    told = re.search("show it with `llmkit (.+)`", err)[1]
    assert main(told.split()) == 0 and "ZeroDivisionError" in capsys.readouterr().out
    assert not (project.path / "artifacts/x/record.ipynb").exists()


@pytest.mark.parametrize("last", [False, True])
def test_a_killed_kernel_is_not_completed(project, capsys, last):
    die = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    project.stage("x", DONE, die, *([] if last else ["print('never')"]))
    assert stage("x", str(project.path)) == 137
    assert "killed in cell 6" in capsys.readouterr().err
    run = list_runs(project.path)[0]
    assert run.status["state"] == "killed" and "SIGKILL of the kernel" in run.status["error"]["message"]
    kept = json.loads((run.folder / "notebook.ipynb").read_text())
    assert {c["metadata"]["papermill"]["status"] for c in kept["cells"]} == {"completed"}  # what papermill believes
    assert not (project.path / "artifacts/x/record.ipynb").exists()


def test_what_a_killed_run_left_under_temporary_names_is_swept_by_the_next(project):
    home = project.path / "artifacts/x"
    die = "import os, signal, pathlib\nhome = pathlib.Path('artifacts/x')\n(home / '.out.abc.tmp/half').mkdir(parents=True)"
    die += "\n(home / '.out.json.7.tmp').write_text('half')\nos.kill(os.getpid(), signal.SIGKILL)"
    project.stage("x", die, DONE)
    assert run_stage("x", project.path).status["exit_code"] == 137
    assert sorted(p.name for p in home.iterdir()) == [".out.abc.tmp", ".out.json.7.tmp"]
    project.stage("x", DONE)
    assert run_stage("x", project.path).status["exit_code"] == 0
    assert sorted(p.name for p in home.iterdir()) == ["out.json", "record.ipynb", "run.json"]


def test_a_stage_that_does_not_make_what_it_says_fails(project):
    project.stage("x", "print('done')")
    run = run_stage("x", project.path)
    assert run.status["exit_code"] == 1 and "without making the out" in run.status["error"]["message"]


def test_a_cell_that_may_raise_still_fails(project):
    project.stage("x", DONE)
    nb = project.path / "nbs/pipeline/01_x.ipynb"
    body = json.loads(nb.read_text())
    body["cells"].insert(-1, project.cell("1 / 0", "raises-exception", id="r"))
    nb.write_text(json.dumps(body))
    assert run_stage("x", project.path).status["state"] == "failed"


def decide(outcome):
    "The source of a cell that makes a verdict of one rule."
    rule = {"rule": "r", "outcome": outcome, "sentence": "x is 1. So", "metric": "x", "on": "engine"}
    verdict = {"schema": SCHEMA, "outcome": outcome, "reasons": [rule], "policy_digest": "", "reports": {}}
    return f"make('artifacts/x/verdict/verdict.json', {verdict!r})\n"


@pytest.mark.parametrize("outcome, code", [("pass", 0), ("inconclusive", 3), ("maybe", 1)])
def test_a_verdict_decides_the_exit_code(project, outcome, code):
    project.stage("x", decide(outcome), makes={"verdict": "artifacts/x/verdict"})
    run = run_stage("x", project.path)
    assert run.status["exit_code"] == code
    assert (run.folder / "record.ipynb").exists() == (outcome == "inconclusive")  # DVC drops it, the run keeps it
    if outcome == "maybe":
        assert "maybe" in run.status["error"]["message"]
    elif code:  # the rules that did not pass are told where the stage is
        assert "\n  ? x is 1\n" in report(run) and "unmet     ? x is 1" in describe(run)


def small_disk(path):
    "A file system of one megabyte, or None where it cannot be mounted."
    path.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], capture_output=True)
    return done.returncode == 0


def test_a_full_disk_fails_and_leaves_nothing_half_written(project, capsys):
    "The run's folder lies on a file system of one megabyte; a cell prints more than that."
    disk = project.path / ".llmkit"
    if not small_disk(disk):
        pytest.skip("may not mount a tmpfs")
    try:
        project.stage("x", "print('x' * 3_000_000)", DONE)
        assert stage("x", str(project.path)) == 1
        err = capsys.readouterr().err
        assert "No space left on device" in err
        run = list_runs(project.path)[0]
        assert run.status["state"] == "failed" and "No space left" in run.status["error"]["message"]
        assert not list(disk.rglob("*.tmp")) and not (project.path / "artifacts/x/record.ipynb").exists()
        project.stage("x", "print('small')", DONE)
        assert stage("x", str(project.path)) == 0
    finally:
        subprocess.run(["umount", disk], check=True)


def fill(file):
    "Take every block that is free."
    with open(file, "ab", buffering=0) as f, contextlib.suppress(OSError):
        while True:
            f.write(bytes(4096))


@pytest.mark.parametrize("code, state, why", [(1, "failed", "No space left"), (3, "completed", "outcome inconclusive")])
def test_a_disk_that_stays_full_leaves_the_last_word(project, capsys, monkeypatch, code, state, why):
    "Somebody else takes every block that comes free, as a log does."
    disk = project.path / ".llmkit"
    if not small_disk(disk):
        pytest.skip("may not mount a tmpfs")
    kept = runner.keep
    monkeypatch.setattr(runner, "keep", lambda *a: (fill(disk / "full"), kept(*a), fill(disk / "full")))
    last = "open('.llmkit/more', 'wb').write(bytes(1 << 21))" if state == "failed" else ""
    project.stage("x", decide("inconclusive") + last, makes={"verdict": "artifacts/x/verdict"})
    try:
        assert stage("x", str(project.path)) == code
        fill(disk / "full")
        assert runs(project=str(project.path)) == 0
        said, (run,) = capsys.readouterr(), list_runs(project.path)
        assert (run.status["state"], run.status["exit_code"]) == (state, code) and run.status["ended"]
        assert "are not kept: " in said.err and "No space left" in said.err and why in said.out
        assert sorted(p.name for p in run.folder.iterdir() if p.name != "notebook.ipynb") == ["lock", "status.json"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_run_that_was_killed_on_a_full_disk_is_closed(project):
    disk = project.path / ".llmkit"
    if not small_disk(disk):
        pytest.skip("may not mount a tmpfs")
    try:
        open_run(project.path, "x").close()
        fill(disk / "full")
        assert [r.status["state"] for r in bury_dead(project.path)] == ["killed"]
        assert list_runs(project.path)[0].status["state"] == "killed"
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_line_of_megabytes_takes_no_time(project):
    "nbclient's own joining of streams needs minutes for it."
    project.stage("x", "import time\nfor i in range(30):\n    print('x' * 100_000, end='', flush=True)", DONE)
    start = time.monotonic()
    run_stage("x", project.path)
    assert time.monotonic() - start < 240
    record = project.read("artifacts/x/record.ipynb")["cells"]
    assert [len(c["outputs"]) for c in record if c["id"] == "c0"] == [1]


def test_a_full_disk_where_the_record_goes(project):
    disk = project.path / "artifacts"
    if not small_disk(disk):
        pytest.skip("may not mount a tmpfs")
    try:
        project.stage("x", "print('x' * 3_000_000)", DONE)
        run = run_stage("x", project.path)
        assert run.status["exit_code"] == 1 and "No space left" in run.status["error"]["message"]
        assert sorted(p.name for p in (disk / "x").iterdir()) == ["out.json"]
        assert (run.folder / "notebook.ipynb").exists()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_stage_that_runs_is_not_started_twice(project, capsys):
    project.stage("x", DONE)
    turn = take_lock(project.path / ".llmkit/stage-x.lock")
    assert stage("x", str(project.path)) == 2
    assert "running already" in capsys.readouterr().err
    os.close(turn)


def test_a_missing_input_is_refused_before_the_kernel_starts(project):
    project.stage("x", DONE, needs={"base": "artifacts/base/base"})
    with pytest.raises(KitError, match="the base that x needs is missing"):
        plan("x", project.path)


def test_an_example_runs_the_stages_of_the_checkout(project):
    project.stage("x", "print(lr)", DONE)
    example = type(project)(project.path / "examples/cards")
    example.params("x: {lr: 3e-1}")
    assert run_stage("x", example.path).status["exit_code"] == 0
    assert outputs(example, "c0") == "0.3\n"
    assert not (project.path / "artifacts").exists()


def test_checkpoints_of_other_inputs_are_elsewhere(project):
    project.stage("x", DONE)
    first = plan("x", project.path).checkpoints
    assert plan("x", project.path).checkpoints == first
    project.params("seed: 7\nx: {lr: 2e-4}")
    by_value = plan("x", project.path).checkpoints
    with open(project.path / "llmkit/stages/x.py", "a") as f:
        f.write("STEPS = 3\n")
    by_code = plan("x", project.path).checkpoints
    assert len({first, by_value, by_code}) == 3


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_kernel_and_run(project, number, code):
    project.stage("x", "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(600)", DONE)
    process = project.spawn("x")
    project.wait_for(lambda: (project.path / "pid").exists() and (project.path / "pid").read_text())
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code and "killed in cell 5" in err, err
    assert not project.alive(int((project.path / "pid").read_text()))
    run = list_runs(project.path)[0]
    assert run.status["state"] == "killed" and run.status["exit_code"] == code
    assert "Traceback" not in err


def test_ctrl_c_while_the_kernel_ignores_sigterm_is_told_as_a_stop(project):
    slow = "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nopen('pid', 'w').write(str(os.getpid()))"
    project.stage("x", slow + "\ntime.sleep(600)", DONE)
    process = project.spawn("x")
    project.wait_for(lambda: (project.path / "pid").exists() and (project.path / "pid").read_text())
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "killed in cell 5" in err, err
    assert not project.alive(int((project.path / "pid").read_text()))


def test_another_kit_than_the_checkouts_does_not_run_in_its_name(project):
    "As in a second worktree that uses the environment of the first."
    project.stage("x", DONE)
    (project.path / "llmkit/core").mkdir()
    shutil.copy(errors.__file__, project.path / "llmkit/core/errors.py")
    with open(project.path / "llmkit/stages/x.py", "a") as f:
        f.write("from llmkit.core import errors\n")
    plan("x", project.path)  # the same code in another place is the same
    with open(project.path / "llmkit/core/errors.py", "a") as f:
        f.write("MORE = 1\n")
    with pytest.raises(KitError, match="llmkit/core/errors.py: is not the code that runs"):
        plan("x", project.path)


def test_a_checkout_of_another_user_has_a_commit_too(project, empty_repo):
    "As in a container that runs as root on a mounted folder."
    if os.getuid():
        pytest.skip("only root can give a folder away")
    shutil.copytree(empty_repo, project.path, dirs_exist_ok=True)
    project.sh("git", "add", "-A")
    project.sh("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "all")
    for folder in (project.path, project.path / ".git"):
        os.chown(folder, 54321, 54321)
    assert project.sh("git", "status", ok=False).returncode == 128
    commit = git_facts(project.path, project.path)["commit"]
    assert len(commit) == 40
    # a project beside the kit's checkout has one of its own, and MLflow is told both
    project.stage("x", DONE)
    todo = plan("x", project.path)
    assert "git_project" not in surroundings(todo)
    beside = replace(todo, checkout=ROOT, stage=replace(todo.stage, notebook=ROOT / "nbs/pipeline/01_x.ipynb"))
    facts = surroundings(beside)
    assert facts["git_project"]["commit"] == commit != facts["git"]["commit"]
    assert tags(facts, beside)["git.project.commit"] == commit


def test_runs_are_those_of_the_nearest_project(project, capsys, monkeypatch):
    open_run(project.path, "x").close()
    open_run(project.path, "y").close()
    (project.path / "data/deep").mkdir(parents=True)
    monkeypatch.chdir(project.path / "data/deep")
    assert main(["runs"]) == 0 and capsys.readouterr().out.count("killed") == 2
    for last, n in (("1", 1), ("0", 0), ("-1", 0)):
        assert main(["runs", f"--last={last}"]) == 0 and capsys.readouterr().out.count("killed") == n
    assert main(["runs", "--project", "../dta"]) == 2
    assert "../dta/params.yaml: no such file" in capsys.readouterr().err


def test_starting_a_stage_imports_nothing_heavy():
    "Seconds before every stage, and before a `repro` with nothing to do."
    heavy = ("scipy", "pandas", "torch", "transformers", "mlflow", "matplotlib", "onnxruntime", "fastapi", "dvc")
    code = f"import sys, llmkit.flow.repro, llmkit.flow.runner; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


MODEL = "from llmkit.core.artifact import build\nwith build('artifacts/x/model', 'model') as f:\n    (f / 'w.bin').write_text('weights')"


@pytest.mark.parametrize("harm", ["a byte", "a file", "the sidecar", "half of the sidecar"])
def test_a_record_does_not_hold_when_what_it_vouches_for_was_changed(project, harm):
    project.stage("x", MODEL, makes={"model": "artifacts/x/model"})
    assert run_stage("x", project.path).status["exit_code"] == 0
    home = project.path / "artifacts/x"
    outs = [{"path": f"artifacts/x/{f}", "md5": md5(home / f)} for f in ("record.ipynb", "run.json")]
    write_json(project.path / "dvc.lock", {"stages": {"x": {"outs": outs}}})
    assert verify_records(project.path) == []
    side = project.read("artifacts/x/run.json")
    if harm == "a byte":
        (home / "model/w.bin").write_text("Weights")
        want = ["x: artifacts/x/model: w.bin differs"]
    elif harm == "a file":
        (home / "model/w.bin").unlink()
        want = ["x: artifacts/x/model: w.bin is missing"]
    elif harm == "the sidecar":
        write_json(home / "run.json", side | {"git": {"commit": "another"}})
        want = ["x: run.json is not the one in dvc.lock; run `dvc repro`"]
    else:
        write_json(home / "run.json", {k: v for k, v in side.items() if k != "digests"})
        want = ["x: the record or its sidecar is not whole: KeyError('digests')"]
        want += ["x: run.json is not the one in dvc.lock; run `dvc repro`"]
    assert verify_records(project.path) == want


@pytest.mark.parametrize("victim", ["kernel", "runner"])
def test_what_a_killed_kernel_or_runner_has_started_ends_with_it(project, victim):
    "A training on several GPUs is a process of its own; it would write into the checkpoints of the next run."
    start = "import os, signal, subprocess\nchild = subprocess.Popen(['sleep', '600'])\nopen('pid', 'w').write(str(child.pid))"
    end = "os.kill(os.getpid(), signal.SIGKILL)" if victim == "kernel" else "child.wait()"
    project.stage("x", f"{start}\n{end}", DONE)
    pid, process = project.path / "pid", project.spawn("x")
    project.wait_for(lambda: pid.exists() and pid.read_text())
    try:
        if victim == "runner":
            process.kill()
        process.communicate(timeout=120)
        project.wait_for(lambda: not project.alive(int(pid.read_text())), 20)
    finally:
        subprocess.run(["kill", "-9", pid.read_text()], capture_output=True)


@pytest.mark.parametrize("left", ['{"cells": [{"cell_type": "code", "sou', "{}", "[]"])
def test_a_run_killed_while_its_notebook_was_saved_stops_no_other(project, left):
    "papermill writes in place, so a kill can leave half of a notebook."
    dead = open_run(project.path, "x")
    (dead.folder / "notebook.ipynb").write_text(left)
    dead.close()
    project.stage("x", DONE)
    assert stage("x", str(project.path)) == 0
    assert sorted(r.status["state"] for r in list_runs(project.path)) == ["completed", "killed"]


def test_a_run_that_cannot_be_written_down_leaves_nothing(project, capsys):
    disk = project.path / ".llmkit"
    if not small_disk(disk):
        pytest.skip("may not mount a tmpfs")
    try:
        project.stage("x", DONE)
        (disk / "full").write_bytes(bytes(1 << 20))
    except OSError:
        pass
    try:
        assert stage("x", str(project.path)) == 2 and "No space left on device" in capsys.readouterr().err
        (disk / "full").unlink()
        assert list_runs(project.path) == [] and stage("x", str(project.path)) == 0
    finally:
        subprocess.run(["umount", disk], check=True)


def test_the_doctor_can_close_what_a_container_and_a_crash_have_left(project, capsys):
    "A container has another name after each start, so that its dead runs look like those of another host."
    other = open_run(project.path, "x")
    other.save(host="container-1")
    other.close()
    (project.path / RUNS / "20260101T000000-x-ffff").mkdir()
    project.stage("x", DONE)
    assert bury_dead(project.path) == [] and len(run_problems(project.path)) == 2
    doctor(str(project.path), repair=True)
    assert run_problems(project.path) == []
    assert {r.status["state"] for r in list_runs(project.path)} == {"killed"}
    alive = open_run(project.path, "x")
    alive.save(host="container-2")
    assert bury_dead(project.path, anywhere=True) == []


@pytest.mark.skipif(os.getuid() != 0, reason="cannot become another user")
@pytest.mark.parametrize("alive", [True, False])
def test_whoever_may_only_read_sees_what_runs(alive, capfd):
    "A colleague looks at the runs of a service."
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        Path(folder, "params.yaml").write_text("seed: 1\n")
        run = open_run(folder, "train")
        if not alive:
            run.close()
        if (pid := os.fork()) == 0:
            os.setuid(65534)
            os._exit(runs(project=folder))
        assert os.waitpid(pid, 0)[1] == 0
        run.close()
    said = capfd.readouterr()
    assert f"{run.id}  running" in said.out and ("cannot write" in said.err) == (not alive)


def test_a_run_is_guarded_though_somebody_asks_whether_it_is_at_that_moment(project, monkeypatch):
    "A doctor's question holds the lock for a moment, and a run without a lock would be taken for dead."
    real, asked = fcntl.flock, []

    def flock(fd, how):
        if not asked:
            asked.append(open(f"/proc/self/fd/{fd if type(fd) is int else fd.fileno()}", "rb"))
            real(asked[0], fcntl.LOCK_SH)
            threading.Timer(0.3, asked[0].close).start()
        return real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    run = open_run(project.path, "x")
    assert run.lock is not None and not bury_dead(project.path)
    run.close()


def test_looking_at_git_takes_no_lock(project, empty_repo):
    "Or a commit at that moment would fail, and a kill leave the lock for ever."
    shutil.copytree(empty_repo, project.path, dirs_exist_ok=True)
    project.sh("git", "add", "-A")
    project.sh("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "all")
    index = project.path / ".git/index"
    os.utime(project.path / "params.yaml")  # a look that refreshes the index would write it
    before = index.stat()
    assert git_facts(project.path, project.path)["dirty"] is False
    assert index.stat().st_ino == before.st_ino


def test_a_run_that_is_being_forgotten_is_seen_whole_or_not_at_all(project, monkeypatch):
    "Whoever looked at half of one told of a run that cannot be read, and a repair made it a killed one."
    for _ in range(3):
        run = open_run(project.path, "x")
        run.save(state="completed", exit_code=0)
        run.close()
    with monkeypatch.context() as m:
        m.setattr(shutil, "rmtree", lambda *a, **kw: None)  # as when it is killed, or slow
        assert len(prune(project.path, keep=1)) == 2
    assert len(list_runs(project.path)) == 1
    (left,) = list_runs(project.path)
    left.status["state"] = "unreadable"  # as it was read a moment ago
    assert prune(project.path, keep=0) == [left.id] and not bury(left, anywhere=True)
    assert list((project.path / RUNS).iterdir()) == []
