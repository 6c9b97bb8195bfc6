"Streams with consumers that are killed, a Redis that restarts, and events that kill whoever reads them."

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from types import SimpleNamespace

import httpx
import pytest
from serve_server import PATIENCE, REPLIES, Lost, listening, until

from llmkit.core.errors import KitError
from llmkit.runtime.dummy import DummyEngine
from llmkit.serve.app import make_app
from llmkit.serve.backend import EngineBackend
from llmkit.serve.gateway import Gateway
from llmkit.serve.stream import Worker, consume
from llmkit.serve.stream_folder import FolderSink, FolderSource
from llmkit.serve.upstream import UpstreamBackend

PROGRAM = """
import functools, os, signal, sys, time
import llmkit.serve.stream as stream
from llmkit.cli import main
from llmkit.runtime.dummy import DummyEngine
from llmkit.serve.backend import EngineBackend
from llmkit.serve.target import Target

class Paced(DummyEngine):
    def next_logits(self, prompt, answer=()):
        time.sleep(float(os.environ.get("PACE", 0.002)))
        if "poison" in self.tokenizer.decode(list(prompt)):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().next_logits(prompt, answer)

stream.connect = functools.partial(stream.connect, wait=float(os.environ.get("WAIT", 120)))
stream.resolve = lambda *a: Target("bank", "here")
stream.open_backend = lambda found, said=None, **how: EngineBackend(Paced(replies=lambda p: "yes"), **how)
sys.exit(main(["stream", "run", *sys.argv[1:]]))
"""


def event(i, text="question", **data):
    body = {"prompt": f"{text} {i}", "max_tokens": 6, **data}
    head = {"specversion": "1.0", "id": f"e{i}", "source": "/t", "type": "llmkit.completion.request"}
    return json.dumps({**head, "data": body})


@pytest.fixture
def consumer(tmp_path):
    "Starts consumers; whatever still runs at the end is killed."
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    started = []

    def start(*args, **how):
        command = [sys.executable, "-c", PROGRAM, *map(str, args), "--slots", "4"]
        p = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)
        started.append(p)
        return p

    yield start
    for p in started:
        if p.poll() is None:
            p.kill()
        p.wait(PATIENCE)


class Server:
    "A Redis of our own that keeps what it was told."

    keep = ("--appendonly", "yes", "--appendfsync", "always")

    def __init__(self, folder):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.folder, self.process = folder, None
        self.start()

    def start(self):
        import redis

        args = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        args += [*self.keep, "--save", ""]
        self.process = subprocess.Popen(args, stdout=subprocess.DEVNULL)
        self.client = redis.Redis(port=self.port, decode_responses=True)

        def up():
            try:
                return self.client.ping()
            except redis.exceptions.ConnectionError:
                return False

        until(up, "Redis")

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(PATIENCE)

    def at(self, stream):
        return f"redis://127.0.0.1:{self.port}/0#{stream}"

    def ids(self, stream):
        return [json.loads(fields["event"])["id"] for _, fields in self.client.xrange(stream)]


@pytest.fixture
def redis_server(tmp_path):
    if not shutil.which("redis-server"):
        pytest.skip("redis-server is not installed")
    pytest.importorskip("redis")
    (tmp_path / "redis").mkdir()
    server = Server(tmp_path / "redis")
    yield server
    server.kill()


def expected(ids):
    return {f"/t#e{i}" for i in ids}


def test_redis_kill_9_of_consumers_loses_nothing_and_the_output_has_each_once(redis_server, consumer):
    r, n = redis_server, 120
    for i in [*range(n), *range(0, n, 7)]:  # some are sent twice
        r.client.xadd("q", {"event": event(i)})
    how = (r.at("q"), r.at("a"), "--patience", 1)
    for goal in (15, 45):
        p = consumer(*how)
        until(lambda goal=goal: r.client.xlen("a") >= goal, "some answers")
        p.send_signal(signal.SIGKILL)
        p.wait(PATIENCE)
        assert r.client.xlen("a") < n, "it was killed in the middle"
    assert r.client.xinfo_groups("q")[0]["pending"] > 0, "the dead left something behind"
    done = consumer(*how, "--once")
    out, err = done.communicate(timeout=PATIENCE)
    assert done.returncode == 0, err
    ids = r.ids("a")
    assert len(ids) == n and set(ids) == expected(range(n)), Counter(ids).most_common(3)
    assert "0 dead" in out and r.client.xinfo_groups("q")[0]["pending"] == 0 == r.client.xinfo_groups("q")[0]["lag"]
    assert len(r.client.xinfo_consumers("q", "llmkit")) == 2, "the one that ended well has left the group"


