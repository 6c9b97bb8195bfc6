"""Rows per second and peak memory of `prepare` at 10^4, 10^5 and 10^6 rows: memory must stay flat.

    python benchmarks/prepare_scale.py [ROWS ...] [--out benchmarks/results/prepare_scale.json]

Each size runs in a process of its own. The rows are JSON Lines made beforehand: questions of the bank with an order
number and a remark of random words, so that they differ as real ones do, 2 % repeated and 1 % nearly repeated.
"""

import argparse
import json
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llmkit.core.files import read_json, write_json, write_jsonl
from llmkit.data.bank import records
from llmkit.data.prepare import Reader, Rules, prepare
from llmkit.data.sources import Source

RULES = Rules({"train": 0.9, "validation": 0.05, "test": 0.05}, seed=7)


def rows(n: int):
    "Rows to prepare."
    rng, words = (
        random.Random(0),
        [f"{a}{b}{c}" for a in "bdfgkl" for b in ("an", "ero", "umi", "ost") for c in ("do", "x", "rel", "ing")],
    )
    said: dict = {}
    for i, r in enumerate(records(7, n)):
        kind = rng.random()
        if kind < 0.02 and said:
            r = {**said, "id": r["id"]}
        elif kind < 0.03 and said:
            turns = [dict(m) for m in said["messages"]]
            turns[1]["content"] += " thanks"
            r = {**said, "messages": turns, "id": r["id"]}
        else:
            r["messages"][1]["content"] += f" My reference is {i} {' '.join(rng.choices(words, k=10))}"
            said = r
        yield r


def tokens(messages: list[dict], opened: bool) -> list[int]:
    "A stand-in for a tokenizer: one token for each word. What a real one costs is not this package's."
    return [0] * sum(len(m["content"].split()) for m in messages)


def one(n: int) -> dict:
    "Prepare `n` rows; what it took."
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp) / "rows.jsonl"
        write_jsonl(path, rows(n))
        size, before = path.stat().st_size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start, cpu = time.perf_counter(), time.process_time()
        data = prepare(Source("jsonl", str(path)), Path(tmp) / "out/dataset", RULES, Reader(tokens, context_length=512))
        took, cpu = time.perf_counter() - start, time.process_time() - cpu
        about = read_json(data / "profile.json")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "rows": n, "input_mb": round(size / 2**20, 1), "seconds": round(took, 1), "cpu_seconds": round(cpu, 1),
        "rows_per_second": round(n / took), "rows_per_cpu_second": round(n / cpu),
        "peak_mb": round(peak / 1024), "before_mb": round(before / 1024), "duplicates": about["rows"]["duplicates"],
    }  # fmt: skip


def main() -> None:
    "Run each size in a fresh process."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("rows", type=int, nargs="*", default=[10_000, 100_000, 1_000_000], help="sizes")
    p.add_argument("--one", type=int, help=argparse.SUPPRESS)
    p.add_argument("--out", type=Path, help="a JSON file for the figures")
    a = p.parse_args()
    if a.one:
        print(json.dumps(one(a.one)))
        return
    found = []
    for n in a.rows:
        run = subprocess.run([sys.executable, __file__, "--one", str(n)], capture_output=True, text=True)
        if run.returncode:
            sys.exit(run.stderr)
        found.append(json.loads(run.stdout.splitlines()[-1]))
        print(found[-1], flush=True)
    if a.out:
        write_json(a.out, {"machine": platform.machine(), "python": platform.python_version(), "sizes": found})


if __name__ == "__main__":
    main()
