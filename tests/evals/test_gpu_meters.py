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


@pytest.fixture
def stub(monkeypatch):
    "A pynvml with two GPUs, the second of them with this process on it; torch is not asked."
    clock = iter(range(1000, 100000, 500))

    def by_index(i):
        if i > 1:
            raise NVMLError("no such GPU")
        return i

    lib = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=by_index,
        nvmlDeviceGetHandleByUUID=lambda name: {"GPU-a": 0, "GPU-b": 1}[name],
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
    "device, visible", [("cuda:1", None), ("cuda", "1"), ("cuda", "GPU-b,GPU-a"), ("cuda:1", "0,1")]
)
def test_memory_is_that_of_this_process_on_its_gpu(stub, monkeypatch, device, visible):
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    value, how = peak_gpu(device)
    assert value == 3 << 30 and "NVML" in how


def test_where_nobody_tells_nothing_is_reported(stub):
    assert peak_gpu("cuda") is None  # another process is on that one
    assert peak_gpu("cpu") is None and peak_gpu("cuda:5") is None
    with pytest.raises(KitError, match="no such counter"):
        find_meter("nvml", "cuda:5")


def test_without_the_package_the_estimate_remains(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml("cuda") is None and find_meter("auto", "cuda").method