def test_redis_restarts_in_the_middle(redis_server, consumer):
    r, n = redis_server, 120
    for i in range(n):
        r.client.xadd("q", {"event": event(i)})
    p = consumer(r.at("q"), r.at("a"), "--patience", 1, "--once")
    until(lambda: r.client.xlen("a") >= 15, "some answers")
    r.kill()
    time.sleep(0.5)
    assert p.poll() is None, "it waits"
    r.start()
    out, err = p.communicate(timeout=PATIENCE)
    assert p.returncode == 0, err
    ids = r.ids("a")
    assert len(ids) == n and set(ids) == expected(range(n))


def test_redis_restarts_with_nothing_left_and_the_consumer_goes_on(redis_server, consumer):
    r, n = redis_server, 120
    r.kill()
    r.keep = ("--appendonly", "no")
    (r.folder / "appendonlydir").rename(r.folder / "old")
    r.start()
    for i in range(n):
        r.client.xadd("q", {"event": event(i)})
    p = consumer(r.at("q"), r.at("a"), "--patience", 0.3)
    until(lambda: r.client.xlen("a") >= 15, "some answers")
    r.kill()
    time.sleep(1)
    r.start()
    time.sleep(1)  # what it works on is renewed in a group that is gone
    for i in range(n, 2 * n):
        r.client.xadd("q", {"event": event(i)})
    until(lambda: p.poll() is not None or expected(range(n, 2 * n)) <= set(r.ids("a")), "the new ones")
    assert p.poll() is None, p.stderr.read()
    assert len(r.ids("a")) == len(set(r.ids("a")))


def test_redis_that_is_full_is_waited_for(redis_server, consumer):
    r, n = redis_server, 100
    for i in range(n):
        r.client.xadd("q", {"event": event(i)})
    p = consumer(r.at("q"), r.at("a"), "--patience", 0.5, "--attempts", 1, "--once")
    until(lambda: r.client.xlen("a") >= 15, "some answers")
    r.client.config_set("maxmemory", "1mb")
    time.sleep(2)
    full = r.client.xlen("a")
    assert full < n and p.poll() is None, "it waits"
    r.client.config_set("maxmemory", 0)
    out, err = p.communicate(timeout=PATIENCE)
    assert p.returncode == 0 and f"{n} answered, 0 duplicates, 0 dead" in out, err
    ids = r.ids("a")
    assert len(ids) == n and set(ids) == expected(range(n)) and not r.ids("a.dead")


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_redis_that_would_throw_questions_or_notes_away_is_refused(redis_server, consumer, policy):
    r = redis_server
    for i in range(2):
        r.client.xadd("q", {"event": event(i)})
    r.client.config_set("maxmemory-policy", policy)
    r.client.config_set("maxmemory", "100mb")
    p = consumer(r.at("q"), r.at("a"), "--once")
    assert p.wait(PATIENCE) == 2
    told = p.stderr.read()
    assert policy in told and "noeviction" in told and "Traceback" not in told
    assert r.client.xlen("q") == 2 and not r.client.exists("a")
    r.client.config_set("maxmemory", 0)  # it is never full
    p = consumer(r.at("q"), r.at("a"), "--once")
    assert p.wait(PATIENCE) == 0 and r.client.xlen("a") == 2


def test_redis_that_stays_full_makes_no_dead_letters(redis_server, consumer):
    r, n, short = redis_server, 24, {**os.environ, "WAIT": "1"}
    for i in range(n):
        r.client.xadd("q", {"event": event(i)})
    r.client.xgroup_create("q", "llmkit", id="0")
    r.client.config_set("maxmemory", "1mb")
    how = (r.at("q"), r.at("a"), "--patience", 0.2, "--attempts", 2, "--once")
    for _ in range(4):  # a supervisor starts it again and again
        p = consumer(*how, env=short)
        out, err = p.communicate(timeout=PATIENCE)
        assert (
            p.returncode == 2
            and "redis: the server takes nothing: command not allowed" in err
            and "Trim its streams" in err
        ), err
        assert "Traceback" not in err
    r.client.config_set("maxmemory", 0)
    out, err = (p := consumer(*how)).communicate(timeout=PATIENCE)
    assert p.returncode == 0 and f"{n} answered, 0 duplicates, 0 dead" in out, out + err
    assert sorted(r.ids("a")) == sorted(expected(range(n))) and not r.ids("a.dead")


