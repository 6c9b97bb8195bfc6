"""Registration against the real MLflow, on SQLite and over HTTP: once is enough, twice changes nothing."""

import multiprocessing as mp
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path

import pytest
from release_road import run_card, run_gate, run_package

from llmkit.core.artifact import open_artifact
from llmkit.core.errors import KitError
from llmkit.core.files import read_json
from llmkit.release.ledger import read_ledger
from llmkit.release.lineage import read_lineage, show_lineage
from llmkit.release.registry import (
    dvc_md5,
    dvc_reference,
    locked_registry,
    register,
    register_release,
    versions,
)
from llmkit.release.release import Release, read_release
from llmkit.release.releases import list_releases

RELEASE, RECEIPT = "artifacts/register/release", "artifacts/register/receipt.json"


def run_register():
    from llmkit.stages.register import run

    return run(model_name="bank-support", alias="challenger")


def dump(path="mlflow.db"):
    with sqlite3.connect(path) as db:
        return list(db.iterdump())


def test_the_whole_road_registers_once(carded, capsys):
    first = run_register()
    release, said = read_release(RELEASE), read_json(RECEIPT)
    assert (said["version"], said["alias"], said["release"]) == (1, "challenger", release.digest)
    (v,) = versions("sqlite:///mlflow.db", "bank-support")
    assert v.aliases == ("challenger",)
    for role in ("bundle", "verdict", "card"):
        assert v.tags[role] == getattr(release, role)
    for role, place in {"base": "base/base", "dataset": "prepare/dataset", "delta": "finetune/delta"}.items():
        assert v.tags[role] == open_artifact(f"artifacts/{place}").digest
    assert v.tags["record"] and v.tags["path"] == "artifacts/package/bundle"
    assert v.source.startswith("file:///") and v.source.endswith("artifacts/package/bundle")
    assert set(release.records) == {
        "base", "prepare", "finetune", "merge", "quantize", "evaluate", "gate", "package", "card",
    }  # fmt: skip
    assert list_releases() == 0
    assert "| 1 | challenger |" in capsys.readouterr().out
    before, ledger = dump(), open("ledger.jsonl", "rb").read()
    assert run_register().digest == first.digest
    assert register_release() == 0
    assert read_json(RECEIPT) == said
    assert dump() == before and open("ledger.jsonl", "rb").read() == ledger
    assert not [r for r in before if "model.onnx" in r or "safetensors" in r]
    assert show_lineage("artifacts") == 0
    kinds = {n.kind for n in read_lineage("artifacts").nodes.values()}
    assert kinds == {"base", "dataset", "delta", "model", "engine", "report", "verdict", "bundle", "card", "release"}


def test_a_fresh_clone_with_a_full_cache_ends_with_version_1_and_the_same_release(carded, monkeypatch):
    run_register()
    digest, ledger = read_release(RELEASE).digest, open("ledger.jsonl", "rb").read()
    monkeypatch.setenv("LLMKIT_TRACKING_URI", "sqlite:///fresh.db")
    os.remove(RECEIPT)
    assert register_release() == 0
    said = read_json(RECEIPT)
    assert (said["version"], said["release"]) == (1, digest)
    assert versions("sqlite:///fresh.db", "bank-support")[0].aliases == ("challenger",)
    assert open("ledger.jsonl", "rb").read() == ledger


def test_a_new_model_becomes_the_next_version_and_takes_the_alias(carded):
    run_register()
    run_gate({"rules": [{"metric": "accuracy", "min": 0.7}]})
    run_package()
    run_card()
    run_register()
    found = versions("sqlite:///mlflow.db", "bank-support")
    assert [(v.version, v.aliases) for v in found] == [(1, ()), (2, ("challenger",))]
    one, two = read_ledger("ledger.jsonl")
    assert (one.before, one.after, two.before, two.after) == (
        None,
        found[0].release,
        found[0].release,
        found[1].release,
    )
    assert found[1].tags["ledger"] == two.digest


def test_parts_that_do_not_belong_together_are_not_bound(carded):
    run_gate({"rules": [{"metric": "accuracy", "min": 0.7}]})
    run_package()
    with pytest.raises(KitError, match="made for the bundle"):
        run_register()
    assert not os.path.exists(RELEASE) and not os.path.exists("mlflow.db")


def test_another_bundle_in_the_place_is_not_registered(carded):
    run_register()
    run_gate({"rules": [{"metric": "accuracy", "min": 0.7}]})
    run_package()
    with pytest.raises(KitError, match="is not the bundle of the release"):
        register_release()


def one_of_many(uri, ledger, gate, release, queue):
    gate.wait()
    v = register(release, uri, "file:///bundle", ledger=ledger)
    queue.put((v.version, v.aliases))


