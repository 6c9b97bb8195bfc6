#!/usr/bin/env python
"""What a request pays for the gateway and the rollout: keys, limits, guards, routing, events, and a canary that is judged.

    python benchmarks/gateway_overhead.py [--requests 2000] [--out benchmarks/results/gateway_overhead.json]

Two servers in processes of their own take turns, block by block: `llmkit serve`'s application over a model that answers at
once, with a rollout under way that half of the users see, and a bare application that reads the same JSON and answers with
the same JSON. The difference between the two is what the gateway costs; HTTP itself is in both. One client asks at a time.
Other work on the machine moves p95: `--realtime` goes before it. The processor time of both hardly depends on it.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from llmkit.core.files import write_json
from llmkit.runtime.dummy import ByteTokenizer
from llmkit.serve.backend import Work
from llmkit.serve.reply import Piece, Usage

LIMIT = 0.002  # seconds at p95
ASK = {"model": "bank", "max_tokens": 8, "temperature": 0, "messages": [{"role": "user", "content": "I lost my card"}]}
LONG = {"min_duration": "24h", "max_duration": "72h", "min_samples": 1_000_000}
POLICY = {
    "alpha": 0.05, "label_lag": "10m",
    "steps": [{"setWeight": 50}, {"analysis": LONG}], "strata": [64, 256], "shadow": [],
    "canary": [{"metric": "error_rate", "margin": 0.03}, {"metric": "refusal_rate", "margin": 0.06}, {"metric": "latency_p95", "max_ratio": 2.0}],
    "validity": {"srm_alpha": 0.001, "stale_after": "10h", "on_no_data": "inconclusive"},
    "on": {"fail": "abort", "error": "pause", "inconclusive": "pause"},
}  # fmt: skip


class Nowhere:
    "A registry that nobody reads."

    def move(self, effect):
        pass


class Instant:
    "A backend that has its answer ready: what is left is the gateway."

    name, tokenizer, context = "instant", ByteTokenizer(), 1024

    def __init__(self, release: str):
        self.release = self.identity = release

    def glance(self, call):
        pass

    def prepare(self, call):
        return Work(call, len(self.tokenizer.chat(call.messages)), 8)

    async def start(self, work, timeout=None):
        return Said(work)

    async def check(self):
        pass

    async def alive(self):
        return True

    def broken(self):
        return False

    async def close(self, timeout=None):
        pass

    def stats(self):
        return {}


class Said:
    "The answer, in one piece."

    queued = 0.0

    def __init__(self, work):
        self.usage = Usage(work.prompt_tokens)

    def cancel(self):
        pass

    async def __aiter__(self):
        self.usage.completion = 8
        yield Piece(0, "Blocked.", 8, (), "stop")


def serve_gateway(folder: Path) -> int:
    "The application of `llmkit serve`, with all that it can have; prints its address and a key."
    from llmkit.rollout.controller import Controller
    from llmkit.rollout.live import Live
    from llmkit.rollout.store import Store
    from llmkit.serve.events import Events
    from llmkit.serve.gateway import Gateway
    from llmkit.serve.keys import Keys
    from llmkit.serve.limits import Limits, Price
    from llmkit.serve.running import run

    keys, store = Keys(folder / "serve.db"), Store(folder / "rollouts.db")
    text, _ = keys.create("team")
    keys.allow("team", rpm=10_000_000, tpm=1_000_000_000, budget=1e6, guards="input_pii=mask, output_pii=mask")
    limits, events = Limits(folder / "serve.db", Price(1.0, 1.0)), Events(folder / "events.db")
    gateway = Gateway("bank", {"baseline": Instant("sha256:a")}, keys=keys, limits=limits, events=events)
    store.create("r1", POLICY)
    releases = {"baseline": "sha256:a", "canary": "sha256:b"}
    Controller(store, "r1", Nowhere()).command("start", "ann", model="bank", releases=releases)
    live = Live(gateway, store, Nowhere(), Instant)
    return run(gateway, port=0, beside=live.beside(), started=lambda line: print(line, text, flush=True))


def serve_bare(_: Path) -> int:
    "An application that does nothing but HTTP and JSON."
    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    choice = {"index": 0, "message": {"role": "assistant", "content": "Blocked."}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 40, "completion_tokens": 8, "total_tokens": 48}

    async def answer(request):
        body = json.loads(await request.body())
        return JSONResponse({"id": "x", "model": body["model"], "choices": [choice], "usage": usage})

    class Server(uvicorn.Server):
        async def startup(self, sockets=None):
            await super().startup(sockets)
            print(f"bare on http://127.0.0.1:{self.servers[0].sockets[0].getsockname()[1]}/v1 none", flush=True)

    app = Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"])])
    Server(uvicorn.Config(app, "127.0.0.1", 0, log_level="warning", access_log=False)).run()
    return 0


async def block(port: int, key: str, n: int, first: int) -> list[float]:
    "Seconds of each of some requests, one after the other on one connection, each from another user."
    r, w = await asyncio.open_connection("127.0.0.1", port)
    out = []
    for i in range(first, first + n):
        data = json.dumps({**ASK, "user": f"u{i}"}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-length: {len(data)}\r\n\r\n"
        start = time.perf_counter()
        w.write(head.encode() + data)
        got = await r.readuntil(b"\r\n\r\n")
        size = next(int(x.split(b":")[1]) for x in got.lower().split(b"\r\n") if x.startswith(b"content-length"))
        body = json.loads(await r.readexactly(size))
        out.append(time.perf_counter() - start)
        if b" 200 " not in got.split(b"\r\n")[0] or "choices" not in body:
            raise SystemExit(f"refused: {got!r} {body}")
    w.close()
    return out


def start(kind: str, folder: Path) -> tuple[subprocess.Popen, int, str]:
    "A server in a process of its own, its port and its key."
    args = [sys.executable, __file__, "--serve", kind, "--folder", folder]
    p = subprocess.Popen(list(map(str, args)), stdout=subprocess.PIPE, text=True)
    line = p.stdout.readline()
    return p, int(line.split("127.0.0.1:")[1].split("/")[0]), line.split()[-1]


def main() -> None:
    "Measure, and print a table."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--requests", type=int, default=2000)
    p.add_argument("--block", type=int, default=50, help="requests between two turns")
    p.add_argument("--realtime", action="store_true", help="before all other work of the machine (needs root)")
    p.add_argument("--out", type=Path, help="a JSON file for the results")
    p.add_argument("--serve", choices=["gateway", "bare"], help=argparse.SUPPRESS)
    p.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.serve:
        raise SystemExit({"gateway": serve_gateway, "bare": serve_bare}[a.serve](a.folder))
    if a.realtime:  # the servers inherit it
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    times: dict[str, list[list[float]]] = {"gateway": [], "bare": []}  # one list for each turn
    busy = dict.fromkeys(times, 0.0)  # seconds of processor time
    with tempfile.TemporaryDirectory() as tmp:
        running = {kind: start(kind, Path(tmp)) for kind in times}
        try:
            time.sleep(2)  # the self-test, and the canary is loaded
            for k in range(-4, a.requests // a.block):  # the first ones warm up
                for kind, (process, port, key) in running.items():
                    before = used(process)
                    got = asyncio.run(block(port, key, a.block, k * a.block))
                    if k >= 0:
                        times[kind].append(got)
                        busy[kind] += used(process) - before
            seen = variants(Path(tmp))
        finally:
            for process, *_ in running.values():
                process.terminate()
                process.wait(30)
    raise SystemExit(report(a, times, busy, seen))


def used(process: subprocess.Popen) -> float:
    "Seconds of processor time of a process so far."
    t = psutil.Process(process.pid).cpu_times()
    return t.user + t.system


def variants(folder: Path) -> dict[str, int]:
    "How many requests each variant has answered."
    from llmkit.serve.events import Events

    found = [e["variant"] for e in Events(folder / "events.db").all("request")]
    return {v: found.count(v) for v in sorted(set(found))}


def report(a: argparse.Namespace, times: dict[str, list], busy: dict[str, float], seen: dict[str, int]) -> int:
    "A table, and whether the limit is kept."
    rows: dict[str, dict[str, float]] = {}
    for kind, x in times.items():
        rows[kind] = {f"p{p}": float(np.quantile(np.concatenate(x), p / 100)) for p in (50, 95, 99)}
    rows["cost"] = {p: v - rows["bare"][p] for p, v in rows["gateway"].items()}
    total = sum(map(len, times["gateway"]))
    cpu = {kind: busy[kind] / total for kind in times}
    print(f"{total:,} requests, answered by {seen}\nms                   p50     p95     p99")
    for name, row in rows.items():
        print(f"{name:16} {row['p50'] * 1e3:7.2f} {row['p95'] * 1e3:7.2f} {row['p99'] * 1e3:7.2f}")
    print(f"processor time of a request: {cpu['gateway'] * 1e3:.2f} ms, of a bare one {cpu['bare'] * 1e3:.2f} ms")
    cost = rows["cost"]["p95"]
    met = cost < LIMIT
    print(
        f"{'met' if met else 'MISSED'}: gateway and rollout cost {cost * 1e3:.2f} ms at p95, limit {LIMIT * 1e3:g} ms"
    )
    if a.out:
        facts: dict[str, Any] = {"cores": os.cpu_count(), "machine": "shared with other work", "variants": seen}
        write_json(
            a.out,
            {**facts, "realtime": a.realtime, "requests": total, "seconds": rows, "processor_seconds": cpu, "met": met},
        )
    return 0 if met else 1


if __name__ == "__main__":
    main()
