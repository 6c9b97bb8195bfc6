"""Tiny random models of several families, and their engines."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from llmkit.core.files import write_json
from llmkit.model.export import export
from llmkit.model.tiny import train_tokenizer
from llmkit.runtime.onnx_engine import OnnxEngine

COMMON = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama_untied": ("Llama", {"tie_word_embeddings": False}),
    "mistral": ("Mistral", {"head_dim": 16, "sliding_window": 16}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 16}),
    "gemma3": ("Gemma3", {"head_dim": 16, "sliding_window": 16}),
    "phi3": ("Phi3", {"original_max_position_embeddings": 128, "sliding_window": None}),
    "phi": ("Phi", {"num_attention_heads": 2, "num_key_value_heads": 2, "partial_rotary_factor": 0.5}),
    "gpt2": ("GPT2", {}),
}


def build_family(folder, name):
    "A random model of a family, with a tokenizer."
    import torch
    import transformers

    prefix, more = FAMILIES[name]
    torch.manual_seed(3)
    config_class = getattr(transformers, prefix + ("TextConfig" if prefix == "Gemma3" else "Config"))
    if prefix == "GPT2":
        config = config_class(n_embd=64, n_layer=2, n_head=4, n_positions=128, vocab_size=320, eos_token_id=1)
        model = transformers.GPT2LMHeadModel(config)
    else:
        model = getattr(transformers, f"{prefix}ForCausalLM")(config_class(**{**COMMON, **more}))
    model.save_pretrained(folder)
    train_tokenizer(folder, [f"the card of customer {i} arrived on day {i % 9}" for i in range(200)], 320)
    return folder


@pytest.fixture(scope="session")
def make_family():
    return build_family


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return build_family(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
def open_onnx(llama, tmp_path_factory):
    "An engine of the small Llama in some precision; the folder is built once."
    made = {}

    def get(precision, block=32, **options):
        if (precision, block) not in made:
            folder = made[precision, block] = tmp_path_factory.mktemp(f"{precision}_{block}")
            facts = export(llama, folder, precision, **({} if precision == "fp32" else {"block_size": block}))
            write_json(folder / "engine.json", facts)
        return OnnxEngine(made[precision, block], threads=1, **options)

    return get


@pytest.fixture
def prompts():
    return [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15], [20, 21, 22, 23], list(range(30, 75))]