def test_redis_that_cannot_save_is_waited_for(redis_server, consumer):
    r, n = redis_server, 60
    for i in range(n):
        r.client.xadd("q", {"event": event(i)})
    p = consumer(r.at("q"), r.at("a"), "--patience", 0.5, "--once")
    until(lambda: r.client.xlen("a") >= 5, "some answers")

    def save(works):
        file = r.folder / "dump.rdb"
        file.rmdir() if works else file.mkdir()  # a folder in the snapshot's place
        r.client.bgsave()
        until(lambda: (r.client.info("persistence")["rdb_last_bgsave_status"] == "ok") is works, "the snapshot")

    r.client.config_set("save", "3600 1")
    save(False)
    done = r.client.xlen("a")
    time.sleep(2)
    assert r.client.xlen("a") == done < n and p.poll() is None, "it waits"
    late = consumer(r.at("q"), r.at("a"), "--once", env={**os.environ, "WAIT": "1"})
    _, err = late.communicate(timeout=PATIENCE)
    assert late.returncode == 2 and "takes nothing: MISCONF" in err and "Its log says why it cannot save" in err, err
    assert "Traceback" not in err
    save(True)
    out, err = p.communicate(timeout=PATIENCE)
    assert p.returncode == 0 and f"{n} answered, 0 duplicates, 0 dead" in out, out + err
    assert sorted(r.ids("a")) == sorted(expected(range(n)))


def test_redis_that_refuses_an_answer_loses_none(redis_server, consumer):
    r, n = redis_server, 20
    for i in range(n):
        r.client.xadd("q", {"event": event(i)})
    how = (r.at("q"), r.at("a"), "--patience", 0.3, "--once")
    r.client.set("a", "no stream")
    for what in ("WRONGTYPE", "NOPERM"):
        if what == "NOPERM":
            r.client.delete("a")
            r.client.acl_setuser("default", enabled=True, nopass=True, keys=["*"], commands=["+@all", "-xadd"])
        _, err = (p := consumer(*how)).communicate(timeout=PATIENCE)
        assert p.returncode == 2 and "redis: the server refuses" in err and "Traceback" not in err, err
    r.client.acl_setuser("default", enabled=True, nopass=True, keys=["*"], commands=["+@all"])
    out, err = (p := consumer(*how)).communicate(timeout=PATIENCE)
    assert p.returncode == 0 and f"{n} answered, 0 duplicates, 0 dead" in out, out + err
    assert sorted(r.ids("a")) == sorted(expected(range(n)))


def test_redis_an_event_that_is_put_back_and_fails_again_is_a_second_dead_letter(redis_server, consumer):
    r, how = redis_server, ("--patience", 0.3, "--once")
    for want in (1, 2):
        r.client.xadd("q", {"event": event(3, temperature=-1)})
        out, err = (p := consumer(r.at("q"), r.at("a"), *how)).communicate(timeout=PATIENCE)
        assert p.returncode == 0 and "1 dead" in out, out + err
        assert r.ids("a.dead") == ["/t#e3"] * want
    assert r.client.xinfo_groups("q")[0]["pending"] == 0


def test_redis_a_message_that_kills_its_readers_becomes_a_dead_letter(redis_server, consumer):
    r = redis_server
    for i, text in enumerate(["question", "poison", "question"]):
        r.client.xadd("q", {"event": event(i, text)})
    r.client.xadd("q", {"event": event(3, temperature=-1)})
    r.client.xadd("q", {"wrong": "field"})
    deaths = 0
    for _ in range(6):
        p = consumer(r.at("q"), r.at("a"), "--patience", 0.3, "--attempts", 2, "--once")
        _, err = p.communicate(timeout=PATIENCE)
        if p.returncode == 0:
            break
        assert p.returncode == -signal.SIGKILL, err
        deaths += 1
    assert deaths == 2 and set(r.ids("a")) == expected([0, 2])
    dead = {json.loads(f["event"])["id"]: json.loads(f["event"])["data"] for _, f in r.client.xrange("a.dead")}
    assert dead["/t#e1"]["attempts"] == 2 and "did not survive" in dead["/t#e1"]["reason"]
    assert json.loads(dead["/t#e1"]["event"]) == json.loads(event(1, "poison"))
    assert dead["/t#e3"]["reason"].startswith("400: 'temperature'") and len(dead) == 3


