"""Every decoder family walks base → delta → merge from a folder; where the road ends later, the base says so."""

import numpy as np
import pytest

from llmkit.core.artifact import build, open_artifact
from llmkit.core.errors import KitError
from llmkit.core.files import read_json, write_json
from llmkit.model.base import make_base
from llmkit.model.export import export
from llmkit.model.lora import attach, load_frozen, save_delta
from llmkit.model.merge import merge, shuffle_delta
from llmkit.model.tiny import train_tokenizer
from llmkit.model.tokenizer import Tokenizer, encode_example
from llmkit.runtime.engine import each_logits
from llmkit.runtime.onnx_engine import OnnxEngine
from llmkit.runtime.sampling import Sampling
from llmkit.runtime.torch_engine import TorchEngine

SIZE = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
COMMON = {**SIZE, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
GROUPED = {**COMMON, "num_key_value_heads": 1}
FAMILIES = {
    "Llama": GROUPED,
    "Mistral": GROUPED | {"sliding_window": 32},
    "Qwen2": GROUPED,
    "Qwen3": GROUPED | {"head_dim": 32},
    "Gemma": GROUPED | {"head_dim": 32},
    "Gemma2": GROUPED | {"head_dim": 32, "sliding_window": 32},
    "Gemma3Text": GROUPED | {"head_dim": 32, "sliding_window": 32},
    "Mixtral": GROUPED | {"num_local_experts": 4},
    "Qwen3Moe": GROUPED | {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "GptOss": GROUPED | {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
    "HunYuanDenseV1": GROUPED | {"head_dim": 32},
    "HunYuanMoEV1": GROUPED | {"head_dim": 32, "num_experts": 4, "moe_topk": 2},
    "Phi": COMMON,
    "Phi3": GROUPED | {"original_max_position_embeddings": 64},
    "GPT2": {
        "vocab_size": 320,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 1,
    },
}
ROPE = {  # two thetas, and one of them stretched, as in Gemma 3 from 4B upwards
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
}
LINES = [f"question {i} about my card and the money I sent" for i in range(120)]


def random_model(folder, family, **other):
    import torch
    import transformers

    config = getattr(transformers, f"{family}Config")(**{**FAMILIES[family], **other})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    train_tokenizer(folder, LINES, 320)


def train_by_hand(path, base, std=0.1, rank=4):
    "A delta as PEFT leaves it after training, with random numbers in place of what was learnt."
    import torch

    tok = Tokenizer.load(base.path)
    tuned = attach(load_frozen(base.path), rank=rank, alpha=8, seed=0)
    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=std)
    meta = {"tokenizer_digest": tok.digest, "template_digest": tok.template_digest}
    with build(path, "delta", parents={"base": base}, meta=meta) as folder:
        save_delta(tuned, folder)
    return open_artifact(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_comes_through_base_and_merge(family, tmp_path):
    random_model(tmp_path / "from", family)
    base = make_base(tmp_path / "base", source="folder", model=str(tmp_path / "from"))
    assert encode_example(
        Tokenizer.load(base.path), [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    )
    delta = train_by_hand(tmp_path / "delta", base)
    model = merge(tmp_path / "model", base.path, delta.path, limits={"logit_error_max": 1e-3, "top1_agreement": 0.99})
    assert read_json(model / "config.json")["architectures"] == [base.meta["architecture"]]
    assert model.meta["change"]["share"] > 0.1
    assert {n for n in base.files if n.endswith(".json") or n.endswith(".jinja")} == {
        n for n in model.files if n.endswith(("json", "jinja"))
    }
    if family in ("GPT2", "HunYuanMoEV1", "Mixtral", "Qwen3Moe"):
        assert base.meta["road"] == f"stage quantize: the ONNX builder knows no {base.meta['architecture']}"
    elif family == "HunYuanDenseV1":
        assert "no engine here can feed the graph of HunYuanDenseV1ForCausalLM" in base.meta["road"]
    else:
        assert base.meta["road"] == ""


def test_hunyuan_ends_where_the_base_said(tmp_path):
    random_model(tmp_path, "HunYuanDenseV1")
    (tmp_path / "onnx").mkdir()
    write_json(tmp_path / "onnx/engine.json", export(tmp_path, tmp_path / "onnx", "fp32"))
    with pytest.raises(KitError, match="quantize: HunYuanDenseV1ForCausalLM gets a graph that no engine here can feed"):
        OnnxEngine(tmp_path / "onnx", threads=1)


@pytest.mark.parametrize("rope", [None, ROPE])
def test_gemma3_says_the_same_in_onnx(rope, tmp_path):
    kinds = ["full_attention", "sliding_attention"]
    random_model(tmp_path, "Gemma3Text", layer_types=kinds, rope_parameters=rope, initializer_range=0.15)
    (tmp_path / "onnx").mkdir()
    write_json(tmp_path / "onnx/engine.json", export(tmp_path, tmp_path / "onnx", "fp32"))
    rows = [list(range(40, 100)), [5, 6, 7]]
    with TorchEngine(tmp_path) as torch, OnnxEngine(tmp_path / "onnx", threads=1) as onnx:
        want, got = (dict(each_logits(e, rows)) for e in (torch, onnx))
    for i in range(2):
        np.testing.assert_allclose(got[i], want[i], atol=1e-4)


LONG = {"rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0 + i / 10 for i in range(16)], "long_factor": [3.0 + i for i in range(16)]}  # fmt: skip


def test_a_long_phi3_says_the_same_alone_in_company_and_in_the_slots_of_a_server(tmp_path):
    "Its frequencies are others once any row, or a slot's mask, is longer than the original context."
    random_model(tmp_path, "Phi3", original_max_position_embeddings=16, rope_parameters=LONG, initializer_range=0.15)
    (tmp_path / "onnx").mkdir()
    write_json(tmp_path / "onnx/engine.json", export(tmp_path, tmp_path / "onnx", "fp32"))
    prompts, how = [[5, 6, 7], list(range(40, 49))], Sampling(max_tokens=9, stop_ids=())
    with TorchEngine(tmp_path, device="cpu") as torch, OnnxEngine(tmp_path / "onnx", threads=1) as onnx:
        assert torch.info.context_length == onnx.info.context_length == 16
        batch, said = onnx.batch(2), {}
        where = {batch.join(p, how): i for i, p in enumerate(prompts)}
        while any(said.get(i, [None])[-1] is None or not said[i][-1].finish for i in where.values()):
            for slot, token in batch.step().items():
                said.setdefault(where[slot], []).append(token)
        together = torch.generate(prompts, how)
        for i, p in enumerate(prompts):
            (alone,) = torch.generate([p], how)
            assert alone.tokens == together[i].tokens == [t.id for t in said[i]]
            np.testing.assert_allclose([t.logprob for t in said[i]], alone.logprobs, atol=1e-4)
        with pytest.raises(KitError, match="holds 16 tokens"):
            torch.generate([list(range(16))], how)


@pytest.mark.parametrize(
    "family, kind",
    [("Llama", "linear"), ("Llama", "yarn"), ("Qwen2", "yarn"), ("Mistral", "yarn"), ("Qwen2", "dynamic")],
)
def test_positions_that_the_builder_would_drop_are_told_at_once_and_not_exported(tmp_path, family, kind):
    "Of a Qwen 2 with YaRN it makes logits that are off by six standard deviations, or ends in a division by zero."
    rope = {"rope_type": kind, "rope_theta": 500.0, "factor": 4.0}
    random_model(tmp_path / "from", family, rope_parameters=rope)
    base = make_base(tmp_path / "base", source="folder", model=str(tmp_path / "from"))
    said = f"the ONNX builder does not keep its rotary positions of type {kind} ({family}ForCausalLM)"
    assert base.meta["road"] == f"stage quantize: {said}"
    with pytest.raises(KitError, match=f"cannot be exported to ONNX: the builder does not keep .* {kind}"):
        export(base.path, tmp_path, "fp32")


def test_heads_that_the_kernel_refuses_are_told_at_once_and_not_exported(tmp_path):
    random_model(tmp_path / "from", "Llama", head_dim=24)
    base = make_base(tmp_path / "base", source="folder", model=str(tmp_path / "from"))
    assert "heads of 24 numbers with rotary positions, for which its kernel wants a multiple of 16" in base.meta["road"]
    with pytest.raises(KitError, match="cannot be exported to ONNX: .* heads of 24 numbers"):
        export(base.path, tmp_path, "fp32")


@pytest.mark.parametrize("family", ["Bloom", "Mamba", "Lfm2"])
def test_a_decoder_without_positions_or_with_a_state_can_be_scored(tmp_path, family):
    small = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"Bloom": {"n_layer": 2, "n_head": 2}, "Mamba": {}, "Lfm2": {"intermediate_size": 64, "num_key_value_heads": 1, "layer_types": ["full_attention", "conv"]}}  # fmt: skip
    FAMILIES[family] = small | more[family]
    random_model(tmp_path, family)
    del FAMILIES[family]
    with TorchEngine(tmp_path, device="cpu") as e:
        assert np.isfinite(e.score([[5, 6]], [[7, 8]])[0]).all()
        if family == "Bloom":
            assert len(e.generate([[5, 6]], Sampling(max_tokens=3, stop_ids=()))[0].tokens) == 3
            return
        with pytest.raises(KitError, match="keeps a state that is not keys and values"):
            e.generate([[5, 6]])


@pytest.mark.parametrize("first", [True, False])
def test_the_plain_template_begins_as_the_tokenizer_of_the_base_does(tmp_path, first):
    "A Gemma or Llama without its first token is lost, and a GPT-2 has never seen one."
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    random_model(tmp_path / "from", "Llama")
    (tmp_path / "from/chat_template.jinja").unlink()
    named = {"eos_token": "<|end|>", "bos_token": "<|system|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(tmp_path / "from/tokenizer_config.json", named)
    backend = Backend.from_file(str(tmp_path / "from/tokenizer.json"))
    bos = backend.token_to_id("<|system|>")
    if first:
        backend.post_processor = TemplateProcessing(single="<|system|> $A", special_tokens=[("<|system|>", bos)])
        backend.save(str(tmp_path / "from/tokenizer.json"))
    base = make_base(tmp_path / "base", source="folder", model=str(tmp_path / "from"))
    tok = Tokenizer.load(base.path)
    ids = tok.chat([{"role": "user", "content": "a"}])
    assert ids.count(bos) == first and (ids[0] == bos) == first
    assert ids == [bos] * first + tok.encode("User:\na\n\nAssistant:\n")


def test_bfloat16_weights_keep_their_type_and_pass_a_wider_limit(tmp_path):
    random_model(tmp_path / "from", "Llama")
    base = make_base(tmp_path / "base", source="folder", model=str(tmp_path / "from"), dtype="bfloat16")
    assert base.meta["dtype"] == "bfloat16"
    model = merge(tmp_path / "model", base.path, train_by_hand(tmp_path / "delta", base).path, limits={"kl_mean": 0.01})
    assert read_json(model / "config.json")["dtype"] == "bfloat16"


def test_a_delta_too_weak_for_bfloat16_is_refused_and_float32_takes_it(tmp_path):
    random_model(tmp_path / "from", "Llama")
    base = make_base(tmp_path / "base", source="folder", model=str(tmp_path / "from"), dtype="bfloat16")
    delta = train_by_hand(tmp_path / "delta", base, std=1e-7)
    with pytest.raises(KitError, match="nearly a no-op.*store float32"):
        merge(tmp_path / "model", base.path, delta.path, least_change=1e-9)
    assert not (tmp_path / "model").exists()
    merge(tmp_path / "model", base.path, delta.path, dtype="float32", least_change=1e-9)


def test_a_shuffled_delta_says_something_else(tmp_path):
    from llmkit.model.merge import logits_of, probes
    from llmkit.model.parity import compare

    random_model(tmp_path / "from", "Llama")
    base = make_base(tmp_path / "base", source="folder", model=str(tmp_path / "from"))
    delta = train_by_hand(tmp_path / "delta", base, std=0.3)
    planted = shuffle_delta(delta.path, tmp_path / "planted", seed=1)
    assert planted.parents == delta.parents and planted.digest != delta.digest
    assert shuffle_delta(delta.path, tmp_path / "again", seed=1).digest == planted.digest
    good, bad = (merge(tmp_path / n, base.path, d.path) for n, d in (("good", delta), ("bad", planted)))
    hop = compare(
        "good→bad", probes(Tokenizer.load(base.path), 320), *(logits_of(load_frozen(m.path)) for m in (good, bad))
    )
    assert hop.get("top1_agreement").value < 0.9
