"""The tiny random models of the runtime tests."""

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("runtime_conftest", Path(__file__).parents[1] / "runtime/conftest.py")
_runtime = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_runtime)
llama, open_onnx = _runtime.llama, _runtime.open_onnx