def test_sigterm_ends_well_and_the_lag_is_told(redis_server, consumer):
    r, n = redis_server, 400
    for i in range(n):
        r.client.xadd("q", {"event": event(i)})
    p = consumer(r.at("q"), r.at("a"), "--metrics", 0)
    address = p.stderr.readline().split()[-1]
    until(lambda: r.client.xlen("a") >= 20, "some answers")
    text = urllib.request.urlopen(address).read().decode()
    lag = float(next(x for x in text.splitlines() if x.startswith("llmkit_stream_lag_events ")).split()[1])
    assert n - 60 < lag <= n, "the lag of the first look"
    p.send_signal(signal.SIGTERM)
    out, err = p.communicate(timeout=PATIENCE)
    answered = r.client.xlen("a")
    assert p.returncode == 0 and 20 <= answered < n, err
    group = r.client.xinfo_groups("q")[0]
    assert group["pending"] == 0 and group["lag"] == n - answered, "what was taken was answered, the rest was left"
    assert f"{answered} answered" in out and "stream: lag" in err


def test_a_folder_with_two_consumers_and_kill_9(tmp_path, consumer):
    n = 40
    (tmp_path / "in").mkdir()
    for k in range(4):
        part = [event(i) for i in range(k * n, (k + 1) * n)]
        (tmp_path / f"in/{k}.ndjson").write_text("\n".join([*part, event(k * n), event(0)]) + "\n")
    answers = tmp_path / "out/answers.ndjson"
    count = lambda: answers.read_text().count("\n") if answers.exists() else 0
    first, second = consumer("in", "out"), consumer("in", "out")
    until(lambda: count() >= 30, "some answers")
    for p in (first, second):
        p.send_signal(signal.SIGKILL)
        p.wait(PATIENCE)
    assert count() < 4 * n, "they were killed in the middle"
    with open(answers, "a") as f:
        f.write('{"id": "/t#e')  # as a write that was cut
    done = consumer("in", "out", "--once")
    out, err = done.communicate(timeout=PATIENCE)
    assert done.returncode == 0, err
    ids = [json.loads(x)["id"] for x in answers.read_text().splitlines()]
    assert len(ids) == 4 * n and set(ids) == expected(range(4 * n))


def test_a_line_that_kills_its_readers_becomes_a_dead_letter(tmp_path, consumer):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text("\n".join([event(0), event(1, "poison"), event(2)]))
    codes = []
    while len(codes) < 6 and 0 not in codes:
        codes.append(consumer("in", "out", "--attempts", 2, "--once").wait(PATIENCE))
    assert codes == [-signal.SIGKILL] * 2 + [0]
    ids = [json.loads(x)["id"] for x in (tmp_path / "out/answers.ndjson").read_text().splitlines()]
    (dead,) = [json.loads(x) for x in (tmp_path / "out/dead.ndjson").read_text().splitlines()]
    assert sorted(ids) == sorted(expected([0, 2])) and dead["id"] == "/t#e1" and dead["data"]["attempts"] == 2


def test_a_folder_on_a_full_disk_makes_no_dead_letters(tmp_path, consumer):
    n = 12
    (tmp_path / "in").mkdir(), (tmp_path / "out").mkdir()
    (tmp_path / "in/a.jsonl").write_text("\n".join(event(i) for i in range(n)))
    (tmp_path / "out/answers.ndjson").symlink_to("/dev/full")
    for _ in range(4):
        p = consumer("in", "out", "--attempts", 2, "--once")
        _, err = p.communicate(timeout=PATIENCE)
        assert p.returncode == 2 and "the disk is full" in err and "Make room" in err and "Traceback" not in err, err
    (tmp_path / "out/answers.ndjson").unlink()
    out, err = (p := consumer("in", "out", "--attempts", 2, "--once")).communicate(timeout=PATIENCE)
    assert p.returncode == 0 and f"{n} answered, 0 duplicates, 0 dead" in out, out + err
    ids = [json.loads(x)["id"] for x in (tmp_path / "out/answers.ndjson").read_text().splitlines()]
    assert sorted(ids) == sorted(expected(range(n))) and not (tmp_path / "out/dead.ndjson").exists()


