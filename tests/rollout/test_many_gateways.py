"""Three gateways and one judge, each in danger: every event counts once, and the verdict is about all of them."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from rollout_road import CANARY, RELEASES, World
from test_outside import get

from llmkit.rollout.judge_server import answer
from llmkit.serve.events import Events
from llmkit.serve.keys import Keys
from llmkit.serve.push import Push, post

JUDGE = """
import sys
from llmkit.cli import main
sys.exit(main(["judge", "serve", "--port", sys.argv[1], "--follow"]))
"""


@pytest.fixture
def judge(tmp_path):
    "Starts a judge on the store of a folder, in a process of its own; all are ended."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    running = []

    def start():
        p = subprocess.Popen([sys.executable, "-c", JUDGE, port], cwd=tmp_path, start_new_session=True)
        running.append(p)
        until = time.monotonic() + 120
        while p.poll() is None and time.monotonic() < until:
            try:
                return p, get(f"http://127.0.0.1:{port}/health") and f"http://127.0.0.1:{port}"
            except OSError:
                time.sleep(0.05)
        raise AssertionError("the judge did not start")

    yield start
    for p in running:
        if p.poll() is None:
            os.killpg(p.pid, signal.SIGTERM)
            p.wait(60)


def test_every_event_of_three_gateways_counts_once_though_judge_and_gateways_die(tmp_path, judge):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nrollouts = rollouts.db\nserve_db = keys.db\n")
    w = World(tmp_path, CANARY)  # its own server, which sees everything: what the judge should say
    (tmp_path / "alone").mkdir()
    alone = World(tmp_path / "alone", CANARY)
    seen = []

    def requests(n):
        for _ in range(n):
            event = alone.request(errors=(0.01, 0.04))
            pod = "c" if event["variant"] == "canary" else "ab"[len(seen) % 2]
            logs[pod].append({**event, "variant": "baseline"})  # a pod holds one release, and calls it so
            seen.append(event)

    logs = {n: Events(tmp_path / f"{n}.db") for n in "abc"}
    process, url = judge()
    push = {n: Push(e, url, "bank-support") for n, e in logs.items()}
    requests(300)
    assert (
        push["a"].send() + push["c"].send() == sum(e["variant"] == "canary" for e in seen) + logs["a"].since(0)[-1][0]
    )
    process.kill()
    process.wait(60)
    requests(200)
    assert not push["a"].attempt() and push["a"].waiting > 0 and push["a"].failures == 1
    _, url = judge()
    restarted = {n: Push(Events(tmp_path / f"{n}.db"), url, "bank-support") for n in "abc"}  # new pods, the old volumes
    for n in "abcabc":
        restarted[n].send()
    push["a"].cursor = 0  # one that believes it was never heard
    push["a"].send()
    assert [restarted[n].waiting for n in "abc"] == [0, 0, 0]
    alone.c.step()
    said, wanted = get(f"{url}/v1/rollouts/r1/verdict?at={alone.now}"), answer(alone.c.fold, alone.now)
    assert [r["n"] for r in said["reasons"]] == [r["n"] for r in wanted["reasons"]]
    assert said["reasons"] == wanted["reasons"] and said["verdict"] == wanted["verdict"]
    assert said["digest"] == answer(w.store.replay("r1"), alone.now)["digest"]
    assert set(RELEASES) == {v for e in seen for v in [e["variant"]]}
    # as soon as there are keys, only one that may send events is heard
    text, _ = Keys(tmp_path / "keys.db").create("pods", ("events",))
    wrong, _ = Keys(tmp_path / "keys.db").create("users", ("inference",))
    for key, code in (("", 401), (wrong, 403)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(f"{url}/v1/events", {"source": "x", "model": "bank-support", "events": []}, key)
        assert refused.value.code == code
    assert post(f"{url}/v1/events", {"source": "x", "model": "bank-support", "events": []}, text)["seen"] == 0
