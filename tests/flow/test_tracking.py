"MLflow is told the truth, whoever dies."

import os
import signal

import pytest

from llmkit.core.files import held
from llmkit.flow.doctor import doctor
from llmkit.flow.runner import run_stage
from llmkit.flow.runs import list_runs
from llmkit.flow.tracking import settle

SLEEP = "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(600)"
DONE = "make('artifacts/x/out.json', 1)"


def settled(project):
    "Wait until no watcher is at work."
    project.wait_for(lambda: not any(held(r.folder / "watch.lock") for r in list_runs(project.path)))


def test_a_completed_a_failed_and_a_killed_run(project, empty_mlflow):
    project.track(empty_mlflow)
    project.stage("x", DONE)
    done = run_stage("x", project.path)
    project.stage("x", "raise SystemExit(3)")
    failed = run_stage("x", project.path)
    project.stage("x", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", DONE)
    killed = run_stage("x", project.path)
    assert [r.status["state"] for r in (done, failed, killed)] == ["completed", "failed", "killed"]
    settle(project.path, wait=60)
    assert project.mlflow() == ["FINISHED", "FAILED", "KILLED"]


def test_ctrl_c_is_told_as_killed(project, empty_mlflow):
    project.track(empty_mlflow)
    project.stage("x", SLEEP, DONE)
    process = project.spawn("x")
    project.wait_for(lambda: (project.path / "pid").exists() and (project.path / "pid").read_text())
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=300) == 130
    settle(project.path, wait=60)
    assert project.mlflow() == ["KILLED"]


def test_the_runner_is_killed_and_its_watcher_says_so(project, empty_mlflow):
    project.track(empty_mlflow)
    project.stage("x", SLEEP, DONE)
    process = project.spawn("x")
    project.wait_for(
        lambda: (
            (project.path / "pid").exists() and (project.path / "pid").read_text() and project.mlflow() == ["RUNNING"]
        )
    )
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    project.wait_for(lambda: project.mlflow() == ["KILLED"])
    project.wait_for(
        lambda: not project.alive(int((project.path / "pid").read_text()))
    )  # the kernel does not outlive its runner
    settled(project)
    run = list_runs(project.path)[0]
    assert run.status["state"] == "killed" and run.status["error"]["cell"] is not None
    assert (run.folder / "notebook.ipynb").exists()


@pytest.mark.slow
def test_runner_and_watcher_are_killed_and_the_next_run_says_so(project, empty_mlflow, capsys):
    project.track(empty_mlflow)
    project.stage("x", SLEEP, DONE)
    process = project.spawn("x")
    project.wait_for(
        lambda: (
            (project.path / "pid").exists() and (project.path / "pid").read_text() and project.mlflow() == ["RUNNING"]
        )
    )
    watchers = [int(p) for p in os.listdir("/proc") if p.isdigit() and parent(p) == process.pid and is_watcher(p)]
    for pid in [*watchers, process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert len(watchers) == 1 and project.mlflow() == ["RUNNING"]
    project.stage("x", DONE)
    assert doctor(str(project.path)) == 1
    said = capsys.readouterr().out
    assert "says 'running', and nobody runs it" in said and "is RUNNING, and nobody runs it" in said
    assert run_stage("x", project.path).status["exit_code"] == 0
    settle(project.path, wait=60)
    assert project.mlflow() == ["KILLED", "FINISHED"]


def parent(pid):
    try:
        return int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
    except OSError:
        return None


def is_watcher(pid):
    return b"llmkit.flow.tracking" in open(f"/proc/{pid}/cmdline", "rb").read()


def test_a_server_that_is_down_does_not_lose_the_run(project, capsys):
    (project.path / "settings.ini").write_text("[DEFAULT]\ntracking_uri = http://127.0.0.1:9\nexperiment = kit\n")
    project.stage("x", DONE)
    run = run_stage("x", project.path)
    assert run.status["exit_code"] == 0 and (project.path / "artifacts/x/record.ipynb").exists()
    settled(project)
    assert not (run.folder / "mlflow.json").exists()
    assert (run.folder / "tracking.log").read_text()  # what went wrong is kept
