"""Fine-tuning speed in tokens per second, padding left out: TRL's SFTTrainer, a bare PyTorch loop, and the kit.

    python benchmarks/finetune_speed.py --data DIR [--steps 8] [--rounds 3] [--out benchmarks/results/finetune_speed.json]
    python benchmarks/finetune_speed.py --data DIR --hidden 128 --rank 64      # a delta that is not low: params.yaml's

DIR holds banking77's train.csv. All trainers get the same model (a random Llama, of 5.5 M parameters unless --hidden says
otherwise), the same LoRA (rank 16 on all linear layers), the same questions, the same loss (on the answer only), and
batches of 32. They take turns, a few steps at a time, within one process, so that whatever else the machine does slows all
of them; only the ratios mean anything. The first two steps of every turn are not counted. TRL is used in float32, and with
its defaults, among which is bfloat16, where the processor computes in that; with --emulated anywhere, at a tenth of the speed.
Where the kit adds a delta to the weight first (`llmkit.model.lora.sum_first`), it also runs without that: "delta apart".
"""

import argparse
import csv
import json
import os
import platform
import statistics
import tempfile
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
RANK, BATCH, WARM = 16, 32, 2  # --rank and --hidden change the first and the width


class Clock:
    "Seconds of wall and processor, and tokens, of the steps after the first ones of a turn."

    def __init__(self):
        self.turns = []

    def turn(self):
        self.seen, self.marks = 0, []

    def step(self, tokens):
        "Call after each step with the tokens of its batch."
        self.marks.append((time.perf_counter(), time.process_time(), tokens))

    def end(self):
        wall, cpu = (self.marks[-1][i] - self.marks[WARM - 1][i] for i in (0, 1))
        tokens = sum(m[2] for m in self.marks[WARM:])
        self.turns.append({"wall": tokens / wall, "cpu": tokens / cpu})


def make_model(tmp):
    "The random base and its tokenizer, in a folder."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmkit.model.tiny import train_tokenizer

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False, pad_token_id=0)).save_pretrained(tmp)
    return train_tokenizer


def recipe_of(precision, threads):
    "The kit's recipe."
    from llmkit.model.train import Recipe

    return Recipe(
        rank=RANK, alpha=2 * RANK, dropout=0.0, targets="all-linear", rslora=False, dora=False, save_modules=[],
        quantize_base="none", precision=precision, batching="length", batch_size=BATCH, accumulate=1, max_tokens=256,
        max_overlong=0.0, word_dropout=0.0, label_smoothing=0.0, prompt_loss_weight=0.0, epochs=1, optimizer="adamw", lr=1e-4, other_lr=0.0, warmup=0.1, weight_decay=0.0,
        clip=1.0, ema=0.0, evaluate_every=0, keep="loss", patience=0, checkpoint_every=0, processes=1, threads=threads, seed=0,
    )  # fmt: skip


def fresh(folder):
    "The base with a fresh delta."
    from llmkit.model.lora import attach, load_frozen

    return attach(load_frozen(folder), rank=RANK, alpha=2 * RANK)


def kit(folder, examples, tok, precision, threads, apart=False):
    "The kit's trainer: a function that takes n steps and reports to a clock."
    from unittest.mock import patch

    from llmkit.model.train import Trainer

    with patch("llmkit.model.train.sum_first") if apart else nullcontext():
        trainer = Trainer(fresh(folder), tok, recipe_of(precision, threads), examples, examples[:32])
    trainer.model.train()
    batches = iter(trainer.batches(0))

    def turn(n, clock):
        for _ in range(n):
            before = trainer.seen
            trainer.step([next(batches)], 0, 10_000)
            clock.step(trainer.seen - before)

    return turn