@pytest.mark.parametrize("same", [True, False])
def test_processes_that_register_at_once(tmp_path, same):
    import mlflow  # noqa: F401  imported once, before the processes part

    ctx, n = mp.get_context("fork"), 4
    uri, ledger = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "ledger.jsonl"
    gate, queue = ctx.Barrier(n), ctx.Queue()
    releases = [Release("bank", f"sha256:{0 if same else i}", "sha256:v", "sha256:c") for i in range(n)]
    args = [(uri, ledger, gate, r, queue) for r in releases]
    workers = [ctx.Process(target=one_of_many, args=a) for a in args]
    for w in workers:
        w.start()
    for w in workers:
        w.join(120)
    assert [w.exitcode for w in workers] == [0] * n
    got = [queue.get(timeout=120)[0] for _ in workers]
    found, entries = versions(uri, "bank"), read_ledger(ledger)
    assert len(found) == len(set(got)) == len({e.after for e in entries}) == (1 if same else n)
    assert sum(len(v.aliases) for v in found) == 1
    assert register(releases[0], uri, "file:///bundle", ledger=ledger).version in got


def test_two_versions_made_at_once_are_reconciled_to_the_lower(tmp_path, monkeypatch):
    "The race itself, made certain: the first look finds nothing, although the version is there by then."
    import llmkit.release.registry as registry

    uri, ledger = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "ledger.jsonl"
    release = Release("bank", "sha256:b", "sha256:v", "sha256:c")
    assert register(release, uri, "file:///bundle", ledger=ledger).version == 1
    real, looks = registry.versions, []

    def blind_once(*args):
        looks.append(args)
        return [] if len(looks) == 1 else real(*args)

    monkeypatch.setattr(registry, "versions", blind_once)
    assert register(release, uri, "file:///bundle", ledger=ledger).version == 1
    assert [v.version for v in real(uri, "bank")] == [1]


