"Servers in processes of their own: stopped by a signal, killed, started again, and two at a time."

import asyncio
import signal
import sqlite3
import subprocess
import sys
import threading

import httpx
import pytest
from serve_server import PATIENCE, PROGRAM, process, until

from llmkit.core.errors import KitError
from llmkit.rollout.store import Store as Rollouts
from llmkit.serve.events import Events
from llmkit.serve.keys import Keys

ASK = {"model": "bank", "prompt": [1, 2, 3], "max_tokens": 20, "temperature": 0, "ignore_eos": True}


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_stop_answers_what_was_accepted(tmp_path, sign):
    with process(tmp_path, pause=0.02) as (p, url):

        async def main():
            results, refused = [], []

            async def ask(client, i):
                while True:
                    try:
                        got = await client.post(f"{url}/v1/completions", json={**ASK, "stream": bool(i % 2)})
                    except httpx.TransportError as e:
                        return refused.append(type(e).__name__)
                    if got.status_code != 200:
                        return refused.append(got.status_code)
                    results.append(got.text)

            async with httpx.AsyncClient(timeout=PATIENCE) as c:
                tasks = [asyncio.create_task(ask(c, i)) for i in range(8)]
                while len(results) < 8:
                    await asyncio.sleep(0.01)
                p.send_signal(sign)
                await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE)
            return results, refused

        results, refused = asyncio.run(main())
        assert p.wait(PATIENCE) == 0
    # every stream that was begun was finished, everybody else was turned away, nobody was answered 5xx by a failure
    assert all('"length"' in r and ("[DONE]" in r or "usage" in r) for r in results)
    assert set(refused) <= {"ConnectError", "RemoteProtocolError", "ReadError", 503}, refused
    events = list(Events(tmp_path / "events.db").all("request"))
    assert [e["status"] for e in events].count("ok") == len(results)
    assert {e["status"] for e in events} <= {"ok", "error"} and all(e["code"] in (200, 503) for e in events)
    assert not p.stderr.read()


def test_what_outlasts_the_drain_is_told_so(tmp_path):
    with process(tmp_path, pause=0.05, drain=0.5) as (p, url):

        async def ask(client, stream):
            got = await client.post(f"{url}/v1/completions", json={**ASK, "max_tokens": 900, "stream": stream})
            return got.status_code, got.text

        async def main():
            async with httpx.AsyncClient(timeout=PATIENCE) as c:
                tasks = []
                for state in ("running", "queue_depth"):  # four that have a slot, then four that have none
                    tasks += [asyncio.create_task(ask(c, i % 2 == 0)) for i in range(4)]
                    while f'llmkit_{state}{{variant="baseline"}} 4.0' not in (await c.get(f"{url}/metrics")).text:
                        await asyncio.sleep(0.05)
                p.send_signal(signal.SIGTERM)
                return await asyncio.gather(*tasks)

        got = asyncio.run(main())
        assert p.wait(PATIENCE) == 0
    # running or waiting, streamed or not: an error object, and no word of the inside in the log
    assert all(status in (200, 503) and '"shutting_down"' in text for status, text in got), got
    assert sum(status == 200 for status, _ in got) == 2, "streams that had begun"
    events = list(Events(tmp_path / "events.db").all("request"))
    assert [(e["status"], e["code"]) for e in events] == [("error", 503)] * 8
    assert not p.stderr.read()


def test_a_failed_self_test_stops_the_server(tmp_path):
    broken = PROGRAM.replace("slots=4)", "slots=4, expected=[[1]] * 3)")
    done = subprocess.run(
        [sys.executable, "-c", broken, str(tmp_path), "0", "open", "60"],
        capture_output=True,
        text=True,
        timeout=PATIENCE * 2,
    )
    assert done.returncode == 1 and "self-test failed" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("make", [Keys, Rollouts])
def test_a_new_database_can_be_opened_by_several_at_once(tmp_path, make):
    failed = []

    def open_it(path, together):
        together.wait()
        try:
            make(path)
        except KitError as e:
            failed.append(str(e))

    for k in range(60):  # the race is lost once in some tens of rounds
        together = threading.Barrier(8)
        some = [threading.Thread(target=open_it, args=(tmp_path / f"{k}.db", together)) for _ in range(8)]
        [t.start() for t in some], [t.join() for t in some]
    assert not failed


