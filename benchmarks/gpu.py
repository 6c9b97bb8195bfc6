"""What only a GPU can show, in one go: training, merging, export, both engines, the server and the meters on CUDA.

    python benchmarks/gpu.py [--out gpu.json] [--only finetune,torch] [--minutes 12]
    python benchmarks/gpu.py --device cpu            # every step in small on the CPU, where only the script is tried

A line for each check: pass, fail or skip, with its figures; all of them as JSON under `--out`, after every step, so that a
run that is cut off has left what it found. Each step is a process of its own, with a limit of time: one that crashes, hangs
or poisons the GPU takes no other with it. What a step needs and is not there (a GPU build of ONNX Runtime, bitsandbytes,
fastapi, a second GPU) is skipped with the reason. No network, and nothing outside a temporary folder is written but `--out`.
Exit code 0: nothing failed; 1: something did; 2: there is no GPU here.

It wants the kit's extras `train`, `onnx` and `serve`, and `nvidia-ml-py` for joules; ONNX Runtime's CUDA builds take the place
of the others: `make gpu`.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "onnx", "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai", "onnxruntime-genai-cuda", "bitsandbytes", "nvidia-ml-py")  # fmt: skip
SIZES = {  # device → the base of good answers, the base of many weights, records, and steps of pretraining
    "cuda": {
        "small": {"vocab": 1024, "hidden": 256, "layers": 4, "heads": 4, "mlp": 704, "context": 256},
        "large": {"vocab": 1024, "hidden": 1024, "layers": 16, "heads": 16, "mlp": 2816, "context": 256},
        "records": 4000, "steps": 120, "asked": 32, "tokens": 24, "threads": 8,
    },
    "cpu": {
        "small": {"vocab": 512, "hidden": 64, "layers": 2, "heads": 2, "mlp": 128, "context": 256},
        "large": {"vocab": 512, "hidden": 64, "layers": 2, "heads": 2, "mlp": 128, "context": 256},
        "records": 160, "steps": 20, "asked": 8, "tokens": 8, "threads": 1,
    },
}  # fmt: skip
PRECISIONS = {"cuda": ("fp16", "int8", "int4"), "cpu": ("fp32", "int8", "int4")}
LIMITS = {  # of params.yaml
    "adapter-merged": {"logit_error_max": 1e-3},
    "merged-onnx": {"logit_error_max": 1e-3},
    "quantized-engine": {"top1_agreement": 0.99},
}
SAME = {"fp32": 1.0, "fp16": 0.9, "int8": 0.5, "int4": 0.0}  # least share of tokens that torch says too
ALIKE = {"fp32": 0.98, "bf16": 0.5}  # least share of tokens that an answer in a batch has of the one alone; else 0.8


class Skip(Exception):
    "Something that a check needs is not here."


class Missed(Exception):
    "A figure is not what it has to be."


def expect(holds: bool, otherwise: str) -> None:
    "Fail a check; raises `Missed`."
    if not holds:
        raise Missed(otherwise)


def installed(*modules: str) -> None:
    "Skip where a module is missing."
    if missing := [m for m in modules if find_spec(m) is None]:
        raise Skip(f"{', '.join(missing)} is not installed")


# -- one step in its process -------------------------------------------------------------------------------------


@dataclass
class Bench:
    "Where a step works, and on what."

    work: Path
    device: str  # "cuda" or "cpu"

    @property
    def size(self) -> dict[str, Any]:
        "How large everything is."
        return SIZES[self.device]

    def need(self, *names: str) -> list[Path]:
        "Folders that earlier steps have made; skips where one is missing."
        if missing := [n for n in names if not (self.work / n / "manifest.json").is_file()]:
            raise Skip(f"{', '.join(missing)} was not made")
        return [self.work / n for n in names]

    @contextmanager
    def check(self, name: str) -> Iterator[dict[str, Any]]:
        "One check: the block fills in the figures; what it raises is its failure."
        figures: dict[str, Any] = {}
        began, status, why = time.perf_counter(), "pass", ""
        try:
            yield figures
        except Skip as e:
            status, why = "skip", str(e)
        except Exception as e:
            traceback.print_exc()
            status, why = "fail", f"{type(e).__name__}: {' '.join(str(e).split())[:400]}"
        self.note(name, status, why, figures, time.perf_counter() - began)

    def note(self, name: str, status: str, why: str = "", figures: dict | None = None, seconds: float = 0.0) -> None:
        "Print a line and keep it."
        row = {"check": name, "status": status, "why": why, "figures": figures or {}, "seconds": round(seconds, 2)}
        with open(self.work / "checks.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")
        told = ", ".join(f"{k} {shown(v)}" for k, v in row["figures"].items())
        print(f"{status:4}  {name:22} {seconds:6.1f} s  {'; '.join(x for x in (why, told) if x)}", flush=True)

    def notes(self) -> list[dict[str, Any]]:
        "What was kept."
        path = self.work / "checks.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def shown(value: Any) -> str:
    "A figure for people."
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def recipe(b: Bench, **changes) -> Any:
    "How deltas are trained here."
    from llmkit.model.train import Recipe

    plain = Recipe(
        rank=16, alpha=16, dropout=0.0, targets="all-linear", rslora=False, dora=False, save_modules=["norm"],
        quantize_base="none", precision="fp32", batching="length", batch_size=16, accumulate=1, max_tokens=256,
        max_overlong=0.0, word_dropout=0.05, label_smoothing=0.0, prompt_loss_weight=0.1, epochs=1, optimizer="muon",
        lr=7e-3, other_lr=1e-2, warmup=0.1, weight_decay=0.0, clip=1.0, ema=0.0, evaluate_every=0, keep="loss",
        patience=0, checkpoint_every=0, processes=1, threads=b.size["threads"], seed=7,
    )  # fmt: skip
    return replace(plain, **changes)


def trained(b: Bench, base: str, dataset: str, name: str, how: Any) -> tuple[Any, dict[str, float]]:
    "A delta, and how fast it was trained."
    from llmkit.core.artifact import open_artifact
    from llmkit.core.files import read_json
    from llmkit.model.finetune import finetune, workspace

    made = [open_artifact(p) for p in b.need(base, dataset)]
    delta = finetune(*made, b.work / name, how)
    return delta, read_json(workspace(delta.parents, how) / "timing.json")


def learnt(delta: Any) -> tuple[float, float]:
    "The loss of the first step, and that of the validation at the end."
    from llmkit.core.files import read_json

    return read_json(delta / "history.json")["train"]["loss"][0], delta.meta["validation_loss"]


# -- the steps ---------------------------------------------------------------------------------------------------


def machine(b: Bench) -> None:
    "What stands here."
    with b.check("machine") as f:
        f |= {"python": sys.version.split()[0], "cores": os.cpu_count()}
        for name in LIBRARIES:
            try:
                f[name] = version(name)
            except PackageNotFoundError:
                f[name] = "-"
        import torch

        if b.device == "cuda":
            gpu = torch.cuda.get_device_properties(0)
            f |= {"gpu": gpu.name, "gpus": torch.cuda.device_count(), "memory": gpu.total_memory, "cuda": torch.version.cuda}  # fmt: skip
            f["capability"] = f"{gpu.major}.{gpu.minor}"
        if find_spec("onnxruntime"):
            import onnxruntime as ort

            f |= {"providers": "+".join(x.removesuffix("ExecutionProvider") for x in ort.get_available_providers())}
            f["onnxruntime's cuda"] = ort.cuda_version or "-"


def prepare(b: Bench) -> None:
    "Two bases with one tokenizer, and a dataset for each."
    import shutil

    from llmkit.core.artifact import build, open_artifact
    from llmkit.core.files import write_jsonl
    from llmkit.data.bank import corpus, records
    from llmkit.model.folder import TOKENIZER_FILES
    from llmkit.model.tiny import Shape, make_tiny, tiny_model

    small, rows = b.work / "small", list(records(7, b.size["records"]))
    with b.check("base") as f:
        how = {"lr": 2e-2, "other_lr": 1e-2, "optimizer": "muon", "threads": b.size["threads"], "batch_tokens": 2048}
        with build(small, "base") as out:
            made = make_tiny(out, list(corpus(7, 4000)), Shape(**b.size["small"]), b.size["steps"], **how)
        f |= {k: made[k] for k in ("parameters", "held_out_loss")}
    with b.check("large base") as f, build(b.work / "large", "base") as out:
        model = tiny_model(Shape(**b.size["large"]), 3)
        model.save_pretrained(out)
        f["parameters"] = sum(p.numel() for p in model.parameters())
        for name in (*TOKENIZER_FILES, "chat_template.jinja", "generation_config.json"):
            if (small / name).is_file():
                shutil.copyfile(small / name, out / name)
    cut = len(rows) // 10
    for base in ("small", "large"):
        with b.check(f"{base} dataset") as f:
            parents = {"base": open_artifact(b.need(base)[0])}
            with build(b.work / f"{base}-data", "dataset", parents) as out:
                write_jsonl(out / "validation.jsonl", rows[:cut])
                write_jsonl(out / "train.jsonl", rows[cut:])
            f["records"] = len(rows)


def finetune(b: Bench) -> None:
    "The large base in bfloat16 and in float32, each twice."
    from llmkit.model.precision import computes_bf16

    found: dict[str, Any] = {}
    for kind in ("bf16", "fp32"):
        with b.check(f"finetune {kind}") as f:
            how = recipe(b, precision=kind, batching="pack", batch_size=64)
            first, _ = trained(b, "large", "large-data", f"large-{kind}", how)
            again, timing = trained(b, "large", "large-data", f"large-{kind}-again", how)
            start, end = learnt(first)
            f |= {k: timing[k] for k in ("tokens_per_second", "peak_gpu_bytes", "peak_bytes") if k in timing}
            f |= {"first_loss": start, "loss": end, "steps": first.meta["steps"]}
            f |= {"deterministic": first.meta.get("deterministic", "-"), "same_bytes": first.digest == again.digest}
            found[kind] = f
            expect(first.meta["device"] == b.device, f"trained on {first.meta['device']}")
            expect(end < start, "the loss did not fall")
            expect(f["same_bytes"], "two runs gave other bytes")
            expect(f["deterministic"] is not False, "an operation has no deterministic kernel: see the log")
    with b.check("bf16 beside fp32") as f:
        if len(found) < 2 or not all("loss" in x for x in found.values()):
            raise Skip("one of them was not trained")
        one, other = found["bf16"], found["fp32"]
        f |= {f"{k} ratio": one[k] / other[k] for k in ("tokens_per_second", "peak_gpu_bytes", "loss") if k in one}
        f["hardware_bf16"] = computes_bf16(b.device)
        expect(abs(one["loss"] / other["loss"] - 1) < 0.1, "bfloat16 learns otherwise than float32")
        expect(f.get("peak_gpu_bytes ratio", 0) < 1, "bfloat16 takes no less memory")


def resume(b: Bench) -> None:
    "The small base's delta, which later steps use; and again, cut off in the middle."
    from llmkit.model.train import Trainer

    kind = "bf16" if b.device == "cuda" else "fp32"
    how = recipe(b, precision=kind, epochs=2, checkpoint_every=4)
    with b.check("delta") as f:
        delta, timing = trained(b, "small", "small-data", "delta", how)
        start, end = learnt(delta)
        f |= {"first_loss": start, "loss": end, "answers": delta.meta["validation_accuracy"], **timing}
        expect(end < start, "the loss did not fall")
    with b.check("resume") as f:
        step, done = Trainer.step, []

        def cut(self, *args):
            done.append(1)
            if len(done) > 6:
                raise KeyboardInterrupt
            return step(self, *args)

        Trainer.step = cut
        try:
            trained(b, "small", "small-data", "resumed", how)
        except KeyboardInterrupt:
            f["steps_before"] = len(done) - 1
        Trainer.step = step
        resumed, timing = trained(b, "small", "small-data", "resumed", how)
        expect("steps_before" in f, "it was not cut off")
        expect(resumed.digest == delta.digest, "a run that was taken up gives other bytes")


def qlora(b: Bench) -> None:
    "The large base in four bits."
    with b.check("qlora") as f:
        installed("bitsandbytes")
        how = recipe(b, precision="bf16" if b.device == "cuda" else "fp32", quantize_base="nf4", batch_size=64)
        delta, timing = trained(b, "large", "large-data", "large-nf4", how)
        start, end = learnt(delta)
        f |= {k: timing[k] for k in ("tokens_per_second", "peak_gpu_bytes") if k in timing}
        f |= {"first_loss": start, "loss": end, "files": "+".join(sorted(delta.files))}
        expect(end < start, "the loss did not fall")
        whole = next((x["figures"] for x in b.notes() if x["check"] == "finetune bf16"), {})
        if "peak_gpu_bytes" in f and "peak_gpu_bytes" in whole:
            f["memory beside bf16"] = f["peak_gpu_bytes"] / whole["peak_gpu_bytes"]


def processes(b: Bench) -> None:
    "Two processes that share every batch."
    with b.check("two processes") as f:
        import torch

        if b.device == "cuda" and torch.cuda.device_count() < 2:
            raise Skip("there is one GPU")
        how = recipe(b, batch_size=32)
        one, _ = trained(b, "small", "small-data", "one-process", how)
        two, timing = trained(b, "small", "small-data", "two-processes", replace(how, processes=2))
        f |= {"loss": two.meta["validation_loss"], "alone": one.meta["validation_loss"], **timing}
        expect(abs(f["loss"] - f["alone"]) < 0.05, "two processes learn otherwise than one")


def merge(b: Bench) -> None:
    "Base and delta as one model, in float32 and rounded."
    from llmkit.model.merge import merge

    for dtype, limits in (("float32", {"logit_error_max": 1e-3, "top1_agreement": 0.99}), ("bfloat16", {"top1_agreement": 0.9})):  # fmt: skip
        with b.check(f"merge {dtype}") as f:
            base, delta = b.need("small", "delta")
            made = merge(b.work / ("model" if dtype == "float32" else "model-bf16"), base, delta, dtype=dtype, limits=limits)  # fmt: skip
            f |= {k: made.meta["parity"][k] for k in ("logit_error_max", "kl_max", "top1_agreement")}
            f |= made.meta["change"]


def prompts(b: Bench) -> list[list[int]]:
    "Questions of the dataset as tokens, of unequal length."
    from llmkit.core.files import read_jsonl
    from llmkit.model.tokenizer import Tokenizer

    data, base = b.need("small-data", "small")
    tok = Tokenizer.load(base)
    rows = [tok.chat(r["messages"][:-1]) for r in read_jsonl(data / "validation.jsonl")][: b.size["asked"]]
    return [row if i % 3 else row[: 2 + i % 7] for i, row in enumerate(rows)]


def agreement(some: list, others: list) -> float:
    "The share of tokens on which answers agree, up to the first other one."
    same = sum(next((i for i, (x, y) in enumerate(zip(a.tokens, o.tokens, strict=False)) if x != y), len(o.tokens)) for a, o in zip(some, others, strict=True))  # fmt: skip
    return same / sum(len(o.tokens) for o in others)


def batches(engine: Any, asked: list[list[int]], tokens: int, f: dict[str, Any]) -> list:
    "A full batch beside one at a time, and requests that join and leave in the middle; gives the answers alone."
    import numpy as np

    from llmkit.runtime.sampling import Sampling

    s = Sampling(max_tokens=tokens, stop_ids=())
    alone = [engine.generate([p], s)[0] for p in asked]
    began = time.perf_counter()
    together = engine.generate(asked, s)
    f["tokens_per_second"] = sum(len(c.tokens) for c in together) / (time.perf_counter() - began)
    f |= {"batch_agreement": agreement(together, alone), "batch_bits": together == alone}
    f["batch_logprob_gap"] = max(abs(float(x.logprobs[0] - y.logprobs[0])) for x, y in zip(together, alone, strict=True))  # fmt: skip
    expect(all(np.isfinite(c.logprobs).all() for c in together), "a log-probability is not finite")
    batch, said = engine.batch(3, max(map(len, asked)) + tokens), {}
    slots = {batch.join(p, s): i for i, p in enumerate(asked[:3])}
    for step in range(3 * tokens):
        for slot, token in batch.step().items():
            said.setdefault(slots[slot], []).append(token.id)
        if step == 1:
            gone = next(slot for slot, i in slots.items() if i == 1)
            batch.leave(gone)
            slots[batch.join(asked[3], s)] = 3
        if all(len(said.get(i, ())) == tokens for i in (0, 2, 3)):
            break
    share = [np.mean(np.equal(said[i], alone[i].tokens)) for i in (0, 2, 3)]
    f["join_and_leave"] = float(np.mean(share))
    return alone


def alike(f: dict[str, Any], precision: str) -> None:
    "A batch says what a request alone is told; the three answers of `join_and_leave` may part early in 16 bits."
    least = ALIKE.get(precision, 0.8)
    expect(f["batch_agreement"] >= least, "a full batch says something else")
    expect(f["join_and_leave"] >= min(least, 0.98 if precision == "fp32" else 0.4), "who joins and leaves hears something else")  # fmt: skip


def torch_engine(b: Bench) -> None:
    "The reference engine on the device, beside itself on the CPU."
    import numpy as np

    from llmkit.runtime.sampling import Sampling
    from llmkit.runtime.torch_engine import TorchEngine

    seen: dict[str, list] = {}
    for kind in ("fp32", "bf16"):
        with b.check(f"torch engine {kind}") as f:
            (model,), asked = b.need("model"), prompts(b)
            with TorchEngine(model, device=b.device, precision=kind) as e:
                expect(e.info.device == b.device, f"it runs on {e.info.device}")
                seen[kind] = [e.logits(p) for p in asked]
                alone = batches(e, asked, b.size["tokens"], f)
            with TorchEngine(model, device="cpu") as cpu:
                want = [cpu.logits(p) for p in asked]
                f["logit_gap"] = float(max(np.abs(x - y).max() for x, y in zip(seen[kind], want, strict=True)))
                s = Sampling(max_tokens=b.size["tokens"], stop_ids=())
                f["cpu_agreement"] = agreement(alone, cpu.generate(asked, s))
            alike(f, kind)
            expect(f["cpu_agreement"] >= ALIKE[kind], "the CPU says something else")
            expect(kind != "fp32" or f["logit_gap"] < 1e-2, "logits in float32 differ from those of the CPU")
    with b.check("torch engine, delta") as f:
        base, delta, _ = b.need("small", "delta", "model")
        with TorchEngine(base, delta, device=b.device) as e:
            got = [e.logits(p) for p in prompts(b)]
        expect("fp32" in seen, "there is no merged model to compare with")
        f["logit_gap"] = float(max(np.abs(x - y).max() for x, y in zip(got, seen["fp32"], strict=True)))
        expect(f["logit_gap"] < 1e-3, "the merged model is not the adapter")


def engine(b: Bench, precision: str) -> None:
    "Export, parity chain, the engine itself, and its speed in a process of its own."
    from llmkit.core.errors import KitError
    from llmkit.model.quantize import quantize
    from llmkit.runtime.onnx_engine import OnnxEngine, open_session
    from llmkit.runtime.sampling import Sampling
    from llmkit.runtime.torch_engine import TorchEngine

    folder = b.work / f"engine-{precision}"
    with b.check(f"export {precision}") as f:
        installed("onnxruntime", "onnxruntime_genai", "onnx")
        (model,) = b.need("model")
        with quantize(model, folder, precision=precision, device=b.device, method="k_quant"):
            pass
        f["weights_bytes"] = (folder / "weights.bin").stat().st_size

    def opened() -> None:
        "Skip where the device has no provider."
        b.need(folder.name)
        try:
            open_session(folder / "decode.onnx", b.device)
        except KitError as e:
            if "no such device" in str(e):
                raise Skip("this ONNX Runtime has no CUDA provider") from e
            raise

    with b.check(f"chain {precision}") as f:
        from llmkit.runtime.chain import measure_chain, require

        opened()
        made = b.need("small", "delta", "model")
        chain = measure_chain(*made, folder, *b.need("small-data"), prompts=b.size["asked"], metric="answer_logprob")
        for name, report in chain.reports().items():
            f |= {f"{name} {m}": report.get(m).value for m in ("logit_error_max", "top1_agreement")}
        f["recovery"] = chain.end_to_end.get("delta_recovery").value
        require(chain, 0.8, LIMITS)
    with b.check(f"engine {precision}") as f:
        opened()
        asked, tokens = prompts(b), b.size["tokens"]
        with TorchEngine(*b.need("model"), device=b.device) as t, OnnxEngine(folder) as e:
            alone = batches(e, asked, tokens, f)
            f["torch_agreement"] = agreement(alone, t.generate(asked, Sampling(max_tokens=tokens, stop_ids=())))
            f |= {"idle": e.idle, "reuse": e.reuse, "rows_as_in_8": rows_alike(e, asked[0])}
        alike(f, precision)
        expect(f["torch_agreement"] >= SAME[precision], "torch says something else")
    with b.check(f"speed {precision}") as f:
        from llmkit.evals.speed import measure_apart

        opened()
        how = {"kind": None, "options": {}, "tokens": b.size["tokens"], "repeats": 1, "warmup": 2, "batch": 8}
        found = measure_apart(folder=str(folder), prompts=prompts(b)[:16], **how)
        rows = {m["metric"]: m for m in found["measurements"]}
        for name in ("tokens_per_second", "batch_tokens_per_second", "ttft_p50", "peak_gpu_bytes", "joules_per_token"):
            f |= {name: rows[name]["value"]} if name in rows else {}
        f["joules"], f["memory"] = (rows.get(n, {}).get("method", "-") for n in ("joules_per_token", "peak_gpu_bytes"))
        if b.device == "cuda":
            expect(find_spec("pynvml") is None or "NVML" in f["joules"], "the GPU's energy was not metered")
            held = f.get("peak_gpu_bytes", 0)
            expect(
                held > (folder / "weights.bin").stat().st_size, "the memory that was measured is less than the weights"
            )


def rows_alike(e: Any, prompt: list[int]) -> list[int]:
    "With how many rows a step gives the first row the same bits as with eight."
    import numpy as np

    said = {}
    for rows in range(1, 9):
        memory = e.batch(rows, len(prompt) + 2).memory
        memory.idle = "never"
        for _ in range(rows):
            memory.join(prompt)
        said[rows] = memory.step([5] * rows)[0].copy()
    return [n for n in said if np.array_equal(said[n], said[8])]


def server(b: Bench) -> None:
    "`llmkit serve` on the device, asked by several at once."
    for name, target in (("torch", "model"), *((p, f"engine-{p}") for p in PRECISIONS[b.device][:1])):
        with b.check(f"server {name}") as f:
            installed("fastapi", "uvicorn", "httpx")
            (folder,) = b.need(target)
            if target != "model" and not any(x["check"] == f"engine {name}" and x["status"] != "skip" for x in b.notes()):  # fmt: skip
                raise Skip("the engine does not open here")
            serve(b, folder, f)


def serve(b: Bench, folder: Path, f: dict[str, Any]) -> None:
    "Start it, ask it, stop it."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    (b.work / "settings.ini").write_text("[DEFAULT]\n")
    code = "import sys; from llmkit.cli import main; sys.exit(main())"
    args = ["serve", "--target", str(folder), "--model", "m", "--port", str(port), "--slots", "4", "--context", "256"]
    began = time.perf_counter()
    with open(b.work / "server.log", "w") as log:
        run = subprocess.Popen([sys.executable, "-c", code, *args], stdout=log, stderr=log, cwd=b.work)
    try:
        while not reached(f"http://127.0.0.1:{port}/ready"):
            expect(run.poll() is None, f"it ended: {(b.work / 'server.log').read_text()[-300:]}")
            expect(time.perf_counter() - began < 90, "it was not ready in 90 s")
            time.sleep(0.2)
        f["ready_seconds"] = time.perf_counter() - began
        answers: dict[int, str] = {}

        def ask(i: int) -> None:
            body = {"model": "m", "max_tokens": 12, "temperature": 0, "messages": [{"role": "user", "content": "My card was declined."}]}  # fmt: skip
            sent = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})  # fmt: skip
            with urllib.request.urlopen(sent, timeout=60) as got:
                answers[i] = json.load(got)["choices"][0]["message"]["content"]

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
        began = time.perf_counter()
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        f |= {"answers": len(answers), "different": len(set(answers.values())), "seconds": time.perf_counter() - began}
        expect(len(answers) == 8, "not all were answered")
    finally:
        run.send_signal(signal.SIGTERM)
        try:
            f["exit"] = run.wait(30)
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
    expect(f.get("exit") == 0, "it did not stop on SIGTERM")


def reached(url: str) -> bool:
    "Whether an address answers well."
    try:
        with urllib.request.urlopen(url, timeout=2) as got:
            return got.status == 200
    except (urllib.error.URLError, OSError):
        return False


def energy(b: Bench) -> None:
    "Joules of two seconds of products."
    with b.check("energy") as f:
        import torch

        from llmkit.evals.energy import find_meter
        from llmkit.evals.speed import peak_gpu

        if b.device == "cuda":
            installed("pynvml")
        meter = find_meter("nvml" if b.device == "cuda" else "auto", b.device)
        n = 8192 if b.device == "cuda" else 256
        x = torch.randn(n, n, device=b.device, dtype=torch.bfloat16 if b.device == "cuda" else torch.float32)
        before, began = meter.read(), time.perf_counter()
        while (seconds := time.perf_counter() - began) < (2 if b.device == "cuda" else 0.3):
            (x @ x)[0, 0].item()
        joules = meter.between(before, meter.read())
        f |= {"watts": joules / seconds, "method": meter.method, "peak_gpu": str(peak_gpu(b.device))}
        expect(joules > 0, "no energy was used")
        expect(b.device == "cpu" or 50 < f["watts"] < 2000, "that is not a GPU at work")


STEPS: dict[str, tuple[Callable[[Bench], None], int]] = {  # in order, with the most seconds that each may take
    "machine": (machine, 60),
    "prepare": (prepare, 150),
    "finetune": (finetune, 180),
    "resume": (resume, 120),
    "qlora": (qlora, 120),
    "processes": (processes, 150),
    "merge": (merge, 90),
    "torch": (torch_engine, 120),
    "fp32": (lambda b: engine(b, "fp32"), 150),
    "fp16": (lambda b: engine(b, "fp16"), 150),
    "int8": (lambda b: engine(b, "int8"), 150),
    "int4": (lambda b: engine(b, "int4"), 150),
    "server": (server, 150),
    "energy": (energy, 60),
}

# -- all steps ---------------------------------------------------------------------------------------------------


def run_step(b: Bench, name: str, limit: float) -> None:
    "A step in a process group of its own; what ended it is a check of its own when it was not its end."
    args = [sys.executable, __file__, "--device", b.device, "--step", name, "--work", str(b.work)]
    env = os.environ | {"LLMKIT_CHECKPOINTS": str(b.work / "checkpoints")}
    log, began = b.work / f"{name}.log", time.perf_counter()
    with open(log, "w") as said:
        run = subprocess.Popen(args, stderr=said, env=env, start_new_session=True)
        try:
            code = run.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
                run.wait()
    if code != 0:
        last = (log.read_text(errors="replace").strip().splitlines() or ["nothing was said"])[-1][:300]
        why = f"not done in {limit:.0f} s" if code is None else f"it ended with {code}: {last}"
        b.note(name, "fail", why, seconds=time.perf_counter() - began)


def parse() -> argparse.Namespace:
    "The command line."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=tuple(SIZES), default="cuda")
    p.add_argument("--out", type=Path, help="a JSON file for all checks")
    p.add_argument(
        "--only", default="", help=f"steps, with commas between them: {', '.join(STEPS)}; prepare comes by itself"
    )
    p.add_argument("--minutes", type=float, default=12, help="steps that would begin later are left out")
    p.add_argument("--step", choices=tuple(STEPS), help=argparse.SUPPRESS)
    p.add_argument("--work", type=Path, help="a folder to keep; default: a temporary one")
    return p.parse_args()


def main() -> int:
    "Run all steps and print their lines."
    a, began = parse(), time.perf_counter()
    if a.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if a.step:
        STEPS[a.step][0](Bench(a.work, a.device))
        return 0
    if a.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print(f"gpu: no GPU here: torch {torch.__version__} sees no CUDA device", file=sys.stderr)
            return 2
    other = {p for ps in PRECISIONS.values() for p in ps} - set(PRECISIONS[a.device])
    asked = set(a.only.split(",")) | {"prepare"} if a.only else set(STEPS)
    if unknown := asked - set(STEPS):
        print(f"gpu: no such step: {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as tmp:
        b = Bench((a.work or Path(tmp)).absolute(), a.device)
        b.work.mkdir(parents=True, exist_ok=True)
        for name, (_, limit) in STEPS.items():
            left = a.minutes * 60 - (time.perf_counter() - began)
            if name in other or name not in asked:
                continue
            if left < 20:
                b.note(name, "skip", "no time is left")
            else:
                run_step(b, name, min(limit, left))
            if a.out:
                found = {"device": a.device, "seconds": round(time.perf_counter() - began, 1), "checks": b.notes()}
                a.out.write_text(json.dumps(found, indent=1) + "\n")
        counted = [x["status"] for x in b.notes()]
    told = ", ".join(
        f"{counted.count(s)} {w}" for s, w in (("pass", "passed"), ("fail", "failed"), ("skip", "skipped"))
    )
    print(f"\n{told} in {time.perf_counter() - began:.1f} s")
    return 1 if "fail" in counted else 0


if __name__ == "__main__":
    sys.exit(main())
