"MLflow is told the truth, whoever dies."

import os
import signal
import sqlite3
import time

import pytest

from llmkit.core.errors import KitError
from llmkit.core.files import held, take_lock, write_json
from llmkit.flow import tracking
from llmkit.flow.doctor import doctor, mlflow_problems
from llmkit.flow.records import md5
from llmkit.flow.repro import after
from llmkit.flow.runner import run_stage
from llmkit.flow.runs import list_runs, now, open_run
from llmkit.flow.tracking import connect, read_mlflow, settle

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
    run = list_runs(project.path)[0]
    # what was killed may take a moment to be gone
    project.wait_for(lambda: not held(run.folder / "lock") and not held(run.folder / "watch.lock"))
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


def test_a_server_that_is_away_neither_fails_the_pipeline_nor_hides_from_the_doctor(project, capsys, monkeypatch):
    (project.path / "settings.ini").write_text("[DEFAULT]\ntracking_uri = http://127.0.0.1:9\nexperiment = kit\n")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    project.stage("x", DONE)
    begun = now()
    assert run_stage("x", project.path).status["exit_code"] == 0
    lock = {"path": "artifacts/x/record.ipynb", "md5": md5(project.path / "artifacts/x/record.ipynb")}
    write_json(project.path / "dvc.lock", {"stages": {"x": {"outs": [lock]}}})
    assert after(project.path, begun, 0) == 0  # as after a `dvc repro` that went well
    assert "MLflow does not answer" in capsys.readouterr().err
    assert (project.path / "records/01_x.ipynb").is_file()  # what comes after MLflow is done
    (said,) = mlflow_problems(project.path)
    assert "MLflow does not answer" in said and "llmkit doctor --repair" in said


def test_on_a_server_the_doctor_minds_no_runs_but_the_projects_own(project, empty_mlflow, tmp_path, monkeypatch):
    project.track(empty_mlflow)
    shared = f"sqlite:///{tmp_path}/server.db"
    (project.path / "mlflow.db").rename(tmp_path / "server.db")
    monkeypatch.setenv("LLMKIT_TRACKING_URI", shared)
    project.stage("x", DONE)
    run = run_stage("x", project.path)
    settle(project.path, wait=60)
    client = connect(shared)
    experiment = client.get_experiment_by_name("kit").experiment_id
    client.create_run(experiment, tags={"llmkit.run": "20990101T000000-x-ffff"})  # of a colleague, who is at work
    assert mlflow_problems(project.path) == []
    # nor does it lose its own among a thousand of theirs
    with sqlite3.connect(tmp_path / "server.db") as db:
        names = [r[1] for r in db.execute("pragma table_info(runs)") if r[1] != "run_uuid"]
        row = ", ".join(names).replace("start_time", "start_time + 1 + n")
        count = "with recursive c(n) as (select 1 union all select n + 1 from c where n < 1000)"
        copy = f"{count} select 'copy' || n, {row} from runs, c where run_uuid = ?"
        db.execute(f"insert into runs (run_uuid, {', '.join(names)}) {copy}", [read_mlflow(run)["run_id"]])
    assert mlflow_problems(project.path) == []
    client.delete_run(read_mlflow(run)["run_id"])
    assert mlflow_problems(project.path) == [f"x: MLflow has no run {read_mlflow(run)['run_id']}"]


def test_a_server_that_goes_away_after_it_made_the_run_is_told_its_parameters_later(project, empty_mlflow, monkeypatch):
    project.track(empty_mlflow)
    run = open_run(project.path, "x", tags={}, parameters={"lr": 0.5})
    with monkeypatch.context() as m:
        m.setattr(tracking, "_log", lambda *a, **k: 1 / 0)
        with pytest.raises(KitError, match="MLflow does not answer"):
            tracking.sync(run, project.path)
    run.save(state="completed", ended=now())
    run.close()
    assert [r.id for r in settle(project.path)] == [run.id]
    where, _ = tracking.tracking_settings(project.path)
    assert connect(where).get_run(read_mlflow(run)["run_id"]).data.params == {"lr": "0.5"}


