"""What happens on a GPU, on machines that have none: graphs for CUDA run by the CPU's provider; torch's device and the CUDA
package of ONNX Runtime are stubs that keep everything in the host's memory. `benchmarks/gpu.py` is the real thing."""

from types import SimpleNamespace

import numpy as np
import pytest

from llmkit.core.errors import KitError
from llmkit.core.files import read_json, write_json
from llmkit.model.export import export
from llmkit.runtime.onnx_engine import OnnxEngine, open_session
from llmkit.runtime.sampling import Sampling
from llmkit.runtime.slots import Slots
from llmkit.runtime.torch_engine import TorchEngine

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15], list(range(20, 60))]


@pytest.fixture(scope="module", params=["fp16", "int8", "int4"])
def half(request, llama, tmp_path_factory):
    "An engine for CUDA, with keys, values and logits in 16 bits."
    folder = tmp_path_factory.mktemp(request.param)
    options = {} if request.param == "fp16" else {"block_size": 16, "algo_config": "k_quant"}
    write_json(folder / "engine.json", export(llama, folder, request.param, "cuda", **options))
    return folder


class OnHost:
    "A session whose bindings take what is said to lie on a GPU for the host's memory, and do not see arrays change."

    def __init__(self, session):
        self.session, self.copied = session, 0
        self.get_inputs, self.get_outputs = session.get_inputs, session.get_outputs

    def io_binding(self):
        real = self.session.io_binding()

        def bind_cpu_input(name, array):
            assert array.flags.c_contiguous
            self.copied += 1
            real.bind_cpu_input(name, array.copy())

        given = lambda f: lambda name, device, *more: f(name, "cpu", *more)
        inside = {"bind_input": given(real.bind_input), "bind_output": given(real.bind_output)}
        return SimpleNamespace(real=real, bind_cpu_input=bind_cpu_input, **inside)

    def run_with_iobinding(self, binding):
        self.session.run_with_iobinding(binding.real)


@pytest.fixture
def gpu(monkeypatch):
    "torch with a GPU that is the host; tells how often it was waited for."
    import torch

    waits, zeros = [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, device=None, **k: zeros(*a, **k))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: waits.append(1))
    return waits


def test_slots_on_a_gpu_say_what_those_on_a_cpu_say(half, gpu):
    session, shape = open_session(half / "decode.onnx", "cpu", 1), read_json(half / "engine.json")
    on = OnHost(session)
    host, device = Slots(session, shape, 3, 64, "cpu"), Slots(on, shape, 3, 64, "cuda")
    assert len(gpu) == 1, "the buffers are clear before ONNX Runtime writes into them"
    assert all(t.data_ptr() for t in device.cache) and host.kind is np.float16 and host.out.dtype == np.float16
    for p in PROMPTS[:3]:
        assert np.array_equal(host.join(p), device.join(p))
    for tokens in ([1, 2, 3], [4, 5, 6]):
        assert np.array_equal(host.step(tokens), device.step(tokens))
    assert host.leave(0) == device.leave(0) == 2 and len(gpu) == 2, "a moved row is there before it is read"
    assert np.array_equal(host.join(PROMPTS[3]), device.join(PROMPTS[3]))
    said = host.step([7, 8, 9]), device.step([7, 8, 9])
    assert np.array_equal(*said) and said[0].dtype == np.float32 and on.copied > 8


def test_the_graph_for_a_gpu_says_what_torch_says(half, llama):
    facts = read_json(half / "engine.json")
    write_json(half / "engine.json", facts | {"device": "cpu"})
    try:
        with OnnxEngine(half, threads=1) as e, TorchEngine(llama, device="cpu") as t:
            gap = max(np.abs(e.logits(p) - t.logits(p)).max() / t.logits(p).std() for p in PROMPTS)
            assert gap < {"fp16": 0.02, "int8": 0.15, "int4": 5.0}[facts["precision"]]  # random weights in four bits
            if facts["precision"] == "fp16":
                s = Sampling(max_tokens=8, stop_ids=())
                assert [c.tokens for c in e.generate(PROMPTS, s)] == [c.tokens for c in t.generate(PROMPTS, s)]
    finally:
        write_json(half / "engine.json", facts)


@pytest.fixture
def cuda_build(monkeypatch):
    "An ONNX Runtime with the CUDA provider; what it was asked for, and whether its libraries load."
    import onnxruntime as real

    asked = SimpleNamespace(loads=True, order=[])

    def session(what, so, providers, options, enable_fallback=1):
        asked.order.append("session")
        asked.options, asked.fallback = options, enable_fallback
        return SimpleNamespace(get_providers=lambda: providers if asked.loads else ["CPUExecutionProvider"])

    def preload():
        asked.order.append("preload")
        asked.loads or print("Failed to load libcublasLt.so.13:\n no such file")

    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    stub = SimpleNamespace(get_available_providers=lambda: names, SessionOptions=real.SessionOptions)
    stub.InferenceSession, stub.preload_dlls, stub.__version__, stub.cuda_version = session, preload, "1.31.1", "13.0"
    monkeypatch.setattr("llmkit.runtime.onnx_engine.need", lambda name, *_: stub)
    return asked


def test_the_cuda_libraries_are_loaded_first_and_nothing_falls_back(cuda_build, capsys):
    open_session("decode.onnx", "cuda")
    assert cuda_build.order == ["preload", "session"] and cuda_build.fallback == 0
    assert cuda_build.options == [{"arena_extend_strategy": "kSameAsRequested"}]
    cuda_build.order.clear()
    open_session("decode.onnx", "cpu")
    assert cuda_build.order == ["session"] and cuda_build.fallback == 0
    assert capsys.readouterr().out == ""


def test_libraries_that_do_not_load_are_named(cuda_build, capsys):
    cuda_build.loads = False
    with pytest.raises(KitError, match=r"1\.31\.1 cannot load .* CUDA 13\.0\. Failed to load libcublasLt\.so\.13"):
        open_session("decode.onnx", "cuda")
    assert capsys.readouterr().out == ""
