"""Families through the builder; the same bytes twice; refusals that leave nothing behind."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime.quantization.neural_compressor import weight_only

from llmkit.core.artifact import build, open_artifact
from llmkit.core.digests import digest_files
from llmkit.core.errors import KitError
from llmkit.core.files import write_json
from llmkit.model.export import export, row_zero_points
from llmkit.model.quantize import quantize
from llmkit.runtime.engine import each_logits
from llmkit.runtime.onnx_engine import OnnxEngine
from llmkit.runtime.sampling import Sampling
from llmkit.runtime.torch_engine import TorchEngine

KNOWN = ["llama", "llama_untied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "phi"]


@pytest.mark.parametrize("family", KNOWN)
def test_family_in_fp32_answers_like_torch(tmp_path, family, make_family):
    base, out = make_family(tmp_path / "base", family), tmp_path / "onnx"
    out.mkdir()
    write_json(out / "engine.json", export(base, out, "fp32"))
    prompts, s = [[5, 6, 7, 8], [9], list(range(40, 70))], Sampling(max_tokens=10, stop_ids=())
    with TorchEngine(base) as t, OnnxEngine(out, threads=1) as e:
        assert [c.tokens for c in e.generate(prompts, s)] == [c.tokens for c in t.generate(prompts, s)]


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3", "phi3"])
def test_family_in_int4_runs(tmp_path, family, make_family):
    base, out = make_family(tmp_path / "base", family), tmp_path / "onnx"
    out.mkdir()
    write_json(out / "engine.json", export(base, out, "int4", block_size=32))
    with OnnxEngine(out, threads=1) as e:
        assert len(e.generate([[5, 6, 7]], Sampling(max_tokens=5, stop_ids=()))[0].tokens) == 5


@pytest.mark.parametrize("width", [64, 96, 80, 32])
def test_k_quant_of_an_odd_number_of_blocks(width):
    "What ONNX Runtime multiplies with is what its own rounding gave, also where a row's zero points end within a byte."
    blocks, rng = -(-width // 32), np.random.default_rng(0)
    w, x = rng.normal(0.3, 1, (width, 6)).astype("float32"), rng.normal(size=(4, width)).astype("float32")
    io = [onnx.helper.make_tensor_value_info(n, 1, s) for n, s in (("x", [4, width]), ("y", [4, 6]))]
    node, weight = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="m"), onnx.numpy_helper.from_array(w, "w")
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", io[:1], io[1:], [weight]),
        ir_version=10,
        opset_imports=[onnx.helper.make_opsetid("", 21)],
    )
    with row_zero_points():
        built = weight_only.rtn_quantize(model, num_bits=4, group_size=32, algorithm="k_quant").model
    built.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    (y,) = onnxruntime.InferenceSession(built.SerializeToString()).run(None, {"x": x})
    padded = np.pad(w, ((0, blocks * 32 - width), (0, 0))).T
    q, scale, zero = weight_only.quant_tensor_k_quant_cpu(padded, 4, 32)
    kept = ((q - zero.astype(float)) * scale).reshape(6, -1)[:, :width]
    assert np.allclose(y, x @ kept.T, atol=1e-4) and not np.allclose(y, x @ w, atol=1e-2)


@pytest.mark.parametrize("block_size", [32, 64])
def test_k_quant_builds_a_model_of_odd_blocks(tmp_path, llama, block_size):
    "Widths of 64 and 96: one block of 64, or three of 32."
    (out := tmp_path / "onnx").mkdir()
    write_json(out / "engine.json", export(llama, out, "int4", block_size=block_size, algo_config="k_quant"))
    with TorchEngine(llama) as t, OnnxEngine(out, threads=1) as e:
        (_, want), (_, got) = (next(each_logits(x, [[5, 6, 7, 8]])) for x in (t, e))
    assert np.linalg.norm(got - want) < 0.25 * np.linalg.norm(want)


def test_unknown_architecture_names_the_stage(tmp_path, make_family):
    base = make_family(tmp_path / "base", "gpt2")
    with TorchEngine(base) as t:
        assert len(t.generate([[5, 6]], Sampling(max_tokens=3, stop_ids=()))[0].tokens) == 3
    with build(tmp_path / "model", "model") as folder:
        make_family(folder, "gpt2")
    with pytest.raises(KitError, match="(?s)GPT2LMHeadModel.*stage quantize"):
        with quantize(tmp_path / "model", tmp_path / "engine"):
            pass
    assert not (tmp_path / "engine").exists() and not list(tmp_path.glob(".engine*"))


def test_two_builds_have_the_same_bytes(llama, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        export(llama, tmp_path / name, "int4", block_size=32)
    assert digest_files(tmp_path / "a") == digest_files(tmp_path / "b")


def test_bytes_do_not_depend_on_the_place(llama, tmp_path, monkeypatch):
    import shutil

    shutil.copytree(llama, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    for src, name in ((llama, "a"), ("elsewhere", "b")):
        (tmp_path / name).mkdir()
        export(src, tmp_path / name, "fp32")
    assert digest_files(tmp_path / "a") == digest_files(tmp_path / "b")


def test_cuda_graph_can_be_built_here(llama, tmp_path):
    (tmp_path / "e").mkdir()
    facts = export(llama, tmp_path / "e", "int4", "cuda", block_size=32)
    write_json(tmp_path / "e/engine.json", facts)
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        with pytest.raises(KitError, match="onnxruntime-gpu"):
            OnnxEngine(tmp_path / "e")


def test_truncated_weights_leave_nothing(tmp_path, make_family):
    with build(tmp_path / "model", "model") as folder:
        make_family(folder, "llama")
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(KitError, match="model.safetensors: cannot load the weights.*cut short"):
        with quantize(tmp_path / "model", tmp_path / "engine"):
            pass
    assert not (tmp_path / "engine").exists()


def test_other_kind_is_refused(tmp_path):
    with build(tmp_path / "data", "dataset") as folder:
        (folder / "x").write_text("x")
    with pytest.raises(KitError, match="is a dataset"):
        with quantize(tmp_path / "data", tmp_path / "engine"):
            pass
    assert open_artifact(tmp_path / "data").kind == "dataset"
