"""Losses at the answers only, packed or not, are those of the whole logits, for every architecture that is promised."""

import numpy as np
import pytest
import torch
import transformers as t

from llmkit.core.errors import KitError
from llmkit.model.batches import Example, collate
from llmkit.model.lora import attach, delta_tensors, linear_names, load_delta, load_frozen, save_delta
from llmkit.model.merge import all_tensors
from llmkit.model.train import answer_loss, check_packing

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = SMALL | {"intermediate_size": 64, "num_key_value_heads": 1, "pad_token_id": 0}
PHI = SMALL | {"intermediate_size": 64}
FEW = {"num_experts_per_tok": 2}
LOCAL = FEW | {"num_local_experts": 4}
CONFIGS = {
    "llama": lambda: t.LlamaConfig(**WIDE),
    "mistral": lambda: t.MistralConfig(**WIDE),
    "qwen2": lambda: t.Qwen2Config(**WIDE),
    "gemma2": lambda: t.Gemma2Config(**WIDE, head_dim=16, final_logit_softcapping=5.0),
    "phi3": lambda: t.Phi3Config(**WIDE),
    "gpt2": lambda: t.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
    ),
}
EXPERTS = {
    "gpt-oss": lambda: t.GptOssConfig(
        **WIDE, **LOCAL, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    ),
    "mixtral": lambda: t.MixtralConfig(**WIDE, **LOCAL),
    "qwen3moe": lambda: t.Qwen3MoeConfig(**WIDE, **FEW, head_dim=16, num_experts=4, moe_intermediate_size=32),
    "phimoe": lambda: t.PhimoeConfig(**WIDE, **LOCAL),
}
CONFIGS |= EXPERTS


def model_of(name):
    "A random model of an architecture."
    torch.manual_seed(0)
    return t.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()


def examples(n=5):
    "Random examples with an answer of a few tokens."
    rng = np.random.default_rng(0)
    for size in rng.integers(6, 14, n):
        answer = int(rng.integers(2, 5))
        yield Example(tuple(rng.integers(1, 96, size).tolist()), (0,) * (size - answer) + (1,) * answer)


CONFIGS["bloom"] = lambda: t.BloomConfig(
    vocab_size=96, hidden_size=32, n_layer=2, n_head=2
)  # its mlp takes the residual


@pytest.mark.parametrize("name", CONFIGS)
def test_loss(name):
    model, some = model_of(name), list(examples())
    batch = collate([[e] for e in some], 0)
    loss, _ = answer_loss(model, batch)
    by_hand = 0.0
    for e in some:  # one at a time, all logits, no padding: what everything above must agree with
        logp = model(input_ids=torch.tensor([e.ids])).logits[0].log_softmax(-1)
        by_hand -= sum(logp[i - 1, e.ids[i]].item() for i in range(1, len(e.ids)) if e.mask[i])
    assert loss.item() == pytest.approx(by_hand, rel=1e-4)
    if name in ("gpt-oss", "bloom"):  # transformers gives its mask no positions
        with pytest.raises(
            KitError, match="batching: packed examples see each other in (gpt_oss|bloom).*batching: length"
        ):
            check_packing(model)
        return
    check_packing(model)
    packed, _ = answer_loss(model, collate([some[:2], some[2:]], 0), packed=True)
    assert packed.item() == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "bloom"])
def test_gradients_without_what_nobody_reads(name):
    """The last block's feed-forward sees only the tokens that count, experts all; no weight's gradient is another for it."""
    model, batch = model_of(name), collate([[e] for e in examples()], 0)
    last, seen = model.get_decoder().children(), []
    mlp = next(b for b in last if isinstance(b, torch.nn.ModuleList))[-1].mlp
    for hooked in (False, True):  # accelerate, for one, puts a forward of its own onto a module
        if hooked:
            whole = mlp.forward
            mlp.forward = lambda x, whole=whole: (seen.append(x.shape), whole(x))[1]
            before = mlp.forward
        model.zero_grad()
        answer_loss(model, batch)[0].backward()
        assert mlp.forward == before if hooked else "forward" not in vars(mlp)
    assert seen == [batch["input_ids"].shape + (32,) if name in EXPERTS else (len(batch["targets"]), 32)]
    got = {n: p.grad for n, p in model.named_parameters()}
    again = model_of(name)
    logits = again(
        input_ids=torch.from_numpy(batch["input_ids"]), attention_mask=torch.from_numpy(batch["attention_mask"])
    ).logits
    torch.nn.functional.cross_entropy(
        logits[torch.from_numpy(batch["keep"])], torch.from_numpy(batch["targets"]), reduction="sum"
    ).backward()
    for n, p in again.named_parameters():
        assert torch.allclose(got[n], p.grad, atol=1e-4, rtol=1e-3), n


