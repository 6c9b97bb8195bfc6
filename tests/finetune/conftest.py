"""A toy base and a toy dataset, made once."""

import os

import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

from llmkit.core.artifact import build, open_artifact
from llmkit.core.files import write_jsonl
from llmkit.model.tiny import train_tokenizer
from llmkit.model.train import Recipe

WORDS = {"lost": ("lost", "stolen", "gone"), "fees": ("fee", "cost", "price")}
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
RECIPE = Recipe(
    rank=4, alpha=8, dropout=0.1, targets="all-linear", rslora=False, dora=False, save_modules=[],
    quantize_base="none", precision="fp32", batching="length", batch_size=8, accumulate=1, max_tokens=64,
    max_overlong=0.0, word_dropout=0.1, label_smoothing=0.05, prompt_loss_weight=0.0, epochs=3, optimizer="muon", lr=1e-2, other_lr=0.0, warmup=0.1, weight_decay=0.01,
    clip=1.0, ema=0.9, evaluate_every=0, keep="loss", patience=0, checkpoint_every=4, processes=1, threads=1, seed=7,
)  # fmt: skip


def chats(seed=0):
    "120 questions of two kinds, in an order of their own."
    rows = [
        {"messages": [{"role": "user", "content": f"{a} {w} {b}"}, {"role": "assistant", "content": label}]}
        for label, words in WORDS.items()
        for w in words
        for a in ("my card", "the old card", "hello , the card", "please : card", "so")
        for b in ("yesterday", "today", "now", "!")
    ]
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    "A random Llama with a tokenizer of 320 tokens."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("base") / "base"
    torch.manual_seed(0)
    with build(path, "base") as out:
        config = LlamaConfig(vocab_size=320, **SHAPE, tie_word_embeddings=True, initializer_range=0.2)
        LlamaForCausalLM(config).save_pretrained(out)
        train_tokenizer(out, [m["content"] for r in chats() for m in r["messages"]], 320)
    return open_artifact(path)


def make_dataset(path, base, rows):
    "A dataset artifact of some rows."
    with build(path, "dataset", {"base": base}) as out:
        write_jsonl(out / "train.jsonl", rows[:100])
        write_jsonl(out / "validation.jsonl", rows[100:])
    return open_artifact(path)


@pytest.fixture(scope="session")
def dataset(base, tmp_path_factory):
    "100 questions to learn from, 20 to watch."
    return make_dataset(tmp_path_factory.mktemp("data") / "dataset", base, chats())


@pytest.fixture
def recipe():
    "A recipe that uses everything that draws random numbers."
    return RECIPE


@pytest.fixture(autouse=True)
def workspaces(tmp_path, monkeypatch):
    "Checkpoints of every test in a folder of its own."
    monkeypatch.setenv("LLMKIT_CHECKPOINTS", str(tmp_path / "checkpoints"))
    monkeypatch.delenv("LLMKIT_INPUT_DIGEST", raising=False)


@pytest.fixture
def other_dataset(base, tmp_path):
    "The same questions in another order."
    return make_dataset(tmp_path / "other", base, chats(seed=1))
