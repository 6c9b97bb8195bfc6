#!/usr/bin/env python
"""From a drift of live traffic to a new registered version, with nobody in between: the real pipeline, server and monitor.

    python tools/retrain_rehearsal.py [--folder FOLDER] [--full] [--patience 4]

In a clone of this repository the pipeline registers version 1, which is put in service by `llmkit rollout start --first`.
`llmkit serve` answers questions of the test split and `llmkit monitor watch` judges windows of 60. Then every question comes
with a polite preamble that nobody was trained on. The alarm asks for a training, the labelled questions become records, and
`llmkit retrain` runs as a DVC experiment until version 2 is the challenger. Meanwhile the server goes on answering. A second
alarm is held by the cooldown, and, where the cooldown is over, by the budget. Nobody is promoted at any time.

A small model, few records and few rules keep it short; --full takes params.yaml as it is. Prints a line for each step with
the seconds since the start. Exit code 1, and the reason: something did not happen. --patience stretches every limit, for a
machine that others use too. A folder that was begun is gone on with: what the pipeline has made is not made again.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from ruamel.yaml import YAML

from llmkit.core.files import read_json, read_jsonl
from llmkit.monitor.state import Memory
from llmkit.release.ledger import read_ledger
from llmkit.release.registry import versions

ROOT = Path(__file__).resolve().parents[1]
POLITE = (
    "Good morning to everybody there, I do hope that you are all very well and that this is the right place to ask: "
)
BEGUN = time.monotonic()
PATIENCE = 1.0  # factor on every limit


def say(text):
    "A step, and when."
    print(f"{time.monotonic() - BEGUN:6.0f} s  {text}", flush=True)


def need(true, text):
    "A step that must have happened."
    if not true:
        raise SystemExit(f"retrain_rehearsal: {text}")


def until(test, seconds, what):
    "Wait for something."
    seconds *= PATIENCE
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := test():
            return found
        time.sleep(0.5)
    raise SystemExit(f"retrain_rehearsal: {what() if callable(what) else what}, within {seconds:g} s")


def parameters(file, full):
    "A policy whose windows are short, and a pipeline that is."
    yaml = YAML()
    p = yaml.load(file)
    m = p["monitor"]
    m["window"] |= {"requests": 60, "min_n": 30, "label_lag": "1s"}
    m["reference"]["requests"] = 180
    m["texts"]["share"] = 1.0
    m["retrain"] |= {"when": ["data"], "cooldown": "1h", "runs": 1, "labelled": 50}
    if not full:
        p["base"]["tiny"] |= {"batch_tokens": 1024, "steps": 500}
        p["prepare"]["n"] = 2500
        p["finetune"] |= {"epochs": 6}
        p["quantize"] |= {"precision": "int8", "prompts": 64}
        p["quantize"]["min_recovery"] = 0.5
        p["evaluate"] |= {"suites": {}, "speed_repeats": 1, "speed_prompts": 4, "noise_items": 8}
        p["gates"]["rules"] = [
            r for r in p["gates"]["rules"] if r["metric"] == "accuracy" and r.get("against") == "base"
        ]
    yaml.dump(p, file)


def ask(client, text, label):
    "A question, and what its label should have been."
    r = client.post("/v1/chat/completions", json={"model": "bank-support", "messages": [{"role": "user", "content": text}], "max_tokens": 24, "temperature": 0})  # fmt: skip
    need(r.status_code == 200, f"an answer was {r.status_code}: {r.text[:200]}")
    said = client.post("/v1/feedback", json={"id": r.json()["id"], "label": label})
    need(said.status_code == 200, f"feedback was {said.status_code}: {said.text[:200]}")


def send(client, rows, n, polite):
    "So many questions, some with a preamble."
    for i in range(n):
        r = rows[i % len(rows)]
        ask(client, (POLITE if polite else "") + r["messages"][-2]["content"], r["label"])
    time.sleep(2)  # the label lag


def main():
    "The whole way."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--folder", default="", help="where the clone goes; default: a temporary folder, removed at the end")
    p.add_argument("--full", action="store_true", help="the pipeline of params.yaml as it is")
    p.add_argument("--port", type=int, default=8123)
    p.add_argument("--patience", type=float, default=1.0, help="factor on every limit")
    a = p.parse_args()
    global PATIENCE
    PATIENCE = a.patience
    home = Path(a.folder or tempfile.mkdtemp(prefix="rehearsal-")).resolve() / "clone"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "LLMKIT_PORT": str(a.port), "PYTHONPATH": str(home)}
    run = lambda *words: subprocess.run(words, cwd=home, env=env, capture_output=True, text=True)
    kit = lambda *words: run(llmkit, *words)
    llmkit, started = str(Path(sys.executable).parent / "llmkit"), []

    def start(*words):
        log = open(home / f"{words[0]}.log", "w")  # noqa: SIM115
        started.append(subprocess.Popen([llmkit, *words], cwd=home, env=env, stdout=log, stderr=log))  # fmt: skip

    try:
        if not home.exists():
            subprocess.run(["git", "clone", "-q", ROOT, home], check=True)
            parameters(home / "params.yaml", a.full)
        shutil.rmtree(home / ".llmkit/monitor", ignore_errors=True)
        for file in (*home.glob(".llmkit/*.db*"), *home.glob("rollouts.db*")):  # traffic of a rehearsal before
            file.unlink()
        registry = f"sqlite:///{home / 'mlflow.db'}"
        say(f"the pipeline runs in {home}")
        done = kit("repro")
        need(done.returncode == 0, f"llmkit repro: {done.stdout[-3000:]}{done.stderr[-3000:]}")
        v1 = versions(registry, "bank-support")[-1]
        say(f"version {v1.version} is registered: {', '.join(v1.aliases)}")
        first = kit("rollout", "start", "--first")
        need(first.returncode == 0, f"llmkit rollout start --first: {first.stdout}{first.stderr}")
        promotions = len(read_ledger(home / "ledger.jsonl"))
        start("serve")
        start("monitor", "watch", "--every", "1")
        client = httpx.Client(base_url=f"http://127.0.0.1:{a.port}", timeout=60)

        def ready():
            try:
                return client.get("/ready").status_code == 200
            except httpx.TransportError:
                return False

        until(ready, 120, "the server was not ready")
        say("the server answers with version 1")
        rows = [r for r in read_jsonl(home / "artifacts/prepare/dataset/test.jsonl") if r["label"]]
        memory = Memory(home / ".llmkit/monitor.db")
        asked = lambda: memory.actions(kind="retrain")
        send(client, rows, 180, False)
        send(client, rows, 120, False)
        until(lambda: memory.windows() and memory.windows()[0].number >= 2, 60, "two quiet windows were not decided")
        need(not asked(), f"a quiet window asked for a training: {asked()}")
        say(f"two quiet windows: {', '.join(w.verdict.outcome for w in memory.windows(n=2))}; nothing was asked for")
        send(client, rows, 120, True)
        request = until(lambda: asked() and asked()[0], 60, "no alarm asked for a training")
        say(f"window {request.number}, {request.reason}")
        until(lambda: asked()[0].state != "requested", 60, "the training did not start")
        need(asked()[0].state == "started", f"the training did not start: {asked()[0]}")
        say(f"{request.id} started: {asked()[0].note}")
        answers, end = 0, time.monotonic() + 1800 * PATIENCE
        while asked()[0].state == "started" and time.monotonic() < end:
            ask(client, rows[answers % len(rows)]["messages"][-2]["content"], rows[answers % len(rows)]["label"])
            answers += 1
            time.sleep(0.5)
        need(asked()[0].state != "started", f"the training took more than {1800 * PATIENCE:g} s")
        log = (home / ".llmkit/retrain" / request.id / "log.txt").read_text()
        need(asked()[0].state == "done", f"the training ended as {asked()[0]}: {log[-3000:]}")
        found = {v.version: v for v in versions(registry, "bank-support")}
        need(set(found) == {1, 2}, f"there is no second version: {found}")
        need(found[2].aliases == ("challenger",) and found[2].tags["retrain"] == request.id, f"not a challenger of this request: {found[2]}")  # fmt: skip
        need("champion" in found[1].aliases, f"version 1 is no longer the champion: {found}")
        split = lambda name: sum(1 for _ in read_jsonl(home / f"artifacts/prepare/dataset/{name}.jsonl"))
        new = sum(r["id"].startswith("traffic-") for r in read_jsonl(home / "artifacts/prepare/dataset/train.jsonl"))
        say(f"version 2 is registered as challenger, tag llmkit.retrain={found[2].tags['retrain']}; it learnt from {split('train')} records, {new} of them traffic")  # fmt: skip
        say(
            f"{answers} questions were answered meanwhile, none was lost; {next(x for x in log.splitlines()[::-1] if x.startswith('time'))}"
        )
        need(len(read_ledger(home / "ledger.jsonl")) == promotions + 1, "the ledger has more than the registration")
        # the next alarm is held: by the cooldown, and where that is over, by the budget
        wait = {"cooldown": "1h", "budget": "1s"}
        for why, cooldown in wait.items():
            policy = YAML().load(home / "params.yaml")
            policy["monitor"]["retrain"]["cooldown"] = cooldown
            YAML().dump(policy, home / "params.yaml")
            started[-1].send_signal(signal.SIGTERM)
            started[-1].wait(30)
            start("monitor", "watch", "--every", "1")
            send(client, rows, 660, False)  # the old alarm ends when the last windows together are quiet again
            send(client, rows, 180, True)
            held = until(lambda why=why: [x for x in asked() if x.state == "held" and why in x.note], 60, lambda why=why: f"no request was held by the {why}: {asked()}")  # fmt: skip
            say(f"{held[-1].id} held by the {held[-1].note}")
        need(set(v.version for v in versions(registry, "bank-support")) == {1, 2}, "a held request made a version")
        doctor = kit("doctor")
        say(f"llmkit doctor: {doctor.stdout.strip().splitlines()[-1]} (exit code {doctor.returncode})")
        print(json.dumps({"seconds": round(time.monotonic() - BEGUN), "answers": answers, "new": new, "verdict": read_json(home / "artifacts/gate/verdict/verdict.json")["outcome"]}))  # fmt: skip
    finally:
        for child in started:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
                child.wait(30)
        if not a.folder:
            shutil.rmtree(home.parent, ignore_errors=True)


if __name__ == "__main__":
    main()
