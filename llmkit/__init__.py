__version__ = "0.1.0"
# ONNX Runtime reports each process to its makers unless this is set. An expression alone makes no stage depend on this file.
__import__("os").environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
