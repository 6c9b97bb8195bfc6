"""Kill -9 at every step, and the same end; a disk, a registry and a shadow that fail."""

import multiprocessing as mp
import signal
import sqlite3

import pytest
from rollout_road import CANARY, FATE, Recorder, World, point

from llmkit.rollout import database
from llmkit.rollout.state import Effect
from llmkit.rollout.store import Store
from llmkit.rollout.window import window_json

SMALL = CANARY | {
    "steps": [
        {"setWeight": 30}, {"analysis": {"min_duration": "8s", "max_duration": "24h", "min_samples": 30, "require": "no_harm"}},
        {"pause": {"duration": "4s"}},
        {"setWeight": 50}, {"analysis": {"min_duration": "8s", "max_duration": "24h", "min_samples": 100}},
    ],
    "canary": [{"metric": "error_rate", "margin": 0.08}],
}  # fmt: skip


class Mortal(Store):
    "A store that may die before and after each write."

    def append(self, *args, **kwargs):
        point()
        done = super().append(*args, **kwargs)
        point()
        return done

    def kept(self, *args):
        point()
        super().kept(*args)
        point()

    def snapshot(self, *args):
        point()
        super().snapshot(*args)
        point()


class MortalRegistry(Recorder):
    "A registry that may take its caller with it, before or after it moved."

    def move(self, effect):
        point()
        super().move(effect)
        point()


def script(folder, begin):
    "A whole rollout, from wherever the log says it is, to the undo of its promotion. Each request is known by its second."
    w = World(folder, SMALL, store=Mortal, registry=MortalRegistry, begin=begin)
    if begin is False and w.c.state is None:
        from rollout_road import RELEASES

        w.c.command("start", "ann", model="bank-support", releases=RELEASES)
    last = w.store.rows("select coalesce(max(time), 0) from events where rollout = 'r1'")[0][0]
    w.now = float(int(last))
    w.c.step()
    while w.c.state.phase != "Degraded":
        second = int(w.now) + 1
        if w.c.state.phase == "Healthy":
            w.now = float(second)
            w.c.command("undo", "ann", "customers complain")
            break
        for i in range(30):  # thirty requests, written down in the second after them
            w.n = second * 100 + i
            w.rng = np_rng(w.n)
            w.request(every=0.0, errors=(0.01, 0.01))
        w.now = float(second)
        w.c.step()
    w.c.step()


def np_rng(seed):
    import numpy as np

    return np.random.default_rng(seed)


def run(folder, begin, points):
    "The script in a process that dies at a point; its exit code."
    FATE.value = points
    p = mp.get_context("fork").Process(target=script, args=(folder, begin))
    p.start()
    p.join(300)
    return p.exitcode


def outcome(folder):
    "What is left: the state without the times of decisions, the aliases, the ledger without digests of evidence."
    w = World(folder, begin=False)
    s, said = w.c.state, w.registry.read()
    ledger = [e[:3] for e in said["ledger"]]
    replayed = w.store.replay("r1")
    assert replayed.state == s and window_json(replayed.window) == window_json(w.c.fold.window)
    assert w.store.promises("r1") == []
    return (s.phase, s.aborted, s.step, s.stage, s.weights, s.reason), said["aliases"], ledger


