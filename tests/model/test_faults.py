"""Bad input to the base and merge stages: a clear error, and nothing half-written."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from test_families import LINES, random_model, train_by_hand

from llmkit.core.artifact import ArtifactError, build, open_artifact
from llmkit.core.digests import digest_files
from llmkit.core.errors import KitError
from llmkit.core.files import read_json, write_json
from llmkit.model.base import fetch, make_base
from llmkit.model.folder import inspect
from llmkit.model.merge import merge
from llmkit.model.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    home = tmp_path_factory.mktemp("pair")
    random_model(home / "from", "Llama")
    base = make_base(home / "base", source="folder", model=str(home / "from"))
    return base, train_by_hand(home / "delta", base)


def reseal(delta, path, parents=None, change=None):
    "The delta again under a fresh manifest, as somebody with bad intentions or a broken disk would leave it."
    with build(path, "delta", parents or delta.parents, delta.recipe, dict(delta.meta)) as folder:
        for name in delta.files:
            shutil.copyfile(delta / name, folder / name)
        if change:
            change(folder)
    return open_artifact(path)


def left_over(folder):
    return sorted(p.name for p in folder.iterdir() if "model" in p.name)


def test_changed_byte_of_a_delta(pair, tmp_path):
    base, delta = pair
    copy = shutil.copytree(delta.path, tmp_path / "delta")
    data = bytearray((copy / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError, match="adapter_model.safetensors differs"):
        merge(tmp_path / "model", base.path, copy)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("keep", [0, 4, 200, -64])
def test_truncated_delta(pair, tmp_path, keep):
    base, delta = pair

    def cut(folder):
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])

    with pytest.raises(KitError, match="not a whole safetensors file"):
        merge(tmp_path / "model", base.path, reseal(delta, tmp_path / "delta", change=cut).path)
    assert left_over(tmp_path) == []


def test_delta_of_another_base(pair, tmp_path):
    _, delta = pair
    random_model(tmp_path / "from", "Llama", initializer_range=0.05)
    other = make_base(tmp_path / "base", source="folder", model=str(tmp_path / "from"))
    with pytest.raises(ArtifactError, match="made for the base .* but .* is"):
        merge(tmp_path / "model", other.path, delta.path)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    "family, change", [("GPT2", {}), ("Llama", {"num_hidden_layers": 3}), ("Llama", {"hidden_size": 128})]
)
def test_delta_of_another_architecture_though_the_manifest_says_it_fits(pair, tmp_path, family, change):
    _, delta = pair
    random_model(tmp_path / "from", family, **change)
    other = make_base(tmp_path / "base", source="folder", model=str(tmp_path / "from"))
    forged = reseal(delta, tmp_path / "delta", parents={"base": other})
    with pytest.raises(KitError, match="the delta does not fit this base"):
        merge(tmp_path / "model", other.path, forged.path)
    assert left_over(tmp_path) == []


def test_template_changed_after_training(pair, tmp_path):
    base, delta = pair
    copy = shutil.copytree(base.path, tmp_path / "from")
    (copy / "manifest.json").unlink()
    (copy / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    other = make_base(tmp_path / "base", source="folder", model=str(copy))
    with pytest.raises(KitError, match="template_digest: trained with"):
        merge(tmp_path / "model", other.path, reseal(delta, tmp_path / "delta", parents={"base": other}).path)


def test_a_base_where_a_delta_should_be_and_the_other_way_round(pair, tmp_path):
    base, delta = pair
    with pytest.raises(ArtifactError, match="is a base, not a delta"):
        merge(tmp_path / "model", base.path, base.path)
    with pytest.raises(ArtifactError, match="is a delta, not a base"):
        merge(tmp_path / "model", delta.path, delta.path)


def test_full_disk(pair, tmp_path):
    "Base, delta and merge, each on a file system of 64 KiB."
    base, delta = pair
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs")
    makers = {
        "base": lambda path: make_base(path, source="folder", model=str(base.path)),
        "delta": lambda path: train_by_hand(path, base, rank=64),
        "model": lambda path: merge(path, base.path, delta.path),
    }
    try:
        for name, maker in makers.items():
            with pytest.raises(KitError, match=f"disk/{name}: cannot write: No space left on device. Free some space"):
                maker(disk / name)
            assert not [*disk.iterdir()]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_merge_is_done_once(pair, tmp_path):
    base, delta = pair
    first = merge(tmp_path / "model", base.path, delta.path)
    before = {n: os.stat(first / n).st_mtime_ns for n in first.files}
    assert merge(tmp_path / "model", base.path, delta.path).digest == first.digest
    assert {n: os.stat(first / n).st_mtime_ns for n in first.files} == before
    assert merge(tmp_path / "other", base.path, delta.path).digest == first.digest


def test_two_processes_make_the_same_tiny_base(tmp_path):
    code = (
        "import sys; from llmkit.model.base import make_base\n"
        "tiny = dict(vocab=400, hidden=64, layers=2, heads=2, mlp=64, context=64, steps=12, optimizer='adamw', lr=3e-3, other_lr=0.0, batch_tokens=512, threads=1, precision='bf16')\n"
        "print(make_base(sys.argv[1], source='tiny', corpus_lines=300, tiny=tiny, seed=3).digest)"
    )
    env = {**os.environ, "PYTHONHASHSEED": "1"}
    said = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "1")], env=env, capture_output=True, text=True, check=True
    )
    tiny = {"vocab": 400, "hidden": 64, "layers": 2, "heads": 2, "mlp": 64, "context": 64}
    tiny |= {
        "steps": 12,
        "optimizer": "adamw",
        "lr": 3e-3,
        "other_lr": 0.0,
        "batch_tokens": 512,
        "threads": 1,
        "precision": "bf16",
    }
    here = make_base(tmp_path / "2", source="tiny", corpus_lines=300, tiny=tiny, seed=3)
    assert said.stdout.split() == [here.digest]
    assert digest_files(tmp_path / "1") == digest_files(tmp_path / "2")


def test_refused_base_leaves_the_old_one_whole(pair, tmp_path):
    base, _ = pair
    good = make_base(tmp_path / "base", source="folder", model=str(base.path.parent / "from"))
    bad = shutil.copytree(base.path.parent / "from", tmp_path / "bad")
    weights = bad / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(KitError, match="cannot load the weights"):
        make_base(tmp_path / "base", source="folder", model=str(bad))
    assert open_artifact(tmp_path / "base").digest == good.digest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "base"]


def test_remote_code_in_the_tokenizer_is_refused(pair, tmp_path):
    bad = shutil.copytree(pair[0].path.parent / "from", tmp_path / "bad")
    settings = read_json(bad / "tokenizer_config.json")
    write_json(bad / "tokenizer_config.json", settings | {"auto_map": {"AutoTokenizer": ["tok.Trap", None]}})
    with pytest.raises(KitError, match="wants to run its own code"):
        make_base(tmp_path / "base", source="folder", model=str(bad))


@pytest.mark.parametrize("family", ["T5", "Bert"])
def test_what_is_no_decoder_is_refused_at_the_base_stage(tmp_path, family):
    import transformers

    getattr(transformers, f"{family}Config")().save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", config | {"architectures": [f"{family}ForConditionalGeneration"]})
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(KitError, match="decoder"):
        inspect(tmp_path)


@pytest.mark.parametrize("revision", ["", "main", "v1.0", "abc1234", "0" * 39])
def test_hub_without_a_commit(revision):
    with pytest.raises(KitError, match="base.revision: a hub model needs a pinned commit"):
        fetch("some/model", revision)


def test_tokenizer_of_the_base_is_what_training_sees(pair):
    from transformers import AutoTokenizer

    tok, theirs = Tokenizer.load(pair[0].path), AutoTokenizer.from_pretrained(pair[0].path)
    assert [tok.encode(line) for line in LINES] == [theirs.encode(line, add_special_tokens=False) for line in LINES]


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "64"},
        {"num_attention_heads": 0},
        {"hidden_act": "nope"},
        {"rope_scaling": {"rope_type": "nope", "factor": 2.0}},
        {"num_hidden_layers": None},
    ],
    ids=lambda c: next(iter(c)),
)
def test_a_config_that_describes_no_model(pair, tmp_path, change):
    base, _ = pair
    copy = shutil.copytree(base.path, tmp_path / "from")
    write_json(copy / "config.json", {**read_json(copy / "config.json"), "rope_parameters": None, **change})
    with pytest.raises(KitError, match="from.*: ") as e:
        make_base(tmp_path / "base", source="folder", model=str(copy))
    assert "\n" not in str(e.value) and not (tmp_path / "base").exists()


NAN, INF, ROPE = float("nan"), float("inf"), {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}


@pytest.mark.parametrize(
    "change, says",
    [
        ({"rope_parameters": ROPE | {"rope_theta": NAN}}, r"rope_parameters.rope_theta: is not finite \(got nan\)"),
        ({"rope_parameters": ROPE | {"rope_theta": {"__float__": "NaN"}}}, "rope_parameters.rope_theta: is not finite"),
        ({"rope_parameters": {"full_attention": ROPE | {"factor": -1.0}}}, r"full_attention.factor: must be positive \(got -1.0\)"),
        ({"rope_scaling": ROPE | {"long_factor": [1.0, 0.0]}}, "rope_scaling.long_factor: must be positive"),
        ({"rope_theta": 0}, "rope_theta: must be positive"),
        ({"text_config": {"rms_norm_eps": -1e-6}}, "text_config.rms_norm_eps: must be 0 or more"),
        ({"rms_norm_eps": INF}, "rms_norm_eps: is not finite"),
        ({"initializer_range": -0.1}, "initializer_range: must be 0 or more"),
        ({"attention_dropout": -1.0}, "attention_dropout: must be 0 or more"),
        ({"sliding_window": -1}, "sliding_window: must be 0 or more"),
        ({"attention_multiplier": 0.0}, "attention_multiplier: must be positive"),
        ({"final_logit_softcapping": 0.0}, "final_logit_softcapping: must be positive"),
        ({"time_step_limit": [-INF, INF]}, "time_step_limit: is not finite"),
    ],
)  # fmt: skip
def test_a_number_that_makes_no_sense(pair, tmp_path, change, says):
    "transformers builds a model from all of these but one; the logits of most are finite, and wrong."
    copy = shutil.copytree(pair[0].path, tmp_path / "from")
    (copy / "config.json").write_text(json.dumps(read_json(copy / "config.json") | change))
    with pytest.raises(KitError, match=f"from/config.json: .*{says}.*Take the model's own config.json"):
        make_base(tmp_path / "base", source="folder", model=str(copy))
    assert not (tmp_path / "base").exists()


def test_numbers_that_look_odd_and_are_right(pair, tmp_path):
    copy = shutil.copytree(pair[0].path, tmp_path / "from")
    for limit in ([0.0, INF], [0.0, {"__float__": "Infinity"}]):
        fine = {
            "time_step_limit": limit,
            "rms_norm_eps": 0.0,
            "sliding_window": 0,
            "router_jitter_noise": 0.0,
            "x": 10**400,
        }
        (copy / "config.json").write_text(json.dumps(read_json(copy / "config.json") | fine))
        assert inspect(copy)["time_step_limit"] == limit


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_a_list_where_an_object_should_be(pair, tmp_path, name):
    base, _ = pair
    copy = shutil.copytree(base.path, tmp_path / "from")
    write_json(copy / name, [1])
    with pytest.raises(KitError, match=f"{name}: must be an object"):
        make_base(tmp_path / "base", source="folder", model=str(copy))


def test_a_folder_of_licences_comes_along(pair, tmp_path):
    base, _ = pair
    copy = shutil.copytree(base.path, tmp_path / "from")
    (copy / "LICENSES").mkdir()
    (copy / "LICENSES/MIT.txt").write_text("MIT")
    (copy / "NOTICE").write_text("ours")
    made = make_base(tmp_path / "base", source="folder", model=str(copy))
    assert {"LICENSES-MIT.txt", "NOTICE"} <= {*made.files}


def bad_copy(pair, tmp_path, change, shards=False, dtype=None):
    "The folder that the base came from, its weights changed by hand; in two shards where asked for."
    import torch
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(pair[0].path.parent / "from", tmp_path / "bad")
    weights = load_file(copy / "model.safetensors")
    weights = {n: t.to(dtype) for n, t in weights.items()} if dtype else weights
    change(weights, torch)
    if not shards:
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        return copy
    names = sorted(weights)
    parts = {f"model-{i}-of-2.safetensors": names[i::2] for i in range(2)}
    (copy / "model.safetensors").unlink()
    for name, held in parts.items():
        save_file({n: weights[n] for n in held}, copy / name, metadata={"format": "pt"})
    where = {n: name for name, held in parts.items() for n in held}
    write_json(copy / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    return copy


def refused(copy, tmp_path, says, **options):
    "Nothing comes of a base, and the error is one line that says so."
    with pytest.raises(KitError, match=says) as e:
        make_base(tmp_path / "base", source="folder", model=str(copy), **options)
    assert "\n" not in str(e.value) and ".tmp" not in str(e.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_not_finite_are_refused_with_file_tensor_and_number(pair, tmp_path, dtype, value):
    import torch

    def change(weights, torch):
        weights["model.layers.1.mlp.up_proj.weight"][2, :5] = float(value)

    copy = bad_copy(pair, tmp_path, change, dtype=getattr(torch, dtype))
    says = r"bad/model.safetensors: model.layers.1.mlp.up_proj.weight: 5 of 6144 values are not finite\. Fetch the"
    refused(copy, tmp_path, says)


def test_a_shard_that_is_not_finite_is_named_in_a_folder_from_the_hub_with_a_mocked_hub(pair, tmp_path, monkeypatch):
    import huggingface_hub

    def change(weights, torch):
        weights["model.norm.weight"][0] = float("nan")

    copy = bad_copy(pair, tmp_path, change, shards=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(copy))
    with pytest.raises(KitError, match=r"bad/model-[01]-of-2.safetensors: model.norm.weight: 1 of 64 values are not"):
        make_base(tmp_path / "base", source="hub", model="some/model", revision="0" * 40)
    assert not (tmp_path / "base").exists()


def test_weights_that_overflow_in_half_precision_are_refused(pair, tmp_path):
    def change(weights, torch):
        weights["model.norm.weight"][:2] = 1e6

    copy = bad_copy(pair, tmp_path, change)
    says = r"bad: model.norm.weight: 2 of 64 values are not finite in float16\. Set base.dtype: float32"
    refused(copy, tmp_path, says, dtype="float16")
    assert make_base(tmp_path / "base", source="folder", model=str(copy), dtype="bfloat16").meta["dtype"] == "bfloat16"


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_delta_that_is_not_finite_is_refused_at_merge(pair, tmp_path, value):
    from safetensors.torch import load_file, save_file

    base, delta = pair

    def change(folder):
        weights = load_file(folder / "adapter_model.safetensors")
        name = sorted(weights)[0]
        weights[name].view(-1)[:3] = float(value)
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    says = r"adapter_model.safetensors: \S+lora_A.weight: 3 of \d+ values are not finite\. Train the delta again"
    with pytest.raises(KitError, match=says):
        merge(tmp_path / "model", base.path, reseal(delta, tmp_path / "delta", change=change).path)
    assert left_over(tmp_path) == []


def test_every_tensor_is_read_one_at_a_time(pair, tmp_path, monkeypatch):
    "What the check holds of a file is never more than one tensor, and the one before it."
    import weakref

    from llmkit.model import weights

    copy, alive, most = bad_copy(pair, tmp_path, lambda w, torch: None, shards=True), [], []

    def look(tensor, name, *rest):
        most.append(sum(r() is not None for r in alive))
        alive.append(weakref.ref(tensor))

    monkeypatch.setattr(weights, "refuse_not_finite", look)
    weights.check_weights(copy)
    assert len(most) > 10 and max(most) <= 1


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda m, w: {}, r"index.json: weight_map: must say in which file"),
        (lambda m, w: {"weight_map": []}, r"index.json: weight_map: must say in which file"),
        (lambda m, w: {"weight_map": w | {"lm_head.weight": "model-7.safetensors"}}, r"index.json: weight_map.lm_head.weight: no such shard \(got 'model-7.safetensors'\)"),
        (lambda m, w: {"weight_map": {n: "model-0-of-2.safetensors" for n in w}}, r""),
        (lambda m, w: [1], r"index.json: must be an object"),
    ],
    ids=["no map", "a list", "missing shard", "one shard for all", "no object"],
)  # fmt: skip
def test_an_index_that_does_not_fit_its_shards(pair, tmp_path, change, says):
    copy = bad_copy(pair, tmp_path, lambda w, torch: None, shards=True)
    index = read_json(copy / "model.safetensors.index.json")
    write_json(copy / "model.safetensors.index.json", change(index, index["weight_map"]))
    refused(copy, tmp_path, says)


def test_shards_are_read_and_one_that_stands_there_twice_or_is_cut_short_is_named(pair, tmp_path):
    copy = bad_copy(pair, tmp_path, lambda w, torch: None, shards=True)
    assert make_base(tmp_path / "good", source="folder", model=str(copy)).digest
    shutil.rmtree(tmp_path / "good")
    kept = (copy / "model-1-of-2.safetensors").read_bytes()
    (copy / "model-1-of-2.safetensors").write_bytes((copy / "model-0-of-2.safetensors").read_bytes())
    refused(copy, tmp_path, r"model-1-of-2.safetensors: \S+: a tensor in two shards.*model-0-of-2")
    (copy / "model-1-of-2.safetensors").write_bytes(kept[:-100])
    refused(copy, tmp_path, r"model-1-of-2.safetensors: cannot load the weights.*cut short")


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_a_dtype_that_torch_does_not_have(pair, tmp_path, key):
    copy = bad_copy(pair, tmp_path, lambda w, torch: None)
    config = {k: v for k, v in read_json(copy / "config.json").items() if "dtype" not in k}
    write_json(copy / "config.json", config | {key: "float99"})
    refused(copy, tmp_path, r"bad/config.json: no model can be built from it: .*'torch' has no .*'float99'")


def test_a_template_with_a_fault_is_told_with_its_line(pair, tmp_path):
    copy = bad_copy(pair, tmp_path, lambda w, torch: None)
    (copy / "chat_template.jinja").write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}")
    refused(copy, tmp_path, r"bad: line 2: the chat template is not valid jinja: .*Correct chat_template.jinja")


def test_a_tokenizer_without_an_end_token(pair, tmp_path):
    copy = bad_copy(pair, tmp_path, lambda w, torch: None)
    (copy / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    config = read_json(copy / "config.json")
    write_json(copy / "config.json", config | {"eos_token_id": None})
    (copy / "generation_config.json").unlink()
    write_json(copy / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    refused(copy, tmp_path, r"bad/chat_template.jinja: no token ends an answer\. Name an eos_token")
    (copy / "chat_template.jinja").unlink()
    refused(copy, tmp_path, r"bad: the tokenizer has no eos_token")


def test_a_tokenizer_larger_than_the_embedding_matrix(pair, tmp_path):
    from llmkit.model.tiny import train_tokenizer

    copy = bad_copy(pair, tmp_path, lambda w, torch: None)
    train_tokenizer(copy, [f"{line} {i * 7919}" for i, line in enumerate(LINES * 3)], 400)
    refused(
        copy,
        tmp_path,
        r"bad: tokenizer.json: the tokenizer has more tokens than the model has embeddings \(got \(\d+, 320\)\)",
    )


def test_a_tokenizer_that_is_none(pair, tmp_path):
    copy = bad_copy(pair, tmp_path, lambda w, torch: None)
    (copy / "tokenizer.json").write_text("{}")
    refused(copy, tmp_path, r"bad/tokenizer.json: not a tokenizer")


def vocabulary(change):
    "A change of what a tokenizer's file calls its tokens."

    def do(folder):
        kept = read_json(folder / "tokenizer.json")
        change(kept["model"])
        write_json(folder / "tokenizer.json", kept)

    return do


def numbered(model):
    "The last token gets a number that the model does not have."
    model["vocab"][[*model["vocab"]][-1]] = 5000


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda f: (f / "chat_template.jinja").write_text("Hello!"), "bad/chat_template.jinja: question and answer do not come through"),
        (lambda f: (f / "chat_template.jinja").write_text("{% for m in messages | reverse %}{{ m.content }}{% endfor %}"), "bad/chat_template.jinja: question and answer do not come through"),
        (lambda f: (f / "chat_template.jinja").write_text("{{ messages[0].content }}"), "bad/chat_template.jinja: question and answer do not"),
        (vocabulary(lambda m: m.update(vocab={}, merges=[])), "bad/chat_template.jinja: question and answer do not.*the tokenizer, that belong"),
        (vocabulary(numbered), r"bad: tokenizer.json: the tokenizer has more tokens than the model has embeddings \(got \(5001, 320\)\)"),
        (lambda f: write_json(f / "generation_config.json", {"eos_token_id": [1, 320]}), r"bad: eos_token_id: is no token of the model \(got 320\)"),
        (lambda f: write_json(f / "config.json", read_json(f / "config.json") | {"max_position_embeddings": -1}), r"bad: max_position_embeddings: is no number of tokens \(got -1\)"),
        (lambda f: write_json(f / "config.json", read_json(f / "config.json") | {"max_position_embeddings": 0}), r"bad: max_position_embeddings: is no number of tokens \(got 0\)"),
        (lambda f: write_json(f / "config.json", read_json(f / "config.json") | {"vocab_size": 321}), "bad: the weights have other sizes than config.json"),
    ],
)  # fmt: skip
def test_a_base_that_would_be_taken_for_another_one(pair, tmp_path, change, says):
    "Each of these was accepted once, or told as a file that is cut short."
    copy = bad_copy(pair, tmp_path, lambda w, torch: None)
    change(copy)
    refused(copy, tmp_path, says)


def test_whole_numbers_where_floats_belong(pair, tmp_path):
    copy = bad_copy(pair, tmp_path, lambda w, torch: w.update({"lm_head.weight": w["lm_head.weight"].to(torch.int8)}))
    refused(copy, tmp_path, r"bad: lm_head.weight: is no float, and the model wants one \(got 'int8'\)")


def test_a_head_of_its_own_is_told_of_in_the_configuration(pair, tmp_path):
    "transformers keeps both weights, whatever config.json says; the ONNX builder goes by config.json."
    copy = bad_copy(pair, tmp_path, lambda w, torch: None)
    write_json(copy / "config.json", read_json(copy / "config.json") | {"tie_word_embeddings": True})
    base = make_base(tmp_path / "base", source="folder", model=str(copy))
    assert read_json(base / "config.json")["tie_word_embeddings"] is False
