"""A project in miniature: real weights, a real ONNX engine, real manifests, and reports whose numbers are made up."""

from llmkit.core.artifact import build, open_artifact
from llmkit.core.files import write_json, write_jsonl
from llmkit.core.report import Measurement, Report, write_report

LINES = [f"question {i} about my card and the money I sent" for i in range(120)]
SHAPE = {"vocab": 512, "hidden": 64, "layers": 2, "heads": 2, "mlp": 96, "context": 128}
TINY = {
    **SHAPE,
    "steps": 3,
    "optimizer": "adamw",
    "lr": 1e-3,
    "other_lr": 0.0,
    "batch_tokens": 512,
    "threads": 1,
    "precision": "fp32",
}
POLICY = {"rules": [{"metric": "accuracy", "min": 0.8, "bound": "wilson"}, {"metric": "ece", "max": 0.2}]}
WORDS = {
    "summary": "Answers customers of a bank.",
    "intended_use": "Sorting questions before a person answers them.",
    "out_of_scope": ["Advice to minors."],
    "limits": ["It knows four intents."],
    "licence": "apache-2.0",
    "language": "en",
    "dataset": "Bank support",
    "tags": ["test"],
    "base_model": "",
    "metrics": ["accuracy"],
}


def random_delta(path, base, dataset, seed=0):
    "A delta as PEFT leaves it, with random numbers in place of what was learnt."
    import torch

    from llmkit.model.lora import attach, load_frozen, save_delta
    from llmkit.model.tokenizer import Tokenizer

    tok = Tokenizer.load(base.path)
    tuned = attach(load_frozen(base.path), rank=4, alpha=8, seed=0)
    torch.manual_seed(seed)
    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    meta = {"tokenizer_digest": tok.digest, "template_digest": tok.template_digest, "system": "You sort questions."}
    with build(path, "delta", {"base": base, "dataset": dataset}, {"rank": 4, "lr": 1e-3}, meta) as folder:
        save_delta(tuned, folder)
        write_json(folder / "history.json", {"train": {"step": [1, 2], "loss": [6.0, 5.0]}})
    return open_artifact(path)


def small_dataset(path, base):
    "Three splits of one shape."
    rows = [
        {
            "id": f"q{i}",
            "label": f"intent_{i % 4}",
            "messages": [
                {"role": "system", "content": "You sort questions."},
                {"role": "user", "content": f"question {i} about my card"},
                {"role": "assistant", "content": f"intent_{i % 4}: Yes."},
            ],
        }
        for i in range(12)
    ]
    with build(path, "dataset", {"base": base}, {"seed": 0}) as folder:
        for split in ("train", "validation", "test"):
            write_jsonl(folder / f"{split}.jsonl", rows)
        write_json(folder / "profile.json", {"rows": {"in": 13, "out": 12, "quarantined": 1, "duplicates": 0}})
    return open_artifact(path)


def made_up(subject, digest, accuracy):
    "A report with per-sample values."
    n = 200
    correct = [int(i < accuracy * n) for i in range(n)]
    measured = (
        Measurement("accuracy", accuracy, n, accuracy - 0.04, accuracy + 0.03, method="Wilson", samples="task/correct"),
        Measurement("accuracy", accuracy - 0.05, 50, 0.7, 0.95, slice="group=over_60"),
        Measurement("ece", 0.05, n, direction="lower", method="10 bins of equal width"),
    )
    table = {"id": [str(i) for i in range(n)], "correct": correct, "confidence": [0.9] * n}
    return Report(subject, digest, "bank-support@1", measured, {"task": table})


def write_reports(parts, evaluate, quantize, accuracy=0.92):
    "The artifacts of the stages evaluate and quantize."
    subjects = {"engine": accuracy, "merged": 0.93, "base": 0.3}
    whose = {"engine": "engine", "merged": "model", "base": "base"}
    with build(evaluate, "report", {r: parts[r] for r in ("engine", "model", "base", "dataset")}) as folder:
        for subject, value in subjects.items():
            write_report(made_up(subject, parts[whose[subject]].digest, value), folder / subject)
        speed = (Measurement("latency_p95", 0.012, 30, unit="s", direction="lower", method="order statistics"),)
        write_report(Report("speed_engine", parts["engine"].digest, "speed@1", speed), folder / "speed_engine")
    with build(quantize, "report", {"engine": parts["engine"]}) as folder:
        for hop, value in (("merged-onnx", 1e-7), ("onnx-quantized", 2e-3)):
            kl = Measurement("kl_mean", value, 8, direction="lower", unit="nats")
            write_report(Report(hop, parts["engine"].digest, "parity@1", (kl,)), folder / hop)


def run_gate(policy=POLICY):
    from llmkit.stages.gate import run

    return run(gates=policy, baseline="baseline")


def run_package():
    from llmkit.stages.package import run

    return run(model_name="bank-support", prompts=3, max_tokens=8, licence_files=["LICENSE"], baseline="baseline")


def run_card(**other):
    from llmkit.stages.card import run

    return run(model_name="bank-support", **{**WORDS, **other})
