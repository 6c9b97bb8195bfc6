#!/usr/bin/env python
"""`llmkit serve` against `transformers serve` and llama.cpp's server: the same model, the same requests, one run.

    python benchmarks/serve_speed.py --llama-server PATH/TO/llama-server --out benchmarks/results/serve_speed.json
    python benchmarks/serve_speed.py --layers 4 --rounds 1 --clients 1 8             # a quick look

The model has the shape of SmolLM2-135M, random weights, and a tokenizer that turns a prompt into the same tokens everywhere.
Clients ask in a closed loop over streaming `/v1/completions`, greedily, each prompt once, so that no cache helps. The
contenders take turns within every round, so that a busy machine slows all of them: read the ratios, whose spread is given. Tokens per second
of processor time hardly depend on other work: with one core for each contender, they are what a quiet machine would give.
llama.cpp's server rearranges weights for the processor when it loads them; "as stored" is the same with `--no-repack`.
`llama-server` and `llama-quantize` come from the sources in llama-cpp-python's sdist:

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python && tar xzf llama_cpp_python-*.tar.gz
    cmake -S llama_cpp_python-*/vendor/llama.cpp -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \\
      -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF
    nice -n 19 cmake --build build --target llama-server llama-quantize -j 2        # build/bin/
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import socket
import statistics
import string
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import psutil
from decode_speed import write_gguf

from llmkit.core.files import write_json, write_text
from llmkit.model.export import export
from llmkit.model.precision import computes_bf16

VOCAB, CONTEXT = 49152, 2048
KEYS = ("throughput", "per_cpu", "ttft_p95", "latency_p95", "memory")
TARGETS = {  # contender, against, clients → least ratio of throughput that is asked for
    ("llmkit int4/32", "transformers", 8): 4.0,
    ("llmkit int4/32", "llama.cpp q4_0", 8): 1.2,
    ("llmkit int4/128", "transformers", 8): 4.0,
    ("llmkit int4/128", "llama.cpp q4_0", 8): 1.2,
}

# -- the model ---------------------------------------------------------------------------------------------------


def merges() -> list[tuple[str, str]]:
    "Pairs of letters, pairs with a third, pairs of pairs, until the vocabulary is full."
    letters = string.ascii_lowercase
    two = ["".join(p) for p in itertools.product(letters, repeat=2)]
    found = [(a, b) for a, b in itertools.product(letters, repeat=2)]
    found += [(a, b) for a, b in itertools.product(two, letters)]
    found += [(a, b) for a, b in itertools.product(two, two)]
    return found[: VOCAB - 257]


def make_tokenizer(folder: Path) -> list[str]:
    "A byte-level BPE of the full size; gives its tokens in order."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pairs = merges()
    tokens += [a + b for a, b in pairs]
    tok = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, pairs))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    chat = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<end>", chat_template=chat)
    fast.save_pretrained(folder)
    return tokens


def make_model(folder: Path, layers: int) -> list[str]:
    "A random Llama in the shape of SmolLM2-135M; gives the tokens of its tokenizer."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": CONTEXT}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.04}
    model = LlamaForCausalLM(LlamaConfig(**size, **heads, tie_word_embeddings=True, **ends))
    model.save_pretrained(folder)
    return make_tokenizer(folder)


def make_gguf(model: Path, out: Path, tokens: list[str], quantize: Path) -> Path:
    "The same weights in q4_0, whose blocks are 32, with the same tokenizer."
    import gguf

    plain = GGUFWriter = gguf.GGUFWriter

    class WithTokenizer(GGUFWriter):
        "Says of the tokenizer what llama.cpp reads, instead of what `write_gguf` says."

        def add_tokenizer_model(self, kind):
            super().add_tokenizer_model("gpt2")
            self.add_tokenizer_pre("gpt-2")
            self.add_token_merges([" ".join(p) for p in merges()])
            self.add_bos_token_id(0), self.add_eos_token_id(0), self.add_add_bos_token(False)

        def add_token_list(self, _):
            super().add_token_list(tokens)

        def add_token_types(self, _):
            super().add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1))

        def add_token_scores(self, _):
            pass

    gguf.GGUFWriter = WithTokenizer
    try:
        whole = write_gguf(model, out)
    finally:
        gguf.GGUFWriter = plain
    small = out / "q4_0.gguf"
    subprocess.run([quantize, "--pure", whole, small, "q4_0", "2"], check=True, capture_output=True)
    return small


# -- the contenders ----------------------------------------------------------------------------------------------


@dataclass
class Contender:
    "A server in a process of its own."

    name: str
    command: Sequence[Any]  # PORT stands for the port
    model: str  # as clients call it
    extra: dict[str, Any]  # of every request
    cores: int  # that it may use
    health: str = "/health"
    env: dict[str, str] = field(default_factory=dict)
    port: int = 0
    process: subprocess.Popen | None = None
    log: Any = None

    def start(self, work: Path) -> None:
        "Start it, and wait until it answers."
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        args = [
            "taskset",
            "-c",
            f"0-{self.cores - 1}",
            *(str(self.port) if a == "PORT" else str(a) for a in self.command),
        ]
        self.log = open(work / f"{self.name.replace('/', '_')}.log", "w+")
        env = os.environ | self.env
        self.process = subprocess.Popen(args, stdout=self.log, stderr=subprocess.STDOUT, env=env, cwd=work)
        end = time.monotonic() + 600
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{self.health}", timeout=5) as r:
                    if r.status == 200:
                        return
            except OSError:
                time.sleep(0.2)
        self.log.seek(0)
        raise SystemExit(f"{self.name} did not start:\n{self.log.read()[-3000:]}")

    def memory(self) -> int:
        "Bytes of memory that it holds, its children with it."
        p = psutil.Process(self.process.pid)
        return sum(x.memory_info().rss for x in [p, *p.children(recursive=True)])

    def busy(self) -> float:
        "Seconds of processor time so far, its children with it."
        p = psutil.Process(self.process.pid)
        times = [x.cpu_times() for x in [p, *p.children(recursive=True)]]
        return sum(t.user + t.system for t in times)

    def stop(self) -> None:
        "End it."
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def contenders(a: argparse.Namespace, work: Path, model: Path, tokens: list[str]) -> Iterator[Contender]:
    "Everything that can run here."
    slots, env = max(a.clients), {"OMP_NUM_THREADS": str(a.threads)}
    write_text(work / "settings.ini", "[DEFAULT]\n")
    for block in a.blocks:
        folder = work / f"int4_{block}"
        folder.mkdir()
        write_json(folder / "engine.json", export(model, folder, "int4", block_size=block))
        command = [
            Path(sys.executable).parent / "llmkit",
            "serve",
            "--target",
            folder,
            "--model",
            "m",
            "--port",
            "PORT",
            "--slots",
            slots,
            "--context",
            a.prompt + a.tokens + 32,
        ]
        yield Contender(f"llmkit int4/{block}", command, "m", {"ignore_eos": True}, a.threads, "/ready", env)
    if a.llama_server:
        small = make_gguf(model, work, tokens, a.llama_server.parent / "llama-quantize")
        room = a.prompt + a.tokens + 32
        how = ["-m", small, "--port", "PORT", "-t", a.threads, "-tb", a.threads, "-np", slots, "-c", slots * room]
        more = ["--no-warmup", "--no-slots", "--cache-ram", "0", "-fa", "auto"]
        extra = {"ignore_eos": True, "cache_prompt": False}
        yield Contender("llama.cpp q4_0", [a.llama_server, *how, *more], "m", extra, a.threads, env=env)
        stored = [a.llama_server, *how, *more, "--no-repack"]
        yield Contender("llama.cpp q4_0 as stored", stored, "m", extra, a.threads, env=env)
    else:
        print("llama.cpp is left out: see --help for how its server is built\n")
    for dtype in a.transformers:
        main = "import sys, torch; torch.set_num_threads(int(sys.argv.pop(1))); from transformers.cli.transformers import main; main()"
        pages = slots * ((a.prompt + a.tokens) // 32 + 2)  # enough for all, as the others have
        how = [
            "serve",
            model,
            "--cb-block-size",
            32,
            "--cb-num-blocks",
            pages,
            "--continuous-batching",
            "--dtype",
            dtype,
            "--port",
            "PORT",
            "--device",
            "cpu",
        ]
        command = [sys.executable, "-c", main, a.threads, *how, "--attn-implementation", "sdpa"]
        yield Contender(f"transformers {dtype}", command, str(model), {}, a.threads, env=env)


# -- the clients -------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    "What a client saw of one request; times in seconds."

    ttft: float
    latency: float
    prompt: int  # tokens
    tokens: int


async def ask(port: int, body: dict[str, Any]) -> Answer:
    "One streaming request on a connection of its own."
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    start, first, usage = time.perf_counter(), None, None
    writer.write(head.encode() + data)
    if b" 200 " not in (status := await reader.readline()):
        raise SystemExit(f"refused: {status!r} {(await reader.read(2000))!r}")
    while (line := await reader.readline()) != b"0\r\n":
        if not line:
            raise SystemExit("the server hung up")
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if "error" in event:
                raise SystemExit(f"failed: {event}")
            if first is None and event["choices"] and event["choices"][0].get("text") is not None:
                first = time.perf_counter()
            usage = event.get("usage") or usage
    now = time.perf_counter()
    writer.close()
    return Answer(first - start, now - start, usage["prompt_tokens"], usage["completion_tokens"])


async def load(c: Contender, prompts: list[str], clients: int, tokens: int) -> tuple[float, list[Answer]]:
    "Seconds, and all answers, of clients that ask one request after the other."
    left, answers = iter(prompts), []

    async def client() -> None:
        for p in left:
            body = {"model": c.model, "prompt": p, "max_tokens": tokens, "temperature": 0, "stream": True, **c.extra}
            answers.append(await ask(c.port, body | {"stream_options": {"include_usage": True}}))

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - start, answers


def make_prompts(rng: random.Random, n: int, tokens: int) -> list[str]:
    "Texts of so many tokens: words of two letters, each a token with its space apart."
    word = lambda: "".join(rng.choices(string.ascii_lowercase, k=2))
    return [" ".join(word() for _ in range(tokens // 2)) for _ in range(n)]


# -- the run -----------------------------------------------------------------------------------------------------


def measure(a: argparse.Namespace, running: list[Contender]) -> dict[str, dict[int, list[dict[str, float]]]]:
    "Rounds in which all take turns, at each number of clients."
    rng, found = random.Random(0), {c.name: {n: [] for n in a.clients} for c in running}
    for round in range(a.rounds + 1):  # the first one warms up, and does not count
        for n in a.clients if round else [2]:
            prompts = make_prompts(rng, max(n * a.each, 4) if round else n, a.prompt)
            turn = running if round % 2 else running[::-1]
            for c in turn:
                before = c.busy()
                seconds, got = asyncio.run(load(c, prompts, n, a.tokens))
                if {x.prompt for x in got} != {got[0].prompt} or {x.tokens for x in got} != {a.tokens}:
                    raise SystemExit(f"{c.name} did other work than asked: {got}")
                if round:
                    made = sum(x.tokens for x in got)
                    row = {
                        "throughput": made / seconds,
                        "per_cpu": made / (c.busy() - before),
                        "prompt_tokens": got[0].prompt,
                    }
                    row |= {
                        f"{k}_p95": float(np.quantile([getattr(x, k) for x in got], 0.95)) for k in ("ttft", "latency")
                    }
                    found[c.name][n].append(row | {"memory": c.memory()})
                    print(
                        f"round {round}, {n:2} clients, {c.name:18}: {row['throughput']:7.1f} tokens/s, {row['per_cpu']:7.1f} a processor second",
                        flush=True,
                    )
    return found


def bandwidth() -> float:
    "Bytes that one core reads from memory in a second of its time."
    data, best = np.ones(64 << 20, np.float64), 0.0  # 512 MB, larger than any cache
    for _ in range(5):
        start = time.thread_time()
        data.sum()
        best = max(best, data.nbytes / (time.thread_time() - start))
    return best


def ratios(rows: list[dict], others: list[dict], key: str) -> dict[str, float]:
    "Of the same round, one by the other: the median, and how far it spreads."
    each = [x[key] / y[key] for x, y in zip(rows, others, strict=True)]
    return {"median": statistics.median(each), "least": min(each), "most": max(each)}


def report(a: argparse.Namespace, found: dict, weights: dict[str, int]) -> dict[str, Any]:
    "Tables, and all of it as data."
    middle = lambda rows, k: statistics.median(r[k] for r in rows)
    print("\ncontender                 clients  tokens/s  a processor second  p95 TTFT ms  p95 latency ms  memory MB")
    for name, by in found.items():
        for n, rows in by.items():
            t, c, f, w, m = (middle(rows, k) for k in KEYS)
            print(f"{name:24} {n:8} {t:9.1f} {c:19.1f} {f * 1e3:12.0f} {w * 1e3:15.0f} {m / 1e6:10.0f}")
    table: dict[str, Any] = {}
    print("\nratios, median of the rounds (least to most)")
    ours = [n for n in found if n.startswith("llmkit")]
    for name, other, n in itertools.product(ours, [o for o in found if o not in ours], a.clients):
        r = {k: ratios(found[name][n], found[other][n], k) for k in KEYS}
        table[f"{name} / {other}, {n} clients"] = r
        told = ", ".join(f"{k} {v['median']:.2f} ({v['least']:.2f} to {v['most']:.2f})" for k, v in r.items())
        print(f"{name} / {other}, {n:2} clients: {told}")
    print()
    targets = {}
    for (name, against, n), least in TARGETS.items():
        for other in [o for o in found if o.startswith(against)]:
            if name in found and n in a.clients:
                got = table[f"{name} / {other}, {n} clients"]
                cpu, got = got["per_cpu"]["median"], got["throughput"]["median"]
                targets[f"{name} / {other}, {n} clients"] = {
                    "ratio": got,
                    "ratio_per_cpu": cpu,
                    "target": least,
                    "met": got >= least,
                }
                print(
                    f"{'met   ' if got >= least else 'MISSED'} {name} / {other}, {n} clients: {got:.2f}, target {least}"
                )
    speed = bandwidth()
    print(
        f"\none core reads {speed / 1e9:.1f} GB/s; it could read the weights so often in a second of its time, and did:"
    )
    limits = {}
    for name, size in weights.items():
        one = middle(found[name][min(a.clients)], "per_cpu")
        limits[name] = {"weights_bytes": size, "reads_possible": speed / size, "steps_alone": one}
        print(
            f"{name}: {size / 1e6:.0f} MB, {speed / size:.0f} times; one client got {one:.0f} tokens a processor second, {one * size / speed:.0%}"
        )
    return {"ratios": table, "targets": targets, "bandwidth": speed, "limits": limits, "rounds": found}


def main() -> int:
    "Measure, and print tables; 1 when a target is missed."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--llama-server", type=Path, help="llama.cpp's server; llama-quantize lies beside it")
    fast = ["float32", *(["bfloat16"] if computes_bf16() else [])]
    p.add_argument(
        "--transformers", nargs="*", default=fast, help="its precisions; default: what the processor computes in"
    )
    p.add_argument("--blocks", type=int, nargs="*", default=[32, 128], help="weights that share a scale")
    p.add_argument("--clients", type=int, nargs="*", default=[1, 8, 32])
    p.add_argument("--layers", type=int, default=30)
    p.add_argument("--prompt", type=int, default=96, help="tokens in a prompt")
    p.add_argument("--tokens", type=int, default=48, help="tokens of an answer")
    p.add_argument("--each", type=int, default=2, help="requests of each client in a round")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="cores of each contender; clients use all")
    p.add_argument("--out", type=Path, help="a JSON file for the results")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        work = Path(tmp)
        model = work / "model"
        model.mkdir()
        tokens, running = make_model(model, a.layers), []
        try:
            for c in contenders(a, work, model, tokens):
                c.start(work)
                running.append(c)
            found = measure(a, running)
        finally:
            for c in running:
                c.stop()
        weights = {f"llmkit int4/{b}": (work / f"int4_{b}/weights.bin").stat().st_size for b in a.blocks}
        body = report(a, found, weights)
    if a.out:
        setting = {k: v for k, v in vars(a).items() if k not in ("out", "llama_server")}
        write_json(a.out, {"setting": setting, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), **body})
    return int(not all(t["met"] for t in body["targets"].values()))


if __name__ == "__main__":
    sys.exit(main())
