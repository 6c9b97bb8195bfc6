#!/usr/bin/env python
"""Decoding and prefill of the ONNX engine against other ways to run the same model, as ratios within one run.

    python benchmarks/decode_speed.py                 # a SmolLM2-135M-shaped model with random weights
    python benchmarks/decode_speed.py --layers 4 --tokens 8 --repeats 1        # a quick look

Each subject decodes greedily from random prompts of 128 tokens, at batch 1 and 8, in rounds that take turns, so that a busy
machine slows all of them; the best round counts. Tokens per second are of this machine; read the ratios.

llama.cpp rearranges q4_0 weights for the processor when it loads them. "llama.cpp q4_0 as stored" reads them as they lie in the
file (`--no-repack`), which all its versions did once.
"""

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from llmkit.core.files import write_json
from llmkit.model.export import export, mute_builder, run_builder
from llmkit.runtime.onnx_engine import OnnxEngine
from llmkit.runtime.slots import Slots

VARIANTS = {"int4/32": ("int4", 32), "int4/128": ("int4", 128), "int8/32": ("int8", 32), "fp32": ("fp32", 32)}
TARGETS = {  # subject, against, batch → least ratios of decoding and of prefill that are asked for
    ("onnx int4/32", "transformers fp32", 1): (4.0, None),
    ("onnx int4/32", "transformers fp32", 8): (4.0, None),
    ("onnx int4/32", "llama.cpp q4_0", 1): (1.0, 1.2),
    ("onnx int4/32", "llama.cpp q4_0", 8): (1.1, None),
    ("onnx int4/128", "llama.cpp q4_0", 1): (1.25, 1.2),
    ("onnx int4/128", "llama.cpp q4_0", 8): (1.4, None),
    ("onnx int4/32", "llama.cpp q4_0 as stored", 1): (1.0, 1.2),
    ("onnx int4/32", "llama.cpp q4_0 as stored", 8): (1.1, None),
    ("onnx int4/128", "llama.cpp q4_0 as stored", 1): (1.25, 1.2),
    ("onnx int4/128", "llama.cpp q4_0 as stored", 8): (1.4, None),
}


def make_model(folder: Path, layers: int) -> None:
    "A random Llama in the shape of SmolLM2-135M, with a small tokenizer that is never used."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmkit.model.tiny import train_tokenizer

    torch.manual_seed(0)
    size = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048}
    config = LlamaConfig(
        **size, **heads, tie_word_embeddings=True, bos_token_id=1, eos_token_id=1, initializer_range=0.04
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    train_tokenizer(folder, [f"line {i} of a text" for i in range(200)], 320)


def timed(work: Callable[[], object]) -> float:
    "Seconds that it takes."
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# A subject is a function of (prompts, tokens) → (seconds of prefill, seconds of decoding).


def onnx_subject(folder: Path, threads: int, exact: bool) -> Callable:
    "This kit's engine."
    e = OnnxEngine(folder, threads=threads, exact=exact)

    def run(prompts, tokens):
        m = Slots(e._decode, e.shape, len(prompts), len(prompts[0]) + tokens, idle=e.idle)
        nexts: list[int] = []
        prefill = timed(lambda: nexts.extend(int(m.join(p).argmax()) for p in prompts))

        def decode():
            now = nexts
            for _ in range(tokens):
                now = m.step(now).argmax(1).tolist()

        return prefill, timed(decode)

    return run


def transformers_subject(folder: Path, threads: int) -> Callable:
    "transformers.generate in 32-bit floats."
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def run(prompts, tokens):
        ids = torch.tensor(prompts)
        args = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
        one = timed(lambda: model.generate(ids, max_new_tokens=1, **args))
        whole = timed(lambda: model.generate(ids, max_new_tokens=1 + tokens, **args))
        return one, whole - one

    return run


def genai_subject(folder: Path) -> Callable:
    "onnxruntime-genai's own loop over the builder's own graph."
    import onnxruntime_genai as og

    model = og.Model(str(folder))

    def run(prompts, tokens):
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(prompts[0]) + tokens + 1, batch_size=len(prompts), do_sample=False)
        g = og.Generator(model, params)

        def start():
            g.append_tokens(np.array(prompts, np.int32))
            g.generate_next_token()

        prefill = timed(start)

        def decode():
            for _ in range(tokens):
                g.generate_next_token()

        return prefill, timed(decode)

    return run


