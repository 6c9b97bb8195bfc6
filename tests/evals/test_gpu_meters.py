"Joules and memory of work on a GPU: here NVML is a stub, since the machines that test have no GPU."

import os
import sys
from types import SimpleNamespace

import pytest

from llmkit.core.errors import KitError
from llmkit.evals.energy import find_meter, nvml
from llmkit.evals.speed import peak_gpu


class NVMLError(Exception):
    "As in pynvml."


UUIDS = {"GPU-a1": 0, "GPU-b2": 1, "MIG-c3": "part 1", "MIG-d4": "part 2"}


@pytest.fixture
def stub(monkeypatch):
    "A pynvml with two GPUs, the second of them with this process on it; torch is not asked."
    clock = iter(range(1000, 100000, 500))

    def by_index(i):
        if i > 1:
            raise NVMLError("no such GPU")
        return i

    def by_uuid(name):
        if name not in UUIDS:
            raise NVMLError("not found")
        return UUIDS[name]

    def parts(gpu):
        if gpu != 1:
            raise NVMLError("not supported")
        return 3

    def part(gpu, i):
        if i == 0:
            raise NVMLError("not found")
        return f"part {i}"

    lib = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=by_index,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetUUID=lambda gpu: {v: k for k, v in UUIDS.items()}[gpu],
        nvmlDeviceGetMaxMigDeviceCount=parts,
        nvmlDeviceGetMigDeviceHandleByIndex=part,
        nvmlDeviceGetTotalEnergyConsumption=lambda gpu: next(clock),
        nvmlDeviceGetComputeRunningProcesses=lambda gpu: [
            SimpleNamespace(pid=1, usedGpuMemory=7),
            SimpleNamespace(pid=os.getpid() if gpu else 2, usedGpuMemory=3 << 30),
        ],  # fmt: skip
    )
    monkeypatch.setitem(sys.modules, "pynvml", lib)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return lib


def test_an_engine_on_a_gpu_is_metered_without_torch(stub):
    meter = find_meter("auto", "cuda")
    assert "NVML" in meter.method and meter.measured
    assert meter.between(meter.read(), meter.read()) == 0.5  # joules: it counts millijoules
    assert "NVML" in find_meter("nvml").method
    assert "NVML" not in find_meter("auto", "cpu").method and nvml("cpu") is None


@pytest.mark.parametrize(
    "device, visible",
    [
        ("cuda:1", None),
        ("cuda", "1"),
        ("cuda", "GPU-b2,GPU-a1"),
        ("cuda", "GPU-b"),
        ("cuda", "MIG-d4"),
        ("cuda:1", "0,MIG-c"),
        ("cuda:1", "0,1"),
    ],
)
def test_memory_is_that_of_this_process_on_its_gpu(stub, monkeypatch, device, visible):
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    value, how = peak_gpu(device)
    assert value == 3 << 30 and "NVML" in how


@pytest.mark.parametrize(
    "device, visible", [("cuda:1", "1"), ("cuda", ""), ("cuda", "-1,1"), ("cuda:1", "0,-1,1"), ("cuda", "MIG-"), ("cuda", "GPU-x")]
)  # fmt: skip
def test_a_gpu_that_cuda_does_not_show_is_not_metered(stub, monkeypatch, device, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert peak_gpu(device) is None and nvml(device) is None


def test_torch_is_asked_for_its_own_engines_alone(stub, monkeypatch):
    "Another model of the process may be torch's: what it reserved is no figure of an ONNX engine."
    asked = []
    cuda = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, max_memory_reserved=lambda d: asked.append(d) or 5
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert peak_gpu("cuda:1", "torch") == (5, "reserved by torch") and asked == ["cuda:1"]
    assert peak_gpu("cuda:1", "")[0] == 3 << 30


def test_where_nobody_tells_nothing_is_reported(stub):
    assert peak_gpu("cuda") is None  # another process is on that one
    assert peak_gpu("cpu") is None and peak_gpu("cuda:5") is None
    with pytest.raises(KitError, match="no such counter"):
        find_meter("nvml", "cuda:5")


def test_without_the_package_the_estimate_remains(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml("cuda") is None and find_meter("auto", "cuda").method