def test_whatever_a_user_calls_things_mlflow_learns_all_of_it(project, empty_mlflow, monkeypatch):
    "Names that it would refuse, more than a hundred of them, and values beyond its limit; nobody's shell says which server."
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "sqlite:////nowhere/else.db")
    project.track(empty_mlflow)
    many = {f"p{i}": i for i in range(250)}
    given = {"splits": {"data/": "train", "x" * 300: "test"}, "rules": "y" * 5999, "text": "z" * 6001} | many
    run = open_run(project.path, "x", tags={}, parameters=given)
    run.save(state="completed", ended=now(), metrics={"my suite!_engine.acc": 0.5} | {f"m{i}": 1.0 for i in range(600)})
    run.close()
    settle(project.path)
    client = connect(tracking.tracking_settings(project.path)[0])
    assert client._registry_uri == client._tracking_client.tracking_uri
    data = client.get_run(read_mlflow(run)["run_id"]).data
    assert data.params.items() >= {k: str(v) for k, v in many.items()}.items() and data.params["rules"] == "y" * 5999
    assert data.params["text"] == "z" * 5999 + "…" and data.params["splits.data_"] == "train"
    assert data.metrics["my suite__engine.acc"] == 0.5 and len(data.metrics) == 601


def test_whoever_talks_to_a_server_that_does_not_answer_holds_up_nobody_else(project, empty_mlflow):
    project.track(empty_mlflow)
    run = open_run(project.path, "x", tags={}, parameters={})
    run.save(state="completed", ended=now())
    run.close()
    talking = take_lock(project.path / tracking.TURN)
    begun = time.monotonic()
    assert settle(project.path, wait=1) == [] and time.monotonic() - begun < 10
    assert [r.id for r in tracking.untold(project.path)] == [run.id]
    os.close(talking)
    assert [r.id for r in settle(project.path, wait=1)] == [run.id] and tracking.untold(project.path) == []


@pytest.mark.parametrize("name", ["repo_feature%2Fx", "what? #1 ü's", "ba\\1ck{x}"])
def test_the_runs_of_a_folder_of_any_name_are_in_its_own_database(project, empty_mlflow, name):
    "Build servers call workspaces so; SQLAlchemy decodes an address, and took it for another project's."
    project.path = project.path.rename(project.path.with_name(name))
    project.track(empty_mlflow)
    run = open_run(project.path, "x", tags={})
    run.save(state="failed", ended=now(), exit_code=1)
    run.close()
    assert [r.id for r in settle(project.path)] == [run.id] and project.mlflow() == ["FAILED"]
    with sqlite3.connect(project.path / "mlflow.db") as db:
        db.execute("update runs set status = 'RUNNING'")
    (problem,) = mlflow_problems(project.path)
    assert "RUNNING, and nobody runs it" in problem


def test_a_database_that_cannot_be_opened_is_told_at_once(project, capsys):
    "MLflow tries ten times, for a hundred seconds, and prints each."
    project.track(__file__)
    began = time.monotonic()
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        connect(f"sqlite:///{project.path}/mlflow.db")
    (problem,) = mlflow_problems(project.path)
    assert "MLflow does not answer: file is not a database" in problem and time.monotonic() - began < 20


def test_a_database_is_made_by_one_at_a_time(project, empty_mlflow, monkeypatch):
    "The registration, or a watcher of another clone, has the same lock: two that make one database destroy each other's tables."
    project.track(empty_mlflow)
    seen, real = [], connect
    lock = project.path / "mlflow.db.lock"
    monkeypatch.setattr(tracking, "connect", lambda uri: (seen.append(held(lock)), real(uri))[1])
    run = open_run(project.path, "x", tags={})
    run.save(state="failed", ended=now(), exit_code=1)
    run.close()
    assert settle(project.path) and seen == [True] and project.mlflow() == ["FAILED"]
    from llmkit.release import registry

    with registry.locked_registry(tracking.tracking_settings(project.path)[0]):
        assert held(lock)