def quantize_gguf(folder: Path, out: Path) -> Path:
    "The model with q4_0 weights, whose blocks are 32."
    import llama_cpp

    plain, quantized = write_gguf(folder, out), out / "q4_0.gguf"
    with mute_builder():
        llama_cpp.llama_backend_init()
        q = llama_cpp.llama_model_quantize_default_params()
        q.ftype, q.pure = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
        if llama_cpp.llama_model_quantize(str(plain).encode(), str(quantized).encode(), q):
            raise RuntimeError("llama.cpp could not quantize the model")
    return quantized


def llama_cpp_subject(quantized: Path, threads: int, repack: bool) -> Callable:
    "llama.cpp, with weights rearranged for the processor or as they are stored."
    import llama_cpp

    how = llama_cpp.llama_model_default_params()
    how.use_extra_bufts = repack
    with mute_builder():
        model = llama_cpp.llama_model_load_from_file(str(quantized).encode(), how)

    def run(prompts, tokens):
        c = llama_cpp.llama_context_default_params()
        c.n_ctx, c.n_batch, c.n_seq_max = len(prompts) * (len(prompts[0]) + tokens + 8), 2048, len(prompts)
        c.n_threads = c.n_threads_batch = threads
        with mute_builder():
            ctx = llama_cpp.llama_init_from_model(model, c)
        vocab, n, length = 49152, len(prompts), len(prompts[0])
        batch = llama_cpp.llama_batch_init(n * length, 0, n)

        def put(items):
            batch.n_tokens = len(items)
            for i, (token, pos, seq, want) in enumerate(items):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = (
                    token,
                    pos,
                    1,
                    seq,
                    want,
                )
            if llama_cpp.llama_decode(ctx, batch):
                raise RuntimeError("llama_decode failed")

        def best(i):
            return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(ctx, i), (vocab,)).argmax())

        def start():
            put([(t, j, s, j == length - 1) for s, p in enumerate(prompts) for j, t in enumerate(p)])

        prefill = timed(start)
        now = [best((s + 1) * length - 1) for s in range(n)]

        def decode():
            nonlocal now
            for k in range(tokens):
                put([(now[s], length + k, s, True) for s in range(n)])
                now = [best(s) for s in range(n)]

        seconds = timed(decode)
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(ctx)
        return prefill, seconds

    return run