def test_kill_9_at_every_point_ends_in_the_same_state(tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    assert run(whole, True, 100_000) == 0
    points = 100_000 - FATE.value
    want = outcome(whole)
    assert want[0][0] == "Degraded" and len(want[2]) == 4
    assert want[1] == {"champion": "sha256:a", "previous": "sha256:b"}
    assert points > 40
    # every point around decisions and effects, and a few within the traffic
    chosen = sorted({*range(6), *range(6, points - 26, max(1, points // 6)), *range(points - 26, points)})
    for k in chosen:
        folder = tmp_path / str(k)
        folder.mkdir()
        assert run(folder, True, k) == -signal.SIGKILL, k
        again = run(folder, False, 100_000)
        if again != 0:  # it died before the rollout was created
            assert not Store(folder / "rollouts.db").rows("select 1 from rollouts"), k
            assert run(folder, True, 100_000) == 0
        assert outcome(folder) == want, k


def test_dying_again_and_again_gets_there_too(tmp_path):
    folder = tmp_path / "r"
    folder.mkdir()
    code, tries = run(folder, True, 3), 0
    while code != 0 and tries < 400:
        code, tries = run(folder, False, 9), tries + 1
    assert code == 0 and tries > 5
    assert outcome(folder)[0][0] == "Degraded"


def test_a_log_that_another_process_holds_is_waited_for(tmp_path):
    w = World(tmp_path)
    other = sqlite3.connect(tmp_path / "rollouts.db", isolation_level=None, check_same_thread=False)
    other.execute("begin immediate")
    import threading

    threading.Timer(0.3, lambda: other.execute("rollback")).start()
    w.request()
    assert w.c.step().phase == "Progressing"
    window = w.c.fold.window
    assert sum(a.n for a in window.arms.values()) + window.counts["before"] == 1


def test_users_are_routed_while_the_log_cannot_be_written(tmp_path):
    w = World(tmp_path)
    w.store.close()
    w.c.run(every=0.01)
    try:
        for i in range(200):
            w.c.observe(w.request())
            assert w.c.assign(f"u{i}") in ("baseline", "canary")
    finally:
        w.c._stop.set()
        w.c._thread.join()
    assert "ProgrammingError" in w.c.trouble


def test_a_cut_off_database_is_an_error_and_not_a_fresh_start(tmp_path):
    w = World(tmp_path)
    w.traffic(200)
    w.store.close()
    path = tmp_path / "rollouts.db"
    size = path.stat().st_size
    with open(path, "r+b") as f:
        f.truncate(size // 2)
    for extra in ("-wal", "-shm"):
        (tmp_path / f"rollouts.db{extra}").unlink(missing_ok=True)
    with pytest.raises((sqlite3.DatabaseError, ValueError)):
        World(tmp_path, begin=False).c.step()


def before_hindrances(path):
    "Make a file of rollouts what a version wrote that kept a hindrance among the failures, as that of an event 0."
    store, moves = Store(path), [Effect("champion", "sha256:b", "promote", "sha256:v", "m")]
    store.promise("r1", 3, moves)
    store.failed("r1", store.promises("r1")[0], "no route to host")
    store.close()
    with sqlite3.connect(path) as db:
        db.execute("drop table hindrances")
        db.execute("insert into failures values ('r1', 0, 0, 'database is locked')")


def test_kill_9_while_a_file_of_the_version_before_is_brought_up_to_date_loses_nothing(tmp_path, monkeypatch):
    def mortal(db, schema):
        for statement in filter(str.strip, schema.split(";")):
            db.execute(statement)
            point()

    FATE.value = -1  # what tests before this one left
    monkeypatch.setattr(database, "make_tables", mortal)
    for k in range(database._TABLES.count(";") + 1):
        path = tmp_path / f"{k}.db"
        before_hindrances(path)
        FATE.value = k
        p = mp.get_context("fork").Process(target=lambda path=path: Store(path).rows("select 1"))
        p.start()
        p.join(60)
        last = k == database._TABLES.count(";")
        assert p.exitcode == (0 if last else -signal.SIGKILL), k
        FATE.value = -1
        with sqlite3.connect(path) as db:  # all or nothing
            kept = db.execute("select count(*) from failures where seq = 0").fetchone()[0]
        assert kept == (0 if last else 1), k
        store = Store(path)
        assert store.hindrance("r1") == "database is locked" and store.promises("r1")[0].error == "no route to host", k
        assert store.rows("select seq from failures") == [(3,)], k
        store.hinder("r1")
        assert not store.hindrance("r1") and not Store(path).hindrance("r1"), k