def bare(folder, examples, tok):
    "The loop that anybody would write: random batches, padded, fp32."
    import numpy as np
    import torch

    model = fresh(folder).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    order = iter(np.random.default_rng(0).permutation(len(examples)))

    def pad(rows, value):
        width = max(map(len, rows))
        return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])

    def turn(n, clock):
        for _ in range(n):
            batch = [examples[next(order)] for _ in range(BATCH)]
            live = pad([[1] * len(e.ids) for e in batch], 0)
            labels = pad([[t if m else -100 for t, m in zip(e.ids, e.mask, strict=True)] for e in batch], -100)
            ids = pad([list(e.ids) for e in batch], tok.pad_id)
            loss = model(input_ids=ids, attention_mask=live, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            clock.step(int(live.sum()))

    return turn


def sft(folder, examples, tmp, **more):
    "TRL's SFTTrainer with its defaults, or more said, on the same tokens."
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Steps(TrainerCallback):
        clock = None

        def on_step_end(self, *a, **k):
            self.clock.step(trainer.batch_tokens)

    class Counted(SFTTrainer):
        def training_step(self, model, inputs, *a, **k):
            self.batch_tokens = int(inputs["attention_mask"].sum())
            return super().training_step(model, inputs, *a, **k)

    steps = Steps()
    rows = Dataset.from_list([{"input_ids": list(e.ids), "completion_mask": list(e.mask)} for e in examples])
    config = SFTConfig(
        output_dir=tmp,
        per_device_train_batch_size=BATCH,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        **more,
    )
    trainer = Counted(
        model=AutoModelForCausalLM.from_pretrained(folder), args=config, train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(folder), callbacks=[steps],
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip

    def turn(n, clock):
        steps.clock, trainer.args.max_steps = clock, n
        trainer.train()

    return turn


def main():
    global RANK
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, type=Path, help="the folder with banking77's train.csv")
    p.add_argument("--steps", type=int, default=8, help="counted steps in a turn")
    p.add_argument("--rounds", type=int, default=3, help="turns of each trainer")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rank", type=int, default=RANK, help="of the delta")
    p.add_argument(
        "--hidden",
        type=int,
        default=SHAPE["hidden_size"],
        help="width of the model; its feed-forward has three times as much",
    )
    p.add_argument("--emulated", action="store_true", help="bfloat16 also where the processor only emulates it")
    p.add_argument("--out", type=Path, default=None, help="where the JSON goes")
    a = p.parse_args()
    RANK = a.rank
    SHAPE.update(hidden_size=a.hidden, intermediate_size=3 * a.hidden)
    os.environ.setdefault("OMP_NUM_THREADS", str(a.threads))
    import torch

    from llmkit.model.batches import encode_rows
    from llmkit.model.lora import sum_first
    from llmkit.model.precision import computes_bf16

    torch.set_num_threads(a.threads)
    with open(a.data / "train.csv", encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    tmp = tempfile.mkdtemp()
    train_tokenizer = make_model(tmp)
    tok = train_tokenizer(tmp, [r["text"] for r in rows], SHAPE["vocab_size"])
    chats = [
        {"messages": [{"role": "user", "content": r["text"]}, {"role": "assistant", "content": r["category"]}]}
        for r in rows
    ]
    examples, _ = encode_rows(tok, chats, 256, 0.0)
    bf16 = a.emulated or computes_bf16()
    trainers = {"trl SFTTrainer, defaults": sft(tmp, examples, tmp)} if bf16 else {}
    trainers |= {
        "trl SFTTrainer, fp32": sft(tmp, examples, tmp, bf16=False),
        "bare loop, fp32": bare(tmp, examples, tok),
    }
    others = list(trainers)
    kinds = ("fp32", "bf16") if bf16 else ("fp32",)
    trainers |= {f"llmkit, {k}": kit(tmp, examples, tok, k, a.threads) for k in kinds}
    if sum_first(fresh(tmp)):
        trainers["llmkit, fp32, delta apart"] = kit(tmp, examples, tok, "fp32", a.threads, apart=True)
    clocks = {name: Clock() for name in trainers}
    for _ in range(a.rounds):
        for name, turn in trainers.items():
            clocks[name].turn()
            turn(a.steps + WARM, clocks[name])
            clocks[name].end()
    rate = {n: {k: round(statistics.median(t[k] for t in c.turns)) for k in ("wall", "cpu")} for n, c in clocks.items()}
    ratios = {
        f"{ours} / {other}": {k: round(rate[ours][k] / rate[other][k], 2) for k in ("wall", "cpu")}
        for ours in list(rate)[len(others) :]
        for other in others
    }
    if (apart := "llmkit, fp32, delta apart") in rate:
        ratios[f"llmkit, fp32 / {apart}"] = {
            k: round(rate["llmkit, fp32"][k] / rate[apart][k], 2) for k in ("wall", "cpu")
        }
    print(f"{'':28}tokens/s (wall)   tokens per CPU-second")
    for n, r in rate.items():
        print(f"{n:28}{r['wall']:>12,}{r['cpu']:>16,}")
    for n, r in ratios.items():
        print(f"{n:48} {r['wall']:>6} by wall clock {r['cpu']:>6} by CPU time")
    result = {
        "what": "fine-tuning, tokens per second without padding, median of turns",
        "command": f"python benchmarks/finetune_speed.py --data DIR --steps {a.steps} --rounds {a.rounds} --threads {a.threads} --rank {a.rank} --hidden {a.hidden}{' --emulated' if a.emulated else ''}",
        "tokens_per_second": rate, "ratios": ratios, "turns": {n: c.turns for n, c in clocks.items()},
        "examples": len(examples), "mean_tokens": round(sum(len(e.ids) for e in examples) / len(examples), 1),
        "versions": {n: version(n) for n in ("torch", "transformers", "peft", "trl")},
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
    }  # fmt: skip
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