TAKE = """
import sys
from llmkit.serve.keys import Account
from llmkit.serve.limits import Limits, Price, RateLimited
from llmkit.serve.wire import ApiError
limits, taken = Limits(sys.argv[1], Price(1.0, 1.0), lambda: 0.0), 0
print("ready", flush=True)
sys.stdin.readline()
for _ in range(300):
    try:
        r = limits.reserve(Account("team", rpm=200, tpm=20_000, budget=1.0), 10, 90)
        limits.settle(r, 10, 40)
        taken += 1
    except RateLimited:
        pass
print(taken)
"""


def test_processes_that_reserve_at_the_same_time_take_exactly_what_there_is(tmp_path):
    args = [sys.executable, "-c", TAKE, str(tmp_path / "l.db")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = [subprocess.Popen(args, text=True, **pipes) for _ in range(4)]
    assert all(p.stdout.readline() == "ready\n" for p in running)
    for p in running:  # all at once
        p.stdin.write("go\n")
        p.stdin.flush()
    done = [p.communicate(timeout=PATIENCE * 2) for p in running]
    assert not any(err for _, err in done), done
    assert sum(int(out) for out, _ in done) == 200
    with sqlite3.connect(tmp_path / "l.db") as db:
        levels = dict(db.execute("SELECT kind, level FROM buckets"))
        assert levels == {"requests": 0, "tokens": 20_000 - 200 * 50}
        assert db.execute("SELECT usd FROM spending").fetchone()[0] == pytest.approx(200 * 50 / 1e6)


def test_limits_hold_across_processes_and_a_restart(tmp_path):
    keys = Keys(tmp_path / "serve.db")
    text, _ = keys.create("team")
    keys.allow("team", rpm=10, tpm=100_000)
    head = {"authorization": f"Bearer {text}"}

    def flood(url, codes, n=15):
        with httpx.Client(timeout=PATIENCE, headers=head) as c:
            codes += [c.post(f"{url}/v1/completions", json=ASK).status_code for _ in range(n)]

    codes = []
    with process(tmp_path, keys=True) as (_, one), process(tmp_path, keys=True) as (_, two):
        threads = [threading.Thread(target=flood, args=(u, codes)) for u in (one, two, one, two)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(PATIENCE)
    assert len(codes) == 60 and set(codes) == {200, 429}
    # the bucket refills one every 6 s: with 10 at the start, what a slow machine lets in is known from the clock
    with sqlite3.connect(tmp_path / "serve.db") as db:
        [(level, at)] = db.execute("SELECT level, at FROM buckets WHERE kind = 'requests'").fetchall()
    events = list(Events(tmp_path / "events.db").all("request"))
    first = min(e["time"] for e in events)
    assert 10 <= codes.count(200) <= 10 + (at - first) / 6 + 1
    keys.allow("team", rpm=1)
    with process(tmp_path, keys=True) as (_, again):
        got = httpx.post(f"{again}/v1/completions", json=ASK, headers=head, timeout=PATIENCE)
        keys.revoke(keys.find()[0].prefix)
        assert httpx.post(f"{again}/v1/completions", json=ASK, headers=head, timeout=PATIENCE).status_code == 401
    assert got.status_code in (200, 429) and (got.status_code == 429 or at - first > 60)


def test_a_killed_server_leaves_whole_databases_and_charges_the_worst_case(tmp_path):
    keys = Keys(tmp_path / "serve.db")
    text, _ = keys.create("team")
    keys.allow("team", rpm=1000, tpm=1000, budget=1.0)
    head = {"authorization": f"Bearer {text}"}
    with process(tmp_path, pause=0.05, keys=True) as (p, url):
        fine = httpx.post(f"{url}/v1/completions", json={**ASK, "max_tokens": 2}, headers=head, timeout=PATIENCE)
        assert fine.status_code == 200

        def lost():
            with pytest.raises(httpx.TransportError):
                httpx.post(f"{url}/v1/completions", json={**ASK, "max_tokens": 500}, headers=head, timeout=PATIENCE)

        t = threading.Thread(target=lost)
        t.start()
        until(lambda: keys.store.read("SELECT usd FROM spending")[0]["usd"] > 1e-4, "the reservation")
        p.kill()
        t.join(PATIENCE)
    for name in ("serve.db", "events.db"):
        with sqlite3.connect(tmp_path / name) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert keys.store.read("SELECT usd FROM spending")[0]["usd"] == pytest.approx((3 + 2 + 3 + 500) / 1e6)
    with process(tmp_path, keys=True) as (_, url):
        got = httpx.post(f"{url}/v1/completions", json={**ASK, "max_tokens": 2}, headers=head, timeout=PATIENCE)
        assert got.status_code == 200 and int(got.headers["x-ratelimit-remaining-tokens"]) < 1000