def write_gguf(folder: Path, out: Path) -> Path:
    "The model as a 32-bit GGUF file."
    import gguf
    from safetensors.numpy import load_file

    cfg, path = __import__("json").loads((folder / "config.json").read_text()), out / "f32.gguf"
    w, t = gguf.GGUFWriter(str(path), "llama"), load_file(folder / "model.safetensors")
    heads, kv = cfg["num_attention_heads"], cfg["num_key_value_heads"]
    w.add_context_length(2048), w.add_embedding_length(cfg["hidden_size"]), w.add_block_count(cfg["num_hidden_layers"])
    w.add_feed_forward_length(cfg["intermediate_size"]), w.add_head_count(heads), w.add_head_count_kv(kv)
    w.add_layer_norm_rms_eps(cfg["rms_norm_eps"]), w.add_rope_dimension_count(cfg["hidden_size"] // heads)
    w.add_tokenizer_model("llama"), w.add_token_list([f"<{i}>".encode() for i in range(cfg["vocab_size"])])
    w.add_token_scores([0.0] * cfg["vocab_size"]), w.add_token_types([1] * cfg["vocab_size"])
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    w.add_tensor("token_embd.weight", t["model.embed_tokens.weight"])
    w.add_tensor("output_norm.weight", t["model.norm.weight"])
    for i in range(cfg["num_hidden_layers"]):
        for ours, theirs in names.items():
            w.add_tensor(f"blk.{i}.{theirs}.weight", t[f"model.layers.{i}.{ours}.weight"])
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()
    return path


def subjects(work: Path, model: Path, threads: int) -> dict[str, Callable[[], Callable]]:
    "Everything that can run here, by name; each is opened when its turn comes."
    found: dict[str, Callable[[], Callable]] = {}
    for name, (precision, block) in VARIANTS.items():
        folder = work / name.replace("/", "_")
        folder.mkdir()
        options = {} if precision == "fp32" else {"block_size": block}
        write_json(folder / "engine.json", export(model, folder, precision, **options))
        found[f"onnx {name}"] = lambda f=folder: onnx_subject(f, threads, exact=True)
        if precision == "int4":
            found[f"onnx {name} inexact"] = lambda f=folder: onnx_subject(f, threads, exact=False)
    plain = work / "genai"
    plain.mkdir()
    run_builder(model, plain, "int4", "cpu", {})
    found["genai int4/32"] = lambda: genai_subject(plain)
    found["transformers fp32"] = lambda: transformers_subject(model, threads)
    try:
        import gguf  # noqa: F401
        import llama_cpp  # noqa: F401

        weights = quantize_gguf(model, work)
        found["llama.cpp q4_0"] = lambda: llama_cpp_subject(weights, threads, repack=True)
        found["llama.cpp q4_0 as stored"] = lambda: llama_cpp_subject(weights, threads, repack=False)
    except ImportError:
        print("llama.cpp is left out: `pip install llama-cpp-python gguf` (its build takes minutes)\n")
    return found


def main() -> int:
    "Measure, and print tables; 1 when a target is missed."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--layers", type=int, default=30)
    p.add_argument("--prompt", type=int, default=128, help="tokens in a prompt")
    p.add_argument("--tokens", type=int, default=48, help="tokens to decode")
    p.add_argument("--repeats", type=int, default=3, help="rounds; the best one counts")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        work = Path(tmp)
        model = work / "model"
        model.mkdir()
        make_model(model, a.layers)
        runs = {name: open_it() for name, open_it in subjects(work, model, a.threads).items()}
        rng = np.random.default_rng(0)
        best: dict[tuple[str, int], list[float]] = {}
        for _ in range(a.repeats):
            for batch in (1, 8):
                prompts = rng.integers(2, 49152, (batch, a.prompt)).tolist()
                for name, run in runs.items():
                    gc.collect()
                    fill, decode = run(prompts, a.tokens)
                    rates = [batch * a.prompt / fill, batch * a.tokens / decode]
                    best[name, batch] = list(np.maximum(best.get((name, batch), [0, 0]), rates))
    return int(not report(best, list(runs)))


def report(best: dict[tuple[str, int], list[float]], names: list[str]) -> bool:
    "Tables of rates and of ratios, and the targets; whether all are met."
    print("tokens per second        | decode 1 | decode 8 | prefill 1 | prefill 8")
    for n in names:
        print(f"{n:24} | {best[n, 1][1]:8.0f} | {best[n, 8][1]:8.0f} | {best[n, 1][0]:9.0f} | {best[n, 8][0]:9.0f}")
    for against in [n for n in names if not n.startswith("onnx")]:
        print(f"\nratio to {against:15} | decode 1 | decode 8 | prefill 1 | prefill 8")
        for n in names:
            r = [best[n, b][k] / best[against, b][k] for k, b in ((1, 1), (1, 8), (0, 1), (0, 8))]
            print(f"{n:24} | {r[0]:8.2f} | {r[1]:8.2f} | {r[2]:9.2f} | {r[3]:9.2f}")
    print()
    met = True
    for (subject, against, b), targets in TARGETS.items():
        for what, k, least in zip(("decoding", "prefill"), (1, 0), targets, strict=True):
            for n in (subject, f"{subject} inexact"):
                if least is not None and (against, b) in best and (n, b) in best:
                    got = best[n, b][k] / best[against, b][k]
                    met, said = met and got >= least, "met   " if got >= least else "MISSED"
                    print(f"{said} {n} / {against}, {what}, batch {b}: {got:.2f}, target {least}")
    return met


if __name__ == "__main__":
    sys.exit(main())
