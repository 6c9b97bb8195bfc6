"""Families through the builder; the same bytes twice; refusals that leave nothing behind."""

import pytest

from llmkit.core.artifact import build, open_artifact
from llmkit.core.digests import digest_files
from llmkit.core.errors import KitError
from llmkit.core.files import write_json
from llmkit.model.export import export
from llmkit.model.quantize import quantize
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
    with pytest.raises(KitError, match="quantize: the ONNX builder failed"):
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