@pytest.mark.parametrize(
    "name, saved", [("gpt2", "wte"), ("gpt2", "lm_head"), ("phi", "lm_head"), ("phi", "embed_tokens")]
)
def test_tied_embeddings_that_peft_would_part_are_refused(name, saved):
    "The merge would find two matrices in the place of one, or no bias, after the training."
    model = model_of(name) if name == "gpt2" else t.PhiForCausalLM(t.PhiConfig(**PHI, tie_word_embeddings=True))
    with pytest.raises(KitError, match="save_modules: input and output embeddings share their weights.*Leave both"):
        attach(model, rank=2, alpha=2, save_modules=[saved])


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_tied_embeddings_train_as_one(saved, tmp_path):
    t.LlamaForCausalLM(t.LlamaConfig(**WIDE, tie_word_embeddings=True)).save_pretrained(tmp_path / "base")
    tuned, ids = (
        attach(load_frozen(tmp_path / "base"), rank=2, alpha=2, save_modules=[saved]),
        torch.arange(1, 10)[None],
    )
    with torch.no_grad():
        tuned.get_input_embeddings().weight.mul_(1.5)
    save_delta(tuned, tmp_path)
    again = load_delta(load_frozen(tmp_path / "base"), tmp_path)
    assert torch.equal(again(ids).logits, tuned.eval()(ids).logits)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert set(all_tensors(tmp_path / "merged")) == set(all_tensors(tmp_path / "base"))


@pytest.mark.parametrize("name", CONFIGS)
def test_delta_round_trip(name, tmp_path):
    tuned = attach(model_of(name), rank=2, alpha=4, seed=1)
    with torch.no_grad():
        for n, p in tuned.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.05)
    save_delta(tuned, tmp_path)
    again, ids = load_delta(model_of(name), tmp_path), torch.arange(1, 10)[None]
    assert torch.equal(again(ids).logits, tuned.eval()(ids).logits)
    assert not torch.allclose(again(ids).logits, model_of(name)(ids).logits, atol=1e-4)
    assert len(linear_names(model_of(name))) >= 3 and "lm_head" not in str(list(delta_tensors(tuned)))


def test_layers_that_peft_cannot_adapt_are_told():
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(t.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2))
    with pytest.raises(KitError, match="stage finetune: PEFT cannot adapt a layer.*out_proj.*finetune.targets.*x_proj"):
        attach(model, rank=2, alpha=4)
    attach(model, rank=2, alpha=4, targets=["in_proj", "x_proj", "dt_proj"])


@pytest.mark.parametrize("name", CONFIGS)
def test_what_trains_is_float32_on_a_base_in_bfloat16(name):
    "A step of 0.001 is lost in bfloat16, whose neighbours of 1 are further away."
    model = model_of(name).bfloat16()
    *_, norm = (n.rpartition(".")[2] for n, _ in model.named_modules() if n.endswith(("norm", "ln_f")))
    tuned = attach(model, rank=2, alpha=2, save_modules=[norm])
    assert {p.dtype for p in tuned.parameters() if p.requires_grad} == {torch.float32}
    whole = [p for n, p in tuned.named_parameters() if p.requires_grad and "lora" not in n]
    before, optimizer = [p.detach().clone() for p in whole], torch.optim.AdamW(whole, lr=1e-3, weight_decay=0.0)
    loss, _ = answer_loss(tuned, collate([[e] for e in examples()], 0), bf16=True)
    loss.backward()
    optimizer.step()
    assert all((p != b).any() for p, b in zip(whole, before, strict=True) if p.grad.any())
    assert any(p.grad.any() for p in whole)
