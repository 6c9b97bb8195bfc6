__version__ = "0.1.0"
# ONNX Runtime and MLflow report who runs them to their makers unless these are set. Expressions alone make no stage depend on this file.
__import__("os").environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
__import__("os").environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
