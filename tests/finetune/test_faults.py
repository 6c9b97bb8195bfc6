"""What is refused, and with which words."""

import shutil
from dataclasses import replace

import pytest

from llmkit.core.errors import KitError
from llmkit.model.finetune import finetune, workspace


@pytest.mark.parametrize(
    "change, words",
    [
        ({"lr": 1e9, "clip": 0.0, "warmup": 0.0, "epochs": 6}, r"step \d+: the (loss is not finite|gradient is not finite|loss diverges).*Lower lr"),
        ({"max_tokens": 6}, r"train.jsonl: max_overlong: .*% of the examples have more than 6 tokens \(got 0.0\)\. Raise max_tokens \(the longest has \d+\)"),
        ({"targets": ["q_proj", "vproj"]}, r"targets: no such linear layer \(got 'vproj'\)\. Did you mean 'v_proj'"),
        ({"save_modules": ["embedding"]}, r"save_modules: no such module"),
        ({"rank": 0}, r"rank: must be at least 1"),
    ],
)  # fmt: skip
def test_refused(base, dataset, recipe, tmp_path, change, words):
    with pytest.raises(KitError, match=words):
        finetune(base, dataset, tmp_path / "delta", replace(recipe, **change))
    assert not (tmp_path / "delta").exists()


def test_examples_longer_than_the_base_reads_are_refused(dataset, recipe, tmp_path):
    "A base with a row for every position ends in an index out of range; one with rotary positions would not even say so."
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from llmkit.core.artifact import build, open_artifact
    from llmkit.core.files import read_jsonl
    from llmkit.model.tiny import train_tokenizer

    torch.manual_seed(0)
    with build(tmp_path / "base", "base") as out:
        GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=1, n_head=2, n_positions=8)).save_pretrained(out)
        train_tokenizer(out, [m["content"] for r in read_jsonl(dataset / "train.jsonl") for m in r["messages"]], 320)
    small = open_artifact(tmp_path / "base")
    with build(tmp_path / "set", "dataset", {"base": small}) as out:
        for name in ("train.jsonl", "validation.jsonl"):
            shutil.copyfile(dataset / name, out / name)
    with pytest.raises(KitError, match=r"finetune.max_tokens: an example has \d+ tokens, and the base reads 8 .got 64"):
        finetune(small, open_artifact(tmp_path / "set"), tmp_path / "delta", recipe)


def test_examples_left_out_are_counted(base, dataset, recipe, tmp_path):
    from llmkit.core.files import read_jsonl
    from llmkit.model.tokenizer import Tokenizer, encode_example

    tok = Tokenizer.load(base.path)
    lengths = sorted(len(encode_example(tok, r["messages"])[0]) for r in read_jsonl(dataset / "train.jsonl"))
    limit = lengths[-1] - 1
    delta = finetune(base, dataset, tmp_path / "delta", replace(recipe, max_tokens=limit, max_overlong=0.9, epochs=1))
    left = delta.meta["left_out_as_too_long"]["train"]
    assert left == sum(n > limit for n in lengths) > 0
    assert delta.meta["examples"]["train"] == 100 - left


def test_two_processes_train_the_same_delta(base, dataset, recipe, tmp_path):
    from safetensors.torch import load_file

    plain = replace(recipe, dropout=0.0, epochs=1)  # dropout draws other numbers in another process
    one = finetune(base, dataset, tmp_path / "one", plain)
    two = finetune(base, dataset, tmp_path / "two", replace(plain, processes=2))
    assert one.meta["seen_tokens"] == two.meta["seen_tokens"]
    a, b = (load_file(d / "adapter_model.safetensors") for d in (one, two))
    assert a.keys() == b.keys()
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-4
    assert (workspace(two.parents, replace(plain, processes=2)) / "train.log").is_file()


def test_a_failing_process_leaves_its_log(base, dataset, recipe, tmp_path):
    bad = replace(recipe, processes=2, max_tokens=6)
    with pytest.raises(KitError, match=r"train\.log: training failed with exit code \d+: train.jsonl: max_overlong"):
        finetune(base, dataset, tmp_path / "delta", bad)
    assert "max_overlong" in (workspace({"base": base, "dataset": dataset}, bad) / "train.log").read_text()


@pytest.mark.parametrize(
    "change", [{"rslora": True}, {"dora": True}, {"batching": "pack"}, {"precision": "bf16", "accumulate": 2}], ids=str
)
def test_every_way_of_training_gives_the_same_bytes_twice_and_merges(base, dataset, recipe, tmp_path, change):
    from llmkit.model.merge import merge

    how = replace(recipe, epochs=1, **change)
    one, two = (finetune(base, dataset, tmp_path / name, how) for name in ("one", "two"))
    assert one.digest == two.digest
    merge(tmp_path / "model", base.path, one.path, limits={"logit_error_max": 1e-3, "top1_agreement": 0.99})
    plain = finetune(base, dataset, tmp_path / "plain", replace(recipe, epochs=1))
    assert one.files["adapter_model.safetensors"] != plain.files["adapter_model.safetensors"]


def test_a_record_that_the_template_spoils_is_named(base):
    "As thoughts in an answer, before which Qwen 3 asks with an empty block of thoughts."
    from llmkit.model.batches import encode_rows
    from llmkit.model.tokenizer import Tokenizer

    tok = Tokenizer.load(base.path)
    thinks = "{% if '</think>' in m.content %}{{ m.content }}{% else %}<think></think>{{ m.content }}{% endif %}"
    tok.template = "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>" + thinks
    tok.template += (
        "<|end|>{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    rows = [{"id": f"r{i}", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": said}]} for i, said in enumerate(("b", "<think>c</think>b"))]  # fmt: skip
    assert tok.opening == "<think></think>" and encode_rows(tok, rows[:1], 99, 0.0)[1] == [0]
    with pytest.raises(
        KitError, match=r"train.jsonl: r1: cannot be learnt with this base: the chat template.*take it out"
    ):
        encode_rows(tok, rows, 99, 0.0)


def test_the_recorded_loss_is_a_mean_by_weight(base, dataset, recipe, tmp_path):
    "A sum over questions and answers, divided by the answers alone, began at 30 nats for 320 tokens."
    import math

    from llmkit.core.files import read_json

    first = []
    for weight in (0.0, 0.5, 1.0):
        how = replace(recipe, epochs=1, prompt_loss_weight=weight, label_smoothing=0.0)
        delta = finetune(base, dataset, tmp_path / f"{weight}", how)
        first.append(read_json(delta / "history.json")["train"]["loss"][0])
    assert all(math.log(320) - 1 < x < math.log(320) + 1 for x in first), first