@pytest.mark.parametrize("step", ["append", "tag"])
def test_what_a_try_left_undone_the_next_one_does(tmp_path, monkeypatch, step):
    "The alias is set, and then the ledger, or the tag that names its entry, cannot be written."
    import mlflow

    import llmkit.release.registry as registry

    uri, ledger = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "ledger.jsonl"
    release = Release("bank", "sha256:b", "sha256:v", "sha256:c")

    def full(*args):
        raise KitError("no space left")

    with monkeypatch.context() as m, pytest.raises(KitError, match="no space left"):
        place, name = (registry, "append") if step == "append" else (mlflow.MlflowClient, "set_model_version_tag")
        m.setattr(place, name, full)
        register(release, uri, "file:///bundle", ledger=ledger)
    assert versions(uri, "bank")[0].aliases == ("challenger",)
    v = register(release, uri, "file:///bundle", ledger=ledger)
    (entry,) = read_ledger(ledger)
    assert entry.after == release.digest and versions(uri, "bank") == [v] and v.tags["ledger"] == entry.digest
    before = dump(tmp_path / "mlflow.db")
    assert register(release, uri, "file:///bundle", ledger=ledger) == v
    assert len(read_ledger(ledger)) == 1 and dump(tmp_path / "mlflow.db") == before


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def server(tmp_path):
    "A real MLflow server on loopback."
    port = free_port()
    args = [
        "server",
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    args += ["--workers", "1", "--artifacts-destination", str(tmp_path / "artifacts")]
    log = open(tmp_path / "server.log", "w")
    proc = subprocess.Popen([sys.executable, "-m", "mlflow", *args], stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(1000):
            if proc.poll() is not None:
                pytest.fail((tmp_path / "server.log").read_text()[-2000:])
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.3)
        else:
            pytest.fail("the server did not answer in 300 s")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(proc.pid, 15)
        proc.wait(120)
        log.close()


@pytest.mark.slow
def test_over_http_a_version_points_to_dvc_and_to_nothing_local(carded, server, monkeypatch):
    run_register()
    monkeypatch.setenv("LLMKIT_TRACKING_URI", server)
    with pytest.raises(KitError, match="needs a bundle that DVC holds"):
        register_release()
    bundle = "artifacts/package/bundle"
    address = dvc_md5(bundle)
    with open("dvc.lock", "w") as f:
        f.write(
            f"schema: '2.0'\nstages:\n  package:\n    cmd: x\n    outs:\n    - path: {bundle}\n      md5: {address}\n"
        )
    assert register_release() == 0
    (v,) = versions(server, "bank-support")
    assert v.source == f"dvc://{address}/{bundle}" and v.tags["dvc_md5"] == address
    assert v.aliases == ("challenger",)
    assert register_release() == 0 and len(versions(server, "bank-support")) == 1


def dvc(*args):
    done = subprocess.run([sys.executable, "-m", "dvc", *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_address_is_the_one_that_dvc_gives(packaged):
    "Against DVC itself: run by DVC, linked into the bundle, restored from the cache."
    shutil.rmtree("artifacts/package")
    with open("make.py", "w") as f:
        f.write(
            "from llmkit.release.bundle import place\nplace('artifacts/quantize/engine', 'artifacts/package/bundle')\n"
        )
    dvc("init", "--no-scm", "-q")
    outs = ["-o", "artifacts/package/bundle", "-d", "artifacts/quantize/engine"]
    dvc("stage", "add", "-q", "-n", "package", *outs, f"{sys.executable} make.py")
    dvc("repro", "-q")
    address = dvc_reference("artifacts/package/bundle")
    assert address and address in open("dvc.lock").read()
    weights = max(os.scandir("artifacts/package/bundle"), key=lambda p: p.stat().st_size).name
    shutil.rmtree("artifacts/package/bundle")
    dvc("checkout", "-q")
    assert dvc_md5("artifacts/package/bundle") == address
    path = f"artifacts/package/bundle/{weights}"
    data = open(path, "rb").read()
    os.remove(path)
    open(path, "wb").write(data[:-1] + b"?")
    assert dvc_reference("artifacts/package/bundle") is None


def tag(key, value):
    with sqlite3.connect("mlflow.db") as db:
        db.execute("UPDATE model_version_tags SET value = ? WHERE key = ?", (value, f"llmkit.{key}"))


def test_a_registry_and_a_ledger_that_disagree_are_told(carded, capsys):
    from llmkit.release.registry import registry_client

    run_register()
    assert list_releases() == 0
    whole, db = open("ledger.jsonl", "rb").read(), open("mlflow.db", "rb").read()
    registry_client("sqlite:///mlflow.db").set_registered_model_alias("bank-support", "champion", "1")  # by hand
    assert list_releases() == 1 and "version 1 is champion, and by the ledger nobody is" in capsys.readouterr().out
    open("mlflow.db", "wb").write(db)
    open("ledger.jsonl", "wb").close()  # an older one
    assert list_releases() == 1 and "is not in the ledger" in capsys.readouterr().out
    open("ledger.jsonl", "wb").write(whole)
    assert list_releases() == 0


@pytest.mark.parametrize("key", ["bundle", "verdict", "dataset", "record"])
def test_a_version_whose_tags_were_edited_is_not_registered_again(carded, key):
    run_register()
    before = open("ledger.jsonl", "rb").read()
    tag(key, "sha256:" + "0" * 64)
    with pytest.raises(KitError, match=f"version 1, llmkit.{key}"):
        register_release()
    assert open("ledger.jsonl", "rb").read() == before


def test_an_empty_lock_and_a_foreign_manifest_stop_nothing(carded):
    open("dvc.lock", "w").close()
    assert dvc_reference("artifacts/package/bundle") is None
    os.makedirs("artifacts/theirs")
    open("artifacts/theirs/manifest.json", "w").write("[]")
    assert len(read_lineage("artifacts").nodes) == 10


@pytest.mark.parametrize("name", ["a%20b", "repo%2Fx", "what?", "ü '"])
def test_a_registry_in_a_folder_of_any_name_is_that_file(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    register(Release("m", "sha256:b", "sha256:v", "sha256:c"), "sqlite:///mlflow.db", "file:///bundle")
    assert len(versions("sqlite:///mlflow.db", "m")) == 1
    assert [p.name for p in tmp_path.rglob("*.db")] == ["mlflow.db"] and Path("mlflow.db").is_file()


@pytest.mark.parametrize("place", ["mlflow.db", "none/mlflow.db"])
def test_whoever_looks_at_a_registry_that_nobody_made_leaves_nothing_behind(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    assert versions(f"sqlite:///{place}", "m") == [] and not list(tmp_path.iterdir())


def test_whoever_looks_waits_for_nobody_but_a_writer(tmp_path):
    "Also without a lock file, as in a copy that was put back; and a database that somebody makes just now is waited for."
    uri, lock = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "mlflow.db.lock"
    register(Release("m", "sha256:b", "sha256:v", "sha256:c"), uri, "file:///bundle", ledger=tmp_path / "ledger.jsonl")
    lock.unlink()
    assert len(versions(uri, "m")) == 1 and not lock.exists()
    with ThreadPoolExecutor() as beside:
        with locked_registry(uri):
            seen = beside.submit(versions, uri, "m")
            assert not wait([seen], timeout=0.5).done
        assert len(seen.result(60)) == 1


def test_a_database_that_was_left_half_made_is_an_error_in_words(tmp_path):
    "A process that was killed while it made the tables; each later command ended in MLflow's traceback."
    with closing(sqlite3.connect(tmp_path / "half.db")) as db:
        db.execute("create table alembic_version (version_num text)")
        db.execute("insert into alembic_version values ('451aebb31d03')")
        db.commit()
    with pytest.raises(KitError, match=r"MLflow does not answer: .*half made holds nothing: move it away"):
        versions(f"sqlite:///{tmp_path}/half.db", "m")