def test_redis_events_that_are_trimmed_before_their_next_try_are_told_of(redis_server, consumer):
    r = redis_server
    for i in range(5):
        r.client.xadd("q", {"event": event(i)})
    r.client.xgroup_create("q", "llmkit", id="0")
    r.client.xreadgroup("llmkit", "the dead", {"q": ">"}, 4)
    r.client.xtrim("q", maxlen=3, approximate=False)
    p = consumer(r.at("q"), r.at("a"), "--once", "--patience", 0.5)
    out, err = p.communicate(timeout=PATIENCE)
    assert p.returncode == 0 and set(r.ids("a")) == expected([2, 3, 4])
    assert sum(int(line.split("it ")[1].split()[0]) for line in err.splitlines() if "was trimmed" in line) == 2, err


def test_redis_an_event_that_is_no_utf8_becomes_a_dead_letter(redis_server, consumer):
    r = redis_server
    for raw in (b"caf\xe9", event(1).encode()):
        r.client.xadd("q", {"event": raw})
    _, err = (p := consumer(r.at("q"), r.at("a"), "--once")).communicate(timeout=PATIENCE)
    assert p.returncode == 0 and set(r.ids("a")) == expected([1]) and len(r.ids("a.dead")) == 1, err


def test_an_answer_that_the_end_cuts_off_costs_its_event_no_attempt(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.ndjson").write_text(event(1) + "\n")

    async def cut_off():
        "Take the event, and stop while it is answered."
        source = FolderSource(tmp_path / "in", "llmkit", 0.01)
        given, stop = [], asyncio.Event()

        async def handle(d):
            given.append(d.attempts)
            stop.set()
            await asyncio.Event().wait()

        worker = SimpleNamespace(
            source=source,
            handle=handle,
            counts=None,
            metrics=SimpleNamespace(set=lambda lag: None),
            presence=SimpleNamespace(away=False),
        )
        await consume(worker, stop=stop, drain=0.05)
        await source.close()
        return given

    assert [asyncio.run(cut_off()) for _ in range(3)] == [[1], [1], [1]]


def test_an_upstream_that_is_away_for_long_and_again_makes_no_dead_letters(tmp_path, caplog):
    n, patience = 200, 0.3
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.ndjson").write_text("".join(event(i) + "\n" for i in range(n)))
    answers = tmp_path / "out/answers.ndjson"
    count = lambda: answers.read_text().count("\n") if answers.exists() else 0
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def up():
        engine = EngineBackend(DummyEngine(replies=REPLIES), slots=4)
        return listening(make_app(Gateway("bank", {"baseline": engine}), check=False, drain=0), port)

    async def main():
        gateway = Gateway("bank", {"baseline": UpstreamBackend(f"http://127.0.0.1:{port}/v1", "bank")}, timeout=None)
        source = FolderSource(tmp_path / "in", patience=patience, whole=True)
        dead = FolderSink(tmp_path / "out", "dead")
        worker = Worker(gateway, source, FolderSink(tmp_path / "out"), dead, attempts=3)
        run = asyncio.create_task(consume(worker, patience=patience, once=True))
        await asyncio.sleep(10 * patience)
        text = gateway.metrics.text().decode()
        assert "llmkit_stream_backend_up 0" in text and not count() and not run.done()
        assert len(caplog.records) == 1 and "does not answer" in caplog.text, caplog.text
        taken = worker.counts.again
        assert taken <= 16, "it takes nothing more while the other side is away"
        for goal in (n // 3, n):  # it comes, goes in the middle, and comes again
            with up():
                await asyncio.to_thread(until, lambda goal=goal: count() >= goal or run.done(), "some answers")
            await asyncio.sleep(6 * patience)
        counts = await asyncio.wait_for(run, PATIENCE)
        assert "llmkit_stream_backend_up 1" in gateway.metrics.text().decode()
        await source.close()
        await gateway.close(0)
        return counts

    counts = asyncio.run(main())
    assert (counts.answered, counts.duplicates, counts.dead) == (n, 0, 0)
    ids = [json.loads(x)["id"] for x in answers.read_text().splitlines()]
    assert sorted(ids) == sorted(expected(range(n))) and not (tmp_path / "out/dead.ndjson").exists()


def test_an_engine_that_is_lost_ends_the_consumer_and_the_next_one_goes_on(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.ndjson").write_text("".join(event(i) + "\n" for i in range(12)))

    async def once():
        gateway = Gateway("bank", {"baseline": EngineBackend(Lost(at="n 7", replies=REPLIES), slots=4)}, timeout=None)
        source = FolderSource(tmp_path / "in", patience=0.1, whole=True)
        worker = Worker(gateway, source, FolderSink(tmp_path / "out"), FolderSink(tmp_path / "out", "dead"), attempts=2)
        try:
            await asyncio.wait_for(consume(worker, patience=0.1, once=True), PATIENCE)
        finally:
            await source.close()
            await gateway.close(0)

    def ends_well():
        try:
            asyncio.run(once())
        except KitError as e:
            assert "the engine has failed" in str(e)
            return False
        return True

    failed = next(i for i in range(8) if ends_well())
    ids = [json.loads(x)["id"] for x in (tmp_path / "out/answers.ndjson").read_text().splitlines()]
    (dead,) = [json.loads(x) for x in (tmp_path / "out/dead.ndjson").read_text().splitlines()]
    assert sorted(ids) == sorted(expected({*range(12)} - {7})) and dead["id"] == "/t#e7" and 2 <= failed <= 4


def _folder(path):
    path.mkdir()
    return path


def test_a_file_that_goes_while_a_line_waits_for_its_next_try_stops_nobody(tmp_path, caplog):
    source = FolderSource(_folder(tmp_path / "in"), patience=0.0)

    async def run():
        (tmp_path / "in/a.ndjson").write_text("one\ntwo\n")
        for d in await source.take(2):
            await source.give_back(d)
        (tmp_path / "in/a.ndjson").unlink()
        (tmp_path / "in/b.ndjson").write_text("three\n")
        assert await source.retake() is None
        assert [d.raw for d in await source.take(9)] == ["three"] and list(source.open) == ["b.ndjson"]

    asyncio.run(run())
    assert caplog.text.count("a.ndjson is gone") == 2


def test_a_consumer_that_is_to_end_does_not_wait_for_ever(tmp_path, monkeypatch):
    (_folder(tmp_path / "in") / "a.ndjson").write_text(event(1) + "\n")
    monkeypatch.setattr("llmkit.serve.stream.AWAY", 0.7)
    source = FolderSource(tmp_path / "in")

    async def run():
        gateway = Gateway("bank", {"baseline": UpstreamBackend("http://127.0.0.1:9/v1", "bank")})
        worker = Worker(gateway, source, FolderSink(tmp_path / "out"), FolderSink(tmp_path / "out", "dead"))
        await asyncio.wait_for(consume(worker, once=True), PATIENCE)

    with pytest.raises(KitError, match="has not answered for 0.7 s.*run this again"):
        asyncio.run(run())
    row = source.store.read("SELECT attempts, settled FROM lines")[0]
    assert tuple(row) == (0, 0), "it is asked again, and no try was spent"


def test_a_mock_upstream_that_refuses_the_key_for_a_while_makes_no_dead_letters(tmp_path, caplog):
    (_folder(tmp_path / "in") / "a.ndjson").write_text("".join(event(i) + "\n" for i in range(12)))
    yes, looks, asked = {"index": 0, "text": "yes", "finish_reason": "stop"}, [], []

    def serve(request):
        old = len(asked) > 4 and len(looks) < 3  # the key has run out; then it is good again
        (looks if request.method == "GET" else asked).append(request)
        if old:
            return httpx.Response(401, json={"error": {"message": "key sk-1 has expired"}})
        return httpx.Response(200, text=f"data: {json.dumps({'choices': [yes]})}\n\ndata: [DONE]\n\n")

    async def run():
        bank = UpstreamBackend("http://u/v1", "bank", transport=httpx.MockTransport(serve))
        dead = FolderSink(tmp_path / "out", "dead")
        worker = Worker(Gateway("bank", {"baseline": bank}), FolderSource(tmp_path / "in", patience=0.1), FolderSink(tmp_path / "out"), dead, attempts=1, together=2)  # fmt: skip
        return await asyncio.wait_for(consume(worker, together=2, patience=0.1, once=True), PATIENCE)

    counts = asyncio.run(run())
    assert (counts.answered, counts.dead) == (12, 0)
    assert caplog.text.count("refuses the key") == 1 and "sk-1" not in caplog.text
