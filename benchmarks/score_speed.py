#!/usr/bin/env python
"""Scoring: items per second of our runner on the ONNX engine against lm-evaluation-harness with its Hugging Face backend.

    python benchmarks/score_speed.py                       # a Llama with random weights, in 32-bit floats on both sides
    python benchmarks/score_speed.py --items 100 --texts 20 --rounds 1       # a quick look
    python benchmarks/score_speed.py --scale               # 10^3 to 10^5 questions: time and memory of our runner
    python benchmarks/score_speed.py --scale --perplexity  # and texts

Same model, data, tokens, precision and threads. The two take turns in rounds within one process, and the best round of each
counts; each side starts from texts and ends with its metrics. Items per second are of this machine; read the ratios. The
metrics of the two are compared, and a difference above 1e-3 ends the run with an error.
"""

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import numpy as np

from llmkit.core.files import write_json, write_jsonl
from llmkit.evals.choice import Question, choice_measurements, choice_table, option_scores
from llmkit.evals.language import language_measurements, text_likelihood
from llmkit.model.export import export
from llmkit.model.tiny import train_tokenizer
from llmkit.runtime.onnx_engine import OnnxEngine

WORDS = "account card payment transfer balance refund customer bank money day week limit branch phone app code the a of to in on is was will be not my your and".split()
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}
test_split: test
{body}"""
BODIES = {
    "kit_choice": 'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{o}}"\ndoc_to_target: r\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n',
    "kit_text": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}, {metric: word_perplexity}]\n',
}
LEAST = 3.0  # ratio asked for


def sentences(rng: np.random.Generator, low: int, high: int) -> str:
    "Random words."
    return " ".join(rng.choice(WORDS, rng.integers(low, high + 1)))


def quiz(n: int, prompt: int, options: int, seed: int = 0) -> Iterator[dict]:
    "Questions of about `prompt` words with options of one to four."
    rng = np.random.default_rng(seed)
    for _ in range(n):
        yield {
            "q": sentences(rng, prompt // 2, prompt),
            "o": [sentences(rng, 1, 4) for _ in range(options)],
            "r": int(rng.integers(options)),
        }


def make(folder: Path, hidden: int, layers: int, vocab: int) -> None:
    "A random Llama with a tokenizer of the words, and its ONNX engine in 32-bit floats."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 32, "max_position_embeddings": 512}
    config = LlamaConfig(hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, vocab_size=vocab, tie_word_embeddings=True, bos_token_id=1, eos_token_id=1, pad_token_id=0, initializer_range=0.1, **heads)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "hf")
    rng = np.random.default_rng(1)
    train_tokenizer(folder / "hf", [sentences(rng, 5, 20) for _ in range(400)], 400)
    (folder / "onnx").mkdir()
    facts = export(folder / "hf", folder / "onnx", "fp32")
    write_json(folder / "onnx/engine.json", facts)


def harness_side(folder: Path, batch: int) -> Callable[[str], dict[str, float]]:
    "lm-evaluation-harness with its Hugging Face backend: task → metrics."
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=str(folder / "hf"), device="cpu", dtype="float32", batch_size=batch)
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)

    def run(name: str) -> dict[str, float]:
        found = lm_eval.simple_evaluate(lm, tasks=[name], task_manager=manager, bootstrap_iters=0)
        return {k.partition(",")[0]: v for k, v in found["results"][name].items() if isinstance(v, float)}

    return run


def own_side(folder: Path, threads: int, slots: int) -> Callable[[str], dict[str, float]]:
    "Our runner on the ONNX engine: task → metrics, their intervals included."
    engine = OnnxEngine(folder / "onnx", threads=threads, slots=slots)

    def run(name: str) -> dict[str, float]:
        rows = [json.loads(x) for x in (folder / f"tasks/{name}.jsonl").read_text().splitlines()]
        if name == "kit_text":
            return {
                m.metric: m.value for m in language_measurements(text_likelihood(engine, [r["text"] for r in rows]))
            }
        asked = [Question(str(i), r["q"], tuple(r["o"]), r["r"], between=" ") for i, r in enumerate(rows)]
        table = choice_table(engine, asked)
        return {m.metric: m.value for m in choice_measurements(table, calibration=False)}

    return run


def compare(folder: Path, a: argparse.Namespace) -> dict:
    "Both sides in turns; the best round of each, the ratio and the largest difference of a metric."
    import torch

    torch.set_num_threads(a.threads)
    rng = np.random.default_rng(2)
    (folder / "tasks").mkdir()
    write_jsonl(folder / "tasks/kit_choice.jsonl", quiz(a.items, a.prompt, a.options))
    write_jsonl(folder / "tasks/kit_text.jsonl", ({"text": sentences(rng, 20, 300)} for _ in range(a.texts)))
    for name, body in BODIES.items():
        (folder / f"tasks/{name}.yaml").write_text(TASK.format(name=name, folder=folder / "tasks", body=body))
    sides = {"harness": harness_side(folder, a.batch), "ours": own_side(folder, a.threads, a.slots)}
    out = {}
    for task, n in (("kit_choice", a.items), ("kit_text", a.texts)):
        best, metrics = dict.fromkeys(sides, float("inf")), {}
        for _ in range(a.rounds):
            for side, run in sides.items():
                gc.collect()
                start = time.perf_counter()
                metrics[side] = run(task)
                best[side] = min(best[side], time.perf_counter() - start)
        shared = metrics["ours"].keys() & metrics["harness"].keys()
        worst = max(abs(metrics["ours"][m] / metrics["harness"][m] - 1) for m in shared)
        rates = {side: round(n / seconds, 1) for side, seconds in best.items()}
        ratio = best["harness"] / best["ours"]
        out[task] = {"items_per_second": rates, "ratio": round(ratio, 2), "metrics": sorted(shared), "largest_relative_difference": worst}  # fmt: skip
        print(f"{task}: ours {rates['ours']}/s, harness {rates['harness']}/s, ratio {ratio:.2f}; {', '.join(sorted(shared))} differ by at most {worst:.1e}")  # fmt: skip
        if not shared or worst > 1e-3:
            raise SystemExit(f"{task}: the two sides disagree: {metrics}")
    return out


def resident() -> int:
    "Memory of this process in bytes."
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def score_choices(engine: OnnxEngine, n: int, a: argparse.Namespace) -> Iterator[float]:
    "Whether each of n questions that stream in is answered right."
    truth = (q["r"] for q in quiz(n, a.prompt, a.options))
    asked = ((q["q"], q["o"]) for q in quiz(n, a.prompt, a.options))
    for ll, r in zip(option_scores(engine, asked), truth, strict=True):
        yield float(ll.argmax() == r)


def score_texts(engine: OnnxEngine, n: int, a: argparse.Namespace) -> Iterator[float]:
    "The bits per byte of each of n texts that stream in, 512 at a time."
    rng = np.random.default_rng(3)
    for start in range(0, n, 512):
        texts = [sentences(rng, a.prompt // 2, a.prompt) for _ in range(min(512, n - start))]
        found = text_likelihood(engine, texts)
        yield from (v / b / np.log(2) for v, b in zip(found["nll"], found["bytes"], strict=True))


def scale(folder: Path, a: argparse.Namespace) -> list[dict]:
    "Time and memory of scoring items that stream in, from 10^3 to 10^5."
    engine = OnnxEngine(folder / "onnx", threads=a.threads, slots=a.slots)
    score = score_texts if a.perplexity else score_choices
    sum(1 for _ in score(engine, 1000, a))  # warm up
    out = []
    for n in a.sizes:
        total, top, start = 0.0, resident(), time.perf_counter()
        for i, value in enumerate(score(engine, n, a)):
            total += value
            top = max(top, resident()) if i % 256 == 0 else top
        seconds = time.perf_counter() - start
        out.append({"items": n, "seconds": round(seconds, 2), "items_per_second": round(n / seconds), "peak_mb": round(top / 2**20), "bits_per_byte" if a.perplexity else "acc": total / n})  # fmt: skip
        print(f"{n:>7} items: {seconds:7.2f} s, {n / seconds:7.0f}/s, resident at most {top / 2**20:.0f} MB")
    return out


def main() -> None:
    "Parse the command line, run, and say whether the ratios are met."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--items", type=int, default=400, help="multiple-choice questions")
    p.add_argument("--texts", type=int, default=100, help="texts for perplexity")
    p.add_argument("--prompt", type=int, default=60, help="most words of a question")
    p.add_argument("--options", type=int, default=4)
    p.add_argument("--hidden", type=int, default=128)
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--vocab", type=int, default=2048)
    p.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    p.add_argument("--batch", type=int, default=32, help="batch size of the harness")
    p.add_argument("--slots", type=int, default=8, help="our engine scores four times as many rows at once")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--scale", action="store_true", help="grow the number of items instead of comparing")
    p.add_argument("--perplexity", action="store_true", help="grow texts instead of questions")
    p.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000])
    p.add_argument("--out", type=Path, help="a JSON file for the figures")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as d:
        make(Path(d), a.hidden, a.layers, a.vocab)
        found = scale(Path(d), a) if a.scale else compare(Path(d), a)
    if a.out:
        settings = {k: v for k, v in vars(a).items() if k not in ("out",)}
        write_json(a.out, {"benchmark": "score_speed", "settings": settings, "found": found})
    if not a.scale:
        low = {t: r["ratio"] for t, r in found.items() if r["ratio"] < LEAST}
        print(f"asked for {LEAST}: " + (f"NOT MET by {low}" if low else "met"))


if __name__ == "__main__":
    main()
