"Engines and models whose parts do not belong together: refused by name when they are opened, or before anything is built."

import shutil

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmkit.core.artifact import seal
from llmkit.core.errors import KitError
from llmkit.core.files import read_json, write_json
from llmkit.model.quantize import quantize
from llmkit.runtime.onnx_engine import OnnxEngine


@pytest.fixture
def engine(open_onnx, tmp_path):
    "A copy of an engine, without a seal."
    with open_onnx("fp32") as e:
        return shutil.copytree(e.folder, tmp_path / "engine")


def rename(name, old, new):
    "A change of a graph: an input or an output is called otherwise."

    def change(folder):
        g = onnx.load(str(folder / name), load_external_data=False)
        for x in (*g.graph.input, *g.graph.output):
            x.name = new if x.name == old else x.name
        for node in g.graph.node:
            for ends in (node.input, node.output):
                ends[:] = [new if e == old else e for e in ends]
        (folder / name).write_bytes(g.SerializeToString())

    return change


def says(**values):
    "A change of `engine.json`."
    return lambda folder: write_json(folder / "engine.json", read_json(folder / "engine.json") | values)


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda f: (f / "score.onnx").unlink(), "score.onnx: no such file"),
        (lambda f: (f / "weights.bin").unlink(), "weights.bin: no such file"),
        (lambda f: shutil.copy(f / "score.onnx", f / "decode.onnx"), "decode.onnx: logits: must give the logits of the last position"),
        (rename("decode.onnx", "logits", "logitz"), "decode.onnx: logits: has no such input or output"),
        (rename("decode.onnx", "past_key_values.0.key", "past_key_values.7.key"), "decode.onnx: past_key_values.0.key: has no such"),
        (says(layers=10**9), "decode.onnx: layers: engine.json says 1000000000 layers .got 2."),
        (says(kv_heads=1), "decode.onnx: past_key_values.0.key: engine.json says that its sizes are"),
        (says(vocab_size=321), "decode.onnx: logits: engine.json says that its sizes are .None, None, 321."),
    ],
)  # fmt: skip
def test_an_engine_whose_files_do_not_belong_together_is_not_opened(engine, change, told):
    change(engine)
    with pytest.raises(KitError, match=f"{told}.*(stage quantize|fetch)"):
        OnnxEngine(engine, threads=1)


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda f: shutil.copy(f / "decode.onnx", f / "score.onnx"), "logits: must give the logits of every position"),
        (lambda f: (f / "score.onnx").write_bytes(b"\x00no graph"), "cannot open the graph"),
        (rename("score.onnx", "logits", "logitz"), "logits: has no such input or output"),
        (rename("score.onnx", "present.1.value", "present.9.value"), "present.1.value: has no such"),
    ],
)
def test_the_second_graph_is_held_against_the_first_when_it_is_opened(engine, change, told):
    change(engine)
    with OnnxEngine(engine, threads=1) as e:
        assert len(e.generate([[5, 6, 7]])[0].tokens)
        with pytest.raises(KitError, match=f"score.onnx: {told}"):
            e.score([[5, 6]], [[7]])


def test_weights_that_are_no_numbers_score_nothing(engine):
    (engine / "weights.bin").write_bytes(b"\xff" * (engine / "weights.bin").stat().st_size)
    with OnnxEngine(engine, threads=1) as e, pytest.raises(KitError, match="logits are not finite"):
        e.score([[5, 6]], [[7]])


def weights(change):
    "A change of a model's tensors."

    def do(folder):
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})

    return do


def config(**values):
    "A change of a model's configuration."
    return lambda folder: write_json(folder / "config.json", read_json(folder / "config.json") | values)


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    "change, told",
    [
        (weights(lambda t: {n: x for n, x in t.items() if n != NAME}), f"model: {NAME}: 1 missing weights"),
        (weights(lambda t: t | {NAME: t[NAME] * float("nan")}), f"{NAME}: 6144 of 6144 values are not finite"),
        (weights(lambda t: t | {NAME: t[NAME].to(torch.int8)}), f"{NAME}: is no float, and the model wants one .got 'int8'"),
        (weights(lambda t: t | {"lm_head.weight": 2 * t["model.embed_tokens.weight"]}), "model: tie_word_embeddings: does not say"),
        (config(num_hidden_layers=3), "model: model.layers.2.input_layernorm.weight: 9 missing weights"),
        (config(vocab_size=300), "model: the weights have other sizes than config.json says"),
        (config(architectures=3), r"config.json: architectures: cannot be exported to ONNX .got 3."),
        (config(sliding_window="x"), "config.json: sliding_window: must be a whole number"),
        (config(max_position_embeddings=-1), "model: max_position_embeddings: is no number of tokens"),
        (config(auto_map={"AutoConfig": "own.Config"}), "config.json: auto_map: wants to run its own code"),
        (lambda f: write_json(f / "generation_config.json", {"eos_token_id": 320}), "model: eos_token_id: is no token of the model"),
        (pickled, "pytorch_model.bin: the weights are a pickle"),
    ],
)  # fmt: skip
def test_a_sealed_model_with_something_odd_in_it_is_not_quantized(llama, tmp_path, change, told):
    "The builder itself makes up weights that are missing, rounds NaN to a number, and opens a pickle."
    model = shutil.copytree(llama, tmp_path / "model")
    change(model)
    seal(model, "model")
    with pytest.raises(KitError, match=told), quantize(model, tmp_path / "engine", precision="fp32"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
